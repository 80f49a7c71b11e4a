"""``tap generate``."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tap_diffusion.apps.cli.options import (
    DType,
    ModelDeviceOption,
    ModelDTypeOption,
    ModelOption,
    console,
    counted,
    failed,
    make_writable,
    option,
    placement,
    read_prompts,
)
from tap_diffusion.apps.files import FPS
from tap_diffusion.core.config import DEFAULT_SPEEDUP, TAPConfig
from tap_diffusion.core.errors import ConfigError, UnsupportedModelError, UsageError, told_by

SHOWN = 10  # errors that are printed


class EngineName(StrEnum):
    """What runs the pipelines that generate many pictures."""

    local = "local"
    ray = "ray"


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="What to draw, one result for each; of fashion and DiT the class.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        option("Sampling", "--prompts", help="File with one prompt a line; for many also .jsonl or .parquet."),
    ] = None,
    model: ModelOption = "emoji",
    dtype: ModelDTypeOption = DType.auto,
    device: ModelDeviceOption = None,
    offload: Annotated[
        bool, option("Model", "--offload", help="Keep on the GPU only what is at work, for models that don't fit.")
    ] = False,
    steps: Annotated[int, option("Sampling", help="Denoising steps.", min=1)] = 50,
    seed: Annotated[int, option("Sampling", help="Seed of the first picture; the next take the next.", min=0)] = 0,
    guidance: Annotated[
        float | None,
        option("Sampling", help="Guidance scale.", default="the pipeline's; 2 for emoji, 3 for scenes", min=0),
    ] = None,
    negative_prompt: Annotated[
        str | None, option("Sampling", "--negative-prompt", help="What not to draw, for all.", default="nothing")
    ] = None,
    height: Annotated[int | None, option("Sampling", help="In pixels.", default="the model's own", min=1)] = None,
    width: Annotated[int | None, option("Sampling", help="In pixels.", default="the model's own", min=1)] = None,
    frames: Annotated[int | None, option("Sampling", help="Of videos.", default="the model's own", min=1)] = None,
    batch_size: Annotated[
        int | None, option("Sampling", help="Generated at a time.", default="8 pictures, or 1 video", min=1)
    ] = None,
    speedup: Annotated[
        float | None,
        option("Method", "--speedup", "-x", help="Steps for each full one.", default=f"{TAPConfig.speedup:g}"),
    ] = None,
    full_steps: Annotated[int | None, option("Method", help="How many steps are full, instead.")] = None,
    interval: Annotated[
        int | None, option("Method", "--interval", "-n", help="The paper's: one step in this many is full; 1: all.")
    ] = None,
    warmup: Annotated[
        int | None, option("Method", help="Full steps at the start, with an interval.", default=str(TAPConfig.warmup))
    ] = None,
    paper: Annotated[bool, option("Method", "--paper", help="Exactly the paper's settings.")] = False,
    config_file: Annotated[
        Path | None, option("Method", "--config", help="TAPConfig as JSON; the options above override it.")
    ] = None,
    compare: Annotated[bool, option("Output", "--compare", help="Generate without TAP too, and compare.")] = False,
    repeats: Annotated[
        int, option("Output", help="Timed runs of each with --compare, alternating; medians count.", min=1)
    ] = 1,
    fps: Annotated[int, option("Output", help="Frames a second of videos.", min=1)] = FPS,
    out: Annotated[Path, option("Output", "--out", "-o", help="Folder for results and report.json.")] = Path("out"),
    overwrite: Annotated[
        bool, option("Output", "--overwrite", help="Delete what an earlier run left in --out; else a run goes on.")
    ] = False,
    engine: Annotated[
        EngineName | None,
        option("Many prompts", help="local: in this process; ray: on Ray Data. A run begun in --out goes on."),
    ] = None,
    address: Annotated[
        str | None, option("Many prompts", help="Of a Ray cluster, or auto.", default="one on this machine")
    ] = None,
    workers: Annotated[
        int | None, option("Many prompts", help="Pipelines on Ray.", default="one per GPU, or per machine", min=1)
    ] = None,
) -> None:
    """Generate pictures or videos with TAP, beside those of the plain model if wanted.

    Example: tap generate "red apple" "green frog face" --speedup 5 --compare

    Many, with a manifest in place of the report: tap generate --prompts coco.jsonl --engine ray --workers 8
    """
    warnings: dict[str, None] = {}  # each once, in the order in which they came
    try:
        if engine is None and prompt_file is not None and prompt_file.suffix in (".jsonl", ".parquet"):
            engine = EngineName.local
        for option, given in (("--address", address), ("--workers", workers)):
            if given is not None and engine != EngineName.ray:
                raise UsageError(f"{option} is for --engine ray")
        few = {"a prompt": prompts, "--compare": compare, "--repeats": repeats > 1, "--offload": offload}
        few |= {"--negative-prompt": negative_prompt is not None, "--overwrite": overwrite}
        for option, asked in few.items():
            if asked and engine is not None:
                raise UsageError(f"{option} is for a few pictures; with an engine they come from the file of --prompts")
        wanted = [] if engine is not None else read_prompts(prompts or [], prompt_file)
        config = _config(config_file, paper, speedup=speedup, full_steps=full_steps, interval=interval, warmup=warmup)
        if config.interval is not None and config.warmup > steps:
            raise UsageError(f"warmup is {config.warmup}, more than the {steps} steps")
        if isinstance(config.full_steps, int) and config.full_steps > steps:
            raise UsageError(f"full_steps is {config.full_steps}, more than the {steps} steps")
        make_writable(out)
        with console.status("importing diffusers"):
            # That takes seconds, for which neither --help nor a wrong option should wait.
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
            import diffusers
            import torch
            import transformers

            from tap_diffusion.apps.generate import Request, guidance_for, load_pipeline, prompt_for
            from tap_diffusion.apps.generate import generate as run_generate
        if not sys.stderr.isatty():  # no progress bars into files
            diffusers.utils.logging.disable_progress_bar()
            transformers.utils.logging.disable_progress_bar()
        guidance = guidance_for(model, guidance)
        if engine is not None:
            if prompt_file is None:
                raise UsageError("--prompts is missing: a file of what to draw")
            on_ray = (address, workers) if engine == EngineName.ray else None
            common = {
                "model": model, "steps": steps, "guidance": guidance, "config": config, "frames": frames, "fps": fps,
            }  # fmt: skip
            _generate_many(prompt_file, common, (dtype, device), on_ray, (seed, width, height), batch_size or 8, out)
            return
        pipe = load_pipeline(model, *placement(dtype, device), offload)
        wanted = [prompt_for(model, prompt) for prompt in wanted]
        request = Request(wanted, steps, seed, guidance, height, width, frames, batch_size, negative_prompt)
        written: list[str] = []
        try:
            with told_by(lambda message: warnings.setdefault(message)):
                result = run_generate(
                    pipe, model, request, config, out, compare, repeats, written.append, fps, overwrite
                )
        except torch.OutOfMemoryError as error:
            size = len(next(request.batches(pipe)))
            remedy = f"a smaller batch than {size}, or smaller pictures" if size > 1 else "a smaller size"
            raise UsageError(f"out of memory; try {remedy}") from error
    except (ConfigError, UnsupportedModelError, UsageError) as error:
        raise failed(error) from None
    except KeyboardInterrupt:
        raise _interrupted(out) from None
    console.print(_table(result, config))
    kind = "picture" if result["frames"] is None else "video"
    found = f" ({result['found']} of an earlier run)" if result["found"] else ""
    console.print(f"{counted(len(wanted), kind)}{found}, {', '.join(written)} in {out}", highlight=False)
    for message in warnings:
        Console(stderr=True).print(f"[bold yellow]Warning:[/] {escape(message)}", soft_wrap=True, highlight=False)


def _interrupted(out: Path) -> typer.Exit:
    Console(stderr=True).print(f"Interrupted. What is done is in {escape(str(out))}; the same call goes on there.")
    return typer.Exit(130)


def _generate_many(
    file: Path, common: dict[str, Any], placed: tuple[DType, str | None],
    on_ray: tuple[str | None, int | None] | None, defaults: tuple[int, int | None, int | None], batch_size: int,
    out: Path,
) -> None:  # fmt: skip
    try:
        from tap_diffusion.apps import bulk
        from tap_diffusion.apps.generate import prompt_for
        from tap_diffusion.apps.prompts_file import read_rows
    except ModuleNotFoundError as error:
        raise UsageError(f"many prompts need {error.name}: pip install 'tap-diffusion[bulk]'") from error
    rows, ignored = read_rows(file, *defaults)
    rows = [replace(row, prompt=prompt_for(common["model"], row.prompt)) for row in rows]
    dtype, device = placed
    if on_ray is None:
        weights, device = placement(dtype, device)
        name, engine = str(weights).removeprefix("torch."), partial(bulk.here, device=device)
    else:
        address, workers = on_ray
        with console.status("connecting to Ray"):
            device = bulk.connect(address, device)
        name = dtype.value if dtype != DType.auto else "bfloat16" if device == "cuda" else "float32"
        engine = partial(bulk.on_ray, device=device, workers=workers)
    if ignored:
        console.print(f"columns that mean nothing here: {', '.join(ignored)}", highlight=False, markup=False)
    columns = [TextColumn("{task.fields[failed]} failed"), MofNCompleteColumn(), TimeRemainingColumn()]
    failed = 0
    try:
        with Progress(BarColumn(), *columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=len(rows), failed=0)

            def tell(done: int, errors: int) -> None:
                nonlocal failed
                failed += errors
                progress.update(task, advance=done, failed=failed)

            entries = bulk.generate_many(rows, bulk.Settings(dtype=name, **common), out, engine, batch_size, tell)
    except KeyboardInterrupt:
        raise _interrupted(out) from None
    errors = [entry for entry in entries if entry["error"] is not None]
    good = [entry for entry in entries if entry["error"] is None]
    for entry in errors[:SHOWN]:
        console.print(f"{entry['id']}: {entry['error']}", highlight=False, markup=False, soft_wrap=True)
    if len(errors) > SHOWN:
        console.print(f"… and {len(errors) - SHOWN} more, column 'error' of the manifest", highlight=False)
    if good:
        full, predicted = (sum(entry[name] for entry in good) for name in ("full_steps", "predicted_steps"))
        console.print(f"steps: {full} full, {predicted} predicted", highlight=False)
    kind = "video" if any(entry["file"].endswith(".mp4") for entry in good) else "picture"
    console.print(
        f"{counted(len(good), kind)}, {len(errors)} failed, manifest.parquet in {out}", highlight=False, markup=False
    )
    if errors:
        raise typer.Exit(1)


def _config(file: Path | None, paper: bool, **options: Any) -> TAPConfig:
    try:
        config = TAPConfig.load(file) if file is not None else TAPConfig()
    except OSError as error:
        raise UsageError(f"can't read the configuration {file}: {error}") from error
    given = {name: value for name, value in options.items() if value is not None}
    schedules = [name for name in ("speedup", "full_steps", "interval") if name in given]
    if len(schedules) > 1:
        raise UsageError(f"{schedules[0]} and {schedules[1]} both say how many steps are full; give one of them")
    base = TAPConfig.paper(config.interval) if paper else config
    others = {"speedup": DEFAULT_SPEEDUP, "full_steps": None, "interval": None} if schedules else {}
    config = TAPConfig.from_dict(base.to_dict() | others | given)
    if "warmup" in given and config.interval is None:
        raise UsageError("--warmup goes with --interval; without one the full steps are placed by the number of them")
    return config


def _table(result: dict[str, Any], config: TAPConfig) -> Table:
    fewer = result["evaluations_speedup"]
    by_speedup = config.full_steps is None and config.interval is None
    asked = f", asked for {config.speedup:g}x" if by_speedup and abs(fewer / config.speedup - 1) > 0.1 else ""
    table = Table(show_header=False)
    kinds = [kind for kind in ("full", "predicted") if result[f"{kind}_steps"]]
    times = [f"{result[f'{kind}_step_ms']:.1f} ms {kind}" for kind in kinds]
    rows = [
        ("steps", f"{result['full_steps']} full, {result['predicted_steps']} predicted"),
        ("time per step", ", ".join(times)),
        ("speed-up in evaluations", f"{fewer:.2f}x{asked}"),
    ]
    if "psnr_db" in result:
        noise = " (more than the evaluations: the machine was busy, use --repeats)"
        faster, mean, worst = (result[name] for name in ("time_speedup", "psnr_db", "psnr_db_worst"))
        rows += [
            ("speed-up in time", f"{faster:.2f}x{noise if faster > fewer else ''}"),
            ("PSNR to the full result", _decibels(mean, worst)),
        ]
    rows.append(("cache", f"{result['cache_bytes']:,} bytes"))
    rows += [(f"fell back to full: {reason}", f"{count} calls") for reason, count in result["fallbacks"].items()]
    for row in rows:
        table.add_row(*row)
    return table


def _decibels(mean: float | None, worst: float | None) -> str:
    if worst is None:  # JSON has no infinity
        return "none, they are equal"
    shown = "some are equal" if mean is None else f"{mean:.1f} dB"
    return shown if mean == worst else f"{shown}, worst {worst:.1f} dB"
