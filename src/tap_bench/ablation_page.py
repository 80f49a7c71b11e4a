"""A page on the ablations of one or several models, and its plots.

python -m tap_bench.ablation_page docs/ablations.md out/ablations-emoji out/ablations-fashion
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from tap_bench.report import signed, verdict
from tap_diffusion.core.errors import UsageError

Results = dict[str, Any]  # of one model, as results.json holds them

GROUPS = {
    "clock": "The time that predictors extrapolate in, full steps being the same: in windows, so that full steps are"
    " even on it; the pace halfway between step and arctan √(σ/α); or the step's index.",
    "schedule": "The same number of full steps elsewhere.",
    "hindsight": "Share of the window's error that the next full step makes up for.",
    "predictors": "Single predictors for all tokens, and sets of which each token takes one.",
    "slopes": "Share of each extrapolation that is carried out, the rest being reuse.",
    "orders": "Single orders at the full horizon, and sets of orders to choose from, with the horizon k alone (λ = 0)"
    " and with the paper's window (λ = 4).",
    "horizon span": "Width of the window of horizons {k - λ, …, k}, in steps of δ = 1.",
    "horizon step": "Spacing δ of the horizons, λ = 4.",
    "shifted windows": "The window of horizons shifted to the right, beyond the step itself.",
    "probe": "What the candidates are compared on: the modulated input of the first block, or what the first one, two"
    " or three blocks add to the hidden states. The deeper two come from a full evaluation that only looks.",
    "proxy loss": "The distance between predicted and actual probe features.",
    "sketch": "Channels of the probe features that are kept and compared.",
    "granularity": "Over what the argmin is taken. Shuffled: the choices of each sample are dealt out among its tokens"
    " at random, so that their shares stay and their places do not.",
    "oracle": "The candidates are compared on the true residual at the current hidden states, known from a full"
    " evaluation that only looks: the choice is the truly best at each step, by L2 or by cosine distance.",
}
_MARKS = {"better": "▲", "worse": "▼", "not told apart": "≈"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe and Ito's, for colour-blind readers
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "tap", "text.parse_math": False, "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": "#dddddd",
}  # fmt: skip


def write_page(folders: Sequence[Path], page: Path) -> None:
    """Write a page of Markdown, and its plots as SVG files beside it.

    Args:
        folders: of runs of :class:`tap_bench.ablations.Ablations`, one for each model.
        page: the file to write.

    Raises:
        UsageError: a folder holds no results.
    """
    runs = [_read(folder) for folder in folders]
    page.parent.mkdir(parents=True, exist_ok=True)
    parts = [_introduction(runs)]
    for group in dict.fromkeys(cell["group"] for results in runs for cell in results["cells"]):
        parts.append(f"## {group[0].upper()}{group[1:]}\n\n{GROUPS[group]}")
        parts.append(_embedded(_differences_plot(runs, group), page, group))
        parts.append(_differences_table(runs, group))
    if all(results["fidelity"] for results in runs):
        parts += ["## Fidelity", _FIDELITY]
        for budget in _budgets(runs):
            measured = [results for results in runs if budget in _budgets([results])]
            parts.append(_embedded(_fidelity_plot(measured, budget), page, f"fidelity {budget}"))
        parts.append(_fidelity_table(runs))
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _read(folder: Path) -> Results:
    try:
        return dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"the folder {folder} holds no finished run of the ablations: {error}") from error


def _budgets(runs: Sequence[Results]) -> list[int]:
    return sorted({cell["budget"] for results in runs for cell in results["cells"]}, reverse=True)


def _columns(runs: Sequence[Results]) -> Iterator[tuple[Results, int]]:
    for results in runs:
        for budget in _budgets([results]):
            yield results, budget


# --------------------------------------------------------------------------------------------------------------- words

_FIDELITY = """How well the probe tells which candidate is best.

On the trajectories of the full result, without feedback, each predicted step compares the candidates' proxy losses with
the true errors ‖r̂ - r‖ of their residuals. Candidates that are equal (at horizon 0 all orders are) count once.

- **Rank correlation** is Spearman's, of each token over its candidates. Spread is its standard deviation over the
  tokens of a sample.
- **Best** is the share of tokens whose choice is the truly best candidate. Chance is one over their number.
- **Errors** of the chosen candidate are ratios, geometric means over tokens: to the truly best one, and to a fixed
  predictor, order 1 at horizon k.
