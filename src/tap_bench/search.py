"""Which full steps plain reuse wants on a model: a search on the final picture, and what each step alone is worth.

    python -m tap_bench.search climb --model scenes --full-steps 9 --out out/climb.json
    python -m tap_bench.search score --model scenes --schedule "0 1 2 3 5 8 13 27 49" --out out/score.json
    python -m tap_bench.search sensitivity --model scenes --out out/sensitivity.json
    python -m tap_bench.search curves out/sensitivity.json out/another.json --to out/sensitivity.svg
    python -m tap_bench.search rank out/sensitivity.json

``climb`` is coordinate ascent (``tap_bench.tune.search``) from an even schedule and from a dense one, by PSNR
on calibration samples. What it finds is confirmed on measured samples. ``score`` measures given schedules on these.
``sensitivity`` predicts one step at a time, by reuse, in a trajectory that is otherwise full. ``curves`` draws several
of these together, and ``rank`` says how well the probe tells what predicting a step costs. The others write what they
know after each run, and go on from it when called again. On cores that are shared, ``OMP_NUM_THREADS=1`` can be several
times faster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from tap_bench import metrics
from tap_bench.calibration import SEED, Calibration, run_all
from tap_bench.counting import Counts
from tap_bench.methods.seacache import filtered_input, token_grid
from tap_bench.methods.thresholds import relative_l1
from tap_bench.models import MODELS, BenchModel, Drawn
from tap_bench.tune import search
from tap_bench.variant import on_engine
from tap_diffusion.apps.files import write_json
from tap_diffusion.apps.generate import load_pipeline
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.presets import PRESETS, STEPS
from tap_diffusion.core.schedule import even_steps, growing_steps

Schedule = tuple[int, ...]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Model = Annotated[str, typer.Option(help="Of the bench.")]
Weights = Annotated[Path | None, typer.Option(help="Folder of a pipeline to take in its place, of the same kind.")]
Call = Annotated[str, typer.Option(help="JSON: arguments of the pipeline's call, such as a height and width.")]
Out = Annotated[Path, typer.Option(help="JSON file of results, from which it goes on when called again.")]
StepsOption = Annotated[int, typer.Option(min=2, help="Of the full result.")]
Fast = Annotated[bool, typer.Option(help="Compute in bf16, the full result too: half the time on some CPUs.")]


class Samples:
    """Samples of one model, their full result, and how near reuse comes to it on any schedule.

    Args:
        pipe: the plain pipeline.
        model: how to call it.
        conditions: what to draw; the i-th has seed ``seed + i``.
        seed: of the first.
        steps: of the full result.
        fast: compute in bf16.
    """

    def __init__(
        self, pipe: Any, model: BenchModel, conditions: Sequence[Any], seed: int, steps: int, fast: bool
    ) -> None:
        self._pipe, self._model, self._conditions, self._seed = pipe, model, conditions, seed
        self._steps, self._fast = steps, fast
        self._full: Drawn | None = None

    def _run(self, full: Schedule | None) -> Drawn:
        variant = None
        if full is not None:
            config = TAPConfig.paper(full_steps=full, orders=(0,), horizon_span=0.0)
            variant = on_engine("", config)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._fast):
            return run_all(self._pipe, self._model, variant, self._conditions, self._seed, self._steps, Counts())

    def psnr(self, full: Schedule) -> list[float]:
        """PSNR of reuse with these full steps to the full result, dB, for each sample."""
        if self._full is None:
            self._full = self._run(None)
        return metrics.psnr(self._run(full).pictures, self._full.pictures).tolist()


def _opened(model: str, weights: Path | None, call: str, batch: int) -> tuple[Any, BenchModel]:
    """Pipeline and model, whose calls have these arguments too."""
    chosen = MODELS[model]()
    more = json.loads(call)
    arguments = chosen.arguments
    chosen = replace(chosen, batch=batch, arguments=lambda conditions: arguments(conditions) | more)
    pipe = chosen.load() if weights is None else load_pipeline(str(weights), torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe, chosen


def _kept(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What the file holds; nothing if there is none.

    Raises:
        typer.BadParameter: it comes from other settings.
    """
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return {"settings": settings}
    kept: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if kept["settings"] != settings:
        raise typer.BadParameter(f"{out} comes from other settings: {kept['settings']}", param_hint="--out")
    return kept


def _name(full: Iterable[int]) -> str:
    return " ".join(map(str, full))


