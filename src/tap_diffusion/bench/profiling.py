"""What a predicted step costs, part by part, beside the least that it could: what ``tap profile`` does.

The floor is written down first: what must move over the device's measured copy bandwidth, and the products of the
embedders, the probe and the head over its measured rate of matrix products. Then whole trajectories are timed. Beside
each full call the plain model runs on the same inputs, so that both see the same machine.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import diffusers
import torch
from torch import Tensor, nn

from tap_diffusion import __version__
from tap_diffusion.bench.counting import flops
from tap_diffusion.bench.models import MODELS, draw
from tap_diffusion.bench.sizes import SIZES, RandomPipeline, build
from tap_diffusion.config import TAPConfig
from tap_diffusion.engine import Engine
from tap_diffusion.generate import load_pipeline
from tap_diffusion.integrations.api import enabled, hooks, report, transformers
from tap_diffusion.integrations.depth import attentions
from tap_diffusion.integrations.models import SPECS
from tap_diffusion.reporting import stopwatch
from tap_diffusion.tracking import Call

PARTS = ("embedders", "probe", "selection", "head", "rest")
Note = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Subject:
    """What is profiled: a pipeline, and how to run it once with a number of steps."""

    name: str
    pipe: Any
    run: Callable[[int], Any]

    @property
    def device(self) -> torch.device:
        """Of the transformer."""
        return next(transformers(self.pipe)[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of most of the transformer's weights."""
        dtype: torch.dtype = transformers(self.pipe)[0].dtype
        return dtype


def of_size(name: str, dtype: torch.dtype, device: str, **shape: int | None) -> Subject:
    """A transformer of true size with random weights, see :func:`tap_diffusion.bench.sizes.build`."""
    pipe = build(name, dtype, device, **shape)
    return Subject(name, pipe, lambda steps: pipe(num_inference_steps=steps))


def of_model(name: str, dtype: torch.dtype, device: str, batch: int | None = None) -> Subject:
    """A model of the bench, or any pipeline that takes a prompt, by folder or hub id."""
    if name in MODELS:
        model = MODELS[name]()
        conditions, pipe = model.measured[: batch or model.batch], model.load().to(device, dtype)
        run = lambda steps: draw(pipe, model, conditions, 0, num_inference_steps=steps)  # noqa: E731
    else:
        pipe = load_pipeline(name, dtype, device)
        prompts = ["a lighthouse in a storm"] * (batch or 1)
        run = lambda steps: pipe(prompt=prompts, num_inference_steps=steps, output_type="latent")  # noqa: E731
    pipe.set_progress_bar_config(disable=True)
    return Subject(name, pipe, run)


# ---------------------------------------------------------------------------------------------- watching trajectories


class Watcher(Protocol):
    """Is told where a trajectory under TAP is."""

    def begin(self) -> None:
        """A call of the transformer begins."""

    def enter(self, part: str) -> None:
        """This of ``PARTS`` begins, and what ran before has ended."""

    def end(self, full: bool, plain: Callable[[], Any]) -> None:
        """The call has ended; ``plain`` runs the model as it is on the same inputs."""

    def step(self) -> None:
        """The scheduler has taken a step."""


class _Watched(Engine):
    def __init__(self, config: TAPConfig, watcher: Watcher) -> None:
        super().__init__(config)
        self._watcher = watcher
        self.full = True  # the call that runs, or the last
        self.sizes: tuple[torch.Size, torch.Size | None] | None = None  # of the stream and of the probe

    def begin(self, call: Call) -> bool:
        self.full = super().begin(call)
        return self.full

    def fall_back(self, call: Call, reason: str) -> None:
        self.full = True
        super().fall_back(call, reason)

    def predict(self, call: Call, hidden_states: Tensor, probe: Callable[[], Tensor], stream: str = "") -> Tensor:
        def watched() -> Tensor:
            self._watcher.enter("probe")
            h = probe()
            self._watcher.enter("selection")
            self.sizes = hidden_states.shape, h.shape
            return h

        self.sizes = hidden_states.shape, None
        self._watcher.enter("selection")
        try:
            return super().predict(call, hidden_states, watched, stream)
        finally:
            self._watcher.enter("head")