- **Brackets** are 95 % bootstrap intervals over samples."""


_TITLES = {"paper": "Ablations of the paper's method", "recommended": "Ablations of the defaults"}
_BASELINES = {
    "paper": "as the paper has it (arXiv 2603.03792: Taylor orders 0 to 2, λ = 4, δ = 1, cosine, per token), on the"
    " paper's schedule",
    "recommended": "as `TAPConfig(full_steps=...)` has it",
}


def _introduction(runs: Sequence[Results]) -> str:
    listed = ", ".join(
        f"{results['model']} ({results['samples']} samples, {results['steps']} steps)" for results in runs
    )
    heads, values = ["model", "full evaluations", "PSNR of TAP (dB)"], []
    for results, budget in _columns(runs):
        cell = next(cell for cell in results["cells"] if cell["method"] == "tap" and cell["budget"] == budget)
        low, high = cell["psnr_ci"]
        values.append([results["model"], str(budget), f"{cell['psnr_db']:.2f} [{low:.2f}, {high:.2f}]"])
    of = " and ".join(dict.fromkeys(_BASELINES[results["of"]] for results in runs))
    title = "; ".join(dict.fromkeys(_TITLES[results["of"]] for results in runs))
    return f"""# {title}

What each part is worth: TAP is taken {of}, and one thing at a time is changed. Models: {listed}.

- **Figures** are differences in PSNR to TAP, dB. PSNR is the distance to what the same pipeline draws from the same
  noise with all steps full.
- **Marks:** ▲ better than TAP, ▼ worse, ≈ not told apart.
- **Brackets and bars** are 95 % bootstrap intervals of the mean difference, paired by seed. They are not corrected for
  the number of comparisons: of 20 that make no difference, one is expected to leave 0 out.

{_table(heads, values)}"""


def _differences_table(runs: Sequence[Results], group: str) -> str:
    columns = list(_columns(runs))
    rows = []
    for label in _labels(runs, group):
        rows.append([label, *(_difference(_cell(results, group, label, budget)) for results, budget in columns)])
    return _table([group, *(f"{results['model']}, {budget}" for results, budget in columns)], rows)


def _labels(runs: Sequence[Results], group: str) -> list[str]:
    return list(dict.fromkeys(c["label"] for results in runs for c in results["cells"] if c["group"] == group))


def _cell(results: Results, group: str, label: str, budget: int) -> dict[str, Any] | None:
    wanted = group, label, budget
    return next((c for c in results["cells"] if (c["group"], c["label"], c["budget"]) == wanted), None)


def _difference(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    if "difference_db" not in cell:
        return "TAP"
    low, high = cell["difference_ci"]
    if low == high == 0:
        return "the same"
    return f"{_MARKS[verdict(cell)]} {signed(cell['difference_db'])} [{signed(low)}, {signed(high)}]"


def _fidelity_table(runs: Sequence[Results]) -> str:
    heads = ["model", "full evaluations", "probe", "rank correlation", "spread", "best", "chance", "error to best",
             "error to order 1"]  # fmt: skip
    rows = []
    for results in runs:
        for entry in results["fidelity"]:
            rows.append(
                [
                    results["model"],
                    str(entry["budget"]),
                    entry["probe"],
                    _bracketed(entry["rank_correlation"], "{:.2f}"),
                    f"{entry['rank_spread']:.2f}",
                    _bracketed(entry["best_share"], "{:.0%}"),
                    f"{entry['chance']:.0%}",
                    _bracketed(entry["error_to_best"], "{:.2f}"),
                    _bracketed(entry["error_to_fixed"], "{:.2f}"),
                ]
            )
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bracketed(values: Sequence[float], form: str) -> str:
    mean, low, high = map(form.format, values)
    return f"{mean} [{low}, {high}]"


# --------------------------------------------------------------------------------------------------------------- plots


def _embedded(figure: Figure, page: Path, title: str) -> str:
    """Save a figure beside the page, and return what shows it there."""
    name = re.sub(r"[^a-z0-9]+", "-", title)
    file = page.with_name(f"{page.stem}-{name}.svg")
    FigureCanvasSVG(figure)
    with mpl.rc_context(STYLE):
        figure.savefig(file, bbox_inches="tight", metadata=dict.fromkeys(("Date", "Creator")))
    return f"![{title}]({file.name})"


def _panels(runs: Sequence[Results], rows: int, width: float, height: float) -> tuple[Figure, Any]:
    """One column of axes for each model."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.8 + width * len(runs), 0.8 + height * rows))
        axes = figure.subplots(rows, len(runs), squeeze=False, sharey="row", gridspec_kw={"wspace": 0.08})
    for column, results in zip(axes.T, runs, strict=True):
        column[0].set_title(results["model"], fontsize=10)
        for panel in column:
            panel.grid(linewidth=0.6)
    return figure, axes


