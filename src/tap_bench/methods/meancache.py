"""MeanCache: the mean velocity over the last few steps, carried on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tap_bench.method import Method, Setting, schedules
from tap_bench.methods.l2p import L2PEngine
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.config import TAPConfig

SPANS = (2, 3, 4, 5)  # K, steps that are looked back on; its search had these and 6
# Full steps that it found, of 50, and K of each window between them; 1 is reuse.
PUBLISHED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "as on Qwen-Image": ((0, 1, 3, 7, 14, 21, 28, 35, 42, 49), (1, 2, 1, 1, 1, 1, 1, 1, 4)),
    "as on Qwen-Image-2512": ((0, 2, 4, 7, 14, 21, 28, 35, 42, 49), (1, 3, 1, 1, 1, 1, 1, 1, 4)),
}


def carried_on(sigmas: NDArray[np.float64], spans: Sequence[int]) -> NDArray[np.float64]:
    """Weights of each step's velocity over those of the steps before (arXiv 2601.19961 and its published code).

    v̂_t = v_{t-1} - (σ_{t+1} - σ_t) (v_s - ū) / (σ_t - σ_s) for s = t - K, ū being the mean velocity from σ_s to σ_t.
    The published code takes ū from the latents; with Euler's steps it is the mean of the velocities, by their lengths.

    Args:
        sigmas: of the S steps and, last, where they end.
        spans: K at each step, at most t; 1 is reuse.

    Returns:
        (S, S), zero on the diagonal and above.
    """
    steps = len(sigmas) - 1
    rows = np.zeros((steps, steps))
    for t in range(1, steps):
        start = max(0, t - spans[t])
        share = (sigmas[t + 1] - sigmas[t]) / (sigmas[t] - sigmas[start])
        rows[t, start:t] = share * np.diff(sigmas[start : t + 1]) / (sigmas[t] - sigmas[start])
        rows[t, start] -= share
        rows[t, t - 1] += 1
    return rows


def by_window(full: Sequence[int], spans: Sequence[int], steps: int) -> list[int]:
    """K of each step, from that of each window between full steps; 1 where there is no window."""
    return [next((k for k, a, b in zip(spans, full, full[1:], strict=False) if a < t < b), 1) for t in range(steps)]


def variants(setting: Setting) -> Iterator[Variant]:
    """Its own schedules where it has any, and those of all with each K; flow matching only.

    How its search weighs windows could not be read. Velocities are here the hidden states after the last block.
    """
    steps, timeline = setting.steps, setting.calibration.timeline
    if timeline is None or timeline.prediction != "flow":
        return
    sigmas = np.array([1 / (1 + 1 / noise) for noise in timeline.noise] + [0.0])
    tries = {
        title: (full, by_window(full, spans, steps))
        for title, (full, spans) in PUBLISHED.items()
        if steps == 50 and len(full) == setting.budget
    }
    for title, full in schedules(setting).items():
        tries |= {f"{title}, K {span}": (full, [span] * steps) for span in SPANS}
    for title, (full, spans) in tries.items():
        config = TAPConfig.paper(full_steps=full, orders=(1,), horizon_span=0.0, history=max(2, len(full)))
        yield on_engine(title, config, partial(L2PEngine, matrix=carried_on(sigmas, spans).tolist()))


METHODS = [Method("meancache", "rival", "MeanCache, arXiv 2601.19961", variants)]
