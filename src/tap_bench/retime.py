"""Timing the cells of a report again, on this machine, without tuning or measuring anything.

    python -m tap_bench.retime docs/bench/emoji --out out/emoji

Every cell runs as the report says that it was tuned. The output folder gets the report with these times, and none of
those that it had. A call that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tap_bench.bench import SUITES, environment
from tap_bench.calibration import Calibration, run
from tap_bench.counting import counted
from tap_bench.method import Method, Setting
from tap_bench.methods import registry
from tap_bench.models import MODELS
from tap_bench.report import Cell, read_cells, renew_report
from tap_bench.timing import cell_name, read_times, speedup, stopwatch, time_cells
from tap_bench.variant import Variant
from tap_diffusion.apps.files import write_json
from tap_diffusion.core.errors import UsageError

FITTED = {"teacache": "coefficients", "diffusers-magcache-ratios": "mag_ratios"}  # the setting that tells it
OTHERS = ("threshold", "residual_diff_threshold", "full_steps")
AGAIN = ("magcache", "l2p")  # of which settings tell only what came of it


class Told(Calibration):
    """A calibration that takes what was fitted from a cell's settings, as far as they tell it."""

    settings: Mapping[str, Any]

    def fitted(self, name: str, fit: Callable[[], Any]) -> Any:
        """As the base class where no setting tells it."""
        known = [FITTED[name]] if name in FITTED else [setting for setting in OTHERS if setting in self.settings]
        return self.settings[known[0]] if known and name not in AGAIN else super().fitted(name, fit)


def rebuilt(cell: Cell, method: Method, pipe: Any, calibration: Told) -> Variant:
    """The variant that a cell was measured with.

    Raises:
        UsageError: the method has no such variant now.
    """
    calibration.settings = cell["settings"]
    for variant in method.variants(Setting(pipe, cell["steps"], cell["budget"], calibration)):
        if variant.schedule == cell["schedule"]:
            now = json.loads(json.dumps(variant.settings))
            differing = [name for name, value in cell["settings"].items() if not _same(value, now.get(name, ""))]
            if differing:
                raise UsageError(
                    f"{cell['method']} at {cell['budget']} is no longer what the report has: {', '.join(differing)}"
                )
            return variant
    raise UsageError(f"{cell['method']} at {cell['budget']} has no schedule '{cell['schedule']}' any more")


def _same(told: Any, now: Any) -> bool:
    if isinstance(told, float) and isinstance(now, float):
        return math.isclose(told, now, rel_tol=1e-3)  # what has been fitted again
    return now is None or bool(told == now)  # None: left to the model, as it was not always


def check(cell: Cell, variant: Variant, pipe: Any, calibration: Told) -> None:
    """Run one sample, and see that it takes about as many full steps as the cell's did, whose threshold knew others.

    Raises:
        UsageError: it does not.
    """
    with counted(pipe) as counts:
        run(pipe, calibration.model, variant, calibration.model.measured[:1], 0, cell["steps"])
    found = counts.full / calibration.calls_per_step
    if abs(found - cell["full_steps"]) > 1 + 0.3 * cell["full_steps"]:
        raise UsageError(
            f"{cell['method']} at {cell['budget']} takes {found:.4g} full steps where the report has"
            f" {cell['full_steps']:.4g}: it no longer does what was measured"
        )


def retime(report: Path, out: Path, budgets: Sequence[int] | None = None, repeats: int = 3, samples: int = 4) -> None:
    """Time the cells of a report, or those of some budgets, and write it with these times.

    Args:
        report: folder of a finished run of one of the bench's own models.
        out: another folder.
        budgets: full evaluations; None are all that the report has.
        repeats: timed runs of each cell.
        samples: in each of them.

    Raises:
        UsageError: the folder holds no such run, or a cell of it can't be run as it was.
    """
    cells = read_cells(report)
    full = cells[0]
    if full["model"] not in MODELS:
        raise UsageError(f"only reports of {', '.join(MODELS)} can be timed again, not of {full['model']}")
    known = registry()
    for name in {cell["method"] for cell in cells[1:]} - known.keys():
        raise UsageError(f"{report} has a method that the bench has not: {name}")
    model = MODELS[full["model"]]()
    dtype = json.loads((report / "run.json").read_text(encoding="utf-8")).get("dtype", "float32")
    if dtype != model.dtype:
        model = model.loaded_as(getattr(torch, dtype))
    pipe = model.load()
    pipe.set_progress_bar_config(disable=True)
    count = SUITES["standard"].tuned_on
    calibration = Told(pipe, replace(model, calibration=model.calibration[:count]), full["steps"], out / "calibration")
    wanted = [cell for cell in cells[1:] if budgets is None or cell["budget"] in budgets]
    if not wanted:
        raise UsageError(f"{report} has no budget of {', '.join(map(str, budgets or ()))}")
    chosen = {}
    for cell in tqdm(wanted, desc="rebuilding", unit="cell"):
        variant = rebuilt(cell, known[cell["method"]], pipe, calibration)
        check(cell, variant, pipe, calibration)
        chosen[cell_name(cell["method"], cell["budget"])] = variant
    _settle(report, out, {"repeats": repeats, "samples": samples} | environment())
    time_cells(chosen, stopwatch(pipe, model, samples, full["steps"]), repeats, out / "times.json")
    write_times(out, read_times(out / "times.json"))
    renew_report(out)


def _settle(report: Path, out: Path, timed: dict[str, Any]) -> None:
    """Copy the report and keep with it how it is timed, or see that this has been done."""
    file = out / "run.json"
    try:
        facts = json.loads((report / "run.json").read_text(encoding="utf-8"))
        if not file.exists():
            out.mkdir(parents=True, exist_ok=True)
            for name in ("results.json", "samples.parquet", "report.html"):
                shutil.copy2(report / name, out / name)
            write_json(file, facts | {"timed": timed | {"on": datetime.now(UTC).strftime("%Y-%m-%d")}})
    except OSError as error:
        raise UsageError(f"the folder {report} holds no finished run of the bench: {error}") from error
    known = json.loads(file.read_text(encoding="utf-8"))
    if known != facts | {"timed": timed | {"on": known.get("timed", {}).get("on")}}:
        raise UsageError(f"the folder {out} holds another report, or one timed otherwise; choose another --out")


def write_times(out: Path, times: Mapping[str, Sequence[float]]) -> None:
    """Put ratios in the cells of a folder, in place of those that are there."""
    cells = read_cells(out)
    for cell in cells[1:]:
        cell |= speedup(times.get(cell_name(cell["method"], cell["budget"]), []))
    write_json(out / "results.json", cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tap_bench.retime", description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path, help="folder of a finished run of the bench")
    parser.add_argument("--out", type=Path, required=True, help="another folder")
    parser.add_argument("--budgets", type=lambda text: [int(part) for part in text.split(",")], help="like 14,10,8,6")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each cell")
    parser.add_argument("--samples", type=int, default=4, help="in each of them")
    given = parser.parse_args(arguments)
    try:
        retime(given.report, given.out, given.budgets, given.repeats, given.samples)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
