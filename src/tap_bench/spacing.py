"""Where full steps belong: the rule against searches on real models, and against the bench's own models.

    python -m tap_bench.spacing compare docs/schedules      # prints the distances, draws the plot; seconds
    python -m tap_bench.spacing measure sprites --work out/spacing --to docs/schedules/measured.json

``measure`` runs TAP with as many full steps as in each cell of the committed reports, on their first samples, and sets
the result beside what the report has of the same samples. What is in the file already is not run again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import matplotlib as mpl
import pyarrow.parquet as pq
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from tap_bench import metrics
from tap_bench.ablation_page import COLOURS, STYLE
from tap_bench.calibration import run_all
from tap_bench.counting import Counts
from tap_bench.models import MODELS, BenchModel
from tap_bench.variant import on_engine
from tap_diffusion.apps.files import write_json
from tap_diffusion.core import timeline as core
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.presets import STEPS
from tap_diffusion.core.schedule import clock_steps, growing_steps, spaced_steps
from tap_diffusion.core.timeline import Timeline, flow_noise

FOUND = Path(__file__).parents[2] / "docs" / "schedules" / "found.json"
REPORTS = Path(__file__).parents[2] / "docs" / "bench"
PLANNED = "meancache"  # a schedule for that method's own predictor, and no search
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)

Steps = tuple[int, ...]
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def distance(one: Sequence[int], other: Sequence[int]) -> float:
    """Mean |log(1 + s) - log(1 + s')| over the full steps of two schedules of one length: early steps count more."""
    return fmean(abs(math.log1p(a) - math.log1p(b)) for a, b in zip(one, other, strict=True))


class Evidence:
    """What searches found, by model.

    Args:
        file: as ``docs/schedules/found.json``.
    """

    def __init__(self, file: Path = FOUND) -> None:
        content = json.loads(file.read_text(encoding="utf-8"))
        self.models: dict[str, dict[str, Any]] = content["models"]
        self.found: dict[str, list[tuple[str, Steps]]] = {name: [] for name in self.models}
        for entry in content["schedules"]:
            if entry["objective"] != PLANNED:
                self.found[entry["model"]].append((entry["objective"], tuple(entry["full_steps"])))

    def rule(self, model: str, count: int, exponent: float | None = None, tokens: int | None = None) -> Steps:
        """The full steps that the rule has for a model; with another exponent of its tokens, or other tokens."""
        known = self.models[model]
        tokens = known["tokens"] if tokens is None else tokens
        if exponent is not None:  # so many tokens as have the same effect
            tokens = round(core.FEW * (tokens / core.FEW) ** exponent)
        timeline = Timeline(flow_noise(STEPS, known["sigma_shift"]), "flow", tokens=tokens)
        return spaced_steps(TAPConfig(), STEPS, count, timeline)

    def error(self, model: str, exponent: float | None = None, tokens: int | None = None) -> float:
        """Mean distance of the rule to what was found for a model."""
        found = self.found[model]
        return fmean(distance(self.rule(model, len(full), exponent, tokens), full) for _, full in found)

    def frames_counted(self, model: str, exponent: float) -> float:
        """As :meth:`error`, if a video's tokens counted as those of one frame times frames^exponent.

        Frames are the latent's, of which both videos' autoencoders make one of four after the first.
        """
        known = self.models[model]
        shown = re.search(r"(\d+) frames", known["size"])
        frames = 1 + (int(shown[1]) - 1) // 4 if shown else 1
        return self.error(model, tokens=round(known["tokens"] * frames ** (exponent - 1)))

    def left_out(self, model: str) -> tuple[float, float]:
        """The exponent that fits the other models best, and its error on this one."""
        others = [other for other in self.models if other != model]
        best = min(EXPONENTS, key=lambda exponent: fmean(self.error(other, exponent) for other in others))
        return best, self.error(model, best)

    def errors_of_others(self, model: str) -> dict[str, float]:
        """Of growing windows, and of the rule without tokens."""
        found = self.found[model]
        return {
            "growing windows": fmean(distance(growing_steps(STEPS, len(full)), full) for _, full in found),
            "without tokens": self.error(model, 0.0),
        }


@app.command()
def compare(to: Annotated[Path, typer.Argument(help="Folder for the plot.")]) -> None:
    """Print how far the rule is from what searches found, and draw both."""
    evidence = Evidence()
    typer.echo("| model | tokens | the rule | fitted without it | without tokens | growing windows |")
    typer.echo("| --- | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for model, known in evidence.models.items():
        exponent, left_out = evidence.left_out(model)
        others = evidence.errors_of_others(model)
        row = [evidence.error(model), left_out, others["without tokens"], others["growing windows"]]
        rows.append(row)
        cells = [f"{row[0]:.2f}", f"{left_out:.2f} (k = {exponent:g})", *(f"{value:.2f}" for value in row[2:])]
        typer.echo(f"| {model} | {known['tokens']} | {' | '.join(cells)} |")
    means = [f"{fmean(column):.2f}" for column in zip(*rows, strict=True)]
    typer.echo(f"| mean | | {' | '.join(means)} |")
    for exponent in EXPONENTS:
        typer.echo(f"k = {exponent:g}: {fmean(evidence.error(model, exponent) for model in evidence.models):.3f}")
    for exponent in (0.0, 0.25, 0.5, 0.75, 1.0):
        counted = fmean(evidence.frames_counted(model, exponent) for model in evidence.models)
        typer.echo(f"one frame's tokens times frames^{exponent:g}: {counted:.3f}")
    _draw(evidence, to / "found.svg")


def _draw(evidence: Evidence, file: Path) -> None:
    counts = sorted({len(full) for found in evidence.found.values() for _, full in found})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.2), layout="constrained")
        grid = figure.subplots(len(counts), len(evidence.models), sharex=True, squeeze=False)
        for row, count in zip(grid, counts, strict=True):
            for axes, model in zip(row, evidence.models, strict=True):
                _draw_one(axes, evidence, model, count)
                if count == counts[0]:
                    axes.set_title(f"{model}, {evidence.models[model]['tokens']} tokens", fontsize=10)
            row[0].set_ylabel(f"{count} of {STEPS} full")
        for axes in grid[-1]:
            axes.set_xlabel("step")
        figure.savefig(file, format="svg", metadata={"Date": None})


