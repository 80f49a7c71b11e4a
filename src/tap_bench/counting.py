"""What a run costs, counted from outside: it must not depend on what a method says of itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tap_diffusion.integrations.depth import attentions
from tap_diffusion.integrations.diffusers.api import transformers
from tap_diffusion.integrations.specs import SPECS


@dataclass
class Counts:
    """Calls so far of the transformers (``all``), and of the attention in their last blocks (``full``)."""

    all: int = 0
    full: int = 0


@contextmanager
def counted(pipe: Any, counts: Counts | None = None) -> Iterator[Counts]:
    """Count within a ``with`` block.

    A call counts as full where the last block's attention computes its queries: every cache known leaves that out on
    a step that is not full, whether it skips blocks or layers.
    """
    counts = counts or Counts()

    def all_(*_: Any) -> None:
        counts.all += 1

    def full(*_: Any) -> None:
        counts.full += 1

    handles = []
    for transformer in transformers(pipe):
        last = getattr(transformer, SPECS[type(transformer).__name__].blocks[-1])[-1]
        handles += [transformer.register_forward_hook(all_), _first_linear(last).register_forward_hook(full)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _first_linear(block: nn.Module) -> nn.Linear:
    return next(part for part in attentions(block)[0].modules() if isinstance(part, nn.Linear))


def flops() -> FlopCounterMode:
    """Counts floating-point operations of matrix products, convolutions and attention within a ``with`` block."""
    return FlopCounterMode(display=False)


@contextmanager
def live_bytes(pipe: Any, every: int) -> Iterator[list[int]]:
    """Collect the bytes of tensors that have come alive since, after one call of the transformers in ``every``."""
    found: list[int] = []
    calls, before = 0, _tensor_bytes()

    def look(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % every == 0:
            found.append(_tensor_bytes() - before)

    handles = [transformer.register_forward_hook(look) for transformer in transformers(pipe)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensor_bytes() -> int:
    gc.collect()  # else what is garbage already would count
    storages = {}
    for item in gc.get_objects():
        # Some lazy objects raise when they are asked for their class.
        if issubclass(type(item), Tensor) and not issubclass(type(item), torch._subclasses.FakeTensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
