"""Pictures of profiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
_BLUE, _ORANGE, _GREY = "#3b76af", "#e08a3c", "#b5b5b5"


def profile_picture(result: dict[str, Any], file: Path) -> None:
    """Floor and measured time of each part of a predicted call, and the whole loop, as a PNG."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3), layout="constrained")
        parts, loop = figure.subplots(1, 2, width_ratios=(3, 2))
        names = list(result["floor_ms"])
        rows = range(len(names))
        parts.barh([row - 0.2 for row in rows], result["floor_ms"].values(), 0.4, label="floor", color=_GREY)
        measured = [result["parts_ms"][name] for name in names]
        parts.barh([row + 0.2 for row in rows], measured, 0.4, label="measured", color=_BLUE)
        parts.set_yticks(rows, names)
        parts.invert_yaxis()
        parts.set_xlabel("ms")
        parts.set_title(f"a predicted call of {result['name']}: {result['predicted_over_plain']:.2%} of a plain one")
        parts.legend(frameon=False)
        whole = result["loop"]
        bound = whole["plain_ms"] / whole["limit"]
        loop.barh(["plain", "TAP", "limit"], [whole["plain_ms"], whole["tap_ms"], bound], color=[_GREY, _BLUE, _ORANGE])
        loop.invert_yaxis()
        loop.set_xlabel("ms")
        loop.set_title(f"{result['steps']} steps: {whole['speedup']:.2f}x, {whole['share_of_limit']:.0%} of the limit")
        _save(figure, file)


def scaling_picture(points: Sequence[dict[str, Any]], file: Path) -> None:
    """Time of a predicted call and bytes of the cache against tokens and against blocks, as a PNG."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        for row, against in zip(figure.subplots(2, 2), ("tokens", "depth"), strict=True):
            some = [point for point in points if point["against"] == against]
            x = [point["tokens" if against == "tokens" else "blocks"] for point in some]
            label = "tokens in the batch" if against == "tokens" else "blocks"
            time, memory = row
            _lines(time, x, {kind: [point[f"{kind}_ms"] for point in some] for kind in ("full", "predicted")}, label)
            time.set_ylabel("ms per call")
            time.set_yscale("log")
            _lines(memory, x, {"cache": [point["cache_bytes"] / 1e6 for point in some]}, label)
            memory.set_ylabel("MB")
            memory.set_ylim(bottom=0)
        _save(figure, file)


def _lines(axes: Axes, x: Sequence[float], lines: dict[str, Sequence[float]], label: str) -> None:
    for (name, y), colour in zip(lines.items(), (_GREY, _BLUE) if len(lines) > 1 else (_ORANGE,), strict=True):
        axes.plot(x, y, "o-", label=name, color=colour)
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)


def _save(figure: Figure, file: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(file, dpi=150)
