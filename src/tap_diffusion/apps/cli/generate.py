"""``tap generate``."""

from __future__ import annotations

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
    quiet_bars,
    quiet_imports,
    read_prompts,
)
from tap_diffusion.apps.cli.told import told
from tap_diffusion.apps.files import FPS
from tap_diffusion.core.config import DEFAULT_SPEEDUP, TAPConfig
from tap_diffusion.core.errors import ConfigError, UnsupportedModelError, UsageError

SHOWN = 10  # errors that are printed


class EngineName(StrEnum):
    """What runs the pipelines that generate many pictures."""

    local = "local"
    ray = "ray"


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to draw: a text for each picture or video. For fashion and DiT, a class by name or number.",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        option("Sampling", "--prompts", help="File with one prompt per line. With --engine also .jsonl or .parquet."),
    ] = None,
    model: ModelOption = "emoji",
    dtype: ModelDTypeOption = DType.auto,
    device: ModelDeviceOption = None,
    offload: Annotated[
        bool,
        option("Model", "--offload", help="For models larger than the GPU's memory: keep idle parts in host memory."),
    ] = False,
    lora: Annotated[
        list[str] | None,
        option(
            "Model",
            "--lora",
            help="LoRA: a folder, a .safetensors file, or a hub id, with :SCALE behind it if not 1."
            " Repeat for several.",
        ),
    ] = None,
    compiled: Annotated[
        bool,
        option(
            "Model",
            "--compile",
            help="Compile the transformer's blocks first (torch.compile). Takes a minute or more; not counted as time.",
        ),
    ] = False,
    steps: Annotated[int, option("Sampling", help="Denoising steps.", min=1)] = 50,
    seed: Annotated[
        int, option("Sampling", help="Seed of the first picture. The second has this plus 1, and so on.", min=0)
    ] = 0,
    guidance: Annotated[
        float | None,
        option(
            "Sampling",
            help="Guidance scale: how closely to follow the prompt.",
            default="the pipeline's; 2 for emoji, 3 for scenes",
            min=0,
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, option("Sampling", "--negative-prompt", help="What not to draw.", default="nothing")
    ] = None,
    height: Annotated[int | None, option("Sampling", help="Height in pixels.", default="the model's", min=1)] = None,
    width: Annotated[int | None, option("Sampling", help="Width in pixels.", default="the model's", min=1)] = None,
    frames: Annotated[int | None, option("Sampling", help="Frames of a video.", default="the model's", min=1)] = None,
    batch_size: Annotated[
        int | None,
        option("Sampling", help="How many to draw at once.", default="8 pictures, or 1 video", min=1),
    ] = None,
    speedup: Annotated[
        float | None,
        option(
            "Speed-up",
            "--speedup",
            "-x",
            help="Target speed-up: one step in this many runs the whole model.",
            default=f"{TAPConfig.speedup:g}",
        ),
    ] = None,
    full_steps: Annotated[
        int | None,
        option("Speed-up", help="Instead: how many of the steps run the whole model.", default="by --speedup"),
    ] = None,
    interval: Annotated[
        int | None,
        option(
            "Speed-up",
            "--interval",
            "-n",
            help="Instead, as in the paper: every how many steps, after the warm-up, one runs the whole model.",
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        option(
            "Speed-up",
            help="With --interval: how many steps at the start run the whole model.",
            default=str(TAPConfig.warmup),
        ),
    ] = None,
    paper: Annotated[bool, option("Speed-up", "--paper", help="Use exactly the paper's settings.")] = False,
    config_file: Annotated[
        Path | None,
        option(
            "Speed-up",
            "--config",
            help="JSON file of a TAPConfig, such as a preset of tap tune. The options above override it.",
        ),
    ] = None,
    compare: Annotated[
        bool, option("Output", "--compare", help="Also run the plain model, and report the difference and the times.")
    ] = False,
    repeats: Annotated[
        int, option("Output", help="With --compare: time each this many times, and take the median.", min=1)
    ] = 1,
    fps: Annotated[int, option("Output", help="Frames per second of videos.", min=1)] = FPS,
    out: Annotated[
        Path,
        option(
            "Output",
            "--out",
            "-o",
            help="Folder for the results and report.json. A run that was interrupted there continues.",
        ),
    ] = Path("out"),
    overwrite: Annotated[
        bool, option("Output", "--overwrite", help="Delete what an earlier run left in --out.")
    ] = False,
    engine: Annotated[
        EngineName | None,
        option(
            "Many prompts",
            help="For thousands of prompts, with a manifest instead of report.json. local: in this"
            " process. ray: on a Ray cluster.",
        ),
    ] = None,
    address: Annotated[
        str | None,
        option("Many prompts", help="With --engine ray: the cluster's address, or auto.", default="start one here"),
    ] = None,
    workers: Annotated[
        int | None,
        option(
            "Many prompts",
            help="With --engine ray: how many copies of the model.",
            default="1 per GPU, or machine",
            min=1,
        ),
    ] = None,
) -> None:
    """Generate pictures or videos with TAP.

    Example: tap generate "red apple" "green frog face" --speedup 5 --compare

    Many: tap generate --prompts coco.jsonl --engine ray --workers 8
    """
    try:
        if engine is None and prompt_file is not None and prompt_file.suffix in (".jsonl", ".parquet"):
            engine = EngineName.local
        for name, given in (("--address", address), ("--workers", workers)):
            if given is not None and engine != EngineName.ray:
                raise UsageError(f"{name} is for --engine ray")
        few = {"a prompt": prompts, "--compare": compare, "--repeats": repeats > 1, "--offload": offload}
        few |= {"--negative-prompt": negative_prompt is not None, "--overwrite": overwrite}
        for name, asked in few.items():
            if asked and engine is not None:
                raise UsageError(f"{name} can't be combined with --engine, nor with a file of .jsonl or .parquet")
        wanted = [] if engine is not None else read_prompts(prompts or [], prompt_file)
        config = _config(config_file, paper, speedup=speedup, full_steps=full_steps, interval=interval, warmup=warmup)
        if config.interval is not None and config.warmup > steps:
            raise UsageError(f"warmup is {config.warmup}, more than the {steps} steps")
        if isinstance(config.full_steps, int) and config.full_steps > steps:
            raise UsageError(f"full_steps is {config.full_steps}, more than the {steps} steps")
        make_writable(out)
        quiet_imports()
        with console.status("importing diffusers"):
            # That takes seconds, for which neither --help nor a wrong option should wait.
            from tap_diffusion.apps.generate import guidance_for
            from tap_diffusion.apps.lora import Lora
        quiet_bars()
        guidance = guidance_for(model, guidance)
        loras = tuple(map(Lora.parse, lora or ()))
        with told():
            if engine is not None:
                if prompt_file is None:
                    raise UsageError("--prompts is missing: a file of what to draw")
                on_ray = (address, workers) if engine == EngineName.ray else None
                common = {
                    "model": model, "steps": steps, "guidance": guidance, "config": config, "frames": frames,
                    "fps": fps, "loras": loras, "compiled": compiled,
                }  # fmt: skip
                sizes = (seed, width, height)
                _generate_many(prompt_file, common, (dtype, device), on_ray, sizes, batch_size or 8, out)
            else:
                sampling = {
                    "prompts": wanted, "steps": steps, "seed": seed, "guidance": guidance, "height": height,
                    "width": width, "frames": frames, "batch_size": batch_size, "negative_prompt": negative_prompt,
                }  # fmt: skip
                loading = {"offload": offload, "loras": loras, "compiled": compiled}
                output = {"compare": compare, "repeats": repeats, "fps": fps, "overwrite": overwrite}
                _generate_few(model, (dtype, device), loading, sampling, config, out, output)
    except (ConfigError, UnsupportedModelError, UsageError) as error:
        raise failed(error) from None
    except KeyboardInterrupt:
        raise _interrupted(out) from None


def _generate_few(
    model: str, placed: tuple[DType, str | None], loading: dict[str, Any], sampling: dict[str, Any], config: TAPConfig,
    out: Path, output: dict[str, Any],
) -> None:  # fmt: skip
    import torch

    from tap_diffusion.apps.generate import Request, load_pipeline, prompt_for
    from tap_diffusion.apps.generate import generate as run_generate

    pipe = load_pipeline(model, *placement(*placed), **loading)
    wanted = [prompt_for(model, prompt) for prompt in sampling["prompts"]]
    request = Request(**sampling | {"prompts": wanted})
    written: list[str] = []
    try:
        result = run_generate(pipe, model, request, config, out, note=written.append, loras=loading["loras"], **output)
    except torch.OutOfMemoryError as error:
        size = len(next(request.batches(pipe)))
        remedy = f"a smaller batch than {size}, or smaller pictures" if size > 1 else "a smaller size"
        raise UsageError(f"out of memory; try {remedy}") from error
    except RuntimeError as error:
        if not loading["compiled"] or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"the blocks can't be compiled here: {reason}; leave out --compile") from error
    console.print(_table(result, config))
    kind = "picture" if result["frames"] is None else "video"
    found = f" ({result['found']} of an earlier run)" if result["found"] else ""
    console.print(
        f"{counted(len(wanted), kind)}{found}, {', '.join(written)} in {out}", highlight=False, soft_wrap=True
    )


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
    short = sum(entry["cut_off"] is not None for entry in good)
    if short:
        console.print(
            f"{counted(short, 'prompt')} too long and cut off, column 'cut_off' of the manifest", highlight=False
        )
    if good:
        full, predicted = (sum(entry[name] for entry in good) for name in ("full_steps", "predicted_steps"))
        console.print(f"steps: {full} full, {predicted} predicted", highlight=False)
    kind = "video" if any(entry["file"].endswith(".mp4") for entry in good) else "picture"
    console.print(
        f"{counted(len(good), kind)}, {len(errors)} failed, manifest.parquet in {out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
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
        remedy = "use --repeats" if result["repeats"] == 1 else "try again"
        noise = f" (more than the evaluations: the machine was busy, {remedy})"
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
