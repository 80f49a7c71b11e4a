"""The hook on a transformer: observes full steps, and runs predicted ones without the depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import ismethod
from typing import Any

import torch
from diffusers.hooks import HookRegistry
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
            self._watch(Depth(module, self.spec))
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

            def forward(model: nn.Module, without: Sequence[str]) -> Any:
                given = {name: None if name in without else value for name, value in kwargs.items()}
                own = self.fn_ref.original_forward
                return own(*args, **given) if model is module else unbound(own, module)(model, *args, **given)

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

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """diffusers calls this as the hook is registered."""
        self._depth.attach()
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """diffusers calls this as the hook is removed, and spells it so."""
        self._depth.detach()
        return module

    def _watch(self, depth: Depth) -> None:
        self._depth.detach()
        self._depth = depth
        depth.attach()

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


def register(hook: TAPHook, module: nn.Module, name: str) -> None:
    """Put the hook next to the module's own forward, inside of all other hooks of diffusers.

    Predicted steps run that forward on a view of the module, and what others wrap is bound to the module itself.

    Raises:
        UnsupportedModelError: something else than a method of the module is its forward.
    """
    registry: Any = HookRegistry.check_if_exists_or_initialize(module)
    references = registry._fn_refs
    if not references:
        unbound(module.forward, module)
        registry.register_hook(hook, name)
        return
    inner = references[0]
    place = "forward" if inner.original_forward is None else "original_forward"
    innermost, outermost = getattr(inner, place), module.forward
    unbound(innermost, module)
    registry.register_hook(hook, name)
    setattr(inner, place, module.forward)
    module.forward = outermost
    hook.fn_ref.original_forward = innermost
    references.insert(0, references.pop())
    registry._hook_order.insert(0, registry._hook_order.pop())


def unregister(module: Any, name: str) -> None:
    """Undo :func:`register`."""
    registry = module._diffusers_hook
    outer = registry._fn_refs[1:2] if registry._hook_order[0] == name else []
    places = {place: getattr(reference, place) for reference in outer for place in ("forward", "original_forward")}
    own = registry.hooks[name].fn_ref
    registry.remove_hook(name, recurse=False)
    for reference in outer:  # which diffusers gives another forward also where it keeps the original aside
        place = "forward" if places["original_forward"] is None else "original_forward"
        reference.forward = places["forward"]
        setattr(reference, place, own.original_forward)


def unbound(forward: Any, module: nn.Module) -> Callable[..., Any]:
    """A module's own forward as a function of the module. Raises UnsupportedModelError where it can't be had."""
    method = getattr(forward, "_torchdynamo_orig_callable", forward)  # module.forward = torch.compile(module.forward)
    if ismethod(method) and method.__self__ is module:
        return method.__func__
    if isinstance(method, partial) and method.args[:1] == (module,):
        return lambda model, *args, **kwargs: method.func(model, *method.args[1:], *args, **method.keywords | kwargs)
    raise UnsupportedModelError(
        f"the forward of this {type(module).__name__} has been replaced by {forward!r}, which is bound to it in a way"
        " that TAP can't see through; call tap.enable(...) before that is done, or replace it by a method"
    )


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
