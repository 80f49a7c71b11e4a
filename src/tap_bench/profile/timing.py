"""Timing trajectories, their calls and the parts of the predicted ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tap_bench.profile.subjects import Subject
from tap_bench.profile.watching import PARTS, EnoughError, watched
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.integrations.diffusers.api import report, transformers

Milliseconds = Callable[[], float]  # on a GPU, asking waits


class _Timer:
    """Times every call, the parts of the predicted ones, and the whole trajectory."""

    def __init__(self, subject: Subject, beside: bool = True) -> None:
        self.calls: dict[str, list[Milliseconds]] = {"plain": [], "full": [], "predicted": []}
        self.parts: list[list[tuple[str, Milliseconds]]] = []  # of each predicted call
        self.spans: list[Milliseconds] = []  # from step to step of the scheduler
        self._stopwatch, self._beside = subject.stopwatch, beside
        self._span: Callable[[], Milliseconds] | None = None
        self._entered: list[tuple[str, Milliseconds]] = []

    def begin(self) -> None:
        if self._span is None:
            self._span = self._stopwatch()
        self._call, self._entered = self._stopwatch(), []
        self._part, self._since = "rest", self._stopwatch()

    def enter(self, part: str) -> None:
        self._entered.append((self._part, self._since()))
        self._part, self._since = part, self._stopwatch()

    def end(self, full: bool, plain: Callable[[], Any]) -> None:
        self.enter("")
        self.calls["full" if full else "predicted"].append(self._call())
        if not full:
            self.parts.append(self._entered)
        elif self._beside:
            stop = self._stopwatch()
            plain()
            self.calls["plain"].append(stop())

    def step(self) -> None:
        assert self._span is not None
        self.spans.append(self._span())
        self._span = self._stopwatch()


def measure(subject: Subject, config: TAPConfig, steps: int, repeats: int) -> dict[str, Any]:
    """Run trajectories and time them.

    Returns:
        ``plain_ms``, ``full_ms`` and ``predicted_ms``: medians over the calls of the plain model, and of TAP's two
        kinds (a full one in which hindsight looks back holds a predicted one as well); ``parts_ms`` of a predicted
        call; ``loop``: of the whole denoising loop, where the plain one is put together from the median plain call
        and what the pipeline does between calls; ``cache_bytes``, ``branches``, ``choosing``.
    """
    totals: dict[str, list[float]] = {"plain": [], "full": [], "predicted": []}
    parts: list[dict[str, float]] = []
    tap_ms, between_ms = [], []
    for _ in range(repeats):
        timer = _Timer(subject)
        with watched(subject.pipe, config, timer):
            subject.run(steps)
            account = report(subject.pipe)
        calls = {kind: [ms() for ms in found] for kind, found in timer.calls.items()}
        tap_ms.append(sum(ms() for ms in timer.spans) - sum(calls["plain"]))
        between_ms.append(tap_ms[-1] - sum(calls["full"]) - sum(calls["predicted"]))
        for kind, found in calls.items():
            totals[kind] += found
        parts += [_summed(entered) for entered in timer.parts]
    plain_loop = len(account.calls) * median(totals["plain"]) + median(between_ms)
    limit, speedup = account.evaluations_speedup, plain_loop / median(tap_ms)
    return {
        **{f"{kind}_ms": median(found) for kind, found in totals.items()},
        "parts_ms": {part: median(call[part] for call in parts) for part in PARTS},
        "loop": {
            "plain_ms": plain_loop, "tap_ms": median(tap_ms), "tap_ms_each": tap_ms, "between_ms": median(between_ms),
            "speedup": speedup, "limit": limit, "share_of_limit": speedup / limit,
        },
        "full_steps": account.full_steps,
        "branches": len(account.calls) // account.steps,
        "cache_bytes": account.cache_bytes,
        "fallbacks": dict(account.fallbacks),
    }  # fmt: skip


def _summed(entered: Sequence[tuple[str, Milliseconds]]) -> dict[str, float]:
    total = dict.fromkeys(PARTS, 0.0)
    for part, milliseconds in entered:
        total[part] += milliseconds()
    return total


def timed_calls(subject: Subject, config: TAPConfig, steps: int) -> dict[str, Any]:
    """Of one trajectory: medians ``full_ms`` and ``predicted_ms``, ``tokens`` (all samples), ``cache_bytes``."""
    timer = _Timer(subject, beside=False)
    with watched(subject.pipe, config, timer) as engine:
        subject.run(steps)
        cache_bytes = report(subject.pipe).cache_bytes
    assert engine.sizes is not None
    times = {f"{kind}_ms": median(ms() for ms in timer.calls[kind]) for kind in ("full", "predicted")}
    return {"tokens": engine.sizes[0][:2].numel(), "cache_bytes": cache_bytes} | times


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """The most memory in use within a ``with`` block, bytes: allocated on a GPU, else resident on Linux, else None."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is resident now
    yield _resident_peak


def _resident_peak() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


def plain_call(subject: Subject) -> None:
    """One call of the plain model."""

    def enough(*_: Any) -> None:
        raise EnoughError

    handle = transformers(subject.pipe)[0].register_forward_hook(enough)
    try:
        with suppress(EnoughError):
            subject.run(2)
    finally:
        handle.remove()
