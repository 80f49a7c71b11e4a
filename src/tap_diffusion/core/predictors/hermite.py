"""Hermite predictors, as HiCache defines them (arXiv 2508.16984)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.polynomial.hermite import hermvander
from numpy.typing import NDArray

from tap_diffusion.core.predictors.differences import difference_matrix


def hermite(order: int, sigma: float = 0.5) -> Callable[[Sequence[float], float], NDArray[np.float64]]:
    """F̂(t) = Σ_{i=0..order} Δ^iF · σ^i H_i(σκ) / i!, κ = t - a_0 (arXiv 2508.16984, the scaled Hermite basis).

    H_i are the physicist's Hermite polynomials: 1, 2x, 4x² - 2, … The default σ is the published one for FLUX.1-dev.
    The paper writes H_i(-σκ) since its times fall; its differences change sign with it, and the sum is the same.

    The factor of Δ¹F is 2σ²κ and that of Δ²F is not 0 at κ = 0: only constants are met exactly, on any spacing.
    """

    def weights(anchor_times: Sequence[float], t: float) -> NDArray[np.float64]:
        basis = hermvander([sigma * (t - anchor_times[0])], order)[0]
        coefficients = np.array([sigma**i * basis[i] / math.factorial(i) for i in range(order + 1)])
        return coefficients @ difference_matrix(anchor_times)[: order + 1]

    return weights
