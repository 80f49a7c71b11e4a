"""Finite differences over unevenly spaced anchors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def difference_matrix(anchor_times: Sequence[float]) -> NDArray[np.float64]:
    """Weights over anchors of the finite differences at the newest anchor (paper, finite-difference recursion).

    Δ⁰F(a_j) = F(a_j) and Δ^{i+1}F(a_j) = (Δ^iF(a_j) - Δ^iF(a_{j+1})) / (s_j - s_{j+1}).

    Args:
        anchor_times: strictly decreasing, newest first, H of them.

    Returns:
        (H, H) float64, lower triangular; row i gives Δ^iF(a_0).
    """
    times = np.asarray(anchor_times, dtype=np.float64)
    if times.ndim != 1 or len(times) == 0 or np.any(np.diff(times) >= 0):
        raise ValueError(f"anchor times must be strictly decreasing, newest first; got {list(anchor_times)}")
    rows = np.eye(len(times))
    result = [rows[0]]
    for _ in range(len(times) - 1):
        rows = (rows[:-1] - rows[1:]) / -np.diff(times)[: len(rows) - 1, None]
        result.append(rows[0])
    return np.stack(result)
