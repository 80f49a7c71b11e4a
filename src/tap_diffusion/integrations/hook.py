"""The hook on a transformer: observes full steps, and runs predicted ones without the depth."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, ModelHook, StateManager
from torch import Tensor, nn

from tap_diffusion.compiling import uncompiled, uncompiled_itself
from tap_diffusion.config import TAPConfig
from tap_diffusion.errors import UnsupportedModelError
from tap_diffusion.integrations.depth import Depth, named
from tap_diffusion.integrations.passes import Passes
from tap_diffusion.ranks import Ranks
from tap_diffusion.tracking import StepTracker


class TAPHook(Passes, ModelHook):
    """Wraps a transformer's forward in diffusers' own way, so that offloading and other hooks go on working.

    Args:
        config: see :class:`TAPConfig`.
        depth: of the transformer, whose parallelism has been enabled already, if any.
    """

    _is_stateful = True  # makes diffusers' `cache_context` tell this hook the name of the branch

    def __init__(self, config: TAPConfig, depth: Depth) -> None:
        ModelHook.__init__(self)
        self._parallelism = _parallelism(depth.module)
        Passes.__init__(self, config, depth.spec, _ranks(self._parallelism))
        self.tracker = StepTracker()
        self._context = StateManager(BaseState)
        self._depth = depth
        self.peers: list[TAPHook] = []  # of the pipeline's other transformers

    @uncompiled_itself
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the transformer's forward."""
        arguments = named(module, args, kwargs)
        if not self._depth.is_current():
            self._depth = Depth(module, self.spec)
        try:
            if _parallelism(module) is not self._parallelism:
                raise UnsupportedModelError(
                    f"parallelism was enabled on this {type(module).__name__} when TAP was there already;"
                    " call tap.enable(...) again, after enable_parallelism(...)"
                )
            timestep = arguments.get(self.spec.timestep)
            if timestep is None:
                raise ValueError(f"{type(module).__name__} got no {self.spec.timestep}, by which TAP tells its steps")
            call = self.tracker.locate(
                timestep, self._branch(), arguments.get(self.spec.conditioning), rising=self.spec.rising
            )
            if call.starts_trajectory:
                refuse_other_caches(module)
            forward = partial(self.fn_ref.original_forward, *args, **kwargs)
            output = self.run(self._depth, [call], forward, _device(arguments))
            if call.is_last_step:
                for peer in self.peers:
                    if peer.tracker.has_stopped_before(self.tracker):
                        peer.engine.finish()
        except BaseException:  # an interrupt as well: nothing of a broken trajectory may reach the next
            for hook in (self, *self.peers):
                hook.engine.reset()
                hook.tracker.reset()
            raise
        return output

    def _branch(self) -> str | None:
        try:
            return self._context.context.name
        except ValueError:  # the pipeline set none
            return None

    def __deepcopy__(self, memo: Any) -> Any:
        # diffusers' patched forward would go on calling the original module.
        raise RuntimeError("a model can't be copied while TAP is enabled on it; call tap.disable(...) first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a model can't be pickled while TAP is enabled on it; call tap.disable(...) first")

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget the current trajectory. diffusers calls this at the end of each run of a pipeline."""
        self.engine.finish()
        self.tracker.reset()
        return module


@uncompiled
def refuse_other_caches(module: nn.Module) -> None:
    """Raise ValueError where another cache works on the module: each would take the other's guesses for the truth."""
    hooks = [hook for part in module.modules() for hook in _hooks(part)]
    others = [hook for hook in hooks if hook._is_stateful and not isinstance(hook, TAPHook)]
    if getattr(module, "is_cache_enabled", False):
        name, remedy = f"diffusers' {type(module._cache_config).__name__}", "call its disable_cache()"
    elif getattr(module, "_is_cached", False):
        name, remedy = "cache-dit", "call cache_dit.disable_cache(pipe)"
    elif others:  # by one of diffusers' apply_... functions, which leave nothing to undo it by
        name, remedy = f"diffusers' {type(others[0]).__name__}", "load the model anew"
    else:
        return
    raise ValueError(f"{type(module).__name__} uses {name}, which can't be combined with TAP; {remedy}")


def _hooks(module: nn.Module) -> list[ModelHook]:
    """diffusers' own on a module."""
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks.values())


def _parallelism(module: nn.Module) -> Any:
    """diffusers' configuration of it; None where the module runs in one process."""
    return getattr(module, "_parallel_config", None)


def _ranks(parallelism: Any) -> Ranks:
    """The processes that have the other tokens. Tensor parallelism splits weights: all tokens are everywhere."""
    context = getattr(parallelism, "context_parallel_config", None)
    return Ranks() if context is None else Ranks(context._flattened_mesh.get_group())


def _device(arguments: dict[str, Any]) -> torch.device:
    """Where the first tensor among the arguments lives."""
    values = (item for value in arguments.values() for item in (value if isinstance(value, list) else [value]))
    return next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))
