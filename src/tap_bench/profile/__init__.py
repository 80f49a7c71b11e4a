"""What a predicted step costs, part by part, beside the least that it could: what ``tap profile`` does.

The floor is written down first: what must move over the device's measured copy bandwidth, and the products of the
embedders, the probe and the head over its measured rate of matrix products. Then whole trajectories are timed. Beside
each full call the plain model runs on the same inputs, so that both see the same machine.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import torch

from tap_bench.profile import sizes
from tap_bench.profile.floor import Work, count, floor, measured_rates
from tap_bench.profile.subjects import Subject, of_size
from tap_bench.profile.timing import measure, peak_memory, plain_call, timed_calls
from tap_bench.profile.watching import PARTS
from tap_diffusion import __version__
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.integrations.diffusers.api import transformers


def profile(
    subject: Subject,
    config: TAPConfig,
    steps: int,
    repeats: int = 3,
    written_down: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Write down the floor, then measure. ``written_down`` is told the floor before anything is timed.

    Returns:
        what profile.json holds; its fields are described in docs/performance.md.
    """
    work, rates = count(subject, config), measured_rates(subject)
    least = floor(work, rates)
    result = _about(subject, work) | {
        "rates": {"copy_bytes_per_s": rates.copy, "matmul_flops_per_s": rates.matmul},
        "floor_ms": {part: least[part] for part in PARTS},
        "flops": {part: work.flops[part] for part in PARTS} | {"full": work.full_flops},
        "weight_bytes": {part: work.weights[part] for part in PARTS},
        "moved_bytes": work.moved,
        "config": config.to_dict(),
        "steps": steps,
        "processor_time": subject.processor_time,
    }
    written_down(result)
    with peak_memory(subject.device) as plain_peak:
        plain_call(subject)
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
        "blocks": subject.blocks,
        "parameters": sum(parameter.numel() for transformer in found for parameter in transformer.parameters()),
        "tokens": work.tokens,
        "width": work.width,
        "dtype": str(subject.dtype).removeprefix("torch."),
    }
    if isinstance(subject.pipe, sizes.RandomPipeline):
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


def scaling(
    name: str, dtype: torch.dtype, device: str, config: TAPConfig, blocks: int | None = None,
    height: int | None = None, width: int | None = None, predicted: int = 20, processor_time: bool = False,
    **shape: int | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """How a predicted call's time and the cache grow with tokens, and with depth.

    Tokens: both sides of the picture once, √2 and 2 times as long, at a quarter of the blocks. Depth: a quarter, half
    and all of the blocks, at the smallest size.

    Args:
        blocks: the most of each kind.
        height, width: of the smallest picture, in pixels.
        predicted: steps that are timed at each point.
        processor_time: as :class:`Subject` has it.

    Returns:
        for each point ``against`` (``tokens`` or ``depth``), ``blocks``, and what :func:`timed_calls` returns.
    """
    size = sizes.get(name)
    deepest = max(size.blocks.values())
    most = min(blocks or deepest, deepest)
    depths = sorted({max(1, round(most * share)) for share in (0.25, 0.5, 1.0)})
    smallest = height or size.height, width or size.width
    points = [("depth", depth, 1.0) for depth in depths]
    points += [("tokens", depths[0], factor) for factor in (1.0, math.sqrt(2), 2.0)]
    config = replace(config, full_steps=tuple(range(config.anchors)), interval=None, hindsight=0.0)
    found = []
    for against, depth, factor in points:
        sides = [16 * round(side * factor / 16) for side in smallest]
        subject = of_size(name, dtype, device, blocks=depth, height=sides[0], width=sides[1], **shape)
        subject = replace(subject, processor_time=processor_time)
        found.append(
            {"against": against, "blocks": sum(subject.blocks.values())}
            | timed_calls(subject, config, config.anchors + predicted)
        )
    return found
