"""Full steps that were searched for, for one budget, by what they do to the final picture of the calibration samples.

TAP as ``tap tune`` plans it, and reuse and TaylorSeer on full steps found in the same way, so that the search is not
all that is compared. The idea is BudCache's, which reuses. It searches by simulated annealing on the final latents of
one prompt, and then moves single steps; our search climbs from each schedule by PSNR. A plan that other calibration
samples do not confirm gives way to the schedule that would be taken without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

from tap_bench.calibration import Calibration
from tap_bench.method import Method, Setting, schedules
from tap_bench.tune import EVALUATIONS, recommended_steps, search
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.config import TAPConfig

Steps = tuple[int, ...]


def plan(setting: Setting, config: Callable[..., TAPConfig], recommended: Steps | None = None) -> Steps:
    """Full steps for one budget.

    Args:
        setting: whose calibration samples are searched on; those apart from them, if any, confirm the plan.
        config: what is planned for, of its ``full_steps``.
        recommended: the schedule without a plan; None is the best on the samples that are searched on.
    """

    def quality_on(calibration: Calibration) -> Callable[[Steps], float]:
        return cache(lambda full: calibration.quality(on_engine("", config(full_steps=full)))[0])

    quality, starts = quality_on(setting.calibration), list(schedules(setting).values())
    found = search(quality, starts, setting.steps, EVALUATIONS)
    without = recommended or max(starts, key=quality)
    if setting.calibration.apart is None or found == without:
        return found
    return max(without, found, key=quality_on(setting.calibration.apart))


def _planned(
    setting: Setting, title: str, name: str, config: Callable[..., TAPConfig], recommended: Steps | None = None
) -> Variant:
    full = setting.calibration.fitted(f"{name}-{setting.budget}", lambda: plan(setting, config, recommended))
    return on_engine(title, config(full_steps=tuple(full)))


def _tap(setting: Setting) -> Iterator[Variant]:
    yield _planned(setting, "planned", "tap-planned", TAPConfig, recommended_steps(setting))


def _taylorseer(setting: Setting) -> Iterator[Variant]:
    for order in (1, 2):
        config = partial(TAPConfig.paper, orders=(order,), horizon_span=0.0)
        yield _planned(setting, f"planned, order {order}", f"taylorseer-planned-{order}", config)


def _budcache(setting: Setting) -> Iterator[Variant]:
    yield _planned(setting, "planned", "budcache", partial(TAPConfig.paper, orders=(0,), horizon_span=0.0))


METHODS = [
    Method("tap-planned", "tap", "docs/beyond.md", _tap, only_by_name=True),
    Method(
        "taylorseer-planned",
        "rival",
        "TaylorSeer, arXiv 2503.06923, on full steps searched as BudCache does",
        _taylorseer,
        only_by_name=True,
    ),
    Method("budcache", "rival", "BudCache, arXiv 2606.13496, with another search", _budcache, only_by_name=True),
]
