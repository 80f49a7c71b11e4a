"""What the page offers to compare: methods by name, how many steps are full, and an engine that keeps losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.schedule import FEWEST, paper_steps

FASTER, FULL = "target speed-up", "number of full steps"


def _on_paper_s_schedule(**changes: Any) -> Callable[[int, int], TAPConfig]:
    return lambda steps, full: TAPConfig.paper(full_steps=paper_steps(steps, full), **changes)


METHODS: dict[str, Callable[[int, int], TAPConfig]] = {
    "TAP, recommended": lambda _, full: TAPConfig(full_steps=full),
    "TAP, as in the paper": _on_paper_s_schedule(),
    "Straight-line forecast for all tokens (Taylor, order 1)": _on_paper_s_schedule(orders=(1,), horizon_span=0.0),
    "Curved forecast for all tokens (Taylor, order 2)": _on_paper_s_schedule(orders=(2,), horizon_span=0.0),
    "Repeat the last full step": _on_paper_s_schedule(orders=(0,), horizon_span=0.0),
}
"""Configurations by name, as functions of the number of steps and of full ones."""


def full_steps(steps: int, kind: str, budget: float) -> int:
    """Full steps of a budget; a speed-up leaves as many as ``TAPConfig(speedup=budget)`` does."""
    return int(budget) if kind == FULL else max(FEWEST, round(steps / budget))


class RecordingEngine(Engine):
    """Engine that keeps the proxy loss of each token's choice. On a GPU that takes a second kernel per step."""

    _loss: Tensor | None = None

    def _choose(self, losses: Tensor) -> Tensor:
        choice = super()._choose(losses)
        self._loss = losses.gather(0, choice.unsqueeze(0)).squeeze(0)
        return choice

    def predict(self, call: Call, hidden_states: Tensor, probe: Callable[[], Tensor], stream: str = "") -> Tensor:
        """As :meth:`Engine.predict`."""
        self._loss = None
        result = super().predict(call, hidden_states, probe, stream)
        if self._loss is not None:
            self._pending[-1] = replace(self._pending[-1], loss=self._loss)
        return result
