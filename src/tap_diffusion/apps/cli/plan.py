"""``tap plan``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.table import Table

from tap_diffusion.apps.cli.options import console, failed, option
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.errors import ConfigError, UsageError
from tap_diffusion.core.presets import PRESETS, STEPS
from tap_diffusion.core.schedule import plan as planned
from tap_diffusion.core.timeline import Timeline, flow_noise

_SIZE = re.compile(r"(\d+)x(\d+)(?:x(\d+))?")


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of a model.

    Attributes:
        width, height: pixels, by default.
        shift: of the flow's noise, by the number of tokens.
        frames: of a video, by default; 1: a picture.
        pixels: of a token's side.
        every: frames of a token, after the first.
        preset: its name among :data:`~tap_diffusion.core.presets.PRESETS`.
    """

    width: int
    height: int
    shift: Callable[[int], float]
    frames: int = 1
    pixels: int = 16
    every: int = 4
    preset: str | None = None

    def tokens(self, width: int, height: int, frames: int) -> int:
        """Of a picture or video of this size."""
        return (width // self.pixels) * (height // self.pixels) * ((frames - 1) // self.every + 1)


def _by_tokens(few: tuple[int, float], many: tuple[int, float]) -> Callable[[int], float]:
    """diffusers' dynamic shifting: the logarithm of the shift is linear in the tokens, through two points."""
    slope = (many[1] - few[1]) / (many[0] - few[0])
    return lambda tokens: math.exp(few[1] + slope * (tokens - few[0]))


# Sizes and shifts as in diffusers' pipelines and the published configurations of their schedulers. Qwen-Image's stretch
# to a terminal noise of 0.02 is left out.
MODELS: dict[str, Model] = {
    "flux": Model(1024, 1024, _by_tokens((256, 0.5), (4096, 1.15)), preset="flux.1-dev"),
    "qwen-image": Model(1328, 1328, _by_tokens((256, 0.5), (8192, 0.9)), preset="qwen-image"),
    "sd3": Model(1024, 1024, lambda _: 3.0),
    "wan-1.3b": Model(832, 480, lambda _: 5.0, frames=81, preset="wan2.1-1.3b"),
    "wan-14b": Model(1280, 720, lambda _: 5.0, frames=81),
    "hunyuan-video": Model(1280, 720, lambda _: 7.0, frames=129, preset="hunyuan-video"),
}


def plan(
    model: Annotated[
        str, typer.Argument(help=f"{', '.join(MODELS)}, or a size in pixels: 1024x1024, or 832x480x81 for 81 frames.")
    ],
    steps: Annotated[int, option("Steps", help="Denoising steps.", min=1)] = 50,
    full_steps: Annotated[
        int | None, option("Steps", help="How many of them run the whole model.", min=1, default="by --speedup")
    ] = None,
    speedup: Annotated[
        float | None,
        option(
            "Steps",
            help="Target speed-up: one step in this many runs the whole model.",
            min=1,
            default=f"{TAPConfig.speedup:g}",
        ),
    ] = None,
    width: Annotated[int | None, option("Size", help="Width in pixels.", min=16, default="the model's")] = None,
    height: Annotated[int | None, option("Size", help="Height in pixels.", min=16, default="the model's")] = None,
    frames: Annotated[int | None, option("Size", help="Frames of a video.", min=1, default="the model's")] = None,
    tokens: Annotated[
        int | None, option("Size", help="Tokens of a picture or video.", min=1, default="by its size")
    ] = None,
    shift: Annotated[
        float | None,
        option("Size", help="The scheduler's shift: above 1, more of the steps are noisy.", default="the model's"),
    ] = None,
) -> None:
    """Show which steps would run the whole model (full steps), and why. Needs no weights.

    Example: tap plan flux --speedup 4
    """
    try:
        known = _model(model)
        if shift is not None and not (shift > 0 and math.isfinite(shift)):
            raise UsageError(f"--shift is {shift:g}; give a number above 0")
        size = width or known.width, height or known.height, frames or known.frames
        count = tokens or known.tokens(*size)
        if count < 1:
            raise UsageError(f"{size[0]}x{size[1]} is smaller than a token of {known.pixels} pixels")
        given = {"speedup": speedup, "full_steps": full_steps}
        config = TAPConfig.from_dict({name: value for name, value in given.items() if value is not None})
    except (UsageError, ConfigError) as error:
        raise failed(error) from None
    shift = shift or known.shift(count)
    timeline = Timeline(flow_noise(steps, shift), "flow", tokens=count)
    full = list(filter(planned(config, steps, timeline), range(steps)))
    shown = "x".join(map(str, size if size[2] > 1 else size[:2]))
    title = f"{count} tokens" if tokens else f"{shown}, {count} tokens"
    console.print(f"{title}, shift {shift:.3g}: {len(full)} of {steps} steps full", highlight=False)
    table = Table("full step", "noise σ/α", "spacing")
    for column in table.columns:
        column.justify = "right"
    for step in full:
        table.add_row(str(step), _number(timeline.noise[step]), f"{timeline.spacing[step]:.1f}")
    console.print(table)
    console.print(
        "Full steps are evenly spaced in the last column, as far as whole steps allow. For many tokens N it is"
        " log(1 + 3 N/64 / (1 + noise)), scaled to the number of steps: the more tokens, the earlier it is decided what"
        " is where. For 64 or fewer it is the pace at which features change.",
        highlight=False,
    )
    found = PRESETS.get(known.preset or "", {}).get(len(full)) if steps == STEPS else None
    if found is not None:
        config_of = f'TAPConfig.preset("{known.preset}", full_steps={len(full)})'
        console.print(f"A search on the model itself found {', '.join(map(str, found))}: {config_of}", highlight=False)


def _model(name: str) -> Model:
    """The model of this name, or one of this size.

    Raises:
        UsageError: it is neither.
    """
    if name in MODELS:
        return MODELS[name]
    size = _SIZE.fullmatch(name)
    if size is None:
        raise UsageError(f"tap plan doesn't know {name!r}; give {', '.join(MODELS)}, or a size such as 1024x1024")
    return Model(int(size[1]), int(size[2]), lambda _: 1.0, frames=int(size[3] or 1))


def _number(noise: float) -> str:
    return "∞" if math.isinf(noise) else f"{noise:.3g}"
