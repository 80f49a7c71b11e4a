"""First-Block Cache: run the first block; reuse the others while its residual is like that of the last full step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from tap_bench.method import Method, Setting
from tap_bench.methods.thresholds import WANTED_FULL, ThresholdEngine, relative_l1, tuned
from tap_bench.variant import Variant
from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.doubts import Fallback


class FirstBlockCacheEngine(ThresholdEngine):
    """Adds the residual of the blocks behind the first to the first block's output (ParaAttention, and diffusers).

    The change is measured against the last full step, so nothing accumulates.

    Args:
        config: with the first block as probe.
        threshold: of the relative change of the first block's residual.
    """

    def record(self, call: Call, before: Tensor, after: Tensor, probe: Tensor | None, stream: str = "") -> None:
        """Keep the first block's residual and that of the others."""
        assert probe is not None
        super().record(call, before + probe, after, probe, stream)

    def predict(self, call: Call, hidden_states: Tensor, probe: Callable[[], Tensor], stream: str = "") -> Tensor:
        """The first block's output and the others' residual, or raise Fallback where the change is too large."""
        history, h = self._anchors(call, hidden_states, stream), probe()
        if relative_l1(h, history.probe[0]) > self.threshold:
            raise Fallback(WANTED_FULL)
        return self._checked(call, hidden_states, h + history.residual[0], h, history)


def variants(setting: Setting) -> Iterator[Variant]:
    """One, with its threshold tuned."""
    config = TAPConfig.paper(full_steps=(0,), orders=(0,), probe="first_block")
    yield tuned(setting, "first-block-cache", "by threshold", config, FirstBlockCacheEngine)


METHODS = [Method("first-block-cache", "rival", "First-Block Cache of ParaAttention and diffusers", variants)]
