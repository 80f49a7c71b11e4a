"""``tap bench``."""

from __future__ import annotations

import shlex
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tap_bench.cli.options import (
    BenchDeviceOption,
    BenchDTypeOption,
    BenchModelOption,
    BenchPromptsOption,
    read_budgets,
    setup,
)
from tap_diffusion.apps.cli.options import (
    DType,
    console,
    failed,
    importing,
    make_writable,
    option,
)
from tap_diffusion.core.errors import ConfigError, UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from tap_bench.bench import Suite
    from tap_bench.models import BenchModel
    from tap_bench.recipes import Recipe


class SuiteName(StrEnum):
    """How much the bench does."""

    quick = "quick"
    standard = "standard"
    paper = "paper"


def bench(
    model: BenchModelOption = None,
    recipe: Annotated[
        str | None,
        option(
            "What",
            "--recipe",
            help="Model, steps and budgets in one: a setting of the paper by name, or a FILE.json.",
        ),
    ] = None,
    prompt_file: BenchPromptsOption = None,
    dtype: BenchDTypeOption = DType.auto,
    device: BenchDeviceOption = None,
    suite: Annotated[
        SuiteName, option("What", help="quick: a few methods in minutes. standard: nearly all. paper: more samples.")
    ] = SuiteName.quick,
    methods: Annotated[
        list[str] | None,
        option(
            "What",
            "--methods",
            help="Methods to compare, by name, or a FILE.py of your own. Repeat, or use commas.",
            default="the suite's",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        option("What", help="How many of the steps run the whole model, such as 14,10,8,6.", default="the suite's"),
    ] = None,
    steps: Annotated[int | None, option("What", help="Denoising steps.", min=3, default="50")] = None,
    samples: Annotated[
        int | None, option("What", help="Samples per method and budget.", min=1, default="the suite's")
    ] = None,
    repeats: Annotated[
        int | None, option("What", help="Timed runs per method and budget. 0: no times.", min=0, default="the suite's")
    ] = None,
    scores: Annotated[
        str | None, option("What", help="Further scores: clip_score, image_reward, lpips.", default="the model's own")
    ] = None,
    keep: Annotated[
        bool, option("Output", "--keep", help="Keep every sample as a file, for scores of your own.")
    ] = False,
    report_only: Annotated[
        bool, option("Output", "--report-only", help="Only write the report of --out again.")
    ] = False,
    out: Annotated[
        Path,
        option("Output", "--out", "-o", help="Folder for the results. A run that was interrupted there continues."),
    ] = Path("bench"),
) -> None:
    """Compare TAP with competing methods, each tuned on separate prompts.

    Example: tap bench --suite standard --methods tap,taylorseer-1,euler --budgets 10,8
    """
    try:
        wanted = None if budgets is None else read_budgets(budgets)
        with importing():
            from tap_bench.report import read_cells, summary, write_report
        if report_only:
            read_cells(out)
            make_writable(out)
        else:
            judged, made = setup(model, recipe, prompt_file, dtype, device)
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
        raise failed(error) from None
    except KeyboardInterrupt:
        Console(stderr=True).print(f"Interrupted. What is done is in {escape(str(out))}; the same call goes on there.")
        raise typer.Exit(130) from None
    for table in summary(cells):
        console.print(table)
    console.print(f"{page.name}, results.json, samples.parquet in {out}", highlight=False, markup=False, soft_wrap=True)


def _suite(name: SuiteName, model: BenchModel, samples: int | None, repeats: int | None) -> Suite:
    """A suite, with another number of samples or timed runs if wanted."""
    from tap_bench.bench import SUITES

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
    from tap_bench.bench import Bench
    from tap_bench.method import Method
    from tap_bench.methods import load, registry

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
    make_writable(out)
    run = Bench(model, methods, suite, budgets, out, steps, keep)
    command = ["tap", "bench", *command]
    command += ["--methods", ",".join(names)] if names else []
    command += ["--budgets", ",".join(map(str, budgets)), "--steps", str(steps), "--out", str(out)]
    (out / "command.txt").write_text(shlex.join(command) + "\n", encoding="utf-8")
    run.run()
