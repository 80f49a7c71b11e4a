"""The kernels against the bandwidth of a copy.

    python -m tap_bench.kernels --out kernels.json

A predicted step moves each tensor once: the probe and its history, the residuals' history, the hidden states in and
out. Each size is compared with a copy of as many bytes on the same device. Between the calls of a round, which take
turns, a GPU's cache is overwritten, which also gives the host time to run ahead; times on a GPU are those of the GPU.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tap_diffusion.core import kernels, selection
from tap_diffusion.core.kernels import eager

ANCHORS = 3
DType = Literal["bfloat16", "float16", "float32"]


class Size(NamedTuple):
    """Of the stream of hidden states, and of the probe features."""

    batch: int
    tokens: int
    width: int


SIZES = {
    "dit-xl": Size(2, 256, 1152),  # DiT-XL/2 at 256², with guidance
    "flux": Size(1, 4096, 3072),  # FLUX.1-dev at 1024²
    "hunyuan-video": Size(1, 32_640, 3072),  # HunyuanVideo at 544 × 960, 61 frames
}


def arguments(size: Size, candidates: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Random ones of :func:`tap_diffusion.core.kernels.predict`, up to the coefficients."""
    generator = torch.Generator(device).manual_seed(0)

    def history() -> list[Tensor]:
        return [torch.randn(size, generator=generator, device=device).mul_(0.1**i).to(dtype) for i in range(ANCHORS)]

    probe, residual = history(), history()
    x, change = history()[0], history()[0]
    coefficients = torch.ones(candidates, ANCHORS, dtype=torch.float64)
    coefficients[:, 1] = torch.arange(candidates)
    coefficients[:, 2] = coefficients[:, 1] ** 2 / 2
    return x, probe[0] + 0.2 * change, probe, kernels.gram_matrix(probe), residual, coefficients


def moved(hidden_states: Tensor, probe: Tensor, differences: Any, gram: Tensor, residuals: Any, *_: Any) -> int:
    """Bytes that cannot but be moved: all that is read, the prediction, each token's choice and error."""
    read = [hidden_states, probe, *differences, gram, *residuals]
    return sum(tensor.nbytes for tensor in read) + hidden_states.nbytes + hidden_states[..., 0].numel() * (1 + 4)


def reference(
    hidden_states: Tensor, probe: Tensor, differences: Any, gram: Tensor, residuals: Any, coefficients: Tensor
) -> Any:
    """The operation as the reference has it, over whole tensors, one after the other."""
    products = selection.inner_products(probe, differences)
    losses, squared = selection.losses_and_errors(products, gram, coefficients, "cosine")
    choice = selection.choose(losses, "token")
    predicted = selection.combine_chosen(residuals, coefficients, choice)
    result = (hidden_states + predicted).to(hidden_states.dtype)
    return result, choice.to(torch.uint8), squared.amin(0), ~selection.all_finite(probe, result)


def forms(device: torch.device, compiled: bool) -> dict[str, Callable[..., Any]]:
    """What is compared, by name."""
    result: dict[str, Callable[..., Any]] = {"reference": reference, "torch": partial(_predict, eager)}
    if compiled:
        torch._dynamo.reset()
        result["torch.compile"] = torch.compile(reference, dynamic=False)
    if device.type == "cuda" and kernels.runs_triton(device):
        from tap_diffusion.core.kernels import fused

        result["triton"] = partial(fused.predict_by_token, loss="cosine", mend=True)
    return result


def _predict(form: Any, hidden_states: Tensor, probe: Tensor, differences: Any, gram: Tensor, residuals: Any,
             coefficients: Tensor) -> Any:  # fmt: skip
    losses, _, _ = form.proxy_losses(probe, differences, gram, coefficients, "cosine")
    return form.combine(hidden_states, residuals, coefficients, selection.choose(losses, "token"), False)


def times(calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each call, and of the host's part in it; the calls take turns.

    The two are the same on a CPU. The first round is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    on_gpu = device.type == "cuda"
    flushed = torch.empty(2**30 if on_gpu else 0, dtype=torch.int8, device=device)
    for _ in range(rounds + 1):
        for name, call in calls.items():
            if on_gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flushed.zero_()
                begin.record()
            start = time.perf_counter()
            call()
            host[name].append(time.perf_counter() - start)
            if on_gpu:
                end.record()
                end.synchronize()
                seconds[name].append(begin.elapsed_time(end) / 1000)
            else:
                seconds[name].append(host[name][-1])
    return {name: (median(seconds[name][1:]), median(host[name][1:])) for name in calls}


def measure(
    name: str,
    size: Size,
    candidates: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """One row for the copy and one for each form."""
    inputs = arguments(size, candidates, dtype, device)
    count = moved(*inputs)
    source = torch.ones(count // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    first: dict[str, float] = {}
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    for form, function in forms(device, compiled).items():
        calls[form] = partial(function, *inputs)
        start = time.perf_counter()
        calls[form]()
        first[form] = time.perf_counter() - start
    found = times(calls, device, rounds)
    return [
        {
            "size": name, "shape": list(size), "dtype": str(dtype).removeprefix("torch."), "anchors": ANCHORS,
            "candidates": candidates, "form": form, "bytes": count, "ms": 1e3 * seconds, "host_ms": 1e3 * on_host,
            "gb_per_s": count / seconds / 1e9, "of_copy": found["copy"][0] / seconds, "first_s": first.get(form),
        }
        for form, (seconds, on_host) in found.items()
    ]  # fmt: skip


def main(
    size: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(SIZES)} (by default all; on a CPU the first two) or as 1x4096x3072; repeatable."
        ),
    ] = None,
    candidates: Annotated[
        list[int] | None, typer.Option(min=2, max=255, help="K; repeatable; by default 3 and 11.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Of all tensors.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="By default cuda where there is one.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="That the medians are of.")] = 15,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile of the reference as well.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
) -> None:
    """Time the operation of a predicted step in all its forms against a copy of as many bytes."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = size or list(SIZES)[: None if where.type == "cuda" else 2]
    machine = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor() or platform.machine()
    console, rows = Console(), []
    table = Table("size", "K", "form", "MB", "ms", "host ms", "GB/s", "of copy", title=f"{machine}, {dtype}")
    with torch.no_grad():
        for name in names:
            for count in candidates or (3, 11):
                rows += measure(name, _size(name), count, getattr(torch, dtype), where, rounds, compiled)
    for row in rows:
        table.add_row(
            row["size"], str(row["candidates"]), row["form"], f"{row['bytes'] / 1e6:.1f}", f"{row['ms']:.3f}",
            f"{row['host_ms']:.3f}", f"{row['gb_per_s']:.1f}", f"{row['of_copy']:.0%}",
        )  # fmt: skip
    console.print(table)
    if out is not None:
        about = {"device": machine, "torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": rounds}
        out.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n", encoding="utf-8")
        console.print(f"wrote {out}")


def _size(name: str) -> Size:
    if name in SIZES:
        return SIZES[name]
    try:
        return Size(*map(int, name.split("x")))
    except (TypeError, ValueError):
        raise typer.BadParameter(
            f"{name!r} is none of {', '.join(SIZES)} and not batch x tokens x width as in 1x4096x3072",
            param_hint="--size",
        ) from None


if __name__ == "__main__":
    typer.run(main)
