"""A loaded pipeline as the page sees it: which controls it takes, what is wrong with what they hold, and its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import FluxPipeline

from tap_diffusion.apps import pipelines
from tap_diffusion.apps.generate import APART, Request, guidance_for, prompt_for
from tap_diffusion.apps.ui.methods import FULL, METHODS, full_steps
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.schedule import FEWEST
from tap_diffusion.integrations.diffusers.api import transformers

LARGEST_SEED = 2**53 - 1  # that a browser's numbers hold exactly

EXAMPLES = {
    "emoji": Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8").splitlines(),
    "sprites": [
        "red apple moves left over grass", "fox face spins over bricks", "rocket moves up over water",
        "basketball bounces over wood",
    ],
    "scenes": [
        "a pig face and a cow", "two cactuses on a green wall", "a carrot and three blue hearts",
        "two elephants on a wall",
    ],
}  # fmt: skip
"""Prompts that the embedded models know."""


@dataclass(frozen=True)
class Settings:
    """What the page's controls hold, in their order. Those that a model doesn't take hold None or nothing.

    Attributes:
        label: number of a class, for a model that draws classes.
        kind, budget: how many steps are full, see :func:`~tap_diffusion.apps.ui.methods.full_steps`.
        method: a key of :data:`~tap_diffusion.apps.ui.methods.METHODS`.
    """

    model: str
    prompt: str
    label: int | None
    negative_prompt: str
    guidance: float | None
    width: int | None
    height: int | None
    frames: int | None
    seed: int
    steps: int
    kind: str
    budget: float
    method: str

    @property
    def config(self) -> TAPConfig:
        """Of the accelerated run."""
        return METHODS[self.method](int(self.steps), full_steps(int(self.steps), self.kind, self.budget))


NAMES = tuple(field.name for field in fields(Settings))


class Model:
    """One pipeline.

    Args:
        name: as :func:`tap_diffusion.apps.generate.load_pipeline` takes it.
        pipe: draws pictures or videos from prompts, or from class labels.

    Attributes:
        defaults: of the controls that this pipeline takes, by the names of :class:`Settings`; None: its own.
        classes: names and numbers of what it draws, for a model that draws classes.

    Raises:
        UsageError, UnsupportedModelError: the pipeline is another one.
    """

    def __init__(self, name: str, pipe: Any) -> None:
        self.name, self.pipe = name, pipe
        self.is_video = pipelines.frames_argument(pipe) is not None
        known = pipelines.parameters(pipe)
        self.defaults: dict[str, Any] = {"model": name, "seed": 0, "steps": 50}
        self.classes: list[tuple[str, int]] = []
        if pipelines.condition(pipe) == "prompt":
            self.defaults["prompt"] = self.examples[0] if self.examples else ""
        else:
            config: Any = transformers(pipe)[0].config
            count = config.num_embeds_ada_norm
            named = pipelines.class_names(pipe) or {f"class {i}": i for i in range(count)}
            self.classes = sorted(named.items(), key=lambda item: item[1])
            self.defaults["label"] = self.classes[0][1]
        Request(["0"]).check(pipe)
        guidance = pipelines.guidance_argument(pipe)
        if guidance is not None:
            own = known[guidance].default
            self.defaults["guidance"] = guidance_for(name, None) or (own if isinstance(own, int | float) else None)
            if "negative_prompt" in known and not pipelines.embeds_guidance(pipe):
                self.defaults["negative_prompt"] = ""
        size = Request([""]).size(pipe)
        for name_of, own in zip(("height", "width"), size, strict=True):
            if name_of in known:
                self.defaults[name_of] = own or self._own(known[name_of].default)
        if (frames := pipelines.frames_argument(pipe)) is not None:
            self.defaults["frames"] = known[frames].default or pipe.config.get("num_frames")

    def _own(self, default: Any) -> int | None:
        if default is not None:
            return int(default)
        sample, scale = (getattr(self.pipe, name, None) for name in ("default_sample_size", "vae_scale_factor"))
        return sample * scale if isinstance(sample, int) and isinstance(scale, int) else None

    @property
    def examples(self) -> list[str]:
        """Prompts to begin with; none where the model is not the project's own."""
        return EXAMPLES.get(self.name, [])

    def request(self, settings: Settings) -> Request:
        """What to generate."""
        subject = str(settings.label) if self.classes else prompt_for(self.name, settings.prompt)
        height, width, frames = (
            None if size is None else int(size) for size in (settings.height, settings.width, settings.frames)
        )
        negative = prompt_for(self.name, settings.negative_prompt or "") or None
        return Request(
            [subject], int(settings.steps), int(settings.seed), settings.guidance, height, width, frames,
            negative_prompt=negative,
        )  # fmt: skip

    def problems(self, settings: Settings) -> dict[str, str]:
        """What is wrong, by name of the control, and its remedy; empty where nothing is."""
        wrong: dict[str, str] = {}
        seed, steps = settings.seed, settings.steps
        if self.classes:
            if settings.label is None:
                wrong["label"] = "Choose what to draw."
        else:
            wrong["prompt"] = self._problem_of(settings.prompt) if settings.prompt.strip() else "Say what to draw."
        if negative := (settings.negative_prompt or "").strip():
            wrong["negative_prompt"] = self._problem_of(negative)
            if settings.guidance is not None and settings.guidance <= 1:
                wrong["guidance"] = "With guidance of 1 or less a negative prompt has no effect. Give more than 1."
        multiple = pipelines.multiple(self.pipe)
        for name in ("height", "width"):
            value = getattr(settings, name)
            if value is not None and (value < multiple or value % multiple):
                wrong[name] = f"The {name} must be a multiple of {multiple}."
        if settings.frames is not None and not (_is_whole(settings.frames) and settings.frames >= 2):
            wrong["frames"] = "Frames must be a whole number of at least 2."
        if not _is_whole(seed) or not 0 <= seed <= LARGEST_SEED:
            wrong["seed"] = "The seed must be a whole number from 0 to 2⁵³ − 1."
        if not _is_whole(steps) or not 2 <= steps <= 1000:
            wrong["steps"] = "Steps must be a whole number from 2 to 1000."
        else:
            wrong["budget"] = self._problem_of_budget(settings)
        return {name: problem for name, problem in wrong.items() if problem}

    def _problem_of(self, prompt: str) -> str:
        if not isinstance(self.pipe, FluxPipeline) and self.name not in APART:
            return ""  # others cut off what is too long, and warn
        tokenizer = self.pipe.tokenizer_2 if isinstance(self.pipe, FluxPipeline) else self.pipe.tokenizer
        prompt = prompt_for(self.name, prompt)
        if self.name in APART:
            known = {token.removeprefix("▁") for token in tokenizer.get_vocab() if token.startswith("▁")} - {""}
            for word in prompt.split():
                if word not in known:
                    usual = [word for word in " ".join(self.examples).split() if word in known]
                    near = get_close_matches(word, known) or list(dict.fromkeys(usual))[:5]
                    return f"This small model never saw the word “{word}”. It knows, for example: {', '.join(near)}."
        most = Request([prompt]).arguments(self.pipe).get("max_sequence_length", tokenizer.model_max_length)
        count = len(tokenizer(prompt).input_ids)
        return f"The model reads {most} tokens, and this has {count}. Make it shorter." if count > most else ""

    def _problem_of_budget(self, settings: Settings) -> str:
        steps, budget, is_full = settings.steps, settings.budget, settings.kind == FULL
        if budget is None or budget < 1 or (is_full and not _is_whole(budget)):
            name, kind = ("Full steps", "whole number") if is_full else ("The target speed-up", "number")
            return f"{name} must be a {kind} of at least 1."
        if full_steps(steps, settings.kind, budget) >= steps:
            remedy = f"Give at most {steps - 1}" if is_full else f"At least {FEWEST} are full: say how many"
            return f"This leaves none of {steps} steps to predict. {remedy}, or take more steps."
        try:
            _ = settings.config
        except ValueError as error:
            return f"{error}. Give more full steps, or take the recommended method."
        return ""


@contextmanager
def watched(pipe: Any, after_step: Callable[[], None]) -> Iterator[None]:
    """Within this, ``after_step`` is called after each step of the pipeline, and may raise to stop it.

    All pipelines of diffusers have a progress bar, and fewer a callback. This one stands in for the bar.
    """

    pipe.progress_bar = partial(_Bar, after_step)
    try:
        yield
    finally:
        del pipe.progress_bar


class _Bar:
    """As much of a progress bar as pipelines use, in both ways in which they use it."""

    def __init__(self, after_step: Callable[[], None], iterable: Any = (), **_: Any) -> None:
        self.after_step, self.iterable = after_step, iterable

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.after_step()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, *_: Any) -> None:
        self.after_step()

    def close(self) -> None: ...


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float) and value == round(value)
