"""Keeping torch.compile to the model's code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

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
    wrapped: F = torch.compiler.disable(function, **_REASON)
    return wrapped


def uncompiled_itself(function: F) -> F:
    """Decorator: run eagerly, but let what is called from here be compiled."""
    wrapped: F = torch.compiler.disable(function, recursive=False, **_REASON)
    return wrapped