def _asked(known: dict[str, list[float]], ask: Callable[[Schedule], list[float]], save: Callable[[], None]) -> Any:
    """Mean PSNR of a schedule, that is asked for once only, and saved."""

    def quality(full: Schedule) -> float:
        if _name(full) not in known:
            known[_name(full)] = ask(full)
            save()
        return fmean(known[_name(full)])

    return quality


def _on_measured(
    out: Path, model: str, weights: Path | None, call: str, steps: int, samples: int, batch: int, fast: bool
) -> tuple[dict[str, Any], Callable[[Schedule], list[float]]]:
    """What the file holds of these settings, and what asks for a schedule's PSNR on measured samples."""
    settings = {
        "model": model, "weights": str(weights), "call": json.loads(call), "steps": steps, "samples": samples,
        "fast": fast,
    }  # fmt: skip
    kept = _kept(out, settings)
    pipe, chosen = _opened(model, weights, call, batch)
    return kept, Samples(pipe, chosen, chosen.measured[:samples], 0, steps, fast).psnr


def early(full: Sequence[int], before: int = 8) -> int:
    """How many full steps are among the first ``before``."""
    return sum(step < before for step in full)


@app.command()
def climb(
    out: Out,
    model: Model = "scenes",
    full_steps: Annotated[int, typer.Option(min=3, help="How many steps are full.")] = 9,
    steps: StepsOption = 50,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples that it climbs on.")] = 8,
    confirm: Annotated[int, typer.Option(min=1, help="Measured samples that the result is confirmed on.")] = 16,
    evaluations: Annotated[int, typer.Option(min=1, help="Schedules tried from each start, at most.")] = 150,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    weights: Weights = None,
    call: Call = "{}",
    fast: Fast = False,
) -> None:
    """Move one full step at a time, from an even schedule and from a dense one, and keep what is better."""
    settings = {
        "model": model, "weights": str(weights), "call": json.loads(call), "full_steps": full_steps, "steps": steps,
        "samples": samples, "confirm": confirm, "fast": fast,
    }  # fmt: skip
    kept = _kept(out, settings)
    save = partial(write_json, out, kept)
    pipe, chosen = _opened(model, weights, call, batch)
    found_before = PRESETS["flux.1-dev"] if steps == STEPS else {}
    known_best = {"FLUX.1-dev": found_before[full_steps]} if full_steps in found_before else {}
    starts = known_best | {"even": even_steps(steps, full_steps), "growing": growing_steps(steps, full_steps)}
    conditions = [chosen.calibration[i % len(chosen.calibration)] for i in range(samples)]
    ask = Samples(pipe, chosen, conditions, SEED, steps, fast).psnr
    quality = _asked(kept.setdefault("climbed_on", {}), ask, save)
    found = kept.setdefault("found", {})
    for title, start in starts.items():
        with tqdm(desc=f"from {title}", unit=" schedules") as progress:

            def watched(full: Schedule, progress: Any = progress) -> float:
                value = quality(full)
                progress.update()
                return value

            found[title] = list(search(watched, [start], steps, evaluations))
        save()
    confirmed = kept.setdefault("confirmed", {})
    check = _asked(confirmed, Samples(pipe, chosen, chosen.measured[:confirm], 0, steps, fast).psnr, save)
    rows = {f"start: {title}": start for title, start in starts.items()}
    rows |= {f"found from {title}": tuple(full) for title, full in found.items()}
    kept["rows"] = [
        {"title": title, "full_steps": list(full), "early": early(full), "climbed_db": quality(full),
         "confirmed_db": check(full)}
        for title, full in rows.items()
    ]  # fmt: skip
    save()
    for row in sorted(kept["rows"], key=lambda row: -row["confirmed_db"]):
        typer.echo(
            f"{row['confirmed_db']:6.2f} dB ({row['climbed_db']:6.2f} climbed)  {row['early']} of the first 8"
            f"  {row['full_steps']}  {row['title']}"
        )


@app.command()
def score(
    out: Out,
    schedule: Annotated[list[str], typer.Option(help='Full steps, such as "0 1 2 5 20". Repeatable.')],
    model: Model = "scenes",
    steps: StepsOption = 50,
    samples: Annotated[int, typer.Option(min=1, help="Measured samples.")] = 16,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    weights: Weights = None,
    call: Call = "{}",
    fast: Fast = False,
) -> None:
    """How near reuse comes to the full result on given schedules."""
    kept, ask = _on_measured(out, model, weights, call, steps, samples, batch, fast)
    quality = _asked(kept.setdefault("psnr_db", {}), ask, partial(write_json, out, kept))
    for text in schedule:
        full = tuple(map(int, text.split()))
        typer.echo(f"{quality(full):6.2f} dB  {early(full)} of the first 8  {list(full)}")


