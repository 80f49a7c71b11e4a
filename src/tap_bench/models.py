"""The models that the bench runs: a pipeline, what to draw with it, and how to judge it without a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from tap_bench import judges, scenes, sprites
from tap_bench.recipes import Recipe
from tap_bench.scores import DISTANCES, SCORES, check
from tap_diffusion.apps.generate import load_pipeline
from tap_diffusion.apps.pipelines import drawn
from tap_diffusion.core.errors import UsageError
from tap_diffusion.demo import data
from tap_diffusion.demo.train import MAX_TOKENS

MEASURED = 256  # samples that the bench's own models have to be measured on


@dataclass(frozen=True)
class BenchModel:
    """A model of the bench.

    Attributes:
        load: gives the pipeline.
        measured: what to draw; the i-th has seed i.
        calibration: what methods are tuned on, none of it among ``measured``.
        arguments: of the pipeline's call, but for steps and generators, for some of these conditions.
        batch: samples at a time.
        scores: without reference: numbers for each of the pictures (B, C, H, W) or videos (B, F, C, H, W) in [0, 1].
        set_scores: the same for all of them together.
        distances: numbers for each to the full result's, beside those that the bench takes of every model.
        extra: names of the scores and distances that were asked for beside the model's own.
        dtype: name of the dtype of weights and arithmetic.
    """

    name: str
    load: Callable[[], Any]
    measured: Sequence[Any]
    calibration: Sequence[Any]
    arguments: Callable[[Sequence[Any]], dict[str, Any]]
    batch: int = 8
    scores: Sequence[Callable[[Tensor, Sequence[Any]], dict[str, list[float]]]] = ()
    set_scores: Sequence[Callable[[Tensor, Sequence[Any]], dict[str, float]]] = ()
    distances: Sequence[Callable[[Tensor, Tensor], dict[str, list[float]]]] = ()
    extra: Sequence[str] = ()
    dtype: str = "float32"

    def loaded_as(self, dtype: torch.dtype, device: str = "cpu") -> BenchModel:
        """One of the bench's own models, in another dtype or on another device. The full result is in it too."""
        load = partial(load_pipeline, self.name, dtype, device)
        return replace(self, load=load, dtype=str(dtype).removeprefix("torch."))

    def judged_by(self, names: Sequence[str]) -> BenchModel:
        """The same with further scores and distances, by name.

        Raises:
            UsageError: one is not known, or its package is missing.
        """
        check(names)
        return replace(
            self,
            scores=[*self.scores, *(SCORES[name] for name in names if name in SCORES)],
            distances=[*self.distances, *(DISTANCES[name] for name in names if name in DISTANCES)],
            extra=[*self.extra, *names],
        )


@dataclass(frozen=True)
class Drawn:
    """Samples on the CPU, float32.

    Attributes:
        latents: final ones, (B, ...).
        pictures: (B, C, H, W), or videos (B, F, C, H, W), in [0, 1].
    """

    latents: Tensor
    pictures: Tensor


