"""What rivals share that decide at each step, by a threshold, whether it is full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from tap_bench.method import Setting
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.engine import Engine

WANTED_FULL = "the method wants this step full"


class ThresholdEngine(Engine):
    """Runs a step in full where a change since an earlier step comes to a threshold.

    Such a step is what the method wants and no fallback: the history is kept, and nothing is counted. The method
    decides in :meth:`predict` and raises ``Fallback(WANTED_FULL)`` there. As in the published code, one decision
    holds for the whole batch, and each branch has its own.

    Args:
        config: its full steps are full whatever the method decides.
        threshold: the larger, the fewer steps are full.
    """

    needs_probe = True
    checks_past = False

    def __init__(self, config: TAPConfig, threshold: float) -> None:
        super().__init__(config)
        self.threshold = threshold
        self._change: dict[str, float] = {}  # accumulated since the last full step, of each branch and stream
        self._last: dict[str, Tensor] = {}  # what the next change is measured against

    def reset(self) -> None:
        """As the base class."""
        super().reset()
        self._change.clear()
        self._last.clear()

    def record(self, call: Call, before: Tensor, after: Tensor, probe: Tensor | None, stream: str = "") -> None:
        """As the base class, and begin to accumulate anew."""
        super().record(call, before, after, probe, stream)
        self._change[call.branch + stream] = 0.0

    def fall_back(self, call: Call, reason: str) -> None:
        """As the base class, but for steps that the method wants full."""
        if reason != WANTED_FULL:
            super().fall_back(call, reason)

    def _say_how_it_went(self) -> None:
        """A threshold may be small enough for every step to be full."""


def relative_l1(now: Tensor, before: Tensor) -> float:
    """mean |now - before| / mean |before|, over the whole batch."""
    return float((now - before).abs().mean() / before.abs().mean())


def tuned(
    setting: Setting,
    name: str,
    schedule: str,
    config: TAPConfig,
    engine: Callable[[TAPConfig, float], Engine],
    **settings: Any,
) -> Variant:
    """A variant whose threshold has been tuned to the budget on the calibration samples.

    Args:
        setting: what is asked for.
        name: under which the threshold is kept.
        schedule: as in :class:`Variant`.
        config: of the engine.
        engine: made of the configuration and a threshold.
        settings: further ones that matter.
    """

    def of(threshold: float) -> Variant:
        variant = on_engine(schedule, config, lambda config: engine(config, threshold))
        return replace(variant, settings=variant.settings | settings | {"threshold": threshold})

    return of(setting.calibration.threshold(name, of, setting.budget, low=1e-3, high=30.0))
