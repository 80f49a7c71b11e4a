"""L2P: for each step its own weights over all steps before, learned from a few recorded trajectories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tap_bench.method import Method, Setting, schedules
from tap_bench.methods.spectrum import SpectrumEngine
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.doubts import Fallback
from tap_diffusion.core.predictors import Candidate, difference_matrix

UPDATES, RATE = 201, 0.01  # of Adam, as published
# Full steps of its runs on FLUX.1-dev, of 50, by their number.
PUBLISHED = {
    len(full): full
    for full in (
        (0, 1, 2, 4, 16, 32),
        (0, 1, 2, 4, 12, 24, 38),
        (0, 1, 2, 4, 10, 20, 31, 41),
        (0, 1, 2, 4, 9, 17, 26, 35, 43),
        (0, 1, 2, 4, 7, 14, 23, 31, 38, 45),
        (0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44),
    )
}


def fit(outputs: Sequence[Tensor]) -> list[list[float]]:
    """Weights of each step over the true features of all steps before (arXiv 2604.26365).

    Adam on the mean squared error, from reuse of the step before, for so few updates that it matters where it begins.
    The error is quadratic in the weights, so the inner products of the features with each other are all it needs.

    Args:
        outputs: features of each branch, (S, B, N, D).

    Returns:
        (S, S), of which only what lies below the diagonal counts: row t is of step t.
    """
    steps = len(outputs[0])
    samples = [sample.flatten(1).double() for output in outputs for sample in output.unbind(1)]
    products = torch.stack([sample @ sample.T for sample in samples]).sum(0).cpu()
    products /= (steps - 1) * sum(sample.shape[1] for sample in samples)
    weights = torch.diag(torch.ones(steps - 1, dtype=torch.float64), -1)
    optimizer = torch.optim.Adam([weights], lr=RATE)
    for _ in range(UPDATES):
        weights.grad = 2 * (weights @ products - products).tril(-1)
        optimizer.step()
    rows: list[list[float]] = weights.tolist()
    return rows


def over_anchors(matrix: NDArray[np.float64], anchor_times: Sequence[float], t: float) -> NDArray[np.float64]:
    """Weights (H,) over the anchors, newest first, of what is predicted for step t.

    What was predicted for the steps in between takes the place of their features, as in the published code, and is
    itself a sum over the anchors.

    Raises:
        Fallback: the first step is not among the anchors.
    """
    if anchor_times[-1] != 0:
        raise Fallback("no anchor at the first step, from which L2P's sums begin")
    anchors = {int(time): row for time, row in zip(anchor_times, np.eye(len(anchor_times)), strict=True)}
    rows: list[NDArray[np.float64]] = []
    for step in range(int(t) + 1):
        rows.append(anchors[step] if step in anchors else matrix[step, :step] @ np.stack(rows))
    return rows[-1]


class L2PEngine(SpectrumEngine):
    """Predicts the hidden states after the last block, as the paper does; the published code, the projected output.

    Args:
        config: with a history of all full steps.
        matrix: weights from :func:`fit`.
    """

    def __init__(self, config: TAPConfig, matrix: Sequence[Sequence[float]]) -> None:
        super().__init__(config)
        self._matrix = np.array(matrix)

    def _candidates(self, times: tuple[float, ...], t: float) -> tuple[list[Candidate], Tensor]:
        weights = np.linalg.solve(difference_matrix(times).T, over_anchors(self._matrix, times, t))
        return [Candidate(self.config.orders[0], t - times[0])], torch.from_numpy(weights[None])


def variants(setting: Setting) -> Iterator[Variant]:
    """On its own schedule, where it has one, and on those of all."""
    own = {"as on FLUX.1-dev": PUBLISHED[setting.budget]} if setting.steps == 50 and setting.budget in PUBLISHED else {}
    matrix = setting.calibration.fitted("l2p", lambda: fit(setting.calibration.trajectories().output))
    for title, full in (own | schedules(setting)).items():
        config = TAPConfig.paper(full_steps=full, orders=(1,), horizon_span=0.0, history=max(2, len(full)))
        yield on_engine(title, config, partial(L2PEngine, matrix=matrix))


METHODS = [Method("l2p", "rival", "L2P, arXiv 2604.26365", variants)]
