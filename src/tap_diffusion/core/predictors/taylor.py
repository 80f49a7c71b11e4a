"""Taylor predictors, as TaylorSeer and TAP define them. Order 0 is reuse (FORA)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tap_diffusion.core.predictors.differences import difference_matrix


def taylor(order: int) -> Callable[[Sequence[float], float], NDArray[np.float64]]:
    """F̂(t) = Σ_{i=0..order} Δ^iF · κ^i / i!, κ = t - a_0 (paper, the Taylor predictor).

    Backward differences stand for the derivatives, so a polynomial is met exactly only up to degree 1, on any
    spacing; the Newton predictor is exact up to its order.
    """

    def weights(anchor_times: Sequence[float], t: float) -> NDArray[np.float64]:
        horizon = t - anchor_times[0]
        coefficients = np.array([horizon**i / math.factorial(i) for i in range(order + 1)])
        return coefficients @ difference_matrix(anchor_times)[: order + 1]

    return weights
