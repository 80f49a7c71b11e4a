"""The caches that diffusers has itself, as they are.

FasterCache and Pyramid Attention Broadcast are left out: they reuse single attention layers, each in a rhythm of its
own, so no step is full or predicted as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from diffusers import FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin

from tap_bench.calibration import Trajectories
from tap_bench.method import Method, Setting
from tap_bench.variant import Variant, restored
from tap_diffusion.integrations.diffusers.api import transformers


@contextmanager
def _cached(config: Any, pipe: Any) -> Iterator[None]:
    transformer: Any
    with restored(pipe), ExitStack() as stack:
        for transformer in transformers(pipe):
            transformer.enable_cache(config)
            stack.callback(transformer.disable_cache)
        yield


def _takes(pipe: Any, config: Any) -> bool:
    """Whether diffusers has caches for the transformers, knows their blocks and finds something to hook."""
    if not all(isinstance(transformer, CacheMixin) for transformer in transformers(pipe)):
        return False
    try:
        with _cached(config, pipe):
            return all(any(map(_is_hooked, transformer.modules())) for transformer in transformers(pipe))
    except (ValueError, IndexError):  # blocks of an unknown class; none at all
        return False


def _is_hooked(module: Any) -> bool:
    return hasattr(module, "_diffusers_hook") and len(module._diffusers_hook.hooks) > 0


# ---------------------------------------------------------------------------------------------------------- TaylorSeer


def taylorseer_steps(steps: int, interval: int, warmup: int) -> tuple[int, ...]:
    """Full steps of a :class:`TaylorSeerCacheConfig`: 0, …, w - 1, then w + 1, w + 1 + N, w + 1 + 2N, …"""
    return tuple(step for step in range(steps) if step < warmup or (step - warmup - 1) % interval == 0)


def taylorseer_schedules(steps: int, budget: int) -> dict[tuple[int, ...], tuple[int, int]]:
    """Intervals and warm-ups with as many full steps as ``budget``, by their full steps.

    Most even is the shortest warm-up with which the number can be had, nearest to the paper's schedule the shortest
    of at least 3. Of the intervals the smallest and the largest, which ends with a full step as late as possible.
    """
    found = {}
    for least in (1, 3):
        for warmup in range(least, budget):
            fitting = [n for n in range(2, steps) if len(taylorseer_steps(steps, n, warmup)) == budget]
            if fitting:
                for interval in (fitting[0], fitting[-1]):
                    found[taylorseer_steps(steps, interval, warmup)] = (interval, warmup)
                break
    return found


def _taylorseer(name: str, order: int, lite: bool) -> Method:
    def variants(setting: Setting) -> Iterator[Variant]:
        for full, (interval, warmup) in taylorseer_schedules(setting.steps, setting.budget).items():
            config = TaylorSeerCacheConfig(
                cache_interval=interval,
                disable_cache_before_step=warmup,
                max_order=order,
                taylor_factors_dtype=transformers(setting.pipe)[0].dtype,
                use_lite_mode=lite,
            )
            if not _takes(setting.pipe, config):
                return
            settings = {"interval": interval, "warmup": warmup, "full_steps": list(full), "order": order, "lite": lite}
            yield Variant(f"every {interval} after {warmup}", partial(_cached, config), settings)

    return Method(name, "peer", "diffusers, TaylorSeer, arXiv 2503.06923", variants)


# ------------------------------------------------------------------------------------------------- with a threshold


def _first_block(setting: Setting) -> Iterator[Variant]:
    def of(threshold: float) -> Variant:
        return Variant(
            "by threshold", partial(_cached, FirstBlockCacheConfig(threshold=threshold)), {"threshold": threshold}
        )

    if _takes(setting.pipe, FirstBlockCacheConfig()):
        yield of(setting.calibration.threshold("diffusers-first-block", of, setting.budget, 1e-3, 10.0))


def mag_ratios(trajectories: Trajectories) -> list[float]:
    """Mean over tokens of the length of each step's residual over that of the step before (MagCache, 2506.09045).

    What ``MagCacheConfig(calibrate=True)`` prints for each branch, averaged over the branches, as it takes only one.
    """
    lengths = [residual.float().norm(dim=-1) for residual in trajectories.residual]
    branches = [(after[1:] / (after[:-1] + 1e-8)).flatten(1).mean(1) for after in lengths]
    return [1.0, *(sum(branches) / len(branches)).tolist()]


def _magcache(setting: Setting) -> Iterator[Variant]:
    if not _takes(setting.pipe, MagCacheConfig(calibrate=True)):
        return
    ratios = setting.calibration.fitted(
        "diffusers-magcache-ratios", lambda: mag_ratios(setting.calibration.trajectories())
    )
    # By default a fifth of the steps is retained, and at most 3 in a row are skipped: too many full steps for us.
    for retained in (1, 3):
        if retained < setting.budget:

            def of(threshold: float, retained: int = retained) -> Variant:
                config = MagCacheConfig(
                    threshold=threshold,
                    max_skip_steps=setting.steps,
                    retention_ratio=retained / setting.steps,
                    num_inference_steps=setting.steps,
                    mag_ratios=ratios,
                )
                settings = {"threshold": threshold, "retained": retained, "mag_ratios": ratios}
                return Variant(f"by threshold after {retained}", partial(_cached, config), settings)

            name = f"diffusers-magcache-{retained}"
            yield of(setting.calibration.threshold(name, of, setting.budget, 1e-3, 100.0))


def _seacache(setting: Setting) -> Iterator[Variant]:
    """Reuse, as in the paper, and lines, as by default."""

    def of(threshold: float, order: int) -> Variant:
        # By default at most 2 steps in a row are skipped: too many full steps for us.
        config = SeaCacheConfig(threshold=threshold, residual_order=order, max_consecutive_cached=0)
        return Variant(
            f"by threshold, order {order}", partial(_cached, config), {"threshold": threshold, "order": order}
        )

    # It hooks any model, and runs every step in full where it can't make out the latents or the pipeline does not tell
    # it the noise. A threshold that no change comes to shows that.
    if setting.budget < 2 or not _takes(setting.pipe, SeaCacheConfig()):
        return
    if setting.calibration.run(of(1e6, 0), samples=1)[1] == setting.steps:
        return
    for order in (0, 1):
        name = f"diffusers-seacache-{order}"
        yield of(setting.calibration.threshold(name, partial(of, order=order), setting.budget, 1e-3, 30.0), order)


METHODS = [
    *(_taylorseer(f"diffusers-taylorseer-{order}", order, lite=False) for order in (1, 2)),
    *(_taylorseer(f"diffusers-taylorseer-lite-{order}", order, lite=True) for order in (1, 2)),
    Method("diffusers-first-block", "peer", "diffusers, First Block Cache", _first_block),
    Method("diffusers-magcache", "peer", "diffusers, MagCache, arXiv 2506.09045", _magcache),
    Method("diffusers-seacache", "peer", "diffusers, SeaCache, arXiv 2602.18993", _seacache),
]
