"""The ``tap`` command."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tap_diffusion.config import TAPConfig
from tap_diffusion.errors import ConfigError, UnsupportedModelError, UsageError
from tap_diffusion.files import FPS

if TYPE_CHECKING:
    import torch

    from tap_diffusion.bench.bench import Suite
    from tap_diffusion.bench.models import BenchModel
    from tap_diffusion.bench.recipes import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
SHOWN = 10  # errors that are printed


class SuiteName(StrEnum):
    """How much the bench does."""

    quick = "quick"
    standard = "standard"
    paper = "paper"


class EngineName(StrEnum):
    """What runs the pipelines that generate many pictures."""

    local = "local"
    ray = "ray"


class DType(StrEnum):
    """Names of the dtypes that a pipeline can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _option(panel: str, *names: str, help: str, default: str | bool = True, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=help, show_default=default, **more)


# Options that commands share.
_WHERE = "cuda where there is one"
ModelOption = Annotated[
    str,
    _option(
        "Model", "--model", "-m", help="emoji, fashion, sprites, scenes (embedded), a pipeline's folder, or a hub id."
    ),
]
ModelDTypeOption = Annotated[DType, _option("Model", help="auto: bfloat16 on a GPU, float32 on a CPU.")]
ModelDeviceOption = Annotated[str | None, _option("Model", help="cpu, cuda, cuda:1, …", default=_WHERE)]
BenchModelOption = Annotated[
    str | None,
    _option(
        "What",
        "--model",
        "-m",
        help="emoji, fashion, sprites, scenes, a pipeline's folder, or a hub id.",
        default="emoji",
    ),
]
BenchPromptsOption = Annotated[
    Path | None, _option("What", "--prompts", help="File with one prompt a line, for a folder or hub id.")
]
BenchDTypeOption = Annotated[DType, _option("What", help="Of a folder or hub id; auto: bfloat16 on a GPU.")]
BenchDeviceOption = Annotated[str | None, _option("What", help="Of a folder or hub id.", default=_WHERE)]


