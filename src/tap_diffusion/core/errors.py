"""Errors and warnings that users may want to catch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class ConfigError(ValueError):
    """A configuration value is out of its domain. The message names the field, the value and what is allowed."""


class UnsupportedModelError(TypeError):
    """The model can't be accelerated. The message names its class and the reason."""


class TAPWarning(UserWarning):
    """A trajectory ran without the effect that was asked for."""


class UsageError(ValueError):
    """A value given on the command line can't be used. The message names it and what is allowed."""


_tell: ContextVar[Callable[[str], None] | None] = ContextVar("tell", default=None)


@contextmanager
def told_by(tell: Callable[[str], None]) -> Iterator[None]:
    """Within this, :func:`warn` gives its messages to a host's logger, and not to Python's warnings."""
    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)


def warn(message: str) -> None:
    """Warn of something in this run. Python shows the same warning once in a process; this one once each time."""
    tell = _tell.get()
    if tell is not None:
        tell(message)
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_INNER):
        frame = frame.f_back
    warnings.warn_explicit(message, TAPWarning, frame.f_code.co_filename, frame.f_lineno, registry={})


_INNER = ("tap_diffusion", "torch.", "diffusers.", "accelerate.")  # a warning is shown at who called these
