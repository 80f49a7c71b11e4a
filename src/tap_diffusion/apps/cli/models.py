"""``tap models``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tap_diffusion.apps.cli.options import (
    console,
)


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/models.md.")] = False,
) -> None:
    """List the transformer classes of diffusers: which work, and why the others don't."""
    with Console(stderr=True).status("reading diffusers"):
        from tap_diffusion.integrations.diffusers import catalog

        entries, absent = catalog.catalog(), catalog.absent()
    if as_json:
        typer.echo(json.dumps([entry.to_dict() for entry in entries], indent=2))
    elif as_markdown:
        typer.echo(catalog.as_markdown(entries), nl=False)
    else:
        works = [entry for entry in entries if entry.status == "works"]
        table = Table("works", "probe", "stream", "used by")
        table.columns[0].no_wrap, table.columns[-1].overflow = True, "fold"
        for entry in works:
            used_by = min(entry.families, key=len, default="")
            if len(entry.families) > 1:
                used_by += f" and {len(entry.families) - 1} more"
            table.add_row(entry.name, entry.probe, entry.stream, f"{used_by}\n{entry.note}".strip())
        console.print(table)
        table = Table("not accelerated", "reason")
        table.columns[0].no_wrap = True
        for entry in entries:
            if entry not in works:
                table.add_row(entry.name, entry.note or entry.status)
        console.print(table)
        console.print(f"{len(works)} of {len(entries)} work")
        if absent:
            console.print(f"Not in this version of diffusers: {', '.join(absent)}")
