"""Keeping torch.compile to the model's code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Decorator: run eagerly, with all that is called from here.

    Bookkeeping never looks the same twice, so that tracing it would compile anew at each step.
    """
    wrapped: F = torch.compiler.disable(function)
    return wrapped


def uncompiled_itself(function: F) -> F:
    """Decorator: run eagerly, but let what is called from here be compiled."""
    wrapped: F = torch.compiler.disable(function, recursive=False)
    return wrapped