@app.callback()
def main() -> None:
    """Token-Adaptive Predictor: training-free acceleration of diffusion transformers."""


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="What to draw, one result for each; of fashion and DiT the class.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        _option("Sampling", "--prompts", help="File with one prompt a line; for many also .jsonl or .parquet."),
    ] = None,
    model: ModelOption = "emoji",
    dtype: ModelDTypeOption = DType.auto,
    device: ModelDeviceOption = None,
    offload: Annotated[
        bool, _option("Model", "--offload", help="Keep on the GPU only what is at work, for models that don't fit.")
    ] = False,
    steps: Annotated[int, _option("Sampling", help="Denoising steps.", min=1)] = 50,
    seed: Annotated[int, _option("Sampling", help="Seed of the first picture; the next take the next.", min=0)] = 0,
    guidance: Annotated[
        float | None,
        _option("Sampling", help="Guidance scale.", default="the pipeline's; 2 for emoji, 3 for scenes", min=0),
    ] = None,
    height: Annotated[int | None, _option("Sampling", help="In pixels.", default="the model's own", min=1)] = None,
    width: Annotated[int | None, _option("Sampling", help="In pixels.", default="the model's own", min=1)] = None,
    frames: Annotated[int | None, _option("Sampling", help="Of videos.", default="the model's own", min=1)] = None,
    batch_size: Annotated[
        int | None, _option("Sampling", help="Generated at a time.", default="8 pictures, or 1 video", min=1)
    ] = None,
    speedup: Annotated[
        float | None,
        _option("Method", "--speedup", "-x", help="Steps for each full one.", default=f"{TAPConfig.speedup:g}"),
    ] = None,
    full_steps: Annotated[int | None, _option("Method", help="How many steps are full, instead.")] = None,
    interval: Annotated[
        int | None, _option("Method", "--interval", "-n", help="The paper's: one step in this many is full; 1: all.")
    ] = None,
    warmup: Annotated[
        int | None, _option("Method", help="Full steps at the start, with an interval.", default=str(TAPConfig.warmup))
    ] = None,
    paper: Annotated[bool, _option("Method", "--paper", help="Exactly the paper's settings.")] = False,
    config_file: Annotated[
        Path | None, _option("Method", "--config", help="TAPConfig as JSON; the options above override it.")
    ] = None,
    compare: Annotated[bool, _option("Output", "--compare", help="Generate without TAP too, and compare.")] = False,
    repeats: Annotated[
        int, _option("Output", help="Timed runs of each with --compare, alternating; medians count.", min=1)
    ] = 1,
    fps: Annotated[int, _option("Output", help="Frames a second of videos.", min=1)] = FPS,
    out: Annotated[Path, _option("Output", "--out", "-o", help="Folder for results and report.json.")] = Path("out"),
    engine: Annotated[
        EngineName | None,
        _option("Many prompts", help="local: in this process; ray: on Ray Data. A run begun in --out goes on."),
    ] = None,
    address: Annotated[
        str | None, _option("Many prompts", help="Of a Ray cluster, or auto.", default="one on this machine")
    ] = None,
    workers: Annotated[
        int | None, _option("Many prompts", help="Pipelines on Ray.", default="one per GPU, or per machine", min=1)
    ] = None,
) -> None:
    """Generate pictures or videos with TAP, beside those of the plain model if wanted.

    Example: tap generate "red apple" "green frog face" --speedup 5 --compare

    Many, with a manifest in place of the report: tap generate --prompts coco.jsonl --engine ray --workers 8
    """
    try:
        if engine is None and prompt_file is not None and prompt_file.suffix in (".jsonl", ".parquet"):
            engine = EngineName.local
        for option, given in (("--address", address), ("--workers", workers)):
            if given is not None and engine != EngineName.ray:
                raise UsageError(f"{option} is for --engine ray")
        few = {"a prompt": prompts, "--compare": compare, "--repeats": repeats > 1, "--offload": offload}
        for option, asked in few.items():
            if asked and engine is not None:
                raise UsageError(f"{option} is for a few pictures; with an engine they come from the file of --prompts")
        wanted = [] if engine is not None else _prompts(prompts or [], prompt_file)
        config = _config(config_file, paper, speedup=speedup, full_steps=full_steps, interval=interval, warmup=warmup)
        if config.interval is not None and config.warmup > steps:
            raise UsageError(f"warmup is {config.warmup}, more than the {steps} steps")
        _make_writable(out)
        with console.status("importing diffusers"):
            # That takes seconds, for which neither --help nor a wrong option should wait.
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
            import torch

            from tap_diffusion.generate import Request, guidance_for, load_pipeline, prompt_for
            from tap_diffusion.generate import generate as run_generate
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
        pipe = load_pipeline(model, *_placement(dtype, device), offload)
        wanted = [prompt_for(model, prompt) for prompt in wanted]
        request = Request(wanted, steps, seed, guidance, height, width, frames, batch_size)
        written: list[str] = []
        try:
            result = run_generate(pipe, model, request, config, out, compare, repeats, written.append, fps)
        except torch.OutOfMemoryError as error:
            size = len(next(request.batches(pipe)))
            remedy = f"a smaller batch than {size}, or smaller pictures" if size > 1 else "a smaller size"
            raise UsageError(f"out of memory; try {remedy}") from error
    except (ConfigError, UnsupportedModelError, UsageError) as error:
        raise _failed(error) from None
    console.print(_table(result))
    kind = "pictures" if result["frames"] is None else "videos"
    console.print(f"{len(wanted)} {kind}, {', '.join(written)} in {out}", highlight=False)


def _generate_many(
    file: Path, common: dict[str, Any], placed: tuple[DType, str | None],
    on_ray: tuple[str | None, int | None] | None, defaults: tuple[int, int | None, int | None], batch_size: int,
    out: Path,
) -> None:  # fmt: skip
    try:
        from tap_diffusion import bulk
        from tap_diffusion.generate import prompt_for
        from tap_diffusion.rows import read_rows
    except ModuleNotFoundError as error:
        raise UsageError(f"many prompts need {error.name}: pip install 'tap-diffusion[bulk]'") from error
    rows, ignored = read_rows(file, *defaults)
    rows = [replace(row, prompt=prompt_for(common["model"], row.prompt)) for row in rows]
    dtype, device = placed
    if on_ray is None:
        weights, device = _placement(dtype, device)
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
        Console(stderr=True).print(f"Interrupted. What is done is in {escape(str(out))}; the same call goes on there.")
        raise typer.Exit(130) from None
    errors = [entry for entry in entries if entry["error"] is not None]
    good = [entry for entry in entries if entry["error"] is None]
    for entry in errors[:SHOWN]:
        console.print(f"{entry['id']}: {entry['error']}", highlight=False, markup=False, soft_wrap=True)
    if len(errors) > SHOWN:
        console.print(f"… and {len(errors) - SHOWN} more, column 'error' of the manifest", highlight=False)
    if good:
        full, predicted = (sum(entry[name] for entry in good) for name in ("full_steps", "predicted_steps"))
        console.print(f"steps: {full} full, {predicted} predicted", highlight=False)
    kind = "videos" if any(entry["file"].endswith(".mp4") for entry in good) else "pictures"
    console.print(f"{len(good)} {kind}, {len(errors)} failed, manifest.parquet in {out}", highlight=False, markup=False)
    if errors:
        raise typer.Exit(1)


