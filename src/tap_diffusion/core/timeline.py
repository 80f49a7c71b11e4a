"""What the noise of a trajectory tells: the pace at which features change, and what an error has done to the latent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Prediction = Literal["flow", "epsilon", "v_prediction", "sample"]

FEW = 64  # tokens; fewer count as so many
# Chosen on searches on real models and on the bench's own (docs/schedule.md).
TAIL = 0.5  # of a window is left after the last full step
LAYOUT = 3  # times N / 64: how much sooner many tokens tell their layout than one token its own content
SEEN = 1 / 2  # of the noise is what counts for few tokens
SHIFT = 3.0  # where nobody tells the noise; models of today have from 2 to 7
# Mean place of the full steps on the pace: as good as even, and dense at the start.
EVEN, DENSE = 0.45, 0.4


@dataclass(frozen=True)
class Timeline:
    """The noise at each step of a trajectory.

    Attributes:
        noise: σ/α of the latent x = α x₀ + σ ε that each step starts from, strictly decreasing; the first may be
            infinite.
        prediction: what the model predicts: ``flow`` ε - x₀ with α + σ = 1; with α² + σ² = 1 ``epsilon`` ε,
            ``v_prediction`` α ε - σ x₀, or ``sample`` x₀. None: something else, or it is not known.
        full: steps that are full, the first among them, on which the clock is even; without them it is the pace.
        fresh_noise: what adds random noise at its steps, the class of a scheduler mostly; None where none is added.
        kept: correlation of the noise in a latent with that in the next one, median over the steps; 1: none is fresh.
        tokens: of the stream, N, all frames of a video together; None: not known yet, which counts as few.
        end: the noise that the last step leaves.
    """

    noise: tuple[float, ...]
    prediction: Prediction | None
    full: tuple[int, ...] = ()
    fresh_noise: str | None = None
    kept: float = 1.0
    tokens: int | None = None
    end: float = 0.0

    def __len__(self) -> int:
        return len(self.noise)

    @classmethod
    def untold(cls, steps: int, tokens: int | None) -> Timeline:
        """What stands in for the noise where nobody tells it: flow matching, shifted as FLUX.1-dev at 1024².

        Args:
            steps: of the trajectory, at least 1.
            tokens: of the stream, or None.
        """
        return cls(flow_noise(steps, SHIFT), None, tokens=tokens)

    @cached_property
    def spacing(self) -> tuple[float, ...]:
        """Time in which full steps are even, from 0 to len - 1 (docs/schedule.md).

        For many tokens log(1 + 3 N/64 · α / (α + σ)). The layout of a picture is an average over its tokens, over
        which the noise of each averages out: the more there are, the earlier it can be told, and what is decided by
        then stays so. For 64 tokens the pace, but with half of the noise; (64 / N)² is its share in between.
        """
        times = max(self.tokens or FEW, FEW) / FEW
        told = [math.log1p(LAYOUT * times / (1 + noise)) for noise in self.noise]
        span = (told[-1] - told[0]) / max(len(told) - 1, 1) or 1.0
        few = _halfway([SEEN * noise for noise in self.noise])
        share = times**-2
        return tuple(share * f + (1 - share) * (t - told[0]) / span for f, t in zip(few, told, strict=True))

    @cached_property
    def pace(self) -> tuple[float, ...]:
        """Time in which features change evenly, from 0 to len - 1: halfway between step and arctan √(σ/α), so scaled.

        In arctan √(σ/α), which is arcsin √σ for flow matching, features change at about the same pace throughout,
        while in steps they change fast at both ends; but an early error also does more harm than a late one. Halfway
        did best on a flow matching and a noise predicting model (docs/beyond.md).
        """
        return _halfway(self.noise)

    @cached_property
    def clock(self) -> tuple[float, ...]:
        """Time in which predictors extrapolate, from 0 to len - 1: the pace, stretched so that full steps are even.

        Between two full steps it is proportional to the pace, and so it is after the last, as in the window before.
        Where windows grow, because change slows down or because early errors do more harm, a slope seen in a short
        window is thus not carried on at its full size through the next, longer one (docs/beyond.md).
        """
        if len(self.full) < 2:
            return self.pace
        places = [self.pace[step] for step in self.full]
        after = (self.pace[-1] - places[-1]) / (places[-1] - places[-2])
        windows = np.interp(self.pace, [*places, self.pace[-1]], [*range(len(places)), len(places) - 1 + after])
        return tuple((windows * (len(self) - 1) / windows[-1]).tolist())

    @property
    def slopes(self) -> float:
        """Share of the slopes seen at n full steps to carry on: n / 10 where n < 10 are dense at the start, else 1.

        Where windows grow, the change in one tells less of the next the longer they are (docs/beyond.md). Whether they
        grow, the full steps' mean place on the pace tells: a half where they are even, a third on a parabola. Where a
        trajectory begins with less than pure noise (image to image), n counts as for the whole way of which it is part.
        """
        if len(self.full) < 2 or len(self) < 3:
            return 1.0
        mean = sum(self.pace[step] for step in self.full) / (len(self.full) * self.pace[-2])
        growth = min(1.0, max(0.0, (EVEN - mean) / (EVEN - DENSE)))
        way = math.atan(math.sqrt(self.noise[0])) / (math.pi / 2)
        return 1 - growth * (1 - min(1.0, len(self.full) / (10 * way)))

    @property
    def reuses(self) -> bool:
        """Whether the newest residual is better reused than extrapolated.

        Residuals change with the noise, and fresh noise can't be told from the last. A model that predicts noise gains
        by extrapolation all the same, as long as a step keeps most of the noise; others lose (docs/beyond.md).
        """
        return self.fresh_noise is not None and (self.prediction != "epsilon" or self.kept < 0.5)

    def hindsight(self, anchors: Sequence[int], step: int) -> float:
        """By how much of its surprise the output of a full step is to be moved, to make up for the window before.

        The surprise is the output less its prediction from the anchors before. The errors of the steps between are
        taken for what a polynomial through these anchors leaves: e_k = e_s Π_a (c_k - c_a) / (c_s - c_a), c being the
        clock. Each step of a first-order solver is linear, x_{k+1} = A_k x_k + B_k F_k, so that by step s the errors
        have moved x_s by Q e_s with Q = Σ_k (Π_{k<j<s} A_j) B_k e_k / e_s.

        The full step has seen the moved x_s: its output is off by J Q e_s, J = ∂F/∂x, so that the surprise is
        -(1 - J Q) e_s, and moving F_s by -(A_s / B_s + J) Q e_s makes x_{s+1} what it would have been. J is taken as
        if only one x₀ were possible. A model heals its own errors less than that where many are, so the correction is
        rather too short than too long.

        Args:
            anchors: full steps from which the window was predicted, newest first; one or two of them.
            step: the full step at the end of the window, s.

        Returns:
            (A_s / B_s + J) Q / (1 - J Q); 0 where no step lies between, it is not known what is predicted, or steps
            add noise, which makes surprises of its own.
        """
        if self.prediction is None or self.fresh_noise is not None:
            return 0.0
        a, b, j = self._solver
        clock = self.clock
        moved = 0.0
        for k in range(anchors[0] + 1, step):
            ramp = math.prod((clock[k] - clock[anchor]) / (clock[step] - clock[anchor]) for anchor in anchors)
            moved += math.prod(a[k + 1 : step]) * b[k] * ramp
        return float((a[step] / b[step] + j[step]) * moved / (1 - j[step] * moved))

    @cached_property
    def _solver(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """A and B of every first-order step, and ∂F/∂x where one x₀ is possible."""
        angle = np.arctan([*self.noise, self.end])
        if self.prediction == "flow":
            total = np.sin(angle) + np.cos(angle)
            alpha, sigma = np.cos(angle) / total, np.sin(angle) / total
        else:
            alpha, sigma = np.cos(angle), np.sin(angle)
        alpha, next_alpha, sigma, next_sigma = alpha[:-1], alpha[1:], sigma[:-1], sigma[1:]
        # x₀ and ε as sums of x and F, so that the next x is α' x₀ + σ' ε, and F as a function of x for a given x₀.
        match self.prediction:
            case "flow":
                clean, noisy, slope = (1.0, -sigma), (1.0, alpha), 1 / sigma
            case "v_prediction":
                clean, noisy, slope = (alpha, -sigma), (sigma, alpha), alpha / sigma
            case "epsilon":
                alpha = np.maximum(alpha, 1e-12)
                clean, noisy, slope = (1 / alpha, -sigma / alpha), (0.0, 1.0), 1 / sigma
            case "sample":
                clean, noisy, slope = (0.0, 1.0), (1 / sigma, -alpha / sigma), np.zeros_like(sigma)
        by_x, by_output = (next_alpha * c + next_sigma * n for c, n in zip(clean, noisy, strict=True))
        return by_x, by_output, slope


def flow_noise(steps: int, shift: float) -> tuple[float, ...]:
    """σ/α at each of ``steps`` even steps of flow matching, its noise shifted."""
    return (math.inf, *(shift * (steps - step) / step for step in range(1, steps)))


def _halfway(noises: Sequence[float]) -> tuple[float, ...]:
    """Halfway between step and arctan √noise, from 0 to len - 1."""
    last = max(len(noises) - 1, 1)
    angles = [math.atan(math.sqrt(noise)) for noise in noises]
    span = angles[0] - angles[-1] or 1.0
    return tuple((step + last * (angles[0] - angle) / span) / 2 for step, angle in enumerate(angles))
