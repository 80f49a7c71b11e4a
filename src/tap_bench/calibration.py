"""What methods are tuned on: samples that are not measured, their full result, and recorded trajectories."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tap_bench import metrics
from tap_bench.counting import Counts, counted
from tap_bench.models import BenchModel, Drawn, draw
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.call import Call
from tap_diffusion.core.config import Probe, TAPConfig
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.timeline import Timeline

SEED = 10_000  # of the first calibration sample, far from those of the measured


@dataclass(frozen=True)
class Trajectories:
    """What full steps leave behind, of all branches in the order in which they are called.

    Attributes:
        probe: probe features h of each branch, (S, B, N, D'), for S steps.
        residual: residuals r of each branch, (S, B, N, D).
        output: hidden states after the last block of each branch, (S, B, N, D).
    """

    probe: list[Tensor]
    residual: list[Tensor]
    output: list[Tensor]


class Calibration:
    """Runs of the calibration samples.

    Args:
        pipe: the plain pipeline.
        model: whose calibration samples count.
        steps: of the full result.
        folder: where what has been fitted is kept; None keeps nothing.
        seed: of the first sample.
        apart: the same with other samples, to see whether what was searched for on these holds; None if there are none.
    """

    def __init__(
        self,
        pipe: Any,
        model: BenchModel,
        steps: int,
        folder: Path | None = None,
        seed: int = SEED,
        apart: Calibration | None = None,
    ) -> None:
        self.pipe, self.model, self.steps, self.seed, self.apart = pipe, model, steps, seed, apart
        self._folder = folder
        self.trajectories = cache(self._trajectories)

    @cached_property
    def full(self) -> Drawn:
        """The full result."""
        return self.run(None)[0]

    @cached_property
    def calls_per_step(self) -> int:
        """Full evaluations of the plain pipeline per step, one for each branch that is called separately."""
        with counted(self.pipe) as counts:
            draw(self.pipe, self.model, self.model.calibration[:1], self.seed, num_inference_steps=2)
        return counts.full // 2

    @cached_property
    def timeline(self) -> Timeline | None:
        """The noise of the pipeline's steps as its tokens see it; None where its scheduler does not tell."""
        seen: list[Timeline | None] = []

        class Look(Engine):
            def begin(self, call: Call) -> bool:
                if call.step == 0:
                    return super().begin(call)
                seen.append(self._timeline and replace(self._timeline, full=()))
                raise _SeenError

        variant = on_engine("", TAPConfig.paper(), Look)
        with suppress(_SeenError):
            run(self.pipe, self.model, variant, self.model.calibration[:1], self.seed, self.steps)
        return seen[0] if seen else None

    def run(self, variant: Variant | None, samples: int | None = None) -> tuple[Drawn, float]:
        """The first calibration samples or all, and the mean number of full steps; None runs the plain pipeline."""
        counts = Counts()
        conditions = self.model.calibration[:samples]
        drawn = run_all(self.pipe, self.model, variant, conditions, self.seed, self.steps, counts)
        batches = -(-len(conditions) // self.model.batch)
        return drawn, counts.full / self.calls_per_step / batches

    def quality(self, variant: Variant) -> tuple[float, float]:
        """Mean PSNR of a variant to the full result, dB, and its mean number of full steps."""
        full = self.full
        drawn, full_steps = self.run(variant)
        return float(metrics.psnr(drawn.pictures, full.pictures).mean()), full_steps

    def threshold(
        self, name: str, of: Callable[[float], Variant], budget: int, low: float, high: float, rounds: int = 10
    ) -> float:
        """The threshold with which a method's number of full steps comes closest to the budget, on the first batch.

        Args:
            name: of what is tuned, under which the threshold is kept.
            of: the variant with a threshold; the larger that is, the fewer steps are full.
            budget: full steps wanted.
            low, high: thresholds between which the right one lies, greater than 0.
            rounds: of bisection, on a logarithmic scale.
        """

        def search() -> float:
            below, above, found = low, high, []
            for _ in range(rounds):
                middle = (below * above) ** 0.5
                full_steps = self.run(of(middle), self.model.batch)[1]
                found.append((abs(full_steps - budget), middle))
                if full_steps == budget:
                    break
                below, above = (middle, above) if full_steps > budget else (below, middle)
            return min(found)[1]

        return float(self.fitted(f"{name}-{budget}", search))

    def fitted(self, name: str, fit: Callable[[], Any]) -> Any:
        """What ``fit`` returns (plain JSON), computed once for a run of the bench."""
        file = None if self._folder is None else self._folder / f"{name}.json"
        if file is not None and file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        value = fit()
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        return value

    def _trajectories(self, probe: Probe = "modulated_input") -> Trajectories:
        """What every step of the first batch of calibration samples leaves."""
        recorder = _Recorder(TAPConfig.paper(full_steps=tuple(range(self.steps)), probe=probe))
        variant = on_engine("all", recorder.config, lambda _: recorder)
        run(self.pipe, self.model, variant, self.model.calibration[: self.model.batch], self.seed, self.steps)
        kinds = recorder.probes, recorder.residuals, recorder.outputs
        return Trajectories(*([torch.stack(features) for features in kind.values()] for kind in kinds))


class _SeenError(Exception):
    """The first step has told what was to be known."""


class _Recorder(Engine):
    """Runs every step in full and keeps what it leaves."""

    needs_probe = True

    def __init__(self, config: TAPConfig) -> None:
        super().__init__(config)
        self.probes: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.residuals: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.outputs: defaultdict[str, list[Tensor]] = defaultdict(list)

    def record(self, call: Call, before: Tensor, after: Tensor, probe: Tensor | None, stream: str = "") -> None:
        assert probe is not None
        self.probes[call.branch + stream].append(probe.detach().clone())
        self.residuals[call.branch + stream].append((after - before).detach())
        self.outputs[call.branch + stream].append(after.detach().clone())

    def _say_how_it_went(self) -> None:
        """Every step is meant to be full."""


def run(pipe: Any, model: BenchModel, variant: Variant | None, conditions: Any, seed: int, steps: int) -> Drawn:
    """Draw one batch, accelerated by a variant; None is the plain pipeline."""
    if variant is None:
        return draw(pipe, model, conditions, seed, num_inference_steps=steps)
    with variant.applied(pipe) as change:
        return draw(pipe, model, conditions, seed, **{"num_inference_steps": steps} | (change or {}))


def run_all(
    pipe: Any, model: BenchModel, variant: Variant | None, conditions: Sequence[Any], seed: int, steps: int,
    counts: Counts, desc: str = "",
) -> Drawn:  # fmt: skip
    """Draw any number of samples, batch by batch, and add to the counts; ``desc`` shows progress under that name."""
    drawn = []
    for first in tqdm(range(0, len(conditions), model.batch), desc=desc, leave=False, disable=not desc):
        with counted(pipe, counts):
            drawn.append(run(pipe, model, variant, conditions[first : first + model.batch], seed + first, steps))
    return Drawn(torch.cat([d.latents for d in drawn]), torch.cat([d.pictures for d in drawn]))
