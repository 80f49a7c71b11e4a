"""What a method of the bench is: for a :class:`Setting`, the variants in which it may run.

A variant is one schedule, or one threshold. The bench tries all of them on calibration samples, and measures the best
on others. What a variant applies to the pipeline is a context manager, so any way of accelerating will do: TAP's own
engine with another family, an engine of its own, a solver in place of the pipeline's scheduler, or another package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tap_bench.calibration import Calibration
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.schedule import even_steps, growing_steps, paper_steps, spaced_steps

Kind = Literal["tap", "rival", "peer", "solver"]


@dataclass(frozen=True)
class Setting:
    """What a method is asked to do.

    Attributes:
        pipe: the pipeline, as a variant will get it.
        steps: of the full result.
        budget: full evaluations that a trajectory may have.
        calibration: runs of this pipeline, and what has been fitted to them.
    """

    pipe: Any
    steps: int
    budget: int
    calibration: Calibration


@dataclass(frozen=True)
class Method:
    """A way to make a pipeline faster.

    Attributes:
        name: lower case with hyphens, as ``--methods`` takes it.
        kind: ``tap``; ``rival``: on the same engine; ``peer``: another package as it is; ``solver``: fewer steps.
        source: paper or package.
        variants: all that are worth a try, or none where the method can't do what the setting asks.
        only_by_name: so dear to tune that no suite includes it.
    """

    name: str
    kind: Kind
    source: str
    variants: Callable[[Setting], Iterable[Variant]]
    only_by_name: bool = False


def schedules(setting: Setting) -> dict[str, tuple[int, ...]]:
    """The schedules on which methods without one of their own are tried: the paper's, even ones, TAP's, and growing."""
    steps, budget, timeline = setting.steps, setting.budget, setting.calibration.timeline
    found = {}
    if budget >= 3:
        found["paper"] = paper_steps(steps, budget)
    found["even"] = even_steps(steps, budget)
    if budget >= 3:
        found["even after 2"] = even_steps(steps, budget, warmup=2)
    if timeline is not None:
        found["even on the clock"] = spaced_steps(TAPConfig(), steps, budget, timeline)
    found["growing"] = growing_steps(steps, budget)
    return found


def forecaster(name: str, kind: Kind, source: str, **config: Any) -> Method:
    """A method that is TAP's engine with another configuration, on every schedule."""

    def variants(setting: Setting) -> Iterator[Variant]:
        for title, full in schedules(setting).items():
            yield on_engine(title, TAPConfig.paper(full_steps=full, **config))

    return Method(name, kind, source, variants)
