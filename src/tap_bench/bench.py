"""Running the bench: tune every method, measure it at its best, time it beside the plain pipeline.

The output folder holds the settings, the full results, one JSON per method and budget of what was tried, one Parquet
file per cell of what was measured, and the times. What is there is not done again.
"""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from tap_bench import BASELINE, metrics
from tap_bench.calibration import SEED, Calibration, run, run_all
from tap_bench.counting import Counts, flops, live_bytes
from tap_bench.method import Method, Setting
from tap_bench.models import BenchModel, Drawn
from tap_bench.timing import cell_name, read_times, speedup, stopwatch, time_cells
from tap_bench.variant import Variant
from tap_diffusion import __version__
from tap_diffusion.apps.files import write_json, write_whole
from tap_diffusion.apps.media import check_videos, encoded
from tap_diffusion.apps.pipelines import frames_argument
from tap_diffusion.apps.sheets import sheet
from tap_diffusion.core.errors import UsageError

SHOWN = 8  # samples of each cell that are kept as pictures; of videos half as many
LARGEST = 256  # pixels of their longer side
LONGEST = 180  # characters of a prompt in a file's name


@dataclass(frozen=True)
class Suite:
    """How much is done.

    Attributes:
        samples: measured in each cell.
        tuned_on: calibration samples; as many more, where there are, tell whether a plan made on them holds.
        budgets: full evaluations, where none are given.
        methods: names, or None for all.
        timed: samples in each timed run; repeats: timed runs of each cell.
    """

    samples: int
    tuned_on: int
    budgets: tuple[int, ...]
    methods: tuple[str, ...] | None
    timed: int
    repeats: int


QUICK = ("tap", "tap-paper", "fora", "taylorseer-1", "euler", "adams-bashforth-2", "ddim")
SUITES = {
    "quick": Suite(8, 8, (8,), QUICK, 4, 1),
    "standard": Suite(64, 16, (14, 10, 8, 6), None, 4, 3),
    "paper": Suite(200, 32, (14, 10, 8, 6), None, 1, 5),
}