@app.command()
def bench(
    model: BenchModelOption = None,
    recipe: Annotated[
        str | None,
        _option("What", "--recipe", help="A setting of the paper by name, or a FILE.json; options override it."),
    ] = None,
    prompt_file: BenchPromptsOption = None,
    dtype: BenchDTypeOption = DType.auto,
    device: BenchDeviceOption = None,
    suite: Annotated[
        SuiteName, _option("What", help="quick: minutes, a few methods; standard: nearly all; paper: more samples.")
    ] = SuiteName.quick,
    methods: Annotated[
        list[str] | None,
        _option(
            "What", "--methods", help="Names, or a FILE.py with METHODS; repeat or use commas.", default="the suite's"
        ),
    ] = None,
    budgets: Annotated[
        str | None, _option("What", help="Full evaluations per trajectory, like 14,10,8,6.", default="the suite's")
    ] = None,
    steps: Annotated[
        int | None, _option("What", help="Denoising steps of the full result.", min=3, default="50")
    ] = None,
    samples: Annotated[int | None, _option("What", help="Measured in each cell.", min=1, default="the suite's")] = None,
    repeats: Annotated[
        int | None, _option("What", help="Timed runs of each cell; 0: none.", min=0, default="the suite's")
    ] = None,
    scores: Annotated[
        str | None, _option("What", help="More of them: clip_score, image_reward, lpips.", default="the model's own")
    ] = None,
    keep: Annotated[
        bool, _option("Output", "--keep", help="Every sample as a file, for scores from elsewhere.")
    ] = False,
    report_only: Annotated[bool, _option("Output", "--report-only", help="Make the report of --out again.")] = False,
    out: Annotated[Path, _option("Output", "--out", "-o", help="Folder; a run begun there goes on.")] = Path("bench"),
) -> None:
    """Compare TAP with other methods, each at its best.

    Example: tap bench --suite standard --methods tap,taylorseer-1,euler --budgets 10,8
    """
    try:
        wanted = None if budgets is None else _budgets(budgets)
        with _importing():
            from tap_diffusion.bench.report import read_cells, summary, write_report
        if report_only:
            read_cells(out)
            _make_writable(out)
        else:
            judged, made = _setup(model, recipe, prompt_file, dtype, device)
            if scores is not None:
                judged = judged.judged_by(scores.split(","))
            given = {
                "--model": model or (None if recipe else "emoji"),
                "--recipe": recipe,
                "--prompts": prompt_file,
                "--dtype": None if dtype == DType.auto else dtype.value,
                "--device": device,
                "--suite": suite.value,
                "--samples": samples,
                "--repeats": repeats,
                "--scores": scores,
            }
            command = [part for name, value in given.items() if value is not None for part in (name, str(value))]
            command += ["--keep"] if keep else []
            sized = _suite(suite, judged, samples, repeats)
            _run_bench((judged, made), sized, methods, wanted, steps, out, keep, command)
        page, cells = write_report(out), read_cells(out)
    except (ConfigError, UnsupportedModelError, UsageError) as error:
        raise _failed(error) from None
    except KeyboardInterrupt:
        Console(stderr=True).print(f"Interrupted. What is done is in {escape(str(out))}; the same call goes on there.")
        raise typer.Exit(130) from None
    for table in summary(cells):
        console.print(table)
    console.print(f"{page.name}, results.json, samples.parquet in {out}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def tune(
    model: BenchModelOption = None,
    recipe: Annotated[str | None, _option("What", "--recipe", help="As tap bench has it.")] = None,
    prompt_file: BenchPromptsOption = None,
    dtype: BenchDTypeOption = DType.auto,
    device: BenchDeviceOption = None,
    budgets: Annotated[str, _option("What", "--full-steps", help="How many, with commas between.")] = "14,10,8,6",
    steps: Annotated[int | None, _option("What", help="Denoising steps.", min=3, default="50")] = None,
    samples: Annotated[int, _option("Search", help="Prompts to search on.", min=1)] = 16,
    verified: Annotated[int, _option("Search", help="Other prompts to verify on.", min=1)] = 32,
    evaluations: Annotated[int, _option("Search", help="Schedules to try for each number.", min=1)] = 60,
    out: Annotated[Path, _option("Output", "--out", "-o", help="Folder for the presets.")] = Path("presets"),
) -> None:
    """Plan which steps are full for a model, from a few prompts, and verify it on others.

    Example: tap tune --model emoji --full-steps 8 --out presets, then tap generate --config presets/8.json
    """
    try:
        setup, made = _setup(model, recipe, prompt_file, dtype, device)
        count = steps or (made.steps if made else 50)
        wanted = _budgets(budgets)
        for budget in wanted:
            if not 2 <= budget < count:
                raise UsageError(f"{budget} full steps are not between 2 and {count - 1}, one less than the steps")
        _make_writable(out)
        from tap_diffusion.bench.tune import Tuning

        rows = Tuning(setup, count, wanted, out, samples, verified, evaluations).run()
    except (ConfigError, UnsupportedModelError, UsageError) as error:
        raise _failed(error) from None
    except KeyboardInterrupt:
        Console(stderr=True).print(f"Interrupted. What is done is in {escape(str(out))}; the same call goes on there.")
        raise typer.Exit(130) from None
    table = Table("full steps", "planned", "recommended, dB", "planned, dB", "gain [95 %]", "kept")
    for row in rows:
        low, high = row.get("gain_ci", (0.0, 0.0))
        shown = [f"{row[name]:.2f}" if name in row else "–" for name in ("recommended_db", "planned_db")]
        gain = f"{row['gain_db']:+.2f} [{low:+.2f}, {high:+.2f}]"
        table.add_row(str(row["budget"]), " ".join(map(str, row["planned"])), *shown, gain, row["kept"])
    console.print(table)
    console.print(f"presets {', '.join(f'{budget}.json' for budget in wanted)} in {out}", highlight=False)