@app.command()
def sensitivity(
    out: Out,
    model: Model = "scenes",
    steps: StepsOption = 50,
    samples: Annotated[int, typer.Option(min=1, help="Measured samples.")] = 16,
    stride: Annotated[int, typer.Option(min=1, help="Only one step in so many is predicted.")] = 1,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    weights: Weights = None,
    call: Call = "{}",
    fast: Fast = False,
) -> None:
    """Predict one step at a time by reuse; the rest is full. Writes a plot beside the JSON file."""
    kept, ask = _on_measured(out, model, weights, call, steps, samples, batch, fast)
    known: dict[str, list[float]] = kept.setdefault("psnr_db", {})
    for step in tqdm(range(1, steps, stride), desc="sensitivity"):
        if str(step) not in known:
            known[str(step)] = ask(tuple(s for s in range(steps) if s != step))
            write_json(out, kept)
            _plot({f"{model} {call}": known}, out.with_suffix(".png"))


@app.command()
def curves(
    sensitivities: Annotated[list[Path], typer.Argument(help="What ``sensitivity`` wrote, one file a model.")],
    to: Annotated[Path, typer.Option(help="Picture to write.")],
) -> None:
    """Draw several models' sensitivities in one plot."""
    known = {}
    for file in sensitivities:
        kept = json.loads(file.read_text(encoding="utf-8"))
        known[kept["settings"]["model"]] = kept["psnr_db"]
    _plot(known, to)


@app.command()
def rank(sensitivity: Annotated[Path, typer.Argument(help="What ``sensitivity`` wrote.")]) -> None:
    """Spearman correlations of what predicting a step costs with how much its probe differs from the step before's.

    As it is, as TeaCache compares it, and through SeaCache's filter; beside them the index, which needs no probe.

    Raises:
        typer.BadParameter: the noise or the grid of the tokens is not known.
    """
    kept = json.loads(sensitivity.read_text(encoding="utf-8"))
    of, known = kept["settings"], kept["psnr_db"]
    weights = None if of["weights"] == "None" else Path(of["weights"])
    pipe, chosen = _opened(of["model"], weights, json.dumps(of["call"]), of["samples"])
    measured = replace(chosen, calibration=chosen.measured[: of["samples"]])
    calibration = Calibration(pipe, measured, of["steps"], seed=0)
    grid, timeline = token_grid(calibration), calibration.timeline
    if grid is None or timeline is None:
        raise typer.BadParameter(f"SeaCache's filter does not know {of['model']}")
    probes = calibration.trajectories().probe
    filtered = [
        torch.stack([filtered_input(h, grid, noise) for h, noise in zip(probe, timeline.noise, strict=True)])
        for probe in probes
    ]
    parts = {"all": range(of["steps"]), "first half": range(of["steps"] // 2)}
    parts["second half"] = range(of["steps"] // 2, of["steps"])
    for title, part in parts.items():
        steps = [step for step in sorted(map(int, known)) if step in part]
        if len(steps) < 3:
            continue
        costs = [_rms(known[str(step)]) for step in steps]
        by = {name: [fmean(relative_l1(h[step], h[step - 1]) for h in features) for step in steps]
              for name, features in (("as it is", probes), ("filtered", filtered))}  # fmt: skip
        by["steps from the end"] = [-float(step) for step in steps]
        found = ", ".join(f"{name} {spearman(costs, values):+.2f}" for name, values in by.items())
        typer.echo(f"{title} ({len(steps)} steps): {found}")


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation of values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return 1 - 6 * float(np.square(ranks[0] - ranks[1]).sum()) / (len(one) ** 3 - len(one))


def _rms(psnr: Sequence[float]) -> float:
    """Root of the mean squared error, of 1, of samples with these PSNR, dB."""
    return fmean(10 ** (-value / 10) for value in psnr) ** 0.5


def _plot(known: dict[str, dict[str, list[float]]], file: Path) -> None:
    """Root of the mean squared error of the final picture, of 1, by the step that was predicted; a curve each."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for title, psnr in known.items():
        at = sorted(map(int, psnr))
        axes.plot(at, [_rms(psnr[str(step)]) for step in at], marker="o", ms=3, label=title)
    axes.set(xlabel="the predicted step", ylabel="RMS error of the final picture", yscale="log")
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    app()
