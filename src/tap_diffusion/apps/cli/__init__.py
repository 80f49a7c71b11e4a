"""The ``tap`` command: a file for each of its commands, and those that other packages add."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Annotated

import typer

from tap_diffusion import __version__
from tap_diffusion.apps.cli import generate, models, options, plan, ui
from tap_diffusion.core.errors import UsageError

GROUP = "tap_diffusion.commands"  # of entry points: a command's name, and its function
BENCH = {  # commands of the bench, which is installed apart
    "bench": "Compare TAP with competing methods, each tuned.",
    "tune": "Search for the best steps to run in full, for your model and prompts.",
    "profile": "Measure where the time of a predicted step goes.",
}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """TAP (Token-Adaptive Predictor) makes diffusion transformers faster without training.

    It runs the whole model on some of the denoising steps and predicts the others.

    Start with: tap generate "red apple" --compare
    """


def _missing(name: str) -> Callable[[], None]:
    """A command in the place of one that is not installed."""

    def missing() -> None:
        raise options.failed(UsageError(f"tap {name} is in a package of its own: pip install 'tap-diffusion[bench]'"))

    return missing


app.command()(generate.generate)
_added = {point.name: point.load() for point in entry_points(group=GROUP)}
for _name in dict.fromkeys([*BENCH, *_added]):
    if _name in _added:
        app.command(_name)(_added[_name])
    else:
        app.command(
            _name,
            help=f"{BENCH[_name]} Not installed: pip install 'tap-diffusion[bench]'",
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        )(_missing(_name))
app.command()(ui.ui)
app.command()(models.models)
app.command()(plan.plan)
