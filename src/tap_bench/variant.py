"""One way to run a method: what a variant is, and those that run on TAP's engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.engine import Engine
from tap_diffusion.integrations.diffusers.api import enabled, hooks, transformers

Change = dict[str, Any]  # arguments of the pipeline's call that a variant replaces


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
