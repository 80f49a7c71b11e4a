"""RACER: how far two forecasts disagree says how far to trust one of them, and where a full step is due."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tap_bench.method import Method, Setting, schedules
from tap_bench.methods.spectrum import DEGREE, SpectrumEngine, growing
from tap_bench.methods.thresholds import WANTED_FULL
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.doubts import Fallback

DECAY, STEEPNESS = 0.3, 4.0  # of the trust
TRUSTS = (0.25, 0.4)  # θ, the disagreement at which trust is half of what the horizon leaves
REFRESHES = (0.5, None)  # disagreement from which a step is full; None: none is


class RacerEngine(SpectrumEngine):
    """Spectrum's forecast, drawn towards the last full step's features the more a local one disagrees.

    With ĥ the Chebyshev series, ĝ the line through the newest two anchors a and b, and k steps since a, the
    disagreement is r = ‖ĥ - ĝ‖ / ‖ĥ‖, and h_a + κ (ĥ - h_a) is predicted (arXiv 2608.01740). Where r is too large the
    step is full and the next one of the schedule predicted in its place, as long as there is one.

    The text of the paper and its code could not be had; this follows its abstract and what others write of it. From
    them are r, the sum and κ = exp(-0.3 max(k - 1, 0)) / (1 + exp(4 (r - θ))). The paper's θ and its limit for
    refreshes are not known, so several are tried. That the *next* full step pays for a refresh is our reading of "a
    later one".

    Args:
        config: of Spectrum, whose full steps are the schedule.
        theta: θ.
        refresh: from which r a step is full; None: none is.
    """

    def __init__(self, config: TAPConfig, theta: float, refresh: float | None) -> None:
        super().__init__(config)
        self._theta, self._refresh = theta, refresh
        self._owed: Counter[str] = Counter()  # full steps of each branch that are to be predicted

    def reset(self) -> None:
        """As the base class."""
        super().reset()
        self._owed.clear()

    def begin(self, call: Call) -> bool:
        """As the base class, but a full step of the schedule pays for one that was run in its place."""
        full = super().begin(call)
        if full and self._owed[call.branch] and self._plan(call.step) and self._branch(call).streams:
            self._owed[call.branch] -= 1
            return False
        return full

    def predict(
        self,
        call: Call,
        hidden_states: Tensor,
        probe: Callable[[], Tensor],  # noqa: ARG002
        stream: str = "",
    ) -> Tensor:
        """As far as it is trusted, or raise Fallback where a full step is due and can be paid for."""
        history = self._anchors(call, hidden_states, stream)
        times, differences = tuple(history.times), history.residual
        horizon, newest = call.step - times[0], differences[0]
        coefficients = self._candidates(times, call.step)[1][0]
        forecast = torch.stack([float(c) * d for c, d in zip(coefficients, differences, strict=True)]).sum(0)
        local = newest + horizon * differences[1] if len(differences) > 1 else newest
        disagreement = (forecast - local).norm() / forecast.norm()
        if self._refresh is not None and disagreement >= self._refresh and self._can_pay(call):
            self._owed[call.branch] += 1
            raise Fallback(WANTED_FULL)
        trust = math.exp(-DECAY * max(horizon - 1, 0)) * torch.sigmoid(STEEPNESS * (self._theta - disagreement))
        result = newest + trust * (forecast - newest)
        return self._checked(call, torch.zeros_like(hidden_states), result, None, history)

    def _can_pay(self, call: Call) -> bool:
        assert isinstance(self.config.full_steps, tuple)
        return sum(step > call.step for step in self.config.full_steps) > self._owed[call.branch]

    def fall_back(self, call: Call, reason: str) -> None:
        """As the base class, but for steps that the method wants full."""
        if reason != WANTED_FULL:
            super().fall_back(call, reason)


def variants(setting: Setting) -> Iterator[Variant]:
    """On Spectrum's windows and those of all."""
    for title, full in (growing(setting.steps, setting.budget) | schedules(setting)).items():
        config = TAPConfig.paper(
            full_steps=full, family="chebyshev", orders=(DEGREE,), horizon_span=0.0, history=max(DEGREE + 1, len(full))
        )
        for theta in TRUSTS:
            for refresh in REFRESHES:
                how = "no refresh" if refresh is None else f"refresh from {refresh}"
                engine = partial(RacerEngine, theta=theta, refresh=refresh)
                variant = on_engine(f"{title}, θ {theta}, {how}", config, engine)
                yield replace(variant, settings=variant.settings | {"theta": theta, "refresh": refresh})


METHODS = [Method("racer", "rival", "RACER, arXiv 2608.01740", variants, only_by_name=True)]
