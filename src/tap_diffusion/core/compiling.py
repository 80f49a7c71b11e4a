"""Keeping torch.compile to the model's code."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar, cast

import torch

# What torch says where its graph is not to break. It takes a reason since 2.7.
_REASON: dict[str, Any] = {}
if "reason" in inspect.signature(torch.compiler.disable).parameters:
    _REASON["reason"] = (
        "TAP decides at each step which parts of a transformer run, so the whole of it is not one graph. Compile the"
        " blocks alone, transformer.compile_repeated_blocks(fullgraph=True), or leave out fullgraph=True"
    )

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Decorator: run eagerly, with all that is called from here.

    Bookkeeping never looks the same twice, so that tracing it would compile anew at each step.
    """
    return _disabled(function, recursive=True)


def uncompiled_itself(function: F) -> F:
    """Decorator: run eagerly, but let what is called from here be compiled."""
    return _disabled(function, recursive=False)


def _disabled(function: F, recursive: bool) -> F:
    """``torch.compiler.disable``, put off until torch._dynamo is there: its import takes seconds.

    Nothing is compiled without that module. It may come at any time, also between two calls of the function.
    """
    disable = functools.partial(torch.compiler.disable, function, recursive=recursive, **_REASON)
    disabled: F | None = None

    @functools.wraps(function)
    def later(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled = disable()
        return disabled(*args, **kwargs)

    if "torch._dynamo" in sys.modules or not _leave_out(later.__code__):  # type: ignore[attr-defined]
        now: F = disable()
        return now
    # A compiled caller looks at these, as at those of torch.compiler.disable.
    later._torchdynamo_disable = True  # type: ignore[attr-defined]
    later._torchdynamo_disable_msg = _REASON.get("reason")  # type: ignore[attr-defined]
    return cast(F, later)


def _leave_out(code: CodeType) -> bool:
    """Tell torch.compile not to trace calls of some code. False: this version of torch can't be told so.

    Torch has no public way to say it without the import of torch._dynamo. This is what its own ``skip_code`` does.
    """
    frames: Any = sys.modules.get("torch._C._dynamo.eval_frame")
    if hasattr(frames, "skip_code"):  # until 2.6 or so
        frames.skip_code(code)
    elif hasattr(frames, "set_code_exec_strategy"):
        skip, default = frames._FrameAction.SKIP, frames._FrameAction.DEFAULT
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, default))
    else:
        return False
    return True