def _setup(
    model: str | None, recipe: str | None, prompt_file: Path | None, dtype: DType, device: str | None
) -> tuple[BenchModel, Recipe | None]:
    """The model to run, and the recipe that gives its steps and budgets, if there is one."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    with _importing():
        from tap_diffusion.bench import recipes
        from tap_diffusion.bench.models import MODELS, any_pipeline
    if recipe is None and (model is None or model in MODELS):
        for option, given in (("--prompts", prompt_file), ("--dtype", dtype.value), ("--device", device)):
            if given not in (None, DType.auto.value):
                raise UsageError(f"{option} is for a folder or hub id; {model or 'emoji'} has its own")
        return MODELS[model or "emoji"](), None
    made = recipes.Recipe(str(model)) if recipe is None else recipes.load(recipe)
    made = replace(made, model=model or made.model)
    if "/" not in made.model and not Path(made.model).is_dir():
        raise UsageError(
            f"unknown model '{made.model}': give one of {', '.join(MODELS)}, a folder or a hub id owner/name"
        )
    if prompt_file is None:
        raise UsageError(f"--prompts is missing: a file of what to draw with {made.model}, one a line")
    if dtype == DType.auto and made.dtype != "auto":
        dtype = DType(made.dtype)
    weights, placed = _placement(dtype, device)
    prompts: list[Any] = _prompts([], prompt_file)
    if made.argument == "class_labels":
        try:
            prompts = [int(prompt) for prompt in prompts]
        except ValueError as error:
            raise UsageError(f"{prompt_file} must have one class number a line: {error}") from error
    return any_pipeline(made, prompts, weights, placed), made


def _suite(name: SuiteName, model: BenchModel, samples: int | None, repeats: int | None) -> Suite:
    """A suite, with another number of samples or timed runs if wanted."""
    from tap_diffusion.bench.bench import SUITES

    suite = SUITES[name]
    if samples is not None:
        if samples > len(model.measured):
            raise UsageError(
                f"{model.name} has {len(model.measured)} samples to be measured on, not {samples}; give that or less"
            )
        suite = replace(suite, samples=samples)
    return suite if repeats is None else replace(suite, repeats=repeats)


def _run_bench(
    setup: tuple[BenchModel, Recipe | None], suite: Suite, given: list[str] | None, budgets: list[int] | None,
    steps: int | None, out: Path, keep: bool, command: list[str],
) -> None:  # fmt: skip
    from tap_diffusion.bench.bench import Bench
    from tap_diffusion.bench.methods import Method, load, registry

    model, recipe = setup
    steps = steps or (recipe.steps if recipe else 50)
    budgets = budgets or list((recipe and recipe.budgets) or suite.budgets)
    for budget in budgets:
        if not 2 <= budget < steps:
            raise UsageError(f"budget {budget} is not between 2 and {steps - 1}, one less than the steps")
    known = registry()
    names = [name for item in given or () for name in item.split(",")]
    methods: dict[str, Method] = {}
    if given is not None:
        for name in names:
            if name.endswith(".py"):
                own = load(Path(name))
                for taken in own.keys() & known.keys():
                    raise UsageError(f"{name} has a method '{taken}', as the bench has; give it another name")
                methods |= own
            elif name in known:
                methods[name] = known[name]
            else:
                raise UsageError(f"unknown method '{name}': give a FILE.py or some of {', '.join(known)}")
    elif suite.methods is not None:
        methods = {name: known[name] for name in suite.methods}
    else:
        methods = {name: method for name, method in known.items() if not method.only_by_name}
    _make_writable(out)
    run = Bench(model, methods, suite, budgets, out, steps, keep)
    command = ["tap", "bench", *command]
    command += ["--methods", ",".join(names)] if names else []
    command += ["--budgets", ",".join(map(str, budgets)), "--steps", str(steps), "--out", str(out)]
    (out / "command.txt").write_text(shlex.join(command) + "\n", encoding="utf-8")
    run.run()


@app.command()
def profile(
    size: Annotated[
        str | None,
        _option("What", "--size", help="A transformer of true size with random weights: flux, dit-xl, …", default=""),
    ] = None,
    model: Annotated[
        str | None,
        _option("What", "--model", "-m", help="Or emoji, fashion, sprites, scenes, a pipeline's folder, or a hub id."),
    ] = None,
    blocks: Annotated[
        int | None, _option("What", help="Of each kind at most, at true width.", default="all", min=1)
    ] = None,
    resolution: Annotated[
        str | None, _option("What", help="In pixels, like 1024 or 480x832 (height first).", default="the size's own")
    ] = None,
    frames: Annotated[int | None, _option("What", help="Of a video.", default="the size's own", min=1)] = None,
    batch: Annotated[int | None, _option("What", help="Samples.", default="the size's own", min=1)] = None,
    dtype: Annotated[DType, _option("What", help="auto: bfloat16 on a GPU, float32 on a CPU.")] = DType.auto,
    device: Annotated[str | None, _option("What", help="cpu, cuda, cuda:1, …", default=_WHERE)] = None,
    steps: Annotated[int, _option("How", help="Denoising steps.", min=6)] = 50,
    full_steps: Annotated[int, _option("How", help="How many of them are full.", min=2)] = 8,
    repeats: Annotated[int, _option("How", help="Trajectories that are timed.", min=1)] = 3,
    processor_time: Annotated[
        bool, _option("How", "--processor-time", help="Not time on the clock, for a CPU that others use too.")
    ] = False,
    scaling: Annotated[
        bool, _option("How", "--scaling", help="How time and cache grow with tokens and depth, instead.")
    ] = False,
    peers: Annotated[
        bool, _option("How", "--peers", help="Whole loops beside those of other packages' caches, instead.")
    ] = False,
    out: Annotated[Path, _option("Output", "--out", "-o", help="Folder for JSON and picture.")] = Path("profile"),
) -> None:
    """Measure what a predicted step costs, part by part, beside the least that it could.

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
        _make_writable(out)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        with _importing():
            from tap_diffusion.bench.profile import report as reports
            from tap_diffusion.bench.profile.subjects import of_model, of_size
        weights, placed = _placement(dtype, device)
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
        raise _failed(error) from None
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


