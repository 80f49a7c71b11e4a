"""TAP, as in the paper and with parts of it left out."""

from __future__ import annotations

from tap_diffusion.bench.methods import forecaster

SOURCE = "arXiv 2603.03792"

METHODS = [
    forecaster("tap", "tap", SOURCE),
    forecaster("tap-full-horizon", "tap", SOURCE, horizon_span=0.0),
    forecaster("tap-orders-1-2", "tap", SOURCE, orders=(1, 2), horizon_span=0.0),
    forecaster("tap-newton", "tap", SOURCE, family="newton", orders=(1, 2, 3), horizon_span=0.0),
    forecaster("tap-sample", "tap", SOURCE, granularity="sample"),
]
