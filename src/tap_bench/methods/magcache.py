"""MagCache: reuse as long as the residual's magnitude, known from calibration, has hardly changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tap_bench.method import Method, Setting
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.config import TAPConfig

RETENTION = 0.1  # share of the steps, at the start, that are full; these two as published for FLUX
MAX_SKIP = 5  # predicted steps in a row


def ratios(residuals: Sequence[Tensor]) -> list[float]:
    """Magnitude ratios |r_t| / |r_{t-1}| (arXiv 2506.09045), 1 for the first step.

    Args:
        residuals: of each branch, (S, B, N, D).

    Returns:
        Means over branches, samples and tokens, one for each of S steps.
    """
    norms = [residual.norm(dim=-1) for residual in residuals]
    means = torch.stack([(norm[1:] / norm[:-1]).mean((1, 2)) for norm in norms])
    return [1.0, *means.mean(0).tolist()]


def errors(ratios: Sequence[float], last: int) -> Iterator[float]:
    """Accumulated errors of predicting the steps after ``last``, a full one: Σ |1 - Π ratios|."""
    product, error = 1.0, 0.0
    for ratio in ratios[last + 1 :]:
        product *= ratio
        error += abs(1 - product)
        yield error


def plan(ratios: Sequence[float], threshold: float, max_skip: int) -> tuple[int, ...]:
    """The full steps: those where the accumulated error would exceed the threshold, or that many were skipped."""
    steps = len(ratios)
    full = list(range(max(1, int(RETENTION * steps + 0.5))))
    while True:
        skipped = 0
        for error in errors(ratios, full[-1]):
            if error > threshold or skipped == max_skip:
                break
            skipped += 1
        if full[-1] + skipped + 1 >= steps:
            return tuple(full)
        full.append(full[-1] + skipped + 1)


def planned(ratios: Sequence[float], budget: int, max_skip: int) -> tuple[float, tuple[int, ...]] | None:
    """The threshold and its plan with the most full steps within the budget; None if there is no such plan.

    The errors that can accumulate are all thresholds that make a difference.
    """
    thresholds = sorted({error for last in range(len(ratios)) for error in errors(ratios, last)})
    plans = [(threshold, plan(ratios, threshold, max_skip)) for threshold in thresholds]
    within = [found for found in plans if len(found[1]) <= budget]
    return max(within, key=lambda found: len(found[1]), default=None)


def variants(setting: Setting) -> Iterator[Variant]:
    """As many predicted steps in a row as published, or as the budget needs; and any number."""
    steps = setting.steps
    known = setting.calibration.fitted("magcache", lambda: ratios(setting.calibration.trajectories().residual))
    needed = next((skip for skip in range(MAX_SKIP, steps) if len(plan(known, math.inf, skip)) <= setting.budget), None)
    if needed is None:
        return
    for title, max_skip in ((f"at most {needed} in a row", needed), ("any number in a row", steps)):
        found = planned(known, setting.budget, max_skip)
        assert found is not None
        threshold, full = found
        variant = on_engine(title, TAPConfig.paper(full_steps=full, orders=(0,)))
        yield replace(variant, settings=variant.settings | {"threshold": threshold, "max_skip": max_skip})


METHODS = [Method("magcache", "rival", "MagCache, arXiv 2506.09045", variants)]
