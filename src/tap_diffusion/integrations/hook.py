"""The hook on a transformer: observes full steps, and runs predicted ones without the depth."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from diffusers.hooks.hooks import BaseState, ModelHook, StateManager
from torch import Tensor, nn

from tap_diffusion.config import TAPConfig
from tap_diffusion.engine import Engine, Fallback
from tap_diffusion.integrations.models import TransformerSpec
from tap_diffusion.reporting import stopwatch
from tap_diffusion.tracking import Call, StepTracker


class TAPHook(ModelHook):
    """Wraps a transformer's forward in diffusers' own way, so that offloading and other hooks go on working.

    Args:
        config: see :class:`TAPConfig`.
        spec: of the transformer's class.
    """

    _is_stateful = True  # makes diffusers' `cache_context` tell this hook the name of the branch

    def __init__(self, config: TAPConfig, spec: TransformerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.engine = Engine(config)
        self.tracker = StepTracker()
        self._context = StateManager(BaseState)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the transformer's forward."""
        arguments = _named(module, args, kwargs)
        try:
            call = self.tracker.locate(
                arguments["timestep"],
                self._branch(),
                arguments.get(self.spec.conditioning),
            )
            stop = stopwatch(arguments[self.spec.stream].device)
            full = self.engine.begin(call)
            if not full:
                output, reason = self._predict(module, call, arguments)
                if reason is not None:
                    self.engine.fall_back(call, reason)
                    full = True
            if full:
                with self._observed(module, call):
                    output = self.fn_ref.original_forward(*args, **kwargs)
            self.engine.end(call, full, stop())
        except BaseException:  # an interrupt as well: nothing of a broken trajectory may reach the next
            self.reset_state(module)
            raise
        return output

    def _branch(self) -> str | None:
        try:
            return self._context.context.name
        except ValueError:  # the pipeline set none
            return None

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget the current trajectory."""
        self.engine.reset()
        self.tracker.reset()
        return module

    def _first_block(self, module: nn.Module) -> nn.Module:
        return next(block for name in self.spec.blocks for block in getattr(module, name))

    @contextmanager
    def _observed(self, module: nn.Module, call: Call) -> Iterator[None]:
        """Record residual and probe features of a full step, by hooks that are gone when it ends."""
        config = self.engine.config
        if config.interval == 1:
            yield
            return
        before: dict[str, Tensor] = {}

        def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
            arguments = _named(block, args, kwargs)
            before["stream"] = arguments[self.spec.stream]
            if config.chooses and config.probe == "modulated_input":
                before["probe"] = self.spec.modulated_input(block, arguments)

        def leave(block: nn.Module, args: Any, output: Any) -> None:
            if config.chooses and config.probe == "first_block":
                before["probe"] = self._stream_of(output) - before["stream"]

        def finish(head: nn.Module, args: Any) -> None:
            self.engine.record(call, args[0] - before["stream"], before.get("probe"))

        first = self._first_block(module)
        handles = [
            first.register_forward_pre_hook(enter, with_kwargs=True),
            first.register_forward_hook(leave),
            getattr(module, self.spec.head).register_forward_pre_hook(finish),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _predict(self, module: nn.Module, call: Call, arguments: dict[str, Any]) -> tuple[Any, str | None]:
        """Run the model's own forward with one block that predicts in place of all its blocks.

        Returns:
            the output, and the reason if it can't be used. The reason does not travel as an exception through the
            model, which may have to undo things (LoRA scales, for one) at the end of its forward.
        """
        first = self._first_block(module)
        reasons: list[str] = []

        def predict(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            block_arguments = _named(first, args, kwargs)
            stream = block_arguments[self.spec.stream]

            def probe() -> Tensor:
                if self.engine.config.probe == "modulated_input":
                    return self.spec.modulated_input(first, block_arguments)
                return self._stream_of(first(*args, **kwargs)) - stream

            try:
                block_arguments = {**block_arguments, self.spec.stream: self.engine.predict(call, stream, probe)}
            except Fallback as fallback:
                reasons.append(str(fallback))
            return tuple(block_arguments[name] for name in self.spec.block_outputs)

        originals = {name: getattr(module, name) for name in self.spec.blocks}
        replaced, *emptied = self.spec.blocks
        try:
            module._modules[replaced] = nn.ModuleList([_StandIn(predict)])
            module._modules.update({name: nn.ModuleList() for name in emptied})
            output = self.fn_ref.original_forward(
                **{name: None if name in self.spec.within_residual else value for name, value in arguments.items()}
            )
        finally:
            module._modules.update(originals)
        return output, (reasons[0] if reasons else None)

    def _stream_of(self, block_output: tuple[Tensor, ...]) -> Tensor:
        return block_output[self.spec.block_outputs.index(self.spec.stream)]


class _StandIn(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def _named(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """A module's arguments by name, however its caller passes them."""
    return dict(zip(_parameters(type(module).forward), args, strict=False)) | kwargs


@cache
def _parameters(method: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(method).parameters)[1:]