def _differences_plot(runs: Sequence[Results], group: str) -> Figure:
    """Differences to TAP: one line for each label, one colour for each budget."""
    labels, budgets = _labels(runs, group), _budgets(runs)
    figure, axes = _panels(runs, 1, width=3.2, height=0.34 * len(labels))
    for panel, results in zip(axes[0], runs, strict=True):
        panel.axvline(0, color="#555555", linewidth=1)
        for i, budget in enumerate(budgets):
            aside = (i - (len(budgets) - 1) / 2) * 0.24
            for y, label in enumerate(labels):
                cell = _cell(results, group, label, budget)
                if cell is not None:
                    _point(panel, cell, y + aside, COLOURS[i])
            panel.plot([], [], "o", color=COLOURS[i], markersize=5, label=f"{budget} full evaluations")
        panel.set_yticks(range(len(labels)), labels)
        panel.set_ylim(len(labels) - 0.5, -0.5)
        panel.set_xlabel("PSNR, difference to TAP (dB)")
    _legend(figure, axes)
    return figure


def _point(panel: Axes, cell: dict[str, Any], y: float, colour: str) -> None:
    if "difference_db" not in cell:
        panel.plot([0], [y], "D", color=colour, markerfacecolor="white", markersize=5)
        return
    x, (low, high) = cell["difference_db"], cell["difference_ci"]
    panel.errorbar([x], [y], xerr=[[x - low], [high - x]], fmt="o", color=colour, markersize=5, elinewidth=1.2)


def _fidelity_plot(runs: Sequence[Results], budget: int) -> Figure:
    """Rank correlation, share of best choices and ratio of errors over the steps, one line for each probe."""
    shown = {"rank_correlation": "rank correlation", "best_share": "truly best chosen",
             "error_to_best": "error to best", "error_to_fixed": "error to order 1"}  # fmt: skip
    figure, axes = _panels(runs, len(shown), width=3.6, height=1.7)
    for column, results in zip(axes.T, runs, strict=True):
        entries = [entry for entry in results["fidelity"] if entry["budget"] == budget]
        for panel, name in zip(column, shown, strict=True):
            for entry, colour in zip(entries, COLOURS, strict=False):
                style: Any = {"color": colour, "linewidth": 1.4, "marker": ".", "label": entry["probe"]}
                panel.plot(*_broken(entry["by_step"], name), **style)
            if name == "best_share" and entries:
                style = {"color": "#555555", "linewidth": 1, "linestyle": ":", "label": "chance"}
                panel.plot(*_broken(entries[0]["by_step"], "chance"), **style)
        column[-1].set_xlabel(f"step, {budget} of {results['steps']} full")
    for panel, label in zip(axes[:, 0], shown.values(), strict=True):
        panel.set_ylabel(label)
    _legend(figure, axes, row=1)
    return figure


def _broken(by_step: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Points of a line that is broken at full steps."""
    xs: list[float] = []
    ys: list[float] = []
    for at in by_step:
        if xs and at["step"] > xs[-1] + 1:
            xs.append(at["step"] - 0.5)
            ys.append(float("nan"))
        xs.append(at["step"])
        ys.append(at[name])
    return xs, ys


def _legend(figure: Figure, axes: Any, row: int = 0) -> None:
    handles, labels = axes[row][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 0.94), ncols=5, frameon=False, fontsize=9)


def main(
    page: Annotated[Path, typer.Argument(help="The file to write; plots go beside it.")],
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs of tap_bench.ablations.")],
) -> None:
    """Write a page on the ablations of one or several models."""
    write_page(folders, page)


if __name__ == "__main__":
    typer.run(main)
