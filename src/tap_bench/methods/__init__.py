"""The methods that the bench compares, one file each.

A method says, for a :class:`Setting`, in which *variants* it may run: on which schedules, or with which threshold. The
bench tries all of them on calibration samples, and measures the best on others. What a variant applies to the pipeline
is a context manager, so any way of accelerating will do: TAP's own engine with another family, an engine of its own, a
solver in place of the pipeline's scheduler, or another package.

A new rival is one file with a ``METHODS`` list, named here or given to ``tap bench --methods FILE.py``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.errors import UsageError
from tap_diffusion.core.schedule import clock_steps, even_steps, growing_steps, paper_steps
from tap_diffusion.integrations.diffusers.api import enabled, hooks, transformers

if TYPE_CHECKING:
    from tap_bench.calibration import Calibration

Kind = Literal["tap", "rival", "peer", "solver"]
Change = dict[str, Any]  # arguments of the pipeline's call that a variant replaces


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
class Variant:
    """One way to run a method.

    Attributes:
        schedule: a few words that tell it from the method's other variants.
        applied: accelerates the pipeline within a ``with`` block, and may return arguments to change in its calls.
        settings: everything that matters, as JSON takes it.
    """

    schedule: str
    applied: Callable[[Any], AbstractContextManager[Change | None]]
    settings: dict[str, Any] = field(default_factory=dict)


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
        found["even on the clock"] = clock_steps(timeline.spacing, budget, timeline.tail)
    found["growing"] = growing_steps(steps, budget)
    return found


def forecaster(name: str, kind: Kind, source: str, **config: Any) -> Method:
    """A method that is TAP's engine with another configuration, on every schedule."""

    def variants(setting: Setting) -> Iterator[Variant]:
        for title, full in schedules(setting).items():
            yield on_engine(title, TAPConfig.paper(full_steps=full, **config))

    return Method(name, kind, source, variants)


def on_engine(schedule: str, config: TAPConfig, engine: Callable[[TAPConfig], Engine] = Engine) -> Variant:
    """A variant that runs on TAP's hook, with an engine of its own if wanted."""

    @contextmanager
    def applied(pipe: Any) -> Iterator[None]:
        with enabled(pipe, config):
            for hook in hooks(pipe):
                hook.engine = engine(hook.engine.config)
            yield

    return Variant(schedule, applied, config.to_dict())


@contextmanager
def restored(pipe: Any) -> Iterator[None]:
    """Put back all attributes of the transformers' modules, which other packages leave changed, after a ``with`` block.

    They leave hook registries, patched forwards, their settings, and submodules in another order.
    """
    modules = [module for transformer in transformers(pipe) for module in transformer.modules()]
    before = [(module, dict(vars(module)), dict(module._modules)) for module in modules]
    try:
        yield
    finally:
        for module, attributes, children in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)


def registry() -> dict[str, Method]:
    """All methods that come with the bench, by name."""
    from tap_bench.methods import (
        cachedit,
        dicache,
        diffusers_caches,
        dpcache,
        first_block_cache,
        forecasters,
        magcache,
        planned,
        solvers,
        spectrum,
        tap,
        teacache,
    )

    rivals = (forecasters, spectrum, teacache, first_block_cache, magcache, dicache, dpcache)
    modules = (tap, *rivals, planned, diffusers_caches, cachedit, solvers)
    return {method.name: method for module in modules for method in module.METHODS}


def load(file: Path) -> dict[str, Method]:
    """The methods of somebody's file, by name.

    Raises:
        UsageError: it can't be imported or has no list ``METHODS``.
    """
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.exists():
        raise UsageError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    methods = getattr(module, "METHODS", None)
    if not isinstance(methods, list) or not all(isinstance(method, Method) for method in methods):
        raise UsageError(f"{file} has no list METHODS of tap_bench.methods.Method")
    return {method.name: method for method in methods}
