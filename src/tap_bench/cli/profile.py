"""``tap profile``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from tap_diffusion.apps.cli.options import (
    DTYPES,
    WHERE,
    DType,
    console,
    failed,
    importing,
    make_writable,
    option,
    placement,
)
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.errors import ConfigError, UnsupportedModelError, UsageError


def profile(
    size: Annotated[
        str | None,
        option(
            "What",
            "--size",
            help="A transformer of full size with random weights: flux, qwen-image, dit-xl, wan-1.3b, …",
        ),
    ] = None,
    model: Annotated[
        str | None,
        option(
            "What", "--model", "-m", help="Instead: emoji, fashion, sprites, scenes, a pipeline's folder, or a hub id."
        ),
    ] = None,
    blocks: Annotated[
        int | None, option("What", help="Use only this many blocks of each kind.", default="all", min=1)
    ] = None,
    resolution: Annotated[
        str | None, option("What", help="In pixels: 1024, or 480x832 (height first).", default="the size's own")
    ] = None,
    frames: Annotated[int | None, option("What", help="Frames of a video.", default="the size's own", min=1)] = None,
    batch: Annotated[int | None, option("What", help="Samples at once.", default="the size's own", min=1)] = None,
    dtype: Annotated[DType, option("What", **DTYPES)] = DType.auto,
    device: Annotated[str | None, option("What", help="cpu, cuda, cuda:1, …", default=WHERE)] = None,
    steps: Annotated[int, option("How", help="Denoising steps.", min=6)] = 50,
    full_steps: Annotated[int, option("How", help="How many of them run the whole model.", min=2)] = 8,
    repeats: Annotated[int, option("How", help="Timed runs.", min=1)] = 3,
    processor_time: Annotated[
        bool, option("How", "--processor-time", help="Count processor time instead of clock time, for a busy CPU.")
    ] = False,
    scaling: Annotated[
        bool, option("How", "--scaling", help="Instead: how time and cache grow with tokens and depth.")
    ] = False,
    peers: Annotated[
        bool, option("How", "--peers", help="Instead: time whole runs beside other packages' caches.")
    ] = False,
    out: Annotated[
        Path, option("Output", "--out", "-o", help="Folder for the results, as JSON and as a picture.")
    ] = Path("profile"),
) -> None:
    """Measure where the time of a predicted step goes, and the least that it could take.

    Example: tap profile --size flux --blocks 1 --resolution 512, or --size dit-xl --scaling
    """
    try:
        if (size is None) == (model is None):
            raise UsageError("give a --size or a --model, and not both")
        if model is not None and (blocks or resolution or frames or scaling or peers):
            raise UsageError(
                "--blocks, --resolution, --frames, --scaling and --peers go with --size; a model has its own shape"
            )
        if scaling and peers:
            raise UsageError("give --scaling or --peers, and not both")
        if full_steps >= steps:
            raise UsageError(f"{full_steps} full steps leave none of {steps} to predict")
        height, width = _sides(resolution)
        make_writable(out)
        with importing():
            from tap_bench.profile import report as reports
            from tap_bench.profile.subjects import of_model, of_size
        weights, placed = placement(dtype, device)
        if processor_time and placed != "cpu":
            raise UsageError("--processor-time is for a CPU; a GPU keeps its own time")
        config = TAPConfig(full_steps=full_steps)
        with reports.enough_memory():
            if scaling:
                assert size is not None
                reports.write_scaling(
                    out, size, weights, placed, config, blocks, height=height, width=width, frames=frames, batch=batch,
                    processor_time=processor_time, show=console.print,
                )  # fmt: skip
            else:
                if size is not None:
                    subject = of_size(
                        size, weights, placed, blocks=blocks, height=height, width=width, frames=frames, batch=batch
                    )
                else:
                    subject = of_model(str(model), weights, placed, batch)
                subject = replace(subject, processor_time=processor_time)
                if peers:
                    reports.write_loops(out, subject, steps, full_steps, repeats, show=console.print)
                else:
                    reports.write_profile(out, subject, config, steps, repeats, show=console.print)
    except (ConfigError, UnsupportedModelError, UsageError) as error:
        raise failed(error) from None
    written = "peers.json" if peers else "{0}.json, {0}.png".format("scaling" if scaling else "profile")
    console.print(f"{written} in {out}", highlight=False)


def _sides(resolution: str | None) -> tuple[int | None, int | None]:
    """Height and width in pixels."""
    if resolution is None:
        return None, None
    try:
        height, _, width = resolution.partition("x")
        return int(height), int(width or height)
    except ValueError:
        raise UsageError(f"resolution '{resolution}' is not like 1024 or 480x832") from None
