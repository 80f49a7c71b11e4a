"""What a run of ``gpu/run.sh`` found, as Markdown with a plot: a part of the page docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from tap_bench.plots import COLOURS, STYLE, as_svg, one_line

NOT_RUN = "Not run yet: no GPU could be had. [One call](../gpu/README.md) measures everything."
GB = 1e9

Row = dict[str, Any]


def shown(folder: Path, tiny: bool = False) -> str:
    """The page's part.

    Args:
        folder: of the JSON files, one for each part of ``tap_bench.gpu``.
        tiny: show runs of tiny models too, whose figures mean nothing.
    """
    files = sorted(folder.glob("*.json"))
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    found = {name: part for name, part in found.items() if tiny or not part["tiny"]}
    if not found:
        return NOT_RUN
    return "\n\n".join([*_about(found), *_loops(found), *_kernels(found), *_errors(found)])


def _about(found: Mapping[str, Any]) -> Iterator[str]:
    first = next(iter(found.values()))
    machine = first["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "diffusers", "python"))
    yield f"{machine['device']}, {first['date']}, {versions}. True sizes, random weights, bfloat16 (`gpu/run.sh`)."
    flux = found.get("flux", {})
    if "interval_1_equal" in (off := flux.get("off", {})):
        are = "are" if off["interval_1_equal"] and off["disabled_equal"] else "are **not**"
        yield f"With every step full, and after `tap.disable`, outputs {are} the plain model's to the bit."
    if "tap" in (waits := flux.get("waits", {})):
        yield f"In one run the host waits for the GPU {waits['plain']} times, with TAP {waits['tap']} times."


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str, Row]]:
    """Part, loop, and what is known of it."""
    titles = {"flux": "FLUX.1-dev", "compiled": "FLUX.1-dev compiled", "peers": "FLUX.1-dev, one run each"}
    for part, sections in found.items():
        for name, section in sections.items():
            if not isinstance(section, dict) or "error" in section:
                continue
            if "seconds" in section:
                yield f"FLUX.1-dev, {part}", name, section
                continue
            title = titles.get(part, name) + (f", {name}" if name.endswith("steps") else "")
            for loop, row in section.items():
                if isinstance(row, dict) and "seconds" in row:
                    yield title, loop, row


def _loops(found: Mapping[str, Any]) -> Iterator[str]:
    rows = list(_rows(found))
    if not rows:
        return
    cells = [
        [title, loop, f"{row['seconds']:.2f}", _figure(row, "speedup", "{:.2f}x"), _figure(row, "full_steps", "{:g}"),
         _figure(row, "share_of_limit", "{:.0%}"), _figure(row, "peak_bytes", "{:.2f}", GB),
         _figure(row, "cache_bytes", "{:.3f}", GB)]
        for title, loop, row in rows
    ]  # fmt: skip
    yield _table(["loop", "", "seconds", "speed-up", "full steps", "of the limit", "peak GB", "cache GB"], cells)
    compared = [(title, loop, row["speedup"]) for title, loop, row in rows if "speedup" in row and loop != "plain"]
    if compared:
        yield f'<div class="plot">{one_line(_plot(compared))}</div>'


def _kernels(found: Mapping[str, Any]) -> Iterator[str]:
    rows = found.get("kernels", {}).get("bandwidth", {}).get("rows", [])
    if rows:
        cells = [
            [row["size"], str(row["candidates"]), row["form"], f"{row['gb_per_s']:.0f}", f"{row['of_copy']:.0%}"]
            for row in rows
        ]
        yield "Losses, choice and combination of a predicted step:"
        yield _table(["size", "candidates", "form", "GB/s", "of a copy"], cells)


def _errors(found: Mapping[str, Any]) -> Iterator[str]:
    for part, sections in found.items():
        for name, section in sections.items():
            for title, row in [(name, section), *(section.items() if isinstance(section, dict) else ())]:
                if isinstance(row, dict) and "error" in row:
                    yield f"Failed in `{part}`: {title}: {row['error'].splitlines()[0]}"


def _plot(rows: Sequence[tuple[str, str, float]]) -> str:
    """Speed-up over the plain loop, a bar for each."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 0.5 + 0.26 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        names = [f"{title}: {loop}" for title, loop, _ in rows][::-1]
        values = [value for *_, value in rows][::-1]
        colours = [COLOURS["tap" if "tap" in name or name.endswith("x") else "peer"] for name in names]
        axes.barh(range(len(rows)), values, color=colours, height=0.7)
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.axvline(1, color=COLOURS["faint"], linewidth=0.8)
        axes.set_xlabel("times as fast as the plain loop")
        return as_svg(figure, "gpu")


def _figure(row: Row, name: str, form: str, unit: float = 1.0) -> str:
    return form.format(row[name] / unit) if row.get(name) is not None else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
