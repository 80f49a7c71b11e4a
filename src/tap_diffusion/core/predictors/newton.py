"""Newton predictors: the polynomial through the newest ``order + 1`` anchors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


def newton(order: int) -> Callable[[Sequence[float], float], NDArray[np.float64]]:
    """The interpolating polynomial of degree ``order``, extrapolated to t (Newton's divided differences).

    The weights are its Lagrange form, which equals Newton's: w_j = Π_{l≠j} (t - a_l) / (a_j - a_l).
    """

    def weights(anchor_times: Sequence[float], t: float) -> NDArray[np.float64]:
        times = np.asarray(anchor_times, dtype=np.float64)
        nodes = times[: order + 1]
        result = np.zeros(len(times))
        for j, node in enumerate(nodes):
            others = np.delete(nodes, j)
            result[j] = np.prod((t - others) / (node - others))
        return result

    return weights
