"""The least that a predicted call takes: what it has to move and to multiply, by what the device does at its best."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tap_bench.counting import flops
from tap_bench.profile.subjects import Subject
from tap_bench.profile.watching import PARTS, EnoughError, watched
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.integrations.depth import attentions
from tap_diffusion.integrations.diffusers.api import transformers
from tap_diffusion.integrations.specs import SPECS


@dataclass(frozen=True)
class Rates:
    """What a device does at its best.

    Attributes:
        copy: bytes read and written per second, by a copy that is too large for any cache.
        matmul: floating-point operations per second of a large square product.
    """

    copy: float
    matmul: float


def measured_rates(subject: Subject, copied: int = 2**28, width: int | None = None) -> Rates:
    """Measure them on the device and in the dtype of a subject, as medians.

    Args:
        copied: bytes of the tensor that is copied.
        width: of the matrices; by default 4096 on a GPU, 1024 elsewhere.
    """
    device, dtype = subject.device, subject.dtype
    width = width or (4096 if device.type == "cuda" else 1024)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    a, b = (torch.randn(width, width, dtype=dtype, device=device) for _ in range(2))
    copying = _median_ms(subject, lambda: target.copy_(source))
    return Rates(2000 * copied / copying, 2000 * width**3 / _median_ms(subject, lambda: a @ b))


def _median_ms(subject: Subject, run: Callable[[], Any], repeats: int = 9) -> float:
    run()
    found = []
    for _ in range(repeats):
        stop = subject.stopwatch()
        run()
        found.append(stop())
    return median(milliseconds() for milliseconds in found)


@dataclass
class Work:
    """What one predicted call has to do, counted.

    Attributes:
        flops: of the matrix products and convolutions of each part.
        weights: bytes of the parameters that each part reads.
        moved: bytes that selection reads and writes: h, its history and that of r, the hidden states and the output.
        cache: bytes of the tensors that one branch's cache has to hold.
        full_flops: of a full call, its probe included.
        layers: bytes of what attention and feed-forward of all blocks return in a full call.
        tokens: of one sample.
        width: of a token.
    """

    flops: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    weights: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    moved: int = 0
    cache: int = 0
    full_flops: int = 0
    layers: int = 0
    tokens: int = 0
    width: int = 0


def count(subject: Subject, config: TAPConfig) -> Work:
    """Count on the first predicted call that has all anchors. Costs as many full calls as there are anchors."""
    work = Work()
    config = replace(config, full_steps=tuple(range(config.anchors)), interval=None, hindsight=0.0)
    with ExitStack() as stack:
        counter = _Counter(subject.pipe, stack)
        engine = stack.enter_context(watched(subject.pipe, config, counter))
        stack.enter_context(suppress(EnoughError))
        subject.run(config.anchors + 3)
    assert engine.sizes is not None
    stream, probe = engine.sizes
    size, cached = subject.dtype.itemsize, _cache_itemsize(subject, config)
    numbers, probed = math.prod(stream), math.prod(probe) if probe is not None else 0
    work.flops, work.weights = counter.flops, counter.weights
    work.full_flops, work.layers = counter.full_flops, counter.layers
    sketched = probed // probe[-1] * math.ceil(probe[-1] / config.stride(probe[-1])) if probe is not None else 0
    work.cache = config.anchors * cached * (numbers + sketched)
    work.moved = work.cache + size * (2 * numbers + probed)
    work.tokens, work.width = stream[1], stream[2]
    return work


def _cache_itemsize(subject: Subject, config: TAPConfig) -> int:
    dtype: torch.dtype = subject.dtype if config.cache_dtype == "model" else getattr(torch, config.cache_dtype)
    return dtype.itemsize


class _Counter:
    """Counts, and breaks off after the first predicted call that had all anchors."""

    def __init__(self, pipe: Any, stack: ExitStack) -> None:
        self.flops: defaultdict[str, int] = defaultdict(int)
        self.weights: defaultdict[str, int] = defaultdict(int)
        self.layers = self._layers_before = self.full_flops = 0
        self._part = "rest"
        self._counter = stack.enter_context(flops())
        self._last = 0
        for transformer in transformers(pipe):
            for module in transformer.modules():
                # Of an embedding, a row for each sample is read.
                if next(module.parameters(recurse=False), None) is not None and not isinstance(module, nn.Embedding):
                    stack.callback(module.register_forward_pre_hook(self._reads).remove)
            for layer in _layers(transformer):
                stack.callback(layer.register_forward_hook(self._returns).remove)

    def _reads(self, module: nn.Module, _: Any) -> None:
        self.weights[self._part] += sum(parameter.nbytes for parameter in module.parameters(recurse=False))

    def _returns(self, _: nn.Module, __: Any, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else output
        self.layers += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def begin(self) -> None:
        self.flops.clear()
        self.weights.clear()
        self._layers_before = self.layers
        self._part, self._last = "rest", self._counter.get_total_flops()

    def enter(self, part: str) -> None:
        total = self._counter.get_total_flops()
        self.flops[self._part] += total - self._last
        self._part, self._last = part, total

    def end(self, full: bool, plain: Callable[[], Any]) -> None:  # noqa: ARG002
        if not full:
            raise EnoughError
        self.full_flops, self.layers = sum(self.flops.values()), self.layers - self._layers_before

    def step(self) -> None:
        """Nothing is counted by steps."""


def _layers(transformer: nn.Module) -> list[nn.Module]:
    """Attention and feed-forward of every block: what TaylorSeer keeps the outputs of (arXiv 2503.06923)."""
    lists: list[Any] = [transformer.get_submodule(name) for name in SPECS[type(transformer).__name__].blocks]
    blocks = [block for blocks in lists for block in blocks]
    forward = [child for block in blocks for child in block.children() if "FeedForward" in type(child).__name__]
    return [layer for block in blocks for layer in attentions(block)] + forward


def floor(work: Work, rates: Rates) -> dict[str, float]:
    """The least that each part of a predicted call takes, milliseconds.

    Products take their operations at the device's rate, or the reading of their weights if that is longer.
    """
    floors = {
        part: 1000 * max(work.flops[part] / rates.matmul, work.weights[part] / rates.copy)
        for part in ("embedders", "probe", "head")
    }
    return {part: floors.get(part, 0.0) for part in PARTS} | {"selection": 1000 * work.moved / rates.copy}
