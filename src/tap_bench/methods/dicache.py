"""DiCache: the first block tells when to reuse, and how far to go from one anchor to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

from torch import Tensor

from tap_bench.method import Method, Setting
from tap_bench.methods.thresholds import WANTED_FULL, ThresholdEngine, relative_l1, tuned
from tap_bench.variant import Variant
from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.doubts import Fallback

Error = Literal["delta_y", "delta_minus"]
RATIOS = (1.0, 1.5)  # γ is clipped to these


class DiCacheEngine(ThresholdEngine):
    """Online probe profiling and dynamic cache trajectory alignment (arXiv 2508.17356 and its published code).

    With x before the first block and y = x + h behind it, the change from step to step is that of y (``delta_y``),
    or by how much it differs from that of x (``delta_minus``). The predicted residual is r₁ + γ (r₀ - r₁), r₀ and r₁
    being those of the last two full steps, and γ = mean |h - h₁| / mean |h₀ - h₁|, clipped. The probe is as deep as
    the first block; the paper recommends 1 to 5 blocks.

    Args:
        config: with the first block as probe and two anchors.
        threshold: of the accumulated change.
        error: what the change is.
    """

    def __init__(self, config: TAPConfig, threshold: float, error: Error) -> None:
        super().__init__(config, threshold)
        self._error = error
        self._inputs: dict[str, Tensor] = {}  # x at the last step

    def reset(self) -> None:
        """As the base class."""
        super().reset()
        self._inputs.clear()

    def record(self, call: Call, before: Tensor, after: Tensor, probe: Tensor | None, stream: str = "") -> None:
        """As the base class; a full step is one to measure the next change against, too."""
        super().record(call, before, after, probe, stream)
        assert probe is not None
        self._inputs[call.branch + stream] = before.detach()
        self._last[call.branch + stream] = (before + probe).detach()

    def predict(self, call: Call, hidden_states: Tensor, probe: Callable[[], Tensor], stream: str = "") -> Tensor:
        """Align the residuals of two full steps, or raise Fallback where the change has come to the threshold."""
        history, key = self._anchors(call, hidden_states, stream), call.branch + stream
        last_input = self._inputs[key]
        self._inputs[key] = hidden_states.detach()
        h = probe()
        y = hidden_states + h
        change = relative_l1(y, self._last[key])
        if self._error == "delta_minus":
            change = abs(change - relative_l1(hidden_states, last_input))
        self._change[key] += change
        self._last[key] = y
        if self._change[key] >= self.threshold:
            raise Fallback(WANTED_FULL)
        residual = history.residual[0]
        if len(history.times) > 1:
            # The history holds differences: r₀ - r₁ and h₀ - h₁ over the steps between the two anchors.
            span = history.times[0] - history.times[1]
            passed, between = h - history.probe[0] + span * history.probe[1], span * history.probe[1]
            ratio = (passed.abs().mean() / between.abs().mean()).clamp(*RATIOS)
            residual = residual + (ratio - 1) * span * history.residual[1]
        return self._checked(call, hidden_states, residual, h, history)


def variants(setting: Setting) -> Iterator[Variant]:
    """Both changes; ``delta_y`` as published begins with more full steps than small budgets have."""
    tries: list[tuple[Error, float]] = [("delta_y", 0.2), ("delta_y", 0.0), ("delta_minus", 0.0)]
    for error, retention in tries:
        retained = int(retention * setting.steps) + 1
        if retained + 1 > setting.budget:
            continue
        config = TAPConfig.paper(
            full_steps=(*range(retained), setting.steps - 1), orders=(1,), horizon_span=0.0, probe="first_block"
        )
        title = f"{error}, {retained} full steps first"
        yield tuned(
            setting, f"dicache-{error}-{retained}", title, config, partial(DiCacheEngine, error=error), error=error
        )


METHODS = [Method("dicache", "rival", "DiCache, arXiv 2508.17356", variants)]