def draw(pipe: Any, model: BenchModel, conditions: Sequence[Any], seed: int, **change: Any) -> Drawn:
    """One batch; its i-th sample has seed ``seed + i`` whatever the batch size."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(conditions))]
    with _last_latents(pipe) as latents:
        result = pipe(generator=generators, output_type="pt", **model.arguments(conditions) | change)
    return Drawn(latents[0].float().cpu().contiguous(), drawn(result))


@contextmanager
def _last_latents(pipe: Any) -> Iterator[list[Tensor]]:
    """What the scheduler returned last: the final latents, whatever the pipeline makes of them."""
    kept: list[Tensor] = []
    scheduler = pipe.scheduler
    step = scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        kept[:] = [result[0]]
        return result

    scheduler.step = watched
    try:
        yield kept
    finally:
        del scheduler.step


def emoji() -> BenchModel:
    """The embedded FLUX: flow matching, text, two calls a step for guidance."""
    captions = sorted(set(data.captions().values()))
    measured = _spread(captions, 64)
    others = [caption for caption in captions if caption not in measured]
    calibration = _spread(others, 32)
    more = [caption for caption in others if caption not in calibration]

    def arguments(prompts: Sequence[str]) -> dict[str, Any]:
        return {
            "prompt": list(prompts), "negative_prompt": [""] * len(prompts), "true_cfg_scale": 2.0,
            "height": data.SIZE, "width": data.SIZE, "max_sequence_length": MAX_TOKENS,
        }  # fmt: skip

    return BenchModel(
        "emoji",
        partial(load_pipeline, "emoji", torch.float32, "cpu"),
        measured + _spread(more, MEASURED - 64),
        calibration,
        arguments,
        scores=[judges.caption_of_emoji],
    )


def fashion() -> BenchModel:
    """Class-conditional DiT on Fashion-MNIST: noise prediction, guidance in one batch."""
    return BenchModel(
        "fashion",
        partial(load_pipeline, "fashion", torch.float32, "cpu"),
        [i % 10 for i in range(MEASURED)],
        [i % 10 for i in range(32)],
        lambda labels: {"class_labels": list(labels), "guidance_scale": 1.5},
        batch=16,
        scores=[judges.kind_of_garment],
        set_scores=[judges.distance_of_garments],
    )


def sprites_() -> BenchModel:
    """Text to video: a moving emoji over a still ground; flow matching, guidance in two calls with their contexts."""
    unseen = sprites.captions("test")
    return BenchModel(
        "sprites",
        partial(load_pipeline, "sprites", torch.float32, "cpu"),
        [unseen[i % len(unseen)] for i in range(MEASURED)],
        _spread(sprites.captions("train"), 32),
        lambda prompts: {"prompt": list(prompts), "guidance_scale": 3.0},
        scores=[judges.caption_of_sprite],
    )


def scenes_() -> BenchModel:
    """Several emoji at free places over a free ground: FLUX's blocks and shift, 256 tokens, two calls a step."""
    return BenchModel(
        "scenes",
        partial(load_pipeline, "scenes", torch.float32, "cpu"),
        scenes.captions(MEASURED, "test"),
        scenes.captions(32, "train"),
        scenes.arguments,
        scores=[judges.caption_of_scene],
    )


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """As many of them, evenly spread."""
    return [items[i * len(items) // count] for i in range(count)]


def any_pipeline(recipe: Recipe, conditions: Sequence[Any], dtype: torch.dtype, device: str) -> BenchModel:
    """Any pipeline that TAP works with. Every fifth condition is kept for calibration.

    Args:
        recipe: how to run it.
        conditions: what to draw, in no particular order.
        dtype: to load the weights in.
        device: to run on.

    Raises:
        UsageError: there are too few conditions to keep some for calibration, or a score is not known.
    """
    if len(conditions) < 2:
        raise UsageError("give at least 2 prompts: some are measured, every fifth is for calibration")

    def load() -> Any:
        pipe: Any = load_pipeline(recipe.model, dtype, device)
        if recipe.scheduler is not None:
            pipe.register_modules(scheduler=getattr(diffusers, recipe.scheduler).from_config(pipe.scheduler.config))
        return pipe

    def arguments(some: Sequence[Any]) -> dict[str, Any]:
        return {recipe.argument: list(some), **recipe.call}

    measured = [condition for i, condition in enumerate(conditions) if i % 5]
    model = BenchModel(
        recipe.model, load, measured, conditions[::5], arguments, recipe.batch, dtype=str(dtype).removeprefix("torch.")
    )
    return model.judged_by(recipe.scores)


MODELS: dict[str, Callable[[], BenchModel]] = {
    "emoji": emoji,
    "fashion": fashion,
    "sprites": sprites_,
    "scenes": scenes_,
}
