"""Predictors: functions of times that give weights over anchors.

Every predictor that is linear in the history is a row of weights: the prediction at time ``t`` is the weighted
sum of the anchors' features. A family of predictors is therefore nothing but a function from an order to
``(anchor_times, t) -> weights``, in float64 on the host; what moves tensors never sees what the rows mean.

A new family is one file with such a function and one line in :data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tap_diffusion.core.predictors.adams_bashforth import adams_bashforth
from tap_diffusion.core.predictors.chebyshev import chebyshev
from tap_diffusion.core.predictors.differences import difference_matrix
from tap_diffusion.core.predictors.foca import foca
from tap_diffusion.core.predictors.hermite import hermite
from tap_diffusion.core.predictors.newton import newton
from tap_diffusion.core.predictors.taylor import taylor

Weights = NDArray[np.float64]
Predictor = Callable[[Sequence[float], float], Weights]

FAMILIES: dict[str, Callable[[int], Predictor]] = {
    "taylor": taylor,
    "newton": newton,
    "hermite": hermite,
    "hermite_wide": partial(hermite, sigma=0.7),
    "adams_bashforth": adams_bashforth,
    "foca": foca,
    "chebyshev": chebyshev,
    "chebyshev_linear": partial(chebyshev, blend=0.5),
}


class Candidate(NamedTuple):
    """A predictor of some order, evaluated ``horizon`` = k - ``lag`` steps after the newest anchor."""

    order: int
    horizon: float
    lag: float = 0.0

    def __str__(self) -> str:
        if self.order == 0:
            return "order 0"
        return f"order {self.order}, horizon k" + (f" - {self.lag:g}" if self.lag else "")


def candidates(
    family: str, orders: Sequence[int], span: float, step: float, anchor_times: Sequence[float], t: float
) -> tuple[list[Candidate], Weights]:
    """All candidates at time ``t`` and their weights (paper, section 3: the family of predictors).

    Orders that need more anchors than there are fall away; if all do, the highest possible order remains. Order 0
    has no horizon and comes once. Within an order the full horizon k comes first: of equal losses the first wins.

    Args:
        family: key of :data:`FAMILIES`.
        orders: orders wanted.
        span, step: horizons are {k - span, …, k} in steps of ``step``, k being the time since the newest anchor.
        anchor_times: strictly decreasing, newest first, H of them.
        t: time to predict at.

    Returns:
        K candidates, weights (K, H) float64.
    """
    possible = [order for order in orders if order < len(anchor_times)] or [len(anchor_times) - 1]
    k = t - anchor_times[0]
    lags = [i * step for i in range(int(span / step + 1e-9) + 1)]
    members = [Candidate(order, k - lag, lag) for order in possible for lag in (lags if order > 0 else [0.0])]
    rows = [FAMILIES[family](member.order)(anchor_times, anchor_times[0] + member.horizon) for member in members]
    return members, np.stack(rows)


__all__ = [
    "FAMILIES",
    "Candidate",
    "Predictor",
    "Weights",
    "adams_bashforth",
    "candidates",
    "chebyshev",
    "difference_matrix",
    "foca",
    "hermite",
    "newton",
    "taylor",
]
