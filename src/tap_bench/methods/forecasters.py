"""Rivals that forecast with one predictor for all tokens: no probe, the same engine."""

from __future__ import annotations

from collections.abc import Iterator

from tap_bench.method import Method, Setting, forecaster, schedules
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.config import TAPConfig


def _fixed(name: str, source: str, order: int, family: str = "taylor") -> Method:
    return forecaster(name, "rival", source, family=family, orders=(order,), horizon_span=0.0)


def hicache(setting: Setting) -> Iterator[Variant]:
    """Orders 1 and 2, with the σ of its runs on FLUX and the largest of its scripts."""
    for title, full in schedules(setting).items():
        for order in (1, 2):
            for family, sigma in (("hermite", 0.5), ("hermite_wide", 0.7)):
                config = TAPConfig.paper(full_steps=full, family=family, orders=(order,), horizon_span=0.0)
                yield on_engine(f"{title}, order {order}, σ {sigma}", config)


METHODS = [
    _fixed("fora", "FORA, arXiv 2407.01425", order=0),
    *(_fixed(f"taylorseer-{order}", "TaylorSeer, arXiv 2503.06923", order) for order in (1, 2, 3)),
    *(_fixed(f"newton-{order}", "AB-Cache, arXiv 2504.10540, on any spacing", order, "newton") for order in (2, 3)),
    Method("hicache", "rival", "HiCache, arXiv 2508.16984", hicache),
    *(_fixed(f"foca-{order}", "FoCa, arXiv 2508.16211", order, "foca") for order in (2, 3)),
]