@app.command()
def ui(
    model: ModelOption = "emoji",
    dtype: ModelDTypeOption = DType.auto,
    device: ModelDeviceOption = None,
    results: Annotated[
        Path | None, _option("Page", help="results.json of a bench run, or its folder, to show the frontier of.")
    ] = None,
    host: Annotated[
        str, _option("Page", help="Address to listen at; 0.0.0.0 lets in whoever reaches this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, _option("Page", help="Port to listen at.", default="the first free from 7860", min=1, max=65535)
    ] = None,
) -> None:
    """Open a page in the browser: plain and accelerated pictures, and what each token took.

    Example: tap ui --results bench/fashion/results.json
    """
    try:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        with _importing("the page", "ui"):
            from tap_diffusion.generate import load_pipeline
            from tap_diffusion.ui import Page, serve
        plots = ""
        if results is not None:
            with _importing():
                from tap_diffusion.ui_parts import frontier

                plots = frontier(results.parent if results.name == "results.json" else results)
        page = Page(load_pipeline(model, *_placement(dtype, device)), model)
        with console.status("trying the model"):
            page.warm_up()
        blocks = page.blocks(plots)
        address = serve(blocks, host, port)
    except (ConfigError, UnsupportedModelError, UsageError) as error:
        raise _failed(error) from None
    console.print(f"Open {address} in a browser. Ctrl-C ends it.", highlight=False, soft_wrap=True)
    blocks.block_thread()


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/models.md.")] = False,
) -> None:
    """List the transformer classes of diffusers: which work, and why the others don't."""
    with Console(stderr=True).status("reading diffusers"):
        from tap_diffusion.integrations import catalog

        entries = catalog.catalog()
    if as_json:
        typer.echo(json.dumps([entry.to_dict() for entry in entries], indent=2))
    elif as_markdown:
        typer.echo(catalog.as_markdown(entries), nl=False)
    else:
        works = [entry for entry in entries if entry.status == "works"]
        table = Table("works", "probe", "stream", "used by")
        table.columns[0].no_wrap, table.columns[-1].overflow = True, "fold"
        for entry in works:
            used_by = min(entry.families, key=len, default="")
            if len(entry.families) > 1:
                used_by += f" and {len(entry.families) - 1} more"
            table.add_row(entry.name, entry.probe, entry.stream, f"{used_by}\n{entry.note}".strip())
        console.print(table)
        table = Table("not accelerated", "reason")
        table.columns[0].no_wrap = True
        for entry in entries:
            if entry not in works:
                table.add_row(entry.name, entry.note or entry.status)
        console.print(table)
        console.print(f"{len(works)} of {len(entries)} work")