def _draw_one(axes: Axes, evidence: Evidence, model: str, count: int) -> None:
    rows = {objective: full for objective, full in evidence.found[model] if len(full) == count}
    rows |= {"rule": evidence.rule(model, count), "before": _before(evidence, model, count)}
    names = list(rows)[::-1]
    colours = {"rule": COLOURS[1], "before": "#999999"}
    for place, name in enumerate(names):
        axes.plot(
            [math.log1p(step) for step in rows[name]], [place] * count, "o-", markersize=4, linewidth=0.5,
            color=colours.get(name, COLOURS[0]),
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(-0.6, len(names) - 0.4)
    ticks = (0, 1, 2, 5, 10, 20, 49)
    axes.set_xticks([math.log1p(step) for step in ticks], [str(step) for step in ticks])
    axes.grid(axis="x", linewidth=0.6)


def _before(evidence: Evidence, model: str, count: int) -> Steps:
    """What had been the default: even as few tokens see the noise, growing windows for videos."""
    if "frames" in evidence.models[model]["size"]:
        return growing_steps(STEPS, count)
    return clock_steps(Timeline(flow_noise(STEPS, evidence.models[model]["sigma_shift"]), "flow").pace, count)


# ----------------------------------------------------------------------------------------------- the bench's own models


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help=", ".join(MODELS))],
    work: Annotated[Path, typer.Option(help="Folder for full results.")],
    to: Annotated[Path, typer.Option(help="File for what is measured.")],
    samples: Annotated[int, typer.Option(min=1)] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 8,
) -> None:
    """Measure TAP's default now against the committed reports, on their first samples."""
    known = replace(MODELS[model](), batch=batch)
    pipe = known.load()
    pipe.set_progress_bar_config(disable=True)
    work.mkdir(parents=True, exist_ok=True)
    cells = json.loads(to.read_text(encoding="utf-8")) if to.exists() else {}
    for first in range(0, samples, batch):
        conditions = known.measured[first : min(first + batch, samples)]
        for report, steps, budget, before in _cells(model):
            cell = cells.setdefault(f"{report}/{budget}", {"before": [], "now": []})
            if len(cell["now"]) != first:
                continue
            full = _full(pipe, known, conditions, first, steps, work)
            variant = on_engine("", TAPConfig(full_steps=budget))
            drawn = run_all(pipe, known, variant, conditions, first, steps, Counts())
            cell["now"] += [round(value, 3) for value in metrics.psnr(drawn.pictures, full).tolist()]
            cell["before"] = [round(before[seed], 3) for seed in range(len(cell["now"]))]
            write_json(to, cells)
            typer.echo(f"{report} {budget}: {fmean(cell['before']):.2f} dB before, {fmean(cell['now']):.2f} now")


def _cells(model: str) -> Iterator[tuple[str, int, int, dict[int, float]]]:
    """Report, steps, full steps, and TAP's PSNR by seed, of each cell of the committed reports."""
    for report, steps in ((model, STEPS), (f"{model}-28", 28)):
        rows = pq.read_table(REPORTS / report / "samples.parquet").to_pylist()
        rows = [row for row in rows if row["method"] == "tap"]
        for budget in sorted({row["budget"] for row in rows}, reverse=True):
            yield report, steps, budget, {row["seed"]: row["psnr_db"] for row in rows if row["budget"] == budget}


def _full(pipe: Any, model: BenchModel, conditions: Any, first: int, steps: int, work: Path) -> torch.Tensor:
    file = work / f"{model.name}-{steps}-{first}-{len(conditions)}.safetensors"
    if not file.exists():
        drawn = run_all(pipe, model, None, conditions, first, steps, Counts())
        save_file({"pictures": drawn.pictures}, file)
    return load_file(file)["pictures"]


if __name__ == "__main__":
    app()
