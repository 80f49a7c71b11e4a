"""The report's plots as inline SVG, in the page's CSS variables so that they follow its colour scheme."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

MARKERS = {"tap": "*", "rival": "o", "peer": "s", "solver": "^"}
FAMILIES = {"tap": "TAP and variants", "rival": "rival, same engine", "peer": "peer, its own code", "solver": "solver"}
# Colours that are replaced by CSS variables of these names.
COLOURS = {
    "ink": "#010101", "faint": "#020202", "grid": "#030303", "page": "#040404",
    "tap": "#050505", "rival": "#060606", "peer": "#070707", "solver": "#080808",
}  # fmt: skip
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "tap", "text.parse_math": False, "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False,
    "text.color": COLOURS["ink"], "axes.labelcolor": COLOURS["ink"], "axes.edgecolor": COLOURS["ink"],
    "xtick.color": COLOURS["ink"], "ytick.color": COLOURS["ink"], "grid.color": COLOURS["grid"],
}  # fmt: skip
MOST = 8  # curves in colour, and with a name
_ASIDE = 0.011  # of the range of budgets, between the points of methods that share one
_LABEL_GAP = 0.048  # of the axes' height


def evaluations_plot(cells: Sequence[dict[str, Any]], baseline: str) -> str:
    """PSNR against full evaluations, as an SVG element."""
    return _plot(cells, baseline, "full_steps", "full evaluations per trajectory", lower_is_better=True)


def time_plot(cells: Sequence[dict[str, Any]], baseline: str) -> str:
    """PSNR against the measured speed-up in time, of the cells that have one, as an SVG element."""
    timed = [cell for cell in cells if cell["time_speedup"] is not None]
    return _plot(timed, baseline, "time_speedup", "measured speed-up in time (×)", lower_is_better=False)


def frontier(cells: Sequence[dict[str, Any]], cost: str, lower_is_better: bool) -> list[dict[str, Any]]:
    """The cells that no other beats in both PSNR and cost."""
    sign = -1 if lower_is_better else 1

    def beaten(cell: dict[str, Any]) -> bool:
        own = sign * cell[cost], cell["psnr_db"]
        others = ((sign * other[cost], other["psnr_db"]) for other in cells)
        return any(x >= own[0] and y >= own[1] and (x, y) != own for x, y in others)

    return [cell for cell in cells if not beaten(cell)]


def _plot(cells: Sequence[dict[str, Any]], baseline: str, x: str, label: str, lower_is_better: bool) -> str:
    if not cells:
        return ""
    best = _best(cells, baseline, x, lower_is_better)
    curves: dict[str, list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: cell[x]):
        curves.setdefault(cell["method"], []).append(cell)
    named = [method for method in curves if method in best]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 5))
        axes = figure.add_axes((0.07, 0.1, 0.68, 0.8))
        axes.grid(linewidth=0.6)
        for method, curve in curves.items():
            if method not in best:
                axes.plot(
                    [cell[x] for cell in curve], [cell["psnr_db"] for cell in curve], color=COLOURS["faint"],
                    marker=_marker(curve[0]), markersize=4, linewidth=0.7, zorder=2,
                )  # fmt: skip
        budgets = sorted({cell["budget"] for cell in cells})
        step = _ASIDE * max(1, budgets[-1] - budgets[0]) if x == "full_steps" else 0.0
        ends = {}
        for i, method in enumerate(named):
            curve = curves[method]
            aside = (i - (len(named) - 1) / 2) * step
            _curve(axes, curve, [cell[x] + aside for cell in curve], x == "time_speedup", method == baseline)
            ends[method] = curve[-1][x] + aside, curve[-1]["psnr_db"], _colour(curve[0])
        _label(axes, ends, baseline)
        axes.set_xlabel(label)
        axes.set_title("PSNR to the full result (dB)", loc="left", fontsize=10, pad=26)
        if x == "full_steps":
            axes.set_xticks(budgets)
        for family in (family for family in MARKERS if any(cell["family"] == family for cell in cells)):
            style: dict[str, Any] = {"color": COLOURS[family], "marker": MARKERS[family], "linewidth": 1.2}
            axes.plot([], [], label=FAMILIES[family], **style)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=4, frameon=False, fontsize=9, columnspacing=1.2)
        return as_svg(figure, prefix=x)


def _best(cells: Sequence[dict[str, Any]], baseline: str, x: str, lower_is_better: bool) -> list[str]:
    """The methods to be named: the baseline, the best of each family, and those that are most on the frontier."""
    best = [baseline]
    for family in MARKERS:  # so that each family can be seen
        own = [cell for cell in cells if cell["family"] == family]
        if own:
            best.append(max(own, key=lambda cell: (-cell["budget"], cell["psnr_db"]))["method"])
    ahead = Counter(cell["method"] for cell in frontier(cells, x, lower_is_better))
    return list(dict.fromkeys([*best, *(method for method, _ in ahead.most_common())]))[:MOST]


def _curve(axes: Axes, curve: Sequence[dict[str, Any]], xs: Sequence[float], ranges: bool, strong: bool) -> None:
    """One method with its intervals."""
    ys = [cell["psnr_db"] for cell in curve]
    spread = [[y - cell["psnr_ci"][0] for y, cell in zip(ys, curve, strict=True)],
              [cell["psnr_ci"][1] - y for y, cell in zip(ys, curve, strict=True)]]  # fmt: skip
    aside = None
    if ranges:
        aside = [[x - cell["time_speedup_range"][0] for x, cell in zip(xs, curve, strict=True)],
                 [cell["time_speedup_range"][1] - x for x, cell in zip(xs, curve, strict=True)]]  # fmt: skip
    axes.errorbar(
        xs, ys, yerr=spread, xerr=aside, color=_colour(curve[0]), marker=_marker(curve[0]),
        markersize=(11 if strong else 8) if curve[0]["family"] == "tap" else 6, markeredgecolor=COLOURS["page"],
        markeredgewidth=0.6, linewidth=2.6 if strong else 1.3, elinewidth=1, zorder=4 if strong else 3,
    )  # fmt: skip


def _label(axes: Axes, ends: dict[str, tuple[float, float, str]], baseline: str) -> None:
    """Names in the right margin, apart from each other, each with a line to the end of its curve."""
    axes.margins(x=0.05)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    order = sorted(ends, key=lambda method: ends[method][1])
    heights: list[float] = []
    for method in order:
        wanted = (ends[method][1] - low) / (high - low)
        heights.append(max(wanted, heights[-1] + _LABEL_GAP) if heights else wanted)
    for i in reversed(range(len(heights))):  # down again where that went over the top
        ceiling = 1 - _LABEL_GAP / 2 if i == len(heights) - 1 else heights[i + 1] - _LABEL_GAP
        heights[i] = min(heights[i], ceiling)
    for method, height in zip(order, heights, strict=True):
        x, y, colour = ends[method]
        axes.annotate(
            method, (x, y), (1.02, height), textcoords="axes fraction", va="center", fontsize=9.5,
            weight="bold" if method == baseline else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 2, "shrinkB": 4,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def _marker(cell: dict[str, Any]) -> str:
    return MARKERS.get(cell["family"], "D")


def _colour(cell: dict[str, Any]) -> str:
    return COLOURS.get(cell["family"], COLOURS["ink"])


def as_svg(figure: Figure, prefix: str) -> str:
    """The figure as an element of a page: with ids of its own and colours by name."""
    FigureCanvasSVG(figure)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def one_line(svg: str) -> str:
    """A picture that Markdown takes: it ends an HTML block at an empty line, and takes indented lines for code."""
    return "".join(line.strip() + " " for line in svg.splitlines() if line.strip())
