"""Settings of the paper, one JSON file each, for those who have the weights and a GPU.

A recipe names the model and says how it is run. The prompts come from a file of the user's, one a line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tap_diffusion.core.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """How to run a pipeline.

    Attributes:
        model: folder or hub id.
        about: one sentence, for people.
        dtype: to load the weights in.
        steps: of the full result.
        budgets: full evaluations per trajectory; None takes the suite's.
        batch: samples at a time.
        argument: name of the argument of the pipeline's call that takes the prompts.
        call: further arguments of the pipeline's call.
        scheduler: class of diffusers to put in place of the pipeline's own; None leaves it.
        scores: names of :data:`tap_bench.scores.SCORES` or ``DISTANCES``.
    """

    model: str
    about: str = ""
    dtype: str = "auto"
    steps: int = 50
    budgets: list[int] | None = None
    batch: int = 1
    argument: str = "prompt"
    call: dict[str, Any] = field(default_factory=dict)
    scheduler: str | None = None
    scores: list[str] = field(default_factory=list)


def names() -> list[str]:
    """Names of the recipes that come with the bench."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.json"))


def load(name: str) -> Recipe:
    """A recipe by name, or from a file of one's own.

    Raises:
        UsageError: there is none, it can't be read, or it has a field that recipes don't have.
    """
    file = Path(name) if name.endswith(".json") else Path(__file__).parent / f"{name}.json"
    if not file.exists():
        raise UsageError(f"no recipe '{name}': give a FILE.json or one of {', '.join(names())}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"can't read the recipe {file}: {error}") from error
    known = [field.name for field in fields(Recipe)]
    unknown = sorted(set(values) - set(known)) if isinstance(values, dict) else ["(it is no JSON object)"]
    if unknown or "model" not in values:
        raise UsageError(
            f"the recipe {file} must name a model and have no fields but {', '.join(known)};"
            f" found {', '.join(unknown) or 'no model'}"
        )
    return Recipe(**values)
