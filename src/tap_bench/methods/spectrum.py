"""Spectrum: a Chebyshev series fitted to all full steps so far, and windows that grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tap_bench.method import Method, Setting, schedules
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.schedule import spectrum_steps

DEGREE = 4  # of the series, as published


class SpectrumEngine(Engine):
    """Predicts the hidden states after the last block, not the residual (arXiv 2603.01623).

    It matters: the ridge shrinks what is predicted, and the norm in most output heads makes up for that only where all
    of the hidden states shrink alike.
    """

    def record(self, call: Call, before: Tensor, after: Tensor, probe: Tensor | None, stream: str = "") -> None:
        """Keep the hidden states after the last block."""
        super().record(call, torch.zeros_like(before), after, probe, stream)

    def predict(self, call: Call, hidden_states: Tensor, probe: Callable[[], Tensor], stream: str = "") -> Tensor:
        """What the base class adds to x is all there is."""
        return super().predict(call, hidden_states, probe, stream) - hidden_states


def growing(steps: int, budget: int) -> dict[str, tuple[int, ...]]:
    """Spectrum's schedule with ``budget`` full steps, after its own warm-up of 5 and one of 2, where there is one."""
    found = {}
    for warmup in (5, 2):
        for hundredths in range(0, 100 * steps, 5):
            full = spectrum_steps(steps, growth=hundredths / 100, warmup=warmup)
            if len(full) == budget:
                found[f"growing windows after {warmup}"] = tuple(full)
                break
    return found


def variants(setting: Setting) -> Iterator[Variant]:
    """Chebyshev ridge regression over all anchors, alone and, as in its scripts, mixed with linear extrapolation."""
    own = growing(setting.steps, setting.budget)
    for title, full in (own | schedules(setting)).items():
        for family, how in (("chebyshev", "alone"), ("chebyshev_linear", "mixed")):
            config = TAPConfig.paper(
                full_steps=full, family=family, orders=(DEGREE,), horizon_span=0.0, history=max(DEGREE + 1, len(full))
            )
            yield on_engine(f"{title}, {how}", config, SpectrumEngine)


METHODS = [Method("spectrum", "rival", "Spectrum, arXiv 2603.01623", variants)]
