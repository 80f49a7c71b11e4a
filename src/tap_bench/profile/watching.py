"""Telling where a trajectory under TAP is: which call, which part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.engine import Engine
from tap_diffusion.integrations.diffusers.api import enabled, hooks, transformers
from tap_diffusion.integrations.diffusers.hook import unbound

PARTS = ("embedders", "probe", "selection", "head", "rest")  # of a predicted call


class Watcher(Protocol):
    """Is told where a trajectory under TAP is."""

    def begin(self) -> None:
        """A call of the transformer begins."""

    def enter(self, part: str) -> None:
        """This of ``PARTS`` begins, and what ran before has ended."""

    def end(self, full: bool, plain: Callable[[], Any]) -> None:
        """The call has ended; ``plain`` runs the model as it is on the same inputs."""

    def step(self) -> None:
        """The scheduler has taken a step."""


class WatchedEngine(Engine):
    """TAP's engine, which tells a watcher what it does.

    Attributes:
        full: whether the call that runs, or the last one, is full.
        sizes: of the stream, (B, N, D), and of the probe, where it ran, at the last predicted call.
    """

    def __init__(self, config: TAPConfig, watcher: Watcher) -> None:
        super().__init__(config)
        self._watcher = watcher
        self.full = True
        self.sizes: tuple[torch.Size, torch.Size | None] | None = None

    def begin(self, call: Call) -> bool:
        """As the engine does."""
        self.full = super().begin(call)
        return self.full

    def fall_back(self, call: Call, reason: str) -> None:
        """As the engine does."""
        self.full = True
        super().fall_back(call, reason)

    def predict(self, call: Call, hidden_states: Tensor, probe: Callable[[], Tensor], stream: str = "") -> Tensor:
        """As the engine does."""

        def watched() -> Tensor:
            self._watcher.enter("probe")
            h = probe()
            self._watcher.enter("selection")
            self.sizes = hidden_states.shape, h.shape
            return h

        self.sizes = hidden_states.shape, None
        self._watcher.enter("selection")
        try:
            return super().predict(call, hidden_states, watched, stream)
        finally:
            self._watcher.enter("head")


@contextmanager
def watched(pipe: Any, config: TAPConfig, watcher: Watcher) -> Iterator[WatchedEngine]:
    """Enable TAP within a ``with`` block, and tell a watcher of each call and its parts."""
    with enabled(pipe, config), ExitStack() as stack:
        for transformer, hook in zip(transformers(pipe), hooks(pipe), strict=True):
            engine = hook.engine = WatchedEngine(config, watcher)
            original = hook.fn_ref.original_forward
            hook.fn_ref.original_forward = partial(_inside, transformer, unbound(original, transformer), watcher)
            stack.callback(setattr, hook.fn_ref, "original_forward", original)

            def end(module: nn.Module, args: Any, kwargs: Any, _: Any, engine: WatchedEngine = engine) -> None:
                watcher.end(engine.full, lambda: type(module).forward(module, *args, **kwargs))

            stack.callback(transformer.register_forward_pre_hook(lambda *_: watcher.begin()).remove)
            stack.callback(transformer.register_forward_hook(end, with_kwargs=True).remove)
        stack.enter_context(_steps(pipe.scheduler, watcher.step))
        yield engine


def _inside(model: nn.Module, forward: Callable[..., Any], watcher: Watcher, *args: Any, **kwargs: Any) -> Any:
    watcher.enter("embedders")
    try:
        return forward(model, *args, **kwargs)
    finally:
        watcher.enter("rest")


@contextmanager
def _steps(scheduler: Any, told: Callable[[], None]) -> Iterator[None]:
    step, tell = scheduler.step, _Tell(told)

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        tell()
        return result

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step


class _Tell:
    """Calls a function; a copy of it, with a scheduler that is copied to be tried out, calls nothing."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def __call__(self) -> None:
        self._function()

    def __deepcopy__(self, memo: Any) -> Any:
        return _Tell(lambda: None)


class EnoughError(Exception):
    """All that was to be known of a trajectory is known."""
