"""TAP with the recommended settings, as in the paper, and with parts of either left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tap_bench.method import Method, Setting, forecaster
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.config import TAPConfig

SOURCE = "arXiv 2603.03792"
OURS = "docs/beyond.md"


def _recommended(name: str, **changes: Any) -> Method:
    def variants(setting: Setting) -> Iterator[Variant]:
        yield on_engine("even on the clock", TAPConfig(full_steps=setting.budget, **changes))

    return Method(name, "tap", OURS, variants)


METHODS = [
    _recommended("tap"),
    _recommended("tap-no-hindsight", hindsight=0.0),
    _recommended("tap-order-1", orders=(1,)),
    forecaster("tap-paper", "tap", SOURCE),
    forecaster("tap-paper-full-horizon", "tap", SOURCE, horizon_span=0.0),
    forecaster("tap-paper-newton", "tap", SOURCE, family="newton", orders=(1, 2, 3), horizon_span=0.0),
    forecaster("tap-paper-sample", "tap", SOURCE, granularity="sample"),
]
