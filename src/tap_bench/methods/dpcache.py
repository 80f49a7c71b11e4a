"""DPCache: full steps planned by dynamic programming on calibration samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tap_bench.method import Method, Setting
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.predictors import taylor

WARMUP = 3
LONGEST = 0.3  # share of the steps that may lie between two full ones, as in the published code


def costs(residuals: Sequence[Tensor], order: int, longest: int) -> NDArray[np.float64]:
    """The path-aware cost tensor (arXiv 2602.22654).

    C[i, j, k] is the sum over the steps from j + 1 to k of the mean |r̂ - r|, where r̂ is the Taylor prediction from
    the full steps j and i and, for order 2, i - 1, which stands for all that may have come before. The step S after
    the last is the published code's stand-in: 0.8 of its prediction, 0.2 of the mean of the last residuals.

    Args:
        residuals: of each branch, (S, B, N, D).
        order: of the predictor, 1 or 2.
        longest: steps from one full step to the next, at most.

    Returns:
        (S + 1, S + 1, S + 1), infinite where there is no such prediction.
    """
    steps, used = len(residuals[0]), order + 1
    features = torch.cat([residual.flatten(1) for residual in residuals], dim=1)

    def predicted(anchors: Sequence[int], times: Sequence[int]) -> Tensor:
        weights = np.stack([taylor(order)(anchors, t) for t in times])
        return torch.from_numpy(weights).to(features) @ features[list(anchors)]

    recent = range(steps - 1, steps - 1 - used, -1)
    beyond = 0.8 * predicted(recent, [steps]) + 0.2 * features[list(recent)].mean(0)
    features = torch.cat([features, beyond])
    found = np.full((steps + 1,) * 3, np.inf)
    for j in range(2, steps):
        for i in range(max(1, j - longest), j):
            later = range(j + 1, min(j + longest, steps) + 1)
            errors = (predicted((j, i, i - 1)[:used], later) - features[later[0] : later[-1] + 1]).abs().mean(1)
            found[i, j, list(later)] = np.cumsum(errors.double().cpu().numpy())
    return found


def plan(costs: NDArray[np.float64], budget: int) -> list[int]:
    """The full steps of least cost: the warm-up, and as many more as the budget has.

    The recursion runs over pairs of full steps, so the plan is optimal; the paper's keeps the best predecessor of
    each step alone.

    Args:
        costs: from :func:`costs`.
        budget: full steps, at least 3.
    """
    end = len(costs) - 1
    least = np.full((end + 1, end + 1), np.inf)  # of paths whose last full steps are i and j
    least[WARMUP - 2, WARMUP - 1] = 0.0
    origins = []
    for _ in range(budget - WARMUP):
        totals = least[:, :, None] + costs
        origins.append(totals.argmin(axis=0))
        least = totals.min(axis=0)
    i, j = np.unravel_index((least + costs[:, :, end]).argmin(), least.shape)
    later = []
    for origin in reversed(origins):
        later.append(int(j))
        i, j = origin[i, j], i
    return [*range(WARMUP), *reversed(later)]


def variants(setting: Setting) -> Iterator[Variant]:
    """A plan for each order of the predictor; 2 is the published code's default."""
    steps, budget = setting.steps, setting.budget
    if budget < WARMUP:
        return
    windows = budget - WARMUP + 1
    longest = max(int(LONGEST * steps), -(-(steps - WARMUP + 1) // windows))
    for order in (1, 2):

        def full_steps(order: int = order) -> list[int]:
            return plan(costs(setting.calibration.trajectories().residual, order, longest), budget)

        full = setting.calibration.fitted(f"dpcache-{order}-{budget}", full_steps)
        yield on_engine(f"order {order}", TAPConfig.paper(full_steps=tuple(full), orders=(order,), horizon_span=0.0))


METHODS = [Method("dpcache", "rival", "DPCache, arXiv 2602.22654", variants)]
