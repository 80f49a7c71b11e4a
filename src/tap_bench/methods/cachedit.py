"""cache-dit (https://github.com/vipshop/cache-dit), if it is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from tap_bench.method import Method, Setting, schedules
from tap_bench.variant import Variant, restored
from tap_diffusion.integrations.diffusers.api import transformers

Calibrator = tuple[str, dict[str, Any]] | None  # name and arguments of its configuration


def _cache_dit() -> Any:
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it reads this once, and by default tells much on stdout
    import cache_dit

    return cache_dit


def _takes(pipe: Any) -> bool:
    """Whether cache-dit is installed and knows the pipeline, or else its only transformer."""
    if importlib.util.find_spec("cache_dit") is None:
        return False
    known = _cache_dit().BlockAdapterRegister
    found = transformers(pipe)
    return known.is_supported(pipe) or (len(found) == 1 and known.is_supported(found[0]))


def _adapter(pipe: Any) -> Any:
    known = _cache_dit().BlockAdapterRegister
    if known.is_supported(pipe):
        return known.get_adapter(pipe)
    adapter = known.get_adapter(transformers(pipe)[0])
    # Its own stand-in for a pipeline is never told where a run begins.
    adapter.pipe = pipe
    return adapter


@contextmanager
def _cached(settings: dict[str, Any], calibrator: Calibrator, pipe: Any) -> Iterator[None]:
    cache_dit = _cache_dit()
    with restored(pipe):
        adapter = _adapter(pipe)
        cache_dit.enable_cache(
            adapter,
            cache_config=cache_dit.DBCacheConfig(**settings),
            calibrator_config=calibrator and getattr(cache_dit, calibrator[0])(**calibrator[1]),
        )
        try:
            yield
        finally:
            cache_dit.disable_cache(adapter)


def _variant(schedule: str, setting: Setting, calibrator: Calibrator = None, **settings: Any) -> Variant:
    """F1B0: one block computed at the start of predicted steps, none at the end; no other limits."""
    settings |= {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "max_cached_steps": -1,
        "max_continuous_cached_steps": -1,
        "enable_separate_cfg": setting.calibration.calls_per_step == 2,
    }
    told = {"cache_dit": version("cache_dit"), "calibrator": calibrator and list(calibrator)} | settings
    return Variant(schedule, partial(_cached, settings, calibrator), told)


def _masked(name: str, source: str, calibrator: Calibrator = None) -> Method:
    """DBCache with a steps computation mask, so that the schedule alone decides."""

    def variants(setting: Setting) -> Iterator[Variant]:
        if not _takes(setting.pipe):
            return
        for schedule, full in schedules(setting).items():
            mask = [int(step in full) for step in range(setting.steps)]
            yield _variant(
                schedule, setting, calibrator, steps_computation_mask=mask, steps_computation_policy="static"
            )

    return Method(name, "peer", source, variants)


def _dynamic(setting: Setting) -> Iterator[Variant]:
    if not _takes(setting.pipe):
        return
    for warmup in (1, 3):
        if warmup < setting.budget:

            def of(threshold: float, warmup: int = warmup) -> Variant:
                title = f"by threshold after {warmup}"
                return _variant(title, setting, residual_diff_threshold=threshold, max_warmup_steps=warmup)

            # With 1 or more cache-dit doesn't compare at all.
            yield of(setting.calibration.threshold(f"cache-dit-dynamic-{warmup}", of, setting.budget, 1e-3, 1.0))


METHODS = [
    _masked("cache-dit", "cache-dit, DBCache"),
    *(
        _masked(
            f"cache-dit-taylorseer-{order}",
            "cache-dit, DBCache with TaylorSeer, arXiv 2503.06923",
            ("TaylorSeerCalibratorConfig", {"taylorseer_order": order}),
        )
        for order in (1, 2)
    ),
    _masked("cache-dit-foca", "cache-dit, DBCache with FoCa, arXiv 2508.16211", ("FoCaCalibratorConfig", {})),
    _masked("cache-dit-dmd", "cache-dit, DBCache with dynamic mode decomposition", ("DMDCalibratorConfig", {})),
    Method("cache-dit-dynamic", "peer", "cache-dit, DBCache", _dynamic),
]
