"""Rivals that forecast with one predictor for all tokens: no probe, the same engine."""

from __future__ import annotations

from tap_diffusion.bench.methods import forecaster

METHODS = [
    forecaster("fora", "rival", "FORA, arXiv 2407.01425", orders=(0,)),
    *(
        forecaster(f"taylorseer-{m}", "rival", "TaylorSeer, arXiv 2503.06923", orders=(m,), horizon_span=0.0)
        for m in (1, 2, 3)
    ),
    *(
        forecaster(
            f"newton-{m}", "rival", "Newton's divided differences", family="newton", orders=(m,), horizon_span=0.0
        )
        for m in (2, 3)
    ),
]
