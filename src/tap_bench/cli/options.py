"""What ``tap bench`` and ``tap tune`` share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tap_diffusion.apps.cli.options import (
    DTYPES,
    WHERE,
    DType,
    importing,
    option,
    placement,
    read_prompts,
)
from tap_diffusion.core.errors import UsageError

if TYPE_CHECKING:
    from tap_bench.models import BenchModel
    from tap_bench.recipes import Recipe


BenchModelOption = Annotated[
    str | None,
    option(
        "What",
        "--model",
        "-m",
        help="emoji, fashion, sprites or scenes (small, included), a pipeline's folder, or a hub id.",
        default="emoji",
    ),
]
BenchPromptsOption = Annotated[
    Path | None, option("What", "--prompts", help="File with one prompt per line. Needed with a folder or hub id.")
]
BenchDTypeOption = Annotated[DType, option("What", **DTYPES)]
BenchDeviceOption = Annotated[
    str | None, option("What", help="cpu, cuda, cuda:1, …", default=f"{WHERE}; the bench's own models: cpu")
]


def setup(
    model: str | None, recipe: str | None, prompt_file: Path | None, dtype: DType, device: str | None
) -> tuple[BenchModel, Recipe | None]:
    """The model to run, and the recipe that gives its steps and budgets, if there is one."""
    with importing():
        from tap_bench import recipes
        from tap_bench.models import MODELS, any_pipeline
    if recipe is None and (model is None or model in MODELS):
        if prompt_file is not None:
            raise UsageError(f"--prompts is for a folder or hub id; {model or 'emoji'} has its own")
        own = MODELS[model or "emoji"]()
        if dtype == DType.auto and device is None:
            return own, None
        weights, placed = placement(dtype, device or "cpu")
        return own.loaded_as(weights, placed), None
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
    weights, placed = placement(dtype, device)
    prompts: list[Any] = read_prompts([], prompt_file)
    if made.argument == "class_labels":
        try:
            prompts = [int(prompt) for prompt in prompts]
        except ValueError as error:
            raise UsageError(f"{prompt_file} must have one class number a line: {error}") from error
    return any_pipeline(made, prompts, weights, placed), made


def read_budgets(text: str) -> list[int]:
    """Numbers of full steps, with commas between."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--budgets '{text}' is not a list of whole numbers with commas, such as 14,10,8,6") from None
