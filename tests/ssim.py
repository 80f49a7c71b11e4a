"""SSIM by plain loops over windows (Wang et al. 2004), to check the library's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def ssim_by_hand(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Mean over the 11×11 windows, Gaussian of σ = 1.5, around every pixel of (C, H, W) in [0, 1], mirrored."""
    size, sigma = 11, 1.5
    x = np.arange(size) - size // 2
    line = np.exp(-(x**2) / (2 * sigma**2))
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for channel, other_channel in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        one, other = (np.pad(picture, size // 2, mode="reflect") for picture in (channel, other_channel))
        for i in range(a.shape[1]):
            for j in range(a.shape[2]):
                p, q = one[i : i + size, j : j + size], other[i : i + size, j : j + size]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * p * p).sum() - mp**2, (window * q * q).sum() - mq**2
                cov = (window * p * q).sum() - mp * mq
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))
