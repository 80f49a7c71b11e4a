"""Full steps that were searched for, for one budget, by what they do to the final picture of the calibration samples.

TAP as ``tap tune`` plans it, and TaylorSeer on full steps found in the same way, so that the search is not all that is
compared. The idea is BudCache's, the search our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tap_diffusion.bench.methods import Kind, Method, Setting, Variant, on_engine, schedules
from tap_diffusion.bench.tune import EVALUATIONS, search
from tap_diffusion.config import TAPConfig


def _planned(name: str, kind: Kind, source: str, configs: dict[str, Callable[..., TAPConfig]]) -> Method:
    def variants(setting: Setting) -> Iterator[Variant]:
        calibration, starts = setting.calibration, list(schedules(setting).values())
        for label, config in configs.items():

            def plan(label: str = label, config: Callable[..., TAPConfig] = config) -> tuple[int, ...]:
                def quality(full_steps: tuple[int, ...]) -> float:
                    return calibration.quality(on_engine(label, config(full_steps=full_steps)))[0]

                return search(quality, starts, setting.steps, EVALUATIONS)

            full = calibration.fitted("-".join([name, *label.split(), str(setting.budget)]), plan)
            yield on_engine(label, config(full_steps=tuple(full)))

    return Method(name, kind, source, variants, only_by_name=True)


def _taylor(order: int) -> Callable[..., TAPConfig]:
    return lambda full_steps: TAPConfig.paper(full_steps=full_steps, orders=(order,), horizon_span=0.0)


METHODS = [
    _planned("tap-planned", "tap", "docs/beyond.md", {"planned": TAPConfig}),
    _planned(
        "taylorseer-planned",
        "rival",
        "TaylorSeer, arXiv 2503.06923, on full steps searched as BudCache does",
        {f"planned, order {order}": _taylor(order) for order in (1, 2)},
    ),
]
