"""What commands share: options, and what is made of them."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tap_diffusion.core.errors import UsageError

if TYPE_CHECKING:
    import torch

console = Console()


class DType(StrEnum):
    """Names of the dtypes that a pipeline can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def option(panel: str, *names: str, help: str, default: str | bool = True, **more: Any) -> Any:
    """An option, shown in this panel of the help."""
    return typer.Option(*names, rich_help_panel=panel, help=help, show_default=default, **more)


WHERE = "cuda where there is one"
ModelOption = Annotated[
    str,
    option(
        "Model",
        "--model",
        "-m",
        help="emoji, fashion, sprites or scenes (small, included), a pipeline's folder, or a hub id.",
    ),
]
DTYPES = {  # of an option; the names alone are longer than the help's column
    "metavar": "NAME",
    "help": "float32, bfloat16, float16, or auto: bfloat16 on a GPU, float32 on a CPU.",
}
ModelDTypeOption = Annotated[DType, option("Model", **DTYPES)]
ModelDeviceOption = Annotated[str | None, option("Model", help="cpu, cuda, cuda:1, …", default=WHERE)]


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """Prompts given one by one and in a file, one a line. Raises UsageError where there are none."""
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"can't read the prompt file {file}: {error}") from error
        if not any(map(str.strip, lines)):
            raise UsageError(f"the prompt file {file} is empty")
        given = given + lines
    prompts = [prompt.strip() for prompt in given if prompt.strip()]
    if not prompts:
        raise UsageError("no prompt: give some, or a file by --prompts")
    return prompts


def counted(number: int, noun: str) -> str:
    """A number of things: 1 picture, 2 pictures."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def quiet_imports() -> None:
    """Keep transformers and diffusers from warning, of what they don't find, at their import."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def quiet_bars() -> None:
    """Show no bar for each part of a model that is loaded, and none at all where they would go into a file."""
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()  # which turns off the hub's as well
    if sys.stderr.isatty():
        enable_progress_bars()
    else:
        of_diffusers.disable_progress_bar()
        disable_progress_bars()


@contextmanager
def importing(what: str = "the bench", extra: str = "bench") -> Iterator[None]:
    """For imports that take seconds, of what not everybody has installed."""
    quiet_imports()
    with console.status(f"importing what {what} needs"):
        try:
            yield
        except ModuleNotFoundError as error:
            raise UsageError(f"{what} needs {error.name}: pip install 'tap-diffusion[{extra}]'") from error


def failed(error: Exception) -> typer.Exit:
    """Print an error, as one line; return what ends the command."""
    Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
    return typer.Exit(2)


def placement(dtype: DType, device: str | None) -> tuple[torch.dtype, str]:
    """The dtype of weights and the device. Raises UsageError where there is no such device."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UsageError(f"device '{device}' is not available: {str(error).splitlines()[0]}") from error
    if dtype == DType.auto:
        return (torch.float32 if device == "cpu" else torch.bfloat16), device
    return getattr(torch, dtype), device


def make_writable(folder: Path) -> None:
    """Make a folder, and try to write to it. Raises UsageError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"can't write to the folder {folder}: {os.strerror(error.errno or 0)}") from error