def _prompts(given: list[str], file: Path | None) -> list[str]:
    if file is not None:
        try:
            given = given + file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"can't read the prompt file {file}: {error}") from error
    prompts = [prompt.strip() for prompt in given if prompt.strip()]
    if not prompts:
        raise UsageError(f"the prompt file {file} is empty" if file else "no prompt: give some, or a file by --prompts")
    return prompts


def _budgets(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"budgets '{text}' are not integers with commas between, like 14,10,8,6") from None


@contextmanager
def _importing(what: str = "the bench", extra: str = "bench") -> Iterator[None]:
    """For imports that take seconds, of what not everybody has installed."""
    with console.status(f"importing what {what} needs"):
        try:
            yield
        except ModuleNotFoundError as error:
            raise UsageError(f"{what} needs {error.name}: pip install 'tap-diffusion[{extra}]'") from error


def _failed(error: Exception) -> typer.Exit:
    Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
    return typer.Exit(2)


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
    others = dict.fromkeys(("full_steps", "interval")) if schedules else {}
    config = TAPConfig.from_dict(base.to_dict() | others | given)
    if "warmup" in given and config.interval is None:
        raise UsageError("--warmup goes with --interval; without one the full steps are placed by the number of them")
    return config


def _placement(dtype: DType, device: str | None) -> tuple[torch.dtype, str]:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UsageError(f"device '{device}' is not available: {str(error).splitlines()[0]}") from error
    if dtype == DType.auto:
        return (torch.float32 if device == "cpu" else torch.bfloat16), device
    return getattr(torch, dtype), device


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"can't write to the folder {folder}: {os.strerror(error.errno or 0)}") from error


def _table(result: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    kinds = [kind for kind in ("full", "predicted") if result[f"{kind}_steps"]]
    times = [f"{result[f'{kind}_step_ms']:.1f} ms {kind}" for kind in kinds]
    rows = [
        ("steps", f"{result['full_steps']} full, {result['predicted_steps']} predicted"),
        ("time per step", ", ".join(times)),
        ("speed-up in evaluations", f"{result['evaluations_speedup']:.2f}x"),
    ]
    if "psnr_db" in result:
        rows += [
            ("speed-up in time", f"{result['time_speedup']:.2f}x"),
            ("PSNR to the full result", f"{result['psnr_db']:.1f} dB"),
        ]
    rows.append(("cache", f"{result['cache_bytes']:,} bytes"))
    rows += [(f"fell back to full: {reason}", f"{count} calls") for reason, count in result["fallbacks"].items()]
    for row in rows:
        table.add_row(*row)
    return table
