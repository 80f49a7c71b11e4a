"""Warnings of a command: each told once, in a line of its own, below the progress bars."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

from tap_diffusion.core.errors import told_by

# What a user of the command has no use for, or is told otherwise.
_LEFT_OUT = (
    "requires torchvision",  # the processor that takes its place does the same
    "Expected types for id2label",  # JSON's keys are strings
    "The following part of your input was truncated",  # see apps.cut_off
    "Token indices sequence length is longer",  # the same
    "Couldn't connect to the Hub",  # told as an error, unless the model is in the local cache
    "Already found a `peft_config` attribute",  # several LoRAs are what was asked for
    "No LoRA keys associated to",  # of a text encoder, for which few have any; see apps.lora for the transformer
)
_LONGEST = 300  # characters of a line: diffusers names every weight that an adapter doesn't find


class _Collecting(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: dict[str, None] = {}  # each once, in the order in which they came

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage())

    def add(self, message: str) -> None:
        if not any(words in message for words in _LEFT_OUT):
            line = " ".join(message.split())
            self.found.setdefault(line if len(line) <= _LONGEST else line[:_LONGEST] + "…")

    def show(self, message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        """In the place of :func:`warnings.showwarning`. What is for developers alone is left out."""
        if not issubclass(category, DeprecationWarning | FutureWarning):
            self.add(str(message))


@contextmanager
def told() -> Iterator[None]:
    """Collect the warnings of TAP, diffusers, transformers and Python within this, and print them at its end."""
    # Both libraries are imported by whoever comes here, under options.quiet_imports.
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    collecting = _Collecting()
    with ExitStack() as stack:
        stack.enter_context(told_by(collecting.add))
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = collecting.show
        for library in (of_diffusers, of_transformers):
            stack.enter_context(_given_to(collecting, library))
        try:
            yield
        finally:
            for message in collecting.found:
                Console(stderr=True).print(
                    f"[bold yellow]Warning:[/] {escape(message)}", soft_wrap=True, highlight=False
                )


@contextmanager
def _given_to(handler: logging.Handler, library: Any) -> Iterator[None]:
    """Give a library's warnings to a handler, and to no other unless the user asks for them by its own variable."""
    before, logger = library.get_verbosity(), logging.getLogger(library.__name__.partition(".")[0])
    logger.addHandler(handler)  # by Python's own functions: remove_handler of transformers 5.0 refuses what it has
    if before == library.ERROR:
        library.disable_default_handler()
        library.set_verbosity_warning()
    try:
        yield
    finally:
        logger.removeHandler(handler)
        if before == library.ERROR:
            library.set_verbosity(before)
            library.enable_default_handler()
