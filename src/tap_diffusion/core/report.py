"""What a trajectory did and what it cost."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tap_diffusion.core.predictors import Candidate


def stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start timing. The function returned stops, and returns a function that gives the milliseconds.

    On a GPU events measure, without waiting; asking for the milliseconds waits.
    """
    if device.type != "cuda":
        start = time.perf_counter()

        def stop() -> Callable[[], float]:
            elapsed = 1000 * (time.perf_counter() - start)
            return lambda: elapsed

        return stop
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()

    def stop_event() -> Callable[[], float]:
        end.record()

        def milliseconds() -> float:
            end.synchronize()
            return begin.elapsed_time(end)

        return milliseconds

    return stop_event


@dataclass(frozen=True)
class Choice:
    """Which candidate each token took at one predicted step of one branch."""

    step: int
    branch: str
    candidates: list[Candidate]
    index: Tensor  # (B, N) uint8, into candidates
    loss: Tensor | None = None  # (B, N), proxy loss of what was taken, where an engine keeps it

    def of(self, samples: slice) -> Choice:
        """The same of some samples of the batch."""
        return replace(self, index=self.index[samples], loss=None if self.loss is None else self.loss[samples])


@dataclass(repr=False)
class Report:
    """One trajectory: counts of steps, times, what was chosen, memory.

    Attributes:
        fallbacks: calls that were to be predicted and ran in full, by reason.
        cache_bytes: the most that the caches of all branches held together.
        choices: of the predicted calls.
        calls: step, whether it ran in full, and a function that gives its time in milliseconds.
        trajectories: how many have begun since TAP was enabled, this one included.
        notes: what else is worth knowing, such as why the scheduler's noise is not made use of.
    """

    trajectories: int = 0
    cache_bytes: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    choices: list[Choice] = field(default_factory=list)
    calls: list[tuple[int, bool, Callable[[], float]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def joined(cls, reports: Sequence[Report]) -> Report:
        """One report of several transformers' trajectories, their steps one after the other."""
        joined = cls(trajectories=max(report.trajectories for report in reports))
        for report in reports:
            offset = joined.steps
            joined.calls += [(offset + step, full, milliseconds) for step, full, milliseconds in report.calls]
            joined.choices += [replace(choice, step=offset + choice.step) for choice in report.choices]
            joined.fallbacks += report.fallbacks
            joined.cache_bytes += report.cache_bytes
            joined.notes += [note for note in report.notes if note not in joined.notes]
        return joined

    @property
    def steps(self) -> int:
        """Steps so far. A step is all calls at one timestep, one for each branch."""
        return len({step for step, _, _ in self.calls})

    @property
    def full_steps(self) -> int:
        """Steps in which a branch ran every block."""
        return len({step for step, full, _ in self.calls if full})

    @property
    def predicted_steps(self) -> int:
        """Steps in which every branch was predicted."""
        return self.steps - self.full_steps

    @property
    def full_calls(self) -> int:
        """Calls of the transformer that ran every block, all branches."""
        return sum(full for _, full, _ in self.calls)

    @property
    def predicted_calls(self) -> int:
        """Calls of the transformer that were predicted, all branches."""
        return len(self.calls) - self.full_calls

    @property
    def evaluations_speedup(self) -> float:
        """Calls for each full one; nan where there is none."""
        return len(self.calls) / self.full_calls if self.full_calls else float("nan")

    @property
    def times_faster(self) -> float:
        """How many times as long full steps alone would have taken in the transformer; nan where there is none."""
        total = sum(milliseconds() for _, _, milliseconds in self.calls)
        return self.steps * self.full_step_ms / total if total else float("nan")

    @property
    def full_step_ms(self) -> float:
        """Median time in the transformer per full step; nan where there is none."""
        return self._step_ms(full=True)

    @property
    def predicted_step_ms(self) -> float:
        """Median time in the transformer per predicted step; nan where there is none."""
        return self._step_ms(full=False)

    def _step_ms(self, full: bool) -> float:
        total: defaultdict[int, float] = defaultdict(float)
        for step, _, milliseconds in self.calls:
            total[step] += milliseconds()
        full_steps = {step for step, is_full, _ in self.calls if is_full}
        values = [value for step, value in total.items() if (step in full_steps) == full]
        return median(values) if values else float("nan")

    def shares(self) -> dict[str, float]:
        """Share of tokens that took each order, over all predicted calls."""
        counts: Counter[str] = Counter()
        for choice in self.choices:
            for i, count in enumerate(torch.bincount(choice.index.flatten().long()).tolist()):
                counts[f"order {choice.candidates[i].order}"] += count
        return {name: counts[name] / counts.total() for name in sorted(counts)}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the maps of choices, as JSON takes it."""
        names = (
            "trajectories", "steps", "full_steps", "predicted_steps", "full_calls", "predicted_calls",
            "evaluations_speedup", "full_step_ms", "predicted_step_ms", "cache_bytes",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {
            "fallbacks": dict(self.fallbacks),
            "notes": list(self.notes),
            "choices": self.shares(),
        }

    def _lines(self) -> list[tuple[str, str]]:
        """What is shown: a name, which may be empty, and what there is to say of it."""
        if not self.calls:
            return [("TAP:", "nothing has run yet")]
        steps = (
            f"{self.steps} steps, {self.full_steps} full and {self.predicted_steps} predicted"
            f" ({self.evaluations_speedup:.2f}x fewer evaluations)"
        )
        predicted = f", per predicted step {self.predicted_step_ms:.1f} ms" if self.predicted_steps else ""
        lines = [
            ("TAP:", steps),
            ("time", f"per full step {self.full_step_ms:.1f} ms{predicted}"),
            ("cache", f"{self.cache_bytes / 1e6:.2f} MB"),
        ]
        if shares := self.shares():
            lines.append(("tokens by predictor:", ", ".join(f"{name} {share:.0%}" for name, share in shares.items())))
        lines += [(f"{count} calls", f"fell back to a full step: {reason}") for reason, count in self.fallbacks.items()]
        return lines + [("", note) for note in self.notes]

    def __str__(self) -> str:
        return "\n  ".join(f"{name} {text}".strip() for name, text in self._lines())

    __repr__ = __str__  # not the maps of choices, which are long

    def _repr_html_(self) -> str:
        """A small table, for notebooks."""
        rows = (f"<tr><th>{escape(name.rstrip(':'))}</th><td>{escape(text)}</td></tr>" for name, text in self._lines())
        return f"<table>{''.join(rows)}</table>"