@contextmanager
def watched(pipe: Any, config: TAPConfig, watcher: Watcher) -> Iterator[_Watched]:
    """Enable TAP within a ``with`` block, and tell a watcher of each call and its parts."""
    with enabled(pipe, config), ExitStack() as stack:
        for transformer, hook in zip(transformers(pipe), hooks(pipe), strict=True):
            engine = hook.engine = _Watched(config, watcher)
            original = hook.fn_ref.original_forward
            hook.fn_ref.original_forward = _inside(original, watcher)
            stack.callback(setattr, hook.fn_ref, "original_forward", original)

            def end(module: nn.Module, args: Any, kwargs: Any, _: Any, engine: _Watched = engine) -> None:
                watcher.end(engine.full, lambda: type(module).forward(module, *args, **kwargs))

            stack.callback(transformer.register_forward_pre_hook(lambda *_: watcher.begin()).remove)
            stack.callback(transformer.register_forward_hook(end, with_kwargs=True).remove)
        stack.enter_context(_steps(pipe.scheduler, watcher.step))
        yield engine


def _inside(forward: Callable[..., Any], watcher: Watcher) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        watcher.enter("embedders")
        try:
            return forward(*args, **kwargs)
        finally:
            watcher.enter("rest")

    return run


@contextmanager
def _steps(scheduler: Any, told: Callable[[], None]) -> Iterator[None]:
    step = scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        told()
        return result

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step


class _EnoughError(Exception):
    """All that was to be known of a trajectory is known."""


# ------------------------------------------------------------------------------------------------------------ the floor


@dataclass(frozen=True)
class Rates:
    """What a device does at its best.

    Attributes:
        copy: bytes read and written per second, by a copy that is too large for any cache.
        matmul: floating-point operations per second of a large square product.
    """

    copy: float
    matmul: float


def measured_rates(device: torch.device, dtype: torch.dtype, copied: int = 2**28, width: int | None = None) -> Rates:
    """Measure them, as medians.

    Args:
        dtype: of the product.
        copied: bytes of the tensor that is copied.
        width: of the matrices; by default 4096 on a GPU, 1024 elsewhere.
    """
    width = width or (4096 if device.type == "cuda" else 1024)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    a, b = (torch.randn(width, width, dtype=dtype, device=device) for _ in range(2))
    copying = _median_ms(device, lambda: target.copy_(source))
    return Rates(2000 * copied / copying, 2000 * width**3 / _median_ms(device, lambda: a @ b))