class Bench:
    """One run of the bench, in one folder.

    Args:
        model: to run on.
        methods: by name.
        suite: how much is done.
        budgets: full evaluations per trajectory.
        out: the folder.
        steps: of the full result.
        keep: every sample as a file of its own in ``samples``, for scores that this bench doesn't have.

    Raises:
        UsageError: the folder holds a run with other settings.
    """

    def __init__(
        self,
        model: BenchModel,
        methods: Mapping[str, Method],
        suite: Suite,
        budgets: Sequence[int],
        out: Path,
        steps: int = 50,
        keep: bool = False,
    ) -> None:
        self.keep = keep
        self.model, self.methods, self.suite, self.budgets = model, methods, suite, budgets
        self.out, self.steps = out, steps
        self._settle()
        self.pipe = model.load()
        self.pipe.set_progress_bar_config(disable=True)
        if keep and frames_argument(self.pipe) is not None:
            check_videos()
        self.measured = list(model.measured[: suite.samples])
        count = suite.tuned_on
        tuned_on, other = (replace(model, calibration=model.calibration[i : i + count]) for i in (0, count))
        apart = Calibration(self.pipe, other, steps, seed=SEED + count) if other.calibration else None
        self.calibration = Calibration(self.pipe, tuned_on, steps, out / "calibration", apart=apart)

    def run(self) -> list[dict[str, Any]]:
        """Do what is left to do; return the cells and write ``results.json`` and ``samples.parquet``.

        Raises:
            UsageError: no method can do any of the budgets on this model.
        """
        wanted = [(method, budget) for budget in self.budgets for method in self.methods.values()]
        chosen: dict[tuple[str, int], Variant] = {}
        for method, budget in tqdm(wanted, desc="tuning", unit="method"):
            variant = self._tune(method, budget)
            if variant is not None:
                chosen[method.name, budget] = variant
        if not chosen:
            budgets = ", ".join(map(str, self.budgets))
            raise UsageError(
                f"none of {', '.join(self.methods)} can do {budgets} full evaluations on {self.model.name}; name others"
            )
        for (name, budget), variant in tqdm(chosen.items(), desc="measuring", unit="cell"):
            self._measure(self.methods[name], budget, variant)
        seconds = stopwatch(self.pipe, self.model, self.suite.timed, self.steps)
        variants = {cell_name(*cell): variant for cell, variant in chosen.items()}
        time_cells(variants, seconds, self.suite.repeats, self.out / "times.json")
        return self._collect()

    # ------------------------------------------------------------------------------------------------- full results

    @cached_property
    def full(self) -> Drawn:
        """The plain pipeline's results."""
        file = self.out / "full.safetensors"
        if not file.exists():
            drawn = self._draw(None, Counts(), "full results")
            save_file({"latents": drawn.latents, "pictures": drawn.pictures}, file)
        tensors = load_file(file)
        return Drawn(tensors["latents"], tensors["pictures"])

    def _draw(self, variant: Variant | None, counts: Counts, desc: str) -> Drawn:
        return run_all(self.pipe, self.model, variant, self.measured, 0, self.steps, counts, desc)

    def _show(self, drawn: Drawn, name: str) -> None:
        """Keep the first samples as a sheet, a row for each video."""
        pictures = drawn.pictures[: SHOWN if drawn.pictures.ndim == 4 else SHOWN // 2]
        frames = pictures.flatten(0, -4).expand(-1, 3, -1, -1)
        if max(frames.shape[-2:]) > LARGEST:
            share = LARGEST / max(frames.shape[-2:])
            frames = F.interpolate(frames, scale_factor=share, mode="bilinear", antialias=True)
        per_row = len(frames) if pictures.ndim == 4 else pictures.shape[1]
        (self.out / "pictures").mkdir(exist_ok=True)
        sheet(list((2 * frames - 1).split(per_row))).save(self.out / "pictures" / f"{name}.png")

    def _keep(self, drawn: Drawn, folder: Path) -> None:
        """Write all samples, each named by what was asked for and which of its samples it is, as VBench wants it."""
        partial = folder.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        count: Counter[str] = Counter()
        for sample, condition in zip(2 * drawn.pictures - 1, self.measured, strict=True):
            title = str(condition).replace("/", " ")[:LONGEST]
            suffix, content = encoded(sample.expand(*sample.shape[:-3], 3, -1, -1))
            (partial / f"{title}-{count[title]}{suffix}").write_bytes(content)
            count[title] += 1
        partial.rename(folder)

    # ------------------------------------------------------------------------------------------------------ the cells

    def _tune(self, method: Method, budget: int) -> Variant | None:
        """The method's best variant on the calibration samples; None where it has none here."""
        setting = Setting(self.pipe, self.steps, budget, self.calibration)
        file = self.out / "tuning" / f"{cell_name(method.name, budget)}.json"
        file.parent.mkdir(exist_ok=True)
        variants = list(method.variants(setting)) if not file.exists() else []
        if not file.exists():
            tried = []
            for variant in variants:
                if len(variants) > 1:
                    quality, full_steps = self.calibration.quality(variant)
                else:
                    quality, full_steps = None, None
                tried.append(
                    {"schedule": variant.schedule, "psnr_db": quality, "full_steps": full_steps,
                     "settings": variant.settings}
                )  # fmt: skip
            write_json(file, tried)
        tried = json.loads(file.read_text(encoding="utf-8"))
        if not tried:
            return None
        best = max(tried, key=lambda entry: entry["psnr_db"] or 0.0)["schedule"]
        variants = variants or list(method.variants(setting))
        return next(variant for variant in variants if variant.schedule == best)

    def _measure(self, method: Method | None, budget: int, variant: Variant | None) -> None:
        """Measure one cell, or without method the full model, unless it has been measured."""
        name = "full" if method is None else cell_name(method.name, budget)
        file, kept = self.out / "cells" / f"{name}.parquet", self.out / "samples" / name
        if file.exists() and (kept.exists() or not self.keep):
            return
        full, counts = self.full, Counts()
        drawn = full if variant is None else self._draw(variant, counts, name)
        batches = -(-len(self.measured) // self.model.batch)
        calls = counts.all // batches or self.steps * self.calibration.calls_per_step
        rows: dict[str, Any] = {
            "model": [self.model.name] * len(self.measured),
            "method": ["full" if method is None else method.name] * len(self.measured),
            "budget": [budget] * len(self.measured),
            "seed": list(range(len(self.measured))),
            "condition": [str(condition) for condition in self.measured],
        }
        if variant is not None:
            rows |= {
                "psnr_db": metrics.psnr(drawn.pictures, full.pictures).tolist(),
                "ssim": metrics.ssim(drawn.pictures, full.pictures).tolist(),
                "latent_error": metrics.latent_error(drawn.latents, full.latents).tolist(),
            }
            for distance in self.model.distances:
                rows |= distance(drawn.pictures, full.pictures)
        for score in self.model.scores:
            rows |= score(drawn.pictures, self.measured)
        facts = {
            "schedule": "every step" if variant is None else variant.schedule,
            "settings": {} if variant is None else variant.settings,
            "full_steps": self.steps if variant is None else counts.full / batches / self.calibration.calls_per_step,
            "scores": {
                name: value
                for score in self.model.set_scores
                for name, value in score(drawn.pictures, self.measured).items()
            },
        } | self._costs(variant, calls)
        self._show(drawn, name)
        if self.keep and not kept.exists():
            self._keep(drawn, kept)
        file.parent.mkdir(exist_ok=True)
        table = pa.table(rows).replace_schema_metadata({"facts": json.dumps(facts)})
        write_whole(file, lambda partial: pq.write_table(table, partial))

    def _costs(self, variant: Variant | None, calls: int) -> dict[str, int]:
        """Floating-point operations of one sample, and the most bytes of tensors that were seen alive at once."""
        with live_bytes(self.pipe, every=max(1, calls // 4)) as found, flops() as counter:
            run(self.pipe, self.model, variant, self.measured[:1], 0, self.steps)
        return {"flops": counter.get_total_flops(), "live_bytes": max(found, default=0)}

    # --------------------------------------------------------------------------------------------------- the results

    def _collect(self) -> list[dict[str, Any]]:
        self._measure(None, self.steps, None)
        tables = {file.stem: pq.read_table(file) for file in sorted((self.out / "cells").glob("*.parquet"))}
        joined = pa.concat_tables(tables.values(), promote_options="default")
        write_whole(self.out / "samples.parquet", lambda partial: pq.write_table(joined, partial))
        times = read_times(self.out / "times.json")
        full = tables.pop("full")
        cells = [self._cell("full", "full", self.steps, full, full, None, times)]
        for budget in self.budgets:
            baseline = tables.get(f"{BASELINE}-{budget}")
            for method in self.methods.values():
                table = tables.get(cell_name(method.name, budget))
                if table is not None:
                    cells.append(self._cell(method.name, method.kind, budget, table, full, baseline, times))
        write_json(self.out / "results.json", cells)
        return cells

    def _cell(
        self, method: str, family: str, budget: int, table: pa.Table, full: pa.Table, baseline: pa.Table | None,
        times: Mapping[str, list[float]],
    ) -> dict[str, Any]:  # fmt: skip
        facts, plain = (json.loads(t.schema.metadata[b"facts"]) for t in (table, full))
        values = {name: table[name].to_pylist() for name in table.column_names}
        cell = {
            "model": self.model.name,
            "method": method,
            "family": family,
            "source": self.methods[method].source if method in self.methods else "",
            "schedule": facts["schedule"],
            "budget": budget,
            "full_steps": facts["full_steps"],
            "steps": self.steps,
            "samples": len(table),
            "evaluations_speedup": self.steps / facts["full_steps"],
            "flops_speedup": plain["flops"] / facts["flops"],
            **speedup(times.get(cell_name(method, budget), [])),
            "memory_bytes": max(0, facts["live_bytes"] - plain["live_bytes"]),
            "settings": facts["settings"],
        }
        if "psnr_db" in values:
            cell |= {"psnr_db": fmean(values["psnr_db"]), "psnr_ci": metrics.bootstrap_interval(values["psnr_db"])}
            cell["psnr_p10_db"] = float(np.percentile(values["psnr_db"], 10))  # the mean hides one bad sample in ten
            cell |= {name: fmean(values[name]) for name in ("ssim", "latent_error")}
            if baseline is not None and method != BASELINE:
                cell |= metrics.difference(values["psnr_db"], baseline["psnr_db"].to_pylist())
        known = {"model", "method", "budget", "seed", "condition", "psnr_db", "ssim", "latent_error"}
        means = {name: fmean(column) for name, column in values.items() if name not in known}
        cell["scores"] = means | facts["scores"]
        return cell

    def _settle(self) -> None:
        """Keep the settings in the folder, or see that they are the same."""
        self.out.mkdir(parents=True, exist_ok=True)
        settings = {
            "model": self.model.name,
            "steps": self.steps,
            "suite": asdict(self.suite) | {"methods": None, "budgets": None},
            "scores": list(self.model.extra),
            "dtype": self.model.dtype,
        } | environment()
        file = self.out / "run.json"
        if file.exists():
            known = json.loads(file.read_text(encoding="utf-8"))
            known = {"scores": [], "dtype": self.model.dtype} | known  # older runs don't tell
            for name in ("model", "steps", "suite", "scores", "dtype", "versions"):
                if known[name] != json.loads(json.dumps(settings[name])):
                    raise UsageError(
                        f"the folder {self.out} holds a run with {name} {known[name]},"
                        f" not {settings[name]}; choose another --out"
                    )
        else:
            write_json(file, settings)


def environment() -> dict[str, dict[str, Any]]:
    """What the bench runs with, and on."""
    return {
        "versions": {
            "tap_diffusion": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def _processor() -> str:
    """The processor's or GPU's name, as far as the system tells."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
