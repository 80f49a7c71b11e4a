"""Whole denoising loops at true size, of TAP and of other packages' caches with as many full steps."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

from tap_bench.calibration import Calibration, run
from tap_bench.counting import counted
from tap_bench.method import Method, Setting
from tap_bench.methods import registry
from tap_bench.models import BenchModel
from tap_bench.profile.subjects import Subject
from tap_bench.profile.timing import peak_memory
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.config import TAPConfig

METHODS = (
    "tap", "tap-offload", "diffusers-taylorseer-1", "diffusers-taylorseer-lite-1", "diffusers-first-block", "cache-dit",
    "cache-dit-taylorseer-1",
)  # fmt: skip


class Loops:
    """Denoising loops of one pipeline, accelerated or not, one beside the other.

    Args:
        subject: a transformer of true size.
        steps: of a trajectory.
        full_steps: how many are full, of every method.
        repeats: timed runs of each; medians count.
    """

    def __init__(self, subject: Subject, steps: int, full_steps: int, repeats: int) -> None:
        self.subject, self.steps, self.full_steps, self.repeats = subject, steps, full_steps, repeats
        self.samples = [0] * subject.pipe.shape[0]
        self.model = BenchModel(
            subject.name, lambda: subject.pipe, self.samples, self.samples, lambda _: {}, batch=len(self.samples)
        )

    def methods(self) -> dict[str, Any]:
        """Seconds, speed-up over the plain loop, full steps and peak memory of each method; null where it can't run."""
        known = registry() | {"tap-offload": Method("tap-offload", "tap", "TAPConfig(offload='cpu')", self._offload)}
        setting = Setting(
            self.subject.pipe, self.steps, self.full_steps, _Quicker(self.subject.pipe, self.model, self.steps)
        )
        variants: dict[str, Variant | None] = {"plain": None}
        missing = []
        for name in METHODS:
            variant = next(iter(known[name].variants(setting)), None)
            if variant is None:
                missing.append(name)
            else:
                variants[name] = variant
        return self._compared(variants) | dict.fromkeys(missing)

    def compiled(self, backend: str) -> dict[str, Any]:
        """The plain loop and TAP's after the model's repeated blocks have been compiled."""
        transformer: Any = self.subject.pipe.transformer
        transformer.compile_repeated_blocks(backend=backend)
        tap = on_engine("TAP's", TAPConfig(full_steps=self.full_steps))
        return self._compared({"plain": None, "tap": tap}, counting=False)

    def _offload(self, setting: Setting) -> Iterator[Variant]:
        yield on_engine("TAP's", TAPConfig(full_steps=setting.budget, offload="cpu"))

    def _compared(self, variants: dict[str, Variant | None], counting: bool = True) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = {}
        for name, variant in variants.items():
            rows[name] = attempted(partial(self._warm_up, variant, counting))
        for _ in range(self.repeats):
            for name, row in rows.items():
                if "error" not in row:
                    row.setdefault("seconds_each", []).append(self._seconds(variants[name]))
        for row in rows.values():
            if "error" not in row:
                row["seconds"] = median(row["seconds_each"])
                row["speedup"] = median(rows["plain"]["seconds_each"]) / row["seconds"]
        return rows

    def _warm_up(self, variant: Variant | None, counting: bool) -> dict[str, Any]:
        with peak_memory(self.subject.device) as peak:
            if not counting:  # which would compile anew at each call
                self._seconds(variant)
                return {"peak_bytes": peak()}
            with counted(self.subject.pipe) as counts:
                self._seconds(variant)
            return {"full_steps": counts.full, "peak_bytes": peak()}

    def _seconds(self, variant: Variant | None) -> float:
        stop = self.subject.stopwatch()
        run(self.subject.pipe, self.model, variant, self.samples, 0, self.steps)
        return stop()() / 1000


def attempted(section: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """What a section returns, or what went wrong: the others are to run nevertheless."""
    try:
        return section() or {}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


class _Quicker(Calibration):
    """Thresholds in fewer rounds: a full step more or less does not change what a step costs."""

    def threshold(
        self, name: str, of: Callable[[float], Variant], budget: int, low: float, high: float, rounds: int = 5
    ) -> float:
        return super().threshold(name, of, budget, low, high, rounds)
