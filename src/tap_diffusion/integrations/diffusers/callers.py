"""Which pipeline calls: the scheduler that is really being stepped is found where the call comes from.

A transformer can be called for any pipeline that shares it: copies, pipelines made of its components, loops of one's
own. None of them tells. But each holds its scheduler, as a local variable or on an object that it holds, in a frame
of the Python stack that the call has come through.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

_NAMED = "scheduler"  # part of the names of variables and attributes that hold one
_MOST_FRAMES = 64
_INNER = ("torch.", "accelerate.", "diffusers.hooks.", "tap_diffusion.integrations")
_WITHOUT = (Tensor, nn.Module, str, int, float, list, dict, tuple, type, ModuleType, FunctionType)  # hold none


def schedulers() -> Iterator[Any]:
    """Of the nearest function on this thread's stack that holds any; none where nobody does.

    Its variables come first, then attributes of its ``self``, then those of its other objects. What counts is the name
    and that there are ``timesteps`` and a method ``step``: users' own schedulers and wrappers need no base class.
    """
    for frame in _frames():
        seen: set[int] = set()
        for scheduler in _of_frame(frame):
            if id(scheduler) not in seen:
                seen.add(id(scheduler))
                yield scheduler
        if seen:
            return


def step_arguments() -> dict[str, Any]:
    """What the nearest function that holds a scheduler passes to its ``step``, such as ``eta``.

    diffusers' pipelines keep it in a variable ``extra_step_kwargs``.
    """
    for frame in _frames():
        if next(_of_frame(frame), None) is not None:
            found = frame.f_locals.get("extra_step_kwargs")
            return dict(found) if isinstance(found, dict) else {}
    return {}


def end_of(timesteps: Tensor) -> int | None:
    """Index of the last of a scheduler's timesteps that the nearest function runs through.

    Image to image leaves out the first, and some pipelines the last. What they run through is a view of all.

    Args:
        timesteps: (S,), of the scheduler.

    Returns:
        None where no function on the stack holds such a view.
    """
    stride = timesteps.stride(0)
    for frame in _frames():
        ends = [
            (view.storage_offset() - timesteps.storage_offset()) // stride + len(view) - 1
            for view in frame.f_locals.values()
            if isinstance(view, Tensor)
            and view.ndim == 1
            and len(view) > 0
            and view.stride(0) == stride
            and view.device == timesteps.device
            and view.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
        ]
        if ends:
            return min(ends)
    return None


def _frames() -> Iterator[FrameType]:
    """Of this thread's callers that may hold a scheduler, the nearest first."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_MOST_FRAMES):
        if frame is None:
            return
        if _may_hold(frame):
            yield frame
        frame = frame.f_back


def is_scheduler(value: Any) -> bool:
    """Whether it has been given its timesteps and can be stepped."""
    return isinstance(getattr(value, "timesteps", None), Tensor) and callable(getattr(value, "step", None))


def _may_hold(frame: FrameType) -> bool:
    """Whether this is a function outside of models and of torch: to look into variables costs more than to ask that."""
    return frame.f_code.co_name != "forward" and not frame.f_globals.get("__name__", "").startswith(_INNER)


def _of_frame(frame: FrameType) -> Iterator[Any]:
    variables = frame.f_locals
    for name, value in variables.items():
        if _NAMED in name and is_scheduler(value):
            yield value
    yield from _of_object(variables.get("self"))
    for value in list(variables.values()):
        if not isinstance(value, _WITHOUT):
            yield from _of_object(value)


def _of_object(value: Any) -> Iterator[Any]:
    for name, part in list(getattr(value, "__dict__", {}).items()):
        if _NAMED in name and is_scheduler(part):
            yield part
