"""TeaCache: reuse until the modulated input has changed by so much that the residual must have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tap_bench.calibration import Trajectories
from tap_bench.method import Method, Setting
from tap_bench.methods.thresholds import WANTED_FULL, ThresholdEngine, relative_l1, tuned
from tap_bench.variant import Variant
from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.doubts import Fallback

DEGREE = 4


class TeaCacheEngine(ThresholdEngine):
    """Accumulates the rescaled change of the modulated input from step to step (arXiv 2411.19108, section 3.3).

    Args:
        config: with the first and the last step full, as in the published code.
        threshold: of the accumulated change.
        coefficients: of the rescaling polynomial, highest power first, from :func:`fit`.
    """

    def __init__(self, config: TAPConfig, threshold: float, coefficients: Sequence[float]) -> None:
        super().__init__(config, threshold)
        self._rescale = np.poly1d(coefficients)

    def record(self, call: Call, before: Tensor, after: Tensor, probe: Tensor | None, stream: str = "") -> None:
        """As the base class; a full step is one to measure the next change against, too."""
        super().record(call, before, after, probe, stream)
        assert probe is not None
        self._last[call.branch + stream] = self._compared(call, probe).detach()

    def predict(self, call: Call, hidden_states: Tensor, probe: Callable[[], Tensor], stream: str = "") -> Tensor:
        """Reuse the residual of the last full step, or raise Fallback where the change has come to the threshold."""
        history, key, h = self._anchors(call, hidden_states, stream), call.branch + stream, probe()
        compared = self._compared(call, h)
        self._change[key] += float(self._rescale(relative_l1(compared, self._last[key])))
        self._last[key] = compared
        if self._change[key] >= self.threshold:
            raise Fallback(WANTED_FULL)
        return self._checked(call, hidden_states, history.residual[0], h, history)

    def _compared(self, call: Call, h: Tensor) -> Tensor:  # noqa: ARG002
        """What of the modulated input is compared from step to step."""
        return h


def fit(trajectories: Trajectories) -> list[float]:
    """Coefficients that map the relative change of the modulated input, per step, to that of the residual.

    A least-squares fit of a polynomial of degree 4, one point for each sample, branch and pair of steps.
    """
    probe, residual = (
        torch.cat([_relative_changes(feature).flatten() for feature in features]).cpu()
        for features in (trajectories.probe, trajectories.residual)
    )
    return [float(value) for value in np.polyfit(probe.numpy(), residual.numpy(), DEGREE)]


def _relative_changes(features: Tensor) -> Tensor:
    """Of each sample from step to step: (S, B, N, D) to (S - 1, B), float64."""
    features = features.double()
    return (features[1:] - features[:-1]).abs().mean((2, 3)) / features[:-1].abs().mean((2, 3))


def variants(setting: Setting) -> Iterator[Variant]:
    """One, with its threshold tuned."""
    if setting.budget < 2:
        return
    coefficients = setting.calibration.fitted("teacache", lambda: fit(setting.calibration.trajectories()))
    config = TAPConfig.paper(full_steps=(0, setting.steps - 1), orders=(0,))
    yield tuned(
        setting,
        "teacache",
        "by threshold",
        config,
        lambda config, threshold: TeaCacheEngine(config, threshold, coefficients),
        coefficients=coefficients,
    )


METHODS = [Method("teacache", "rival", "TeaCache, arXiv 2411.19108", variants)]
