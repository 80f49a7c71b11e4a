"""Every supported transformer class at a tiny size: configuration, inputs, and a denoising loop.

A file here holds the cases of some classes; ``CASES`` collects them.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn


class Conditions:
    """Tensors that condition one branch: random, and the same objects again at each step.

    Calling it with a shape gives a normal tensor (batch, *shape); the n-th call within a step gives the n-th tensor.
    """

    def __init__(self, seed: int, batch: int, dtype: torch.dtype) -> None:
        self.batch, self.dtype = batch, dtype
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: list[Any] = []
        self._next = 0

    def step(self) -> Conditions:
        self._next = 0
        return self

    def _keep(self, make: Callable[[], Any]) -> Any:
        if self._next == len(self._kept):
            self._kept.append(make())
        self._next += 1
        return self._kept[self._next - 1]

    def __call__(self, *shape: int) -> Tensor:
        """Normal, (batch, *shape)."""
        tensor: Tensor = self._keep(lambda: torch.randn(self.batch, *shape, generator=self._generator).to(self.dtype))
        return tensor

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers below ``high``, (batch, *shape)."""
        tensor: Tensor = self._keep(lambda: torch.randint(high, (self.batch, *shape), generator=self._generator))
        return tensor

    def constant(self, make: Callable[[], Any]) -> Any:
        """Whatever ``make`` returns at the first step."""
        return self._keep(make)


@dataclass(frozen=True)
class Case:
    """A transformer class in small.

    Attributes:
        config: arguments of its constructor. At least three blocks in the (first) list, and enough width that
            tokens differ.
        shape: size (1 or 2; 2 has more tokens) -> shape of one sample's latents, without batch.
        inputs: (latents z (B, *shape), time t (B,) falling from 1 to 0, conditions) -> keyword arguments of forward,
            but return_dict. Convert t to what the pipeline passes.
        velocity: (output, z) -> what the solver adds to z, of its shape.
        dtypes: other dtypes that the class runs in on a CPU.
    """

    config: dict[str, Any]
    shape: Callable[[int], tuple[int, ...]]
    inputs: Callable[[Tensor, Tensor, Conditions], dict[str, Any]]
    velocity: Callable[[Any, Tensor], Tensor] = lambda output, z: output[0]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)


CASES: dict[str, Case] = {}  # by the class, or "class: variant"


def class_of(name: str) -> str:
    """The class of a case."""
    return name.partition(":")[0]


def build(name: str, **changes: Any) -> Any:
    """The class of a case with random weights. None is zero, so that every part has an effect on the output.

    Skips the test where this version of diffusers is older than the class.
    """
    kind = getattr(diffusers, class_of(name), None)
    if kind is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {class_of(name)}")
    torch.manual_seed(0)
    model = kind(**CASES[name].config | changes).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.add_(0.1 * noise)
    return model


@torch.no_grad()
def evaluate(model: nn.Module, case: Case, z: Tensor, time: float, conditions: Conditions) -> Tensor:
    """One call of the transformer: the velocity, of the shape of ``z``."""
    t = torch.full((len(z),), time)
    output = model(**case.inputs(z, t, conditions.step()), return_dict=False)
    return case.velocity(output, z)


def start(case: Case, seed: int = 0, batch: int = 1, size: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Initial latents."""
    return torch.randn(batch, *case.shape(size), generator=torch.Generator().manual_seed(seed)).to(dtype)


def denoise(
    model: Any,
    case: Case,
    steps: int = 12,
    batch: int = 1,
    size: int = 1,
    dtype: torch.dtype = torch.float32,
    branches: Sequence[int] = (0,),
    contexts: bool = False,
    stop: int | None = None,
) -> list[Tensor]:
    """Euler steps from t = 1 to 0, each branch with latents and conditions of its own in separate calls.

    Args:
        branches: their seeds.
        contexts: name each by diffusers' ``cache_context``.
        stop: end early, after this many steps.

    Returns:
        the final latents of each branch.
    """
    latents = [start(case, seed, batch, size, dtype) for seed in branches]
    conditions = [Conditions(100 + seed, batch, dtype) for seed in branches]
    for step in range(steps)[:stop]:
        for i, seed in enumerate(branches):
            with model.cache_context(f"branch {seed}") if contexts else contextlib.nullcontext():
                velocity = evaluate(model, case, latents[i], 1 - step / steps, conditions[i])
            latents[i] = latents[i] - velocity / steps
    return latents


for _info in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_info.name}")
