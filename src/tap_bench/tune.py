"""Planning which steps are full, for one model, number of steps and budget: a search on the final error.

As BudCache does, and unlike DPCache, which adds up open-loop errors of the steps, the search looks at what a schedule
does to the picture: errors compound and cancel along a trajectory. It starts from the best of the schedules on which
the bench tries every method, the recommended one among them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from tap_bench import metrics
from tap_bench.calibration import Calibration, run_all
from tap_bench.counting import Counts
from tap_bench.method import Setting, schedules
from tap_bench.models import BenchModel
from tap_bench.variant import on_engine
from tap_diffusion.apps.files import write_json
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.errors import UsageError
from tap_diffusion.core.schedule import spaced_steps

RADII = (3, 1)  # steps by which a full step is moved
EVALUATIONS = 60  # schedules tried for each budget


def search(
    quality: Callable[[tuple[int, ...]], float], starts: Sequence[Sequence[int]], steps: int, evaluations: int
) -> tuple[int, ...]:
    """Coordinate ascent from the best start: move one full step at a time, keep what is better, until nothing is.

    Args:
        quality: of a schedule; the larger, the better. Is asked once for each.
        starts: schedules to start from; the first full step stays.
        steps: of the trajectory.
        evaluations: schedules to ask about, at most; the starts are included, and all asked about.
    """
    tried = {full: quality(full) for full in dict.fromkeys(map(tuple, starts))}
    best = max(tried, key=tried.__getitem__)
    for radius in RADII:
        improved = True
        while improved:
            improved = False
            for i in range(len(best) - 1, 0, -1):
                for move in (-radius, radius):
                    other = (*best[:i], best[i] + move, *best[i + 1 :])
                    upper = other[i + 1] if i + 1 < len(other) else steps
                    if not other[i - 1] < other[i] < upper or other in tried:
                        continue
                    if len(tried) >= evaluations:
                        return best
                    tried[other] = quality(other)
                    if tried[other] > tried[best]:
                        best, improved = other, True
    return best


def recommended_steps(setting: Setting) -> tuple[int, ...]:
    """The full steps of ``TAPConfig(full_steps=budget)``."""
    return spaced_steps(TAPConfig(), setting.steps, setting.budget, setting.calibration.timeline)


@dataclass(frozen=True)
class Tuning:
    """Searches, one for each budget, in one folder.

    Attributes:
        model: whose calibration samples are searched on, and whose measured samples tell whether it was worth it.
        steps: of a trajectory.
        budgets: numbers of full steps.
        out: folder for the presets (``8.json``, a :class:`TAPConfig`), what was tried, and ``report.json``. What has
            been tried is not tried again.
        samples: to search on; verified: to verify on.
        evaluations: schedules tried for each budget.
    """

    model: BenchModel
    steps: int
    budgets: Sequence[int]
    out: Path
    samples: int = 16
    verified: int = 32
    evaluations: int = EVALUATIONS

    def run(self) -> list[dict[str, Any]]:
        """Search, verify, write the presets; return what ``report.json`` holds, a row for each budget.

        Raises:
            UsageError: the folder holds the search of something else.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        settings = {"model": self.model.name, "steps": self.steps, "samples": self.samples, "config": _shared()}
        file = self.out / "settings.json"
        if file.exists() and json.loads(file.read_text(encoding="utf-8")) != settings:
            raise UsageError(
                f"{self.out} holds the search of another model or with other settings; give another folder"
            )
        write_json(file, settings)
        pipe = self.model.load()
        pipe.set_progress_bar_config(disable=True)
        tuned_on = replace(self.model, calibration=self.model.calibration[: self.samples])
        calibration = Calibration(pipe, tuned_on, self.steps)
        conditions = list(self.model.measured[: self.verified])

        def pictures(config: TAPConfig | None) -> Any:
            variant = None if config is None else on_engine("", config)
            return run_all(pipe, self.model, variant, conditions, 0, self.steps, Counts(), "verifying").pictures

        rows = []
        full = None
        for budget in self.budgets:
            setting = Setting(pipe, self.steps, budget, calibration)
            start = recommended_steps(setting)
            found = self._search(setting, start)
            row: dict[str, Any] = {"budget": budget, "recommended": list(start), "planned": list(found), "gain_db": 0.0}
            if found != start:
                full = pictures(None) if full is None else full
                psnr = [metrics.psnr(pictures(self._preset(steps)), full).tolist() for steps in (start, found)]
                gains = [own - other for own, other in zip(psnr[1], psnr[0], strict=True)]
                row |= {"recommended_db": fmean(psnr[0]), "planned_db": fmean(psnr[1]), "gain_db": fmean(gains)}
                row["gain_ci"] = metrics.bootstrap_interval(gains)
            row["kept"] = "planned" if row["gain_db"] > 0 else "recommended"
            self._preset(found if row["kept"] == "planned" else start).save(self.out / f"{budget}.json")
            rows.append(row)
            write_json(self.out / "report.json", rows)
        return rows

    def _preset(self, full_steps: tuple[int, ...]) -> TAPConfig:
        return TAPConfig(full_steps=full_steps, steps=self.steps)

    def _search(self, setting: Setting, recommended: tuple[int, ...]) -> tuple[int, ...]:
        file = self.out / f"tried-{setting.budget}.json"
        tried: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        with tqdm(total=self.evaluations, desc=f"{setting.budget} full steps", unit="schedule") as progress:

            def quality(full_steps: tuple[int, ...]) -> float:
                key = ",".join(map(str, full_steps))
                if key not in tried:
                    tried[key] = setting.calibration.quality(on_engine("", self._preset(full_steps)))[0]
                    write_json(file, tried)
                progress.update()
                progress.set_postfix(best=f"{max(tried.values()):.2f} dB")
                return tried[key]

            return search(quality, [recommended, *schedules(setting).values()], self.steps, self.evaluations)


def _shared() -> dict[str, Any]:
    """What all presets have in common."""
    return TAPConfig(full_steps=1).to_dict() | {"full_steps": None}
