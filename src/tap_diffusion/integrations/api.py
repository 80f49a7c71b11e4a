"""Turning TAP on and off for a pipeline or a transformer."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from torch import nn

from tap_diffusion.config import TAPConfig
from tap_diffusion.errors import UnsupportedModelError
from tap_diffusion.integrations.depth import Depth
from tap_diffusion.integrations.hook import TAPHook
from tap_diffusion.integrations.models import SPECS, TransformerSpec
from tap_diffusion.reporting import Report

_NAME = "tap_diffusion"


def apply_tap(module: nn.Module, config: TAPConfig | None = None) -> None:
    """Accelerate a transformer, in the manner of diffusers' ``apply_*`` hooks.

    Applying TAP again replaces the configuration. Whatever pipelines use the transformer are accelerated; tell
    TAP of each one by :func:`enable` on the pipeline, for the reasons given there.

    Args:
        module: a transformer of a supported class, see :data:`SPECS`.
        config: defaults to ``TAPConfig()``.

    Raises:
        UnsupportedModelError: the class is not supported, or has no blocks.
        ValueError: another cache of diffusers is enabled on it.
    """
    spec = _spec(module)
    if getattr(module, "is_cache_enabled", False):
        raise ValueError(
            f"{type(module).__name__} already uses diffusers' {type(module._cache_config).__name__};"
            " call its disable_cache() before enabling TAP"
        )
    previous = _hook(module)
    hook = TAPHook(config or TAPConfig(), spec)
    if previous is not None:
        hook.tracker.schedulers = previous.tracker.schedulers
        _remove(module)
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _NAME)


def enable(target: DiffusionPipeline | nn.Module, config: TAPConfig | None = None) -> None:
    """Accelerate a pipeline, or a transformer by itself.

    Prefer the pipeline: its scheduler tells TAP where a run begins and ends. By its timesteps alone a transformer
    can tell a new run too, as long as that starts higher than the last one stopped or has other prompt embeddings,
    but it keeps the cache until the next run or :func:`disable`, and on a GPU it waits for the timestep.

    Args:
        target: the pipeline or the transformer.
        config: defaults to ``TAPConfig()``, the recommended settings.

    Raises:
        UnsupportedModelError: the message names the class and the reason.
    """
    transformer = _transformer(target)
    apply_tap(transformer, config)
    if target is not transformer:
        pipeline = weakref.ref(target)
        hook = _hook(transformer)
        assert hook is not None
        hook.tracker.schedulers.append(lambda: getattr(pipeline(), "scheduler", None))


def disable(target: DiffusionPipeline | nn.Module) -> None:
    """Undo :func:`enable` without a trace. Does nothing where TAP is not enabled."""
    transformer = _transformer(target)
    hook = _hook(transformer)
    if hook is not None:
        hook.engine.finish()
        _remove(transformer)


@contextmanager
def enabled(target: DiffusionPipeline | nn.Module, config: TAPConfig | None = None) -> Iterator[None]:
    """:func:`enable` within a ``with`` block; :func:`disable` at its end, also after an exception."""
    enable(target, config)
    try:
        yield
    finally:
        disable(target)


def report(target: DiffusionPipeline | nn.Module) -> Report:
    """What the current or last trajectory did. Raises ValueError where TAP is not enabled."""
    transformer = _transformer(target)
    hook = _hook(transformer)
    if hook is None:
        raise ValueError(f"TAP is not enabled on this {type(target).__name__}; call tap.enable(...) first")
    return hook.engine.report


def _transformer(target: DiffusionPipeline | nn.Module) -> nn.Module:
    if isinstance(target, nn.Module):
        return target
    transformer = getattr(target, "transformer", None)
    if isinstance(transformer, nn.Module):
        return transformer
    if getattr(target, "unet", None) is not None:
        raise UnsupportedModelError(
            f"{type(target).__name__} has a UNet; TAP needs a transformer, whose blocks share one residual stream"
        )
    raise UnsupportedModelError(f"{type(target).__name__} has no transformer that TAP could accelerate")


def _spec(module: nn.Module) -> TransformerSpec:
    name = type(module).__name__
    if name not in SPECS:
        raise UnsupportedModelError(f"{name} is not supported yet; supported are {', '.join(SPECS)}")
    spec = SPECS[name]
    Depth(module, spec)  # raises where this one lacks what its class should have
    return spec


def _hook(module: nn.Module) -> TAPHook | None:
    registry = getattr(module, "_diffusers_hook", None)
    return registry.get_hook(_NAME) if registry is not None else None


def _remove(module: nn.Module) -> None:
    registry: Any = module._diffusers_hook
    registry.remove_hook(_NAME, recurse=False)
    if not registry.hooks:
        # diffusers leaves the original forward behind as an attribute of the instance, and the empty registry.
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.__dict__["forward"]
        del module._diffusers_hook
