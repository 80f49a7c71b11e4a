"""A plugin for SGLang-Diffusion, of its entry points ``sglang.multimodal_gen.plugins``. Written for SGLang 0.5.23.

It is configured as SGLang's own caches are, by the environment::

    SGLANG_TAP_ENABLED=true SGLANG_TAP_CONFIG='{"full_steps": 8}' sglang serve --backend diffusers --model-path ...

It accelerates pipelines of diffusers (``--backend diffusers``). SGLang's own models are refused.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.errors import ConfigError, UnsupportedModelError, told_by

logger = logging.getLogger(__name__)

ENABLED, CONFIG = "SGLANG_TAP_ENABLED", "SGLANG_TAP_CONFIG"
_RUNTIME = "sglang.multimodal_gen.runtime"


def register() -> None:
    """Called by SGLang in each of its processes. Nothing of SGLang changes unless SGLANG_TAP_ENABLED is true."""
    if os.environ.get(ENABLED, "").lower() not in ("true", "1"):
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    loaded, base = f"{_RUNTIME}.pipelines.diffusers_pipeline", f"{_RUNTIME}.pipelines_core.composed_pipeline_base"
    HookRegistry.register(f"{loaded}.DiffusersPipeline._load_diffusers_pipeline", enable_loaded, HookType.AFTER)
    HookRegistry.register(f"{loaded}.DiffusersExecutionStage.forward", tell, HookType.AROUND)
    HookRegistry.register(f"{base}.ComposedPipelineBase.__init__", refuse_native, HookType.BEFORE)


def config() -> TAPConfig:
    """Fields of TAPConfig, as JSON in SGLANG_TAP_CONFIG. Raises ConfigError."""
    try:
        return TAPConfig.from_json(os.environ.get(CONFIG, "{}"))
    except ConfigError as error:
        raise ConfigError(f"{CONFIG}: {error}") from error


def enable_loaded(pipe: Any, *_: Any, **__: Any) -> None:
    """Enable TAP on what SGLang has loaded. An error ends the server's start, as one in :func:`register` would not."""
    from tap_diffusion.integrations.diffusers.api import enable

    enable(pipe, config())
    logger.info("TAP is enabled on this %s: %s", type(pipe).__name__, config())


def tell(forward: Callable[..., Any], stage: Any, *args: Any, **kwargs: Any) -> Any:
    """Log what a run did, and TAP's warnings: SGLang drops what Python's ``warnings`` are given."""
    from tap_diffusion.integrations.diffusers.api import report

    with told_by(logger.warning):
        result = forward(stage, *args, **kwargs)
    logger.info("%s", report(stage.diffusers_pipe))
    return result


def refuse_native(pipeline: Any, *_: Any, **__: Any) -> None:
    """Raise UnsupportedModelError for a pipeline of SGLang's own, where TAP would be without effect.

    All but the diffusers backend's, which has a constructor of its own, begin there, before they load anything.
    """
    raise UnsupportedModelError(
        f"TAP is for diffusers' pipelines, not SGLang's own {type(pipeline).__name__}:"
        f" give --backend diffusers, or unset {ENABLED}"
    )