def _median_ms(device: torch.device, run: Callable[[], Any], repeats: int = 9) -> float:
    run()
    found = []
    for _ in range(repeats):
        stop = stopwatch(device)
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
        full_flops: of a full call.
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
        stack.enter_context(contextlib.suppress(_EnoughError))
        subject.run(config.anchors + 3)
    assert engine.sizes is not None
    stream, probe = engine.sizes
    size, cached = subject.dtype.itemsize, _cache_itemsize(subject, config)
    numbers, probed = math.prod(stream), math.prod(probe) if probe is not None else 0
    work.flops, work.weights = counter.flops, counter.weights
    work.full_flops, work.layers = counter.full_flops, counter.layers
    work.cache = config.anchors * cached * (numbers + probed)
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
        self.layers = self.full_flops = 0
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

    def _returns(self, _: nn.Module, args: Any, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else output
        self.layers += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def begin(self) -> None:
        self.flops.clear()
        self.weights.clear()
        self.layers_before = self.layers
        self._part, self._last = "rest", self._counter.get_total_flops()

    def enter(self, part: str) -> None:
        total = self._counter.get_total_flops()
        self.flops[self._part] += total - self._last
        self._part, self._last = part, total

    def end(self, full: bool, plain: Callable[[], Any]) -> None:
        if not full:
            raise _EnoughError
        self.full_flops, self.layers = sum(self.flops.values()), self.layers - self.layers_before

    def step(self) -> None:
        """Nothing is counted by steps."""


def _layers(transformer: nn.Module) -> list[nn.Module]:
    """Attention and feed-forward of every block: what TaylorSeer keeps the outputs of (arXiv 2503.06923)."""
    blocks = [block for name in SPECS[type(transformer).__name__].blocks for block in transformer.get_submodule(name)]
    names = ("ff", "ffn", "mlp", "feed_forward", "ff_context")
    forward = [child for block in blocks for name, child in block.named_children() if name in names]
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


# ---------------------------------------------------------------------------------------------------------------- time


class _Timer:
    """Times every call, the parts of the predicted ones, and the whole trajectory."""

    def __init__(self, device: torch.device, beside: bool = True) -> None:
        self.calls: dict[str, list[Callable[[], float]]] = {"plain": [], "full": [], "predicted": []}
        self.parts: list[list[tuple[str, Callable[[], float]]]] = []  # of each predicted call
        self.spans: list[Callable[[], float]] = []  # from step to step of the scheduler
        self._device, self._beside = device, beside
        self._span: Callable[[], Callable[[], float]] | None = None

    def begin(self) -> None:
        if self._span is None:
            self._span = stopwatch(self._device)
        self._call, self._entered = stopwatch(self._device), []
        self._part, self._since = "rest", stopwatch(self._device)

    def enter(self, part: str) -> None:
        self._entered.append((self._part, self._since()))
        self._part, self._since = part, stopwatch(self._device)

    def end(self, full: bool, plain: Callable[[], Any]) -> None:
        self.enter("")
        self.calls["full" if full else "predicted"].append(self._call())
        if not full:
            self.parts.append(self._entered)
        elif self._beside:
            stop = stopwatch(self._device)
            plain()
            self.calls["plain"].append(stop())

    def step(self) -> None:
        assert self._span is not None
        self.spans.append(self._span())
        self._span = stopwatch(self._device)


def measure(subject: Subject, config: TAPConfig, steps: int, repeats: int) -> dict[str, Any]:
    """Run trajectories and time them.

    Returns:
        ``plain_ms``, ``full_ms`` and ``predicted_ms``: medians over the calls of the plain model, and of TAP's two
        kinds (a full one in which hindsight looks back holds a predicted one as well); ``parts_ms`` of a predicted
        call; ``loop``: of the whole denoising loop, where the plain one is put together from the median plain call
        and what the pipeline does between calls; ``cache_bytes``, ``branches``, ``choosing``.
    """
    totals: dict[str, list[float]] = {"plain": [], "full": [], "predicted": []}
    parts: list[dict[str, float]] = []
    tap_ms, between_ms = [], []
    for _ in range(repeats):
        timer = _Timer(subject.device)
        with watched(subject.pipe, config, timer):
            subject.run(steps)
            account = report(subject.pipe)
        calls = {kind: [ms() for ms in found] for kind, found in timer.calls.items()}
        tap_ms.append(sum(ms() for ms in timer.spans) - sum(calls["plain"]))
        between_ms.append(tap_ms[-1] - sum(calls["full"]) - sum(calls["predicted"]))
        for kind, found in calls.items():
            totals[kind] += found
        parts += [_summed(entered) for entered in timer.parts]
    plain_loop = len(account.calls) * median(totals["plain"]) + median(between_ms)
    limit, speedup = account.evaluations_speedup, plain_loop / median(tap_ms)
    return {
        **{f"{kind}_ms": median(found) for kind, found in totals.items()},
        "parts_ms": {part: median(call[part] for call in parts) for part in PARTS},
        "loop": {
            "plain_ms": plain_loop, "tap_ms": median(tap_ms), "tap_ms_each": tap_ms, "between_ms": median(between_ms),
            "speedup": speedup, "limit": limit, "share_of_limit": speedup / limit,
        },
        "full_steps": account.full_steps,
        "branches": len(account.calls) // account.steps,
        "cache_bytes": account.cache_bytes,
        "fallbacks": dict(account.fallbacks),
    }  # fmt: skip


def _summed(entered: Sequence[tuple[str, Callable[[], float]]]) -> dict[str, float]:
    total = dict.fromkeys(PARTS, 0.0)
    for part, milliseconds in entered:
        total[part] += milliseconds()
    return total


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """The most memory in use within a ``with`` block, bytes: allocated on a GPU, else resident on Linux, else None."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is resident now
    yield _resident_peak


def _resident_peak() -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


def _plain_call(subject: Subject) -> None:
    """One call of the plain model."""

    def enough(*_: Any) -> None:
        raise _EnoughError

    handle = transformers(subject.pipe)[0].register_forward_hook(enough)
    try:
        with contextlib.suppress(_EnoughError):
            subject.run(2)
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------------------------ profiles


def profile(
    subject: Subject, config: TAPConfig, steps: int, repeats: int = 3, written_down: Note = lambda _: None
) -> dict[str, Any]:
    """Write down the floor, then measure. ``written_down`` is told the floor before anything is timed.

    Returns:
        what profile.json holds; its fields are described in docs/performance.md.
    """
    work, rates = count(subject, config), measured_rates(subject.device, subject.dtype)
    least = floor(work, rates)
    result = _about(subject, work) | {
        "rates": {"copy_bytes_per_s": rates.copy, "matmul_flops_per_s": rates.matmul},
        "floor_ms": {part: least[part] for part in PARTS},
        "flops": {part: work.flops[part] for part in PARTS} | {"full": work.full_flops},
        "weight_bytes": {part: work.weights[part] for part in PARTS},
        "moved_bytes": work.moved,
        "config": config.to_dict(),
        "steps": steps,
    }
    written_down(result)
    with peak_memory(subject.device) as plain_peak:
        _plain_call(subject)
        plain_bytes = plain_peak()
    with peak_memory(subject.device) as tap_peak:
        result |= measure(subject, config, steps, repeats)
        tap_bytes = tap_peak()
    return result | {
        "predicted_over_plain": result["predicted_ms"] / result["plain_ms"],
        "cache": {
            "computed_bytes": work.cache * result["branches"],
            "measured_bytes": result.pop("cache_bytes"),
            "taylorseer_per_layer_bytes": work.layers * config.anchors * result["branches"],
        },
        "peak_bytes": {"plain": plain_bytes, "tap": tap_bytes},
    }


def _about(subject: Subject, work: Work) -> dict[str, Any]:
    found = transformers(subject.pipe)
    about = {
        "name": subject.name,
        "transformer": type(found[0]).__name__,
        "blocks": _blocks(subject),
        "parameters": sum(parameter.numel() for transformer in found for parameter in transformer.parameters()),
        "tokens": work.tokens,
        "width": work.width,
        "dtype": str(subject.dtype).removeprefix("torch."),
    }
    if isinstance(subject.pipe, RandomPipeline):
        about["batch"], about["latents"] = subject.pipe.shape[0], list(subject.pipe.shape)
    return about | {"machine": machine(subject.device)}


def machine(device: torch.device) -> dict[str, Any]:
    """What ran, and the versions of what it ran."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "tap_diffusion": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- scaling


def scaling(
    name: str, dtype: torch.dtype, device: str, config: TAPConfig, blocks: int | None, height: int, width: int,
    predicted: int = 20, **shape: int | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """How a predicted call's time and the cache grow with tokens, and with depth.

    Tokens: both sides of the picture once, √2 and 2 times as long, at a quarter of the blocks. Depth: a quarter, half
    and all of the blocks, at the smallest size.

    Args:
        blocks: the most of each kind.
        height, width: of the smallest picture, in pixels.
        predicted: steps that are timed at each point.

    Returns:
        for each point ``against`` (``tokens`` or ``depth``), ``tokens`` of all samples, ``blocks``, ``predicted_ms``
        and ``full_ms`` (medians), ``cache_bytes``.
    """
    most = blocks or max(SIZES[name].blocks.values())
    depths = sorted({max(1, round(most * share)) for share in (0.25, 0.5, 1.0)})
    longer = [[16 * round(side * factor / 16) for side in (height, width)] for factor in (1, math.sqrt(2), 2)]
    points = [("depth", depth, height, width) for depth in depths]
    points += [("tokens", depths[0], *sides) for sides in longer]
    config = replace(config, full_steps=tuple(range(config.anchors)), interval=None, hindsight=0.0)
    found = []
    for against, depth, *sides in points:
        subject = of_size(name, dtype, device, blocks=depth, height=sides[0], width=sides[1], **shape)
        timer = _Timer(subject.device, beside=False)
        with watched(subject.pipe, config, timer) as engine:
            subject.run(config.anchors + predicted)
            cache_bytes = report(subject.pipe).cache_bytes
        assert engine.sizes is not None
        found.append(
            {"against": against, "tokens": engine.sizes[0][:2].numel(), "blocks": sum(_blocks(subject).values()),
             "cache_bytes": cache_bytes, "predicted_ms": median(ms() for ms in timer.calls["predicted"]),
             "full_ms": median(ms() for ms in timer.calls["full"])}
        )  # fmt: skip
    return found


def _blocks(subject: Subject) -> dict[str, int]:
    transformer: Any = transformers(subject.pipe)[0]
    return {name: len(transformer.get_submodule(name)) for name in SPECS[type(transformer).__name__].blocks}
