"""EasyCache: reuse until the change of the input, times the rate at which the output follows it, is too large."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from tap_bench.method import Method, Setting
from tap_bench.methods.thresholds import WANTED_FULL, ThresholdEngine, tuned
from tap_bench.variant import Variant
from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.doubts import Fallback

RETAINED = (1, 3, 10)  # full steps at the start; 10 as published, more than small budgets have


class EasyCacheEngine(ThresholdEngine):
    """The rule of the published code of EasyCache (arXiv 2507.02860).

    With x_t before the first block at step t, and y_a and y_b after the last at the latest full steps a and b, a step
    adds k mean |x_t - x_{t-1}| / mean |y_a|, k = mean |y_a - y_b| / mean |x_a - x_b|. With one full step so far there
    is no k, and the next is full. What is reused is y - x.

    The published code takes x and y at the transformer's own input and output, where our engine does not cache, and
    decides for both branches by the conditional one.

    Args:
        config: with the first steps and the last full, as in the published code.
        threshold: of the accumulated change.
    """

    needs_probe = False

    def __init__(self, config: TAPConfig, threshold: float) -> None:
        super().__init__(config, threshold)
        self._full: dict[str, tuple[Tensor, Tensor]] = {}  # x and y at the latest full step
        self._rate: dict[str, float] = {}  # k

    def reset(self) -> None:
        """As the base class."""
        super().reset()
        self._full.clear()
        self._rate.clear()

    def record(self, call: Call, before: Tensor, after: Tensor, probe: Tensor | None, stream: str = "") -> None:
        """As the base class, and see how the output has followed the input."""
        super().record(call, before, after, probe, stream)
        key = call.branch + stream
        if key in self._full:
            x, y = self._full[key]
            self._rate[key] = _size(after - y) / _size(before - x)
        self._full[key] = before.detach().clone(), after.detach().clone()
        self._last[key] = self._full[key][0]

    def predict(
        self,
        call: Call,
        hidden_states: Tensor,
        probe: Callable[[], Tensor],  # noqa: ARG002
        stream: str = "",
    ) -> Tensor:
        """Reuse the residual of the last full step, or raise Fallback where the change has come to the threshold."""
        history, key = self._anchors(call, hidden_states, stream), call.branch + stream
        if key not in self._rate:
            raise Fallback(WANTED_FULL)
        moved = _size(hidden_states - self._last[key]) / _size(self._full[key][1])
        self._change[key] += self._rate[key] * moved
        self._last[key] = hidden_states.detach().clone()
        if self._change[key] >= self.threshold:
            raise Fallback(WANTED_FULL)
        return self._checked(call, hidden_states, history.residual[0], None, history)


def _size(features: Tensor) -> float:
    return float(features.abs().mean())


def variants(setting: Setting) -> Iterator[Variant]:
    """With few full steps at the start, and as many as published."""
    for retained in RETAINED:
        if retained + 1 < setting.budget:
            config = TAPConfig.paper(full_steps=(*range(retained), setting.steps - 1), orders=(0,))
            title = f"by threshold after {retained}"
            yield tuned(setting, f"easycache-{retained}", title, config, EasyCacheEngine, retained=retained)


METHODS = [Method("easycache", "rival", "EasyCache, arXiv 2507.02860", variants)]
