"""FoCa predictors: forecast with BDF2, then calibrate with Heun's rule (arXiv 2508.16211)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]


def foca(order: int) -> Callable[[Sequence[float], float], NDArray[np.float64]]:
    """FoCa's recursion from step to step, over rows of weights (arXiv 2508.16211, eqs. 6 to 8).

    From the two latest steps k - 1 and k, full or predicted, h apart from the next:
    F̂ = (4F_k - F_{k-1} + 2h F'_k) / 3 (forecast), F'_{k+1} = (3F̂ - 4F_k + F_{k-1}) / 2h and
    F_{k+1} = F_k + h/2 · (F'_a + F'_{k+1}) (calibration), F'_a being the derivative at the newest full step.
    The forecast put into F'_{k+1} leaves F'_k, so that only the calibration remains: each step's slope is the mean of
    the last step's slope and F'_a.

    The paper's recursion starts with the trajectory; here it starts at the oldest of the newest ``order + 1``
    anchors. Order 1 is linear extrapolation, order 2 needs a predicted step before the newest anchor.

    Deviation: the paper leaves open how the derivatives come about, and its code was never published. Backward
    differences stand for them, F'_k over the last two steps and F'_a over the newest two full steps.
    """

    def weights(anchor_times: Sequence[float], t: float) -> NDArray[np.float64]:
        times, rows = anchor_times, np.eye(len(anchor_times))
        if order == 0:
            return rows[0]
        before, time = rows[order], float(times[order])
        for j in reversed(range(order)):
            slope = (rows[j] - before) / (times[j] - time)
            anchor_slope = (rows[j] - rows[j + 1]) / (times[j] - times[j + 1])
            last = times[j - 1] - 1 if j > 0 else t
            before, time = _march(rows[j], slope, anchor_slope, times[j], last)
        return before

    return weights


def _march(row: Row, slope: Row, anchor_slope: Row, start: float, end: float) -> tuple[Row, float]:
    """Steps of 1 from an anchor to the time ``end``, the last one shorter where need be; the row and time there."""
    for i in range(max(math.ceil(end - start), 1)):
        step = min(1.0, end - start - i)
        slope = (slope + anchor_slope) / 2
        row = row + step * slope
    return row, end
