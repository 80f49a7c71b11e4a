"""Chebyshev predictors, as Spectrum defines them (arXiv 2603.01623)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.polynomial.chebyshev import chebvander
from numpy.typing import NDArray

from tap_diffusion.core.predictors.newton import newton


def chebyshev(
    order: int, ridge: float = 0.1, blend: float = 1.0, steps: float = 50.0
) -> Callable[[Sequence[float], float], NDArray[np.float64]]:
    """Chebyshev series of degree ``order``, fitted to all anchors by ridge regression (arXiv 2603.01623).

    With X the values of T_0 … T_order at the anchors and x those at t, the weights are x (XᵀX + λI)⁻¹ Xᵀ. Times are
    mapped from [0, steps] to [-1, 1]. λ shrinks all coefficients, also that of T_0: not even constants are met exactly.

    The defaults are the published ones, with order 4: λ = 0.1, and 50 steps, which the published code assumes
    whatever the trajectory's length is. It fits all anchors of the trajectory: set ``TAPConfig.history`` to their
    number. Its recommended runs mix in linear extrapolation from the newest two anchors with ``blend`` = 0.5.

    Deviations: order 0 is reuse, as in every family; the published code rounds times and coefficients to bfloat16; and
    it predicts the hidden states after the last block rather than the residual, which matters as λ pulls towards 0
    (the bench's Spectrum does so too).

    Args:
        order: degree of the series.
        ridge: λ.
        blend: share of the series; the rest is linear extrapolation.
        steps: time that is mapped to 1.
    """

    def weights(anchor_times: Sequence[float], t: float) -> NDArray[np.float64]:
        if order == 0:
            return newton(0)(anchor_times, t)
        design = chebvander(2 * np.array([*anchor_times, t]) / steps - 1, order)
        anchors, target = design[:-1], design[-1]
        fit = target @ np.linalg.solve(anchors.T @ anchors + ridge * np.eye(order + 1), anchors.T)
        result: NDArray[np.float64] = blend * fit + (1 - blend) * newton(1)(anchor_times, t)
        return result

    return weights
