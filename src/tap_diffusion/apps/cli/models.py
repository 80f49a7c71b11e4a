"""``tap models``."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from tap_diffusion.apps.cli.options import console, counted, failed
from tap_diffusion.core.errors import UsageError

if TYPE_CHECKING:
    from tap_diffusion.integrations.diffusers.catalog import Entry

_WIDTH = 38  # of pipelines, so that the longest classes beside them fit into 80 columns


def models(
    word: Annotated[
        str | None,
        typer.Argument(
            help="Show only pipelines and transformers with this in their names, such as wan.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, by transformer.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, by transformer.")] = False,
) -> None:
    """List the pipelines of diffusers that TAP accelerates, and why it doesn't accelerate others.

    Example: tap models wan
    """
    with Console(stderr=True).status("reading diffusers"):
        from tap_diffusion.integrations.diffusers import catalog

        entries, absent = catalog.catalog(), catalog.absent()
    shown = entries
    if word is not None:
        shown = [found for entry in entries if (found := _matching(entry, word)) is not None]
        absent = [name for name in absent if _plain(word) in _plain(name)]
        if not shown and not absent:
            raise failed(UsageError(_none(word, entries)))
    if as_markdown:
        typer.echo(catalog.as_markdown(shown), nl=False)
        return
    if as_json:
        typer.echo(json.dumps([entry.to_dict() for entry in shown], indent=2))
        return
    works = [entry for entry in shown if entry.status == "works"]
    others = [entry for entry in shown if entry.status != "works"]
    if works:
        _print("Accelerated", works)
    if others:
        _print("Not accelerated", others)
    if word is None:
        pipelines = sum(len(entry.pipelines) for entry in works)
        _say(f"{counted(pipelines, 'pipeline')}. {len(works)} of {len(entries)} transformer classes work.")
    if absent:
        _say(f"Known to TAP, but not in this version of diffusers: {', '.join(absent)}")


def _matching(entry: Entry, word: str) -> Entry | None:
    """The entry, of its pipelines those with a word in their names; all where it is in the transformer's."""
    if _plain(word) in _plain(entry.name):
        return entry
    pipelines = tuple(name for name in entry.pipelines if _plain(word) in _plain(name))
    return replace(entry, pipelines=pipelines) if pipelines else None


def _none(word: str, entries: Sequence[Entry]) -> str:
    """What to say where nothing matches."""
    import diffusers

    others = [name for name in dir(diffusers) if name.endswith("Pipeline") and _plain(word) in _plain(name)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return f"{others[0]}{more}: no transformer for TAP to accelerate (Stable Diffusion 1, 2 and XL have a UNet)"
    names = {_plain(name): name for entry in entries for name in entry.families}
    near = max((name for name in names if name in _plain(word)), key=len, default=None)  # a hub id, or a version
    if near is None:
        starts = {name[: len(_plain(word))]: name for name in names}
        near = next((starts[start] for start in difflib.get_close_matches(_plain(word), starts, 1, 0.7)), None)
    meant = f"did you mean {names[near]}?" if near is not None else "tap models lists all"
    return f"diffusers {diffusers.__version__} has no pipeline or transformer with '{word}' in its name; {meant}"


def _plain(name: str) -> str:
    """As names are compared: Z-Image is ZImage, and stable diffusion 3 StableDiffusion3."""
    return re.sub(r"[\W_]", "", name).lower()


def _print(title: str, entries: Sequence[Entry]) -> None:
    """A line for each pipeline, and below it what is to be known of its transformer."""
    console.print(f"[bold]{title}[/]")
    for entry in sorted(entries, key=lambda entry: (entry.pipelines or (entry.name,))[0]):
        for pipeline in entry.pipelines or ("(no pipeline of its own)",):
            console.print(f"  {pipeline:<{_WIDTH}} {entry.name}", highlight=False, soft_wrap=True)
        if entry.note:
            _say(entry.note, indent=6)
    console.print()


def _say(text: str, indent: int = 0) -> None:
    console.print(Padding(Text(text), (0, 0, 0, indent), expand=False))
