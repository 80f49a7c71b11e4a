"""The model ``sprites``: text to video with Wan's transformer, an emoji that moves over a still, textured ground.

    python -m tap_bench.sprites train --work out/sprites
    python -m tap_bench.sprites export --work out/sprites --to DIR

Flow matching (arXiv 2210.02747) in pixel space, 8 frames of 32×32 pixels, captions such as ``red apple moves left over
grass``. The videos are made as they are needed, from Noto Emoji (see ``tap_diffusion.demo.data``).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import typer
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from tap_bench.pixels import PixelWanPipeline
from tap_diffusion.apps.sheets import sheet
from tap_diffusion.demo import data
from tap_diffusion.demo.train import (
    CAPTION_DROPOUT,
    Batch,
    Data,
    LearningRate,
    Minutes,
    Start,
    Steps,
    Work,
    build_tokenizers,
    device,
    ema_weights,
    fast_arithmetic,
    run,
    write_bf16,
)

FRAMES = 8
SIZE = 32  # pixels
SPRITE = 16  # pixels
TEXTURE = 16  # pixels after which a ground repeats
HELD_OUT = 64  # captions that the model never sees
_FINE = 2  # samples for each pixel and axis, against aliasing

SPRITES = (
    "red apple", "basketball", "soccer ball", "blue heart", "star", "planet", "fire", "rocket",
    "red car", "tractor", "banana", "watermelon", "grapes", "carrot", "eggplant", "mushroom",
    "hamburger", "doughnut", "frog face", "pig face", "panda face", "fox face", "clown face", "alien",
    "penguin", "baby chick", "sunflower", "christmas tree", "gift", "game die", "diamond", "alarm clock",
)  # fmt: skip
MOTIONS = ("moves left", "moves right", "moves up", "moves down", "bounces", "circles", "spins", "grows")
GROUNDS = ("grass", "sand", "water", "bricks", "tiles", "wood")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


# --------------------------------------------------------------------------------------------------------- the data


@cache
def _meanings() -> dict[str, tuple[int, str, str]]:
    """Index into ``SPRITES``, motion and ground of every caption."""
    combinations = itertools.product(enumerate(SPRITES), MOTIONS, GROUNDS)
    return {f"{name} {motion} over {ground}": (i, motion, ground) for (i, name), motion, ground in combinations}


def meaning(caption: str) -> tuple[int, int, int]:
    """Places of a caption's sprite, motion and ground in their lists."""
    index, motion, ground = _meanings()[caption]
    return index, MOTIONS.index(motion), GROUNDS.index(ground)


def captions(split: Literal["train", "test"]) -> list[str]:
    """All captions but ``HELD_OUT`` of them, or those, whose sprites, motions and grounds are in other captions."""
    everything = list(_meanings())
    held_out = random.Random(0).sample(everything, HELD_OUT)
    return held_out if split == "test" else sorted(set(everything).difference(held_out))


def load(folder: Path) -> Tensor:
    """The sprites, as premultiplied RGBA in [0, 1], (len(SPRITES), 4, 32, 32): ``_FINE`` times as fine as shown."""
    return data.cutouts(folder, SPRITES, "noto", _FINE * SPRITE)


@cache
def texture(ground: str) -> Tensor:
    """One period of a ground, in both directions: RGB in [0, 1], (3, 16, 16)."""
    y, x = torch.meshgrid(torch.arange(TEXTURE), torch.arange(TEXTURE), indexing="ij")
    grain = torch.rand(TEXTURE, TEXTURE, generator=torch.Generator().manual_seed(0))
    period = 2 * math.pi / TEXTURE
    match ground:
        case "grass":
            blades = (grain + grain.roll(1, 0) + grain.roll(2, 0)) / 3
            low, high, share = (0.10, 0.32, 0.08), (0.48, 0.76, 0.25), 1.6 * blades - 0.3
        case "sand":
            ripples = torch.sin(period * (3 * y + 1.5 * torch.sin(period * x)))
            low, high, share = (0.74, 0.58, 0.36), (0.97, 0.88, 0.66), 0.5 + 0.25 * ripples + 0.5 * (grain - 0.5)
        case "water":
            waves = torch.sin(period * (2 * y + 2 * torch.sin(period * x))) + torch.sin(period * (x + 3 * y))
            low, high, share = (0.05, 0.25, 0.60), (0.60, 0.88, 0.97), 0.4 + 0.3 * waves
        case "bricks":
            row = y // 4
            column = (x + 4 * (row % 2)) % TEXTURE // 8
            mortar = (y % 4 == 0) | ((x + 4 * (row % 2)) % 8 == 0)
            clay = 0.15 + 0.35 * grain[row, column] + 0.1 * grain
            low, high, share = (0.45, 0.13, 0.08), (0.86, 0.80, 0.74), torch.where(mortar, 1.0, clay)
        case "tiles":
            dark = (x // 8 + y // 8) % 2
            joint = (x % 8 == 0) | (y % 8 == 0)
            glaze = 0.95 - 0.5 * dark - 0.02 * ((x % 8) + (y % 8))
            low, high, share = (0.22, 0.20, 0.30), (0.93, 0.93, 0.98), torch.where(joint, 0.0, glaze)
        case "wood":
            plank = y // 8
            fibres = torch.sin(period * (3 * y + 2 * torch.sin(period * (x + 5 * plank))))
            share = torch.where(y % 8 == 0, 0.0, 0.45 + 0.15 * plank + 0.25 * fibres + 0.2 * (grain - 0.5))
            low, high = (0.24, 0.12, 0.05), (0.80, 0.54, 0.30)
        case _:
            raise ValueError(f"no ground is named {ground!r}; there are {', '.join(GROUNDS)}")
    dark_colour, light_colour = (torch.tensor(colour)[:, None, None] for colour in (low, high))
    return torch.lerp(dark_colour, light_colour, share.clamp(0, 1).expand(3, -1, -1))


def path(motion: str, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where a sprite is in each frame, from a random place on.

    Returns:
        x and y of its centre in pixels from the upper left, magnification, and clockwise turn in radians; (F,) each.
    """
    frame = torch.arange(FRAMES, dtype=torch.float32)
    middle, radius, still = SIZE / 2, SPRITE / 2, torch.zeros(FRAMES)
    # What stays in place keeps a distance from the edge that lets it grow or turn.
    slack = middle - radius - (3 if motion in ("spins", "grows") else 0)
    u, v = (2 * torch.rand(2, generator=generator) - 1).unbind()
    x, y = middle + slack * u + still, middle + slack * v + still
    along = 2 * (frame - (FRAMES - 1) / 2)  # 2 pixels a frame, around 0
    match motion:
        case "moves left":
            return middle + u - along, y, still + 1, still
        case "moves right":
            return middle + u + along, y, still + 1, still
        case "moves up":
            return x, middle + v - along, still + 1, still
        case "moves down":
            return x, middle + v + along, still + 1, still
        case "bounces":
            return x, SIZE - radius - 13 * torch.sin(math.pi * frame / 4).abs(), still + 1, still
        case "circles":
            turn = 2 * math.pi * (frame / FRAMES + u)
            return middle + 7 * torch.cos(turn), middle + 7 * torch.sin(turn), still + 1, still
        case "spins":
            return x, y, still + 1, 2 * math.pi * frame / FRAMES
        case "grows":
            return x, y, torch.linspace(0.5, 1.375, FRAMES), still
    raise ValueError(f"no motion is named {motion!r}; there are {', '.join(MOTIONS)}")


def render(caption: str, sprites: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The video that a caption describes, at a random place and with a random shift of the ground.

    Args:
        caption: one of ``captions``.
        sprites: as ``load`` gives them.
        generator: for place and shift.

    Returns:
        (3, F, 32, 32) float32 in [-1, 1].
    """
    if caption not in _meanings():
        raise ValueError(f"{caption!r} is not a caption; one is {next(iter(_meanings()))!r}")
    index, motion, ground = _meanings()[caption]
    x, y, magnification, turn = path(motion, generator)
    shift = torch.randint(TEXTURE, (2,), generator=generator).tolist()
    under = texture(ground).repeat(1, SIZE // TEXTURE, SIZE // TEXTURE).roll(shift, (1, 2))

    # From coordinates of the frame to those of the sprite, both from -1 to 1.
    scale = SIZE / (SPRITE * magnification)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    dx, dy = 1 - 2 * x / SIZE, 1 - 2 * y / SIZE
    theta = torch.stack([cos, sin, cos * dx + sin * dy, -sin, cos, cos * dy - sin * dx], dim=1).view(-1, 2, 3)
    fine = F.affine_grid(theta, [FRAMES, 4, _FINE * SIZE, _FINE * SIZE], align_corners=False)
    over = F.grid_sample(sprites[index].expand(FRAMES, -1, -1, -1), fine, align_corners=False)
    colour, alpha = F.avg_pool2d(over, _FINE).split([3, 1], dim=1)
    return ((colour + (1 - alpha) * under) * 2 - 1).clamp(-1, 1).transpose(0, 1)


# -------------------------------------------------------------------------------------------------------- the model


def build() -> PixelWanPipeline:
    """8 blocks of width 192 on 512 tokens; 4.3 M parameters, of which 0.3 M encode text."""
    _, tokenizer = build_tokenizers(list(_meanings()))
    text = T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        text_dim=text.d_model,
        freq_dim=128,
        ffn_dim=384,
        num_layers=8,
        rope_max_seq_len=SIZE,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    # Shift 1: the eight frames share much of what they show, which asks for more noise, but are small.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return PixelWanPipeline(transformer, T5EncoderModel(text), tokenizer, scheduler, FRAMES, SIZE, SIZE)


def trained_part(pipe: PixelWanPipeline) -> nn.ModuleDict:
    """Transformer and text encoder, to be trained together."""
    return nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})


def loss(pipe: PixelWanPipeline, sprites: Tensor, texts: list[str], batch: int) -> Callable[[], Tensor]:
    """A function that gives the flow matching loss of another batch each time."""
    dev = pipe.device
    tokens = {
        text: pipe.tokenizer(text, padding="max_length", return_tensors="pt").input_ids.to(dev) for text in ["", *texts]
    }

    def loss_of() -> Tensor:
        chosen = [texts[i] for i in torch.randint(len(texts), (batch,)).tolist()]
        x = torch.stack([render(text, sprites) for text in chosen]).to(dev)
        seen = ["" if float(torch.rand(())) < CAPTION_DROPOUT else text for text in chosen]
        noise = torch.randn(x.shape).to(dev)
        sigma = torch.randn(batch).sigmoid().to(dev)
        noisy = torch.lerp(x, noise, sigma.view(-1, 1, 1, 1, 1))
        with fast_arithmetic(dev):
            embeddings = pipe.text_encoder(torch.cat([tokens[text] for text in seen]))[0]
            velocity = pipe.transformer(noisy, 1000 * sigma, embeddings, return_dict=False)[0]
        return F.mse_loss(velocity.float(), noise - x)

    return loss_of


@app.command()
def train(
    work: Work, data_folder: Data = None, steps: Steps = 8000, batch: Batch = 8, lr: LearningRate = 1e-3,
    minutes: Minutes = 1e9, start: Start = None,
) -> None:  # fmt: skip
    """Train, or go on from the checkpoint in the work folder."""
    work.mkdir(parents=True, exist_ok=True)
    sprites = load(data_folder or work / "data")
    torch.manual_seed(0)
    pipe = build() if start is None else PixelWanPipeline.from_pretrained(start, dtype=torch.float32)
    pipe.to(device())
    pipe.set_progress_bar_config(disable=True)
    model = trained_part(pipe).requires_grad_(True).train()

    shown = captions("test")[:8]

    def samples(_: nn.Module, file: Path) -> None:
        generators = [torch.Generator().manual_seed(i) for i in range(len(shown))]
        with fast_arithmetic(pipe.device):
            videos = pipe(shown, num_inference_steps=25, generator=generators, output_type="pt").frames
        sheet(list(2 * videos.cpu() - 1), shown).save(file)

    run(work, "sprites", model, steps, lr, minutes, loss(pipe, sprites, captions("train"), batch), samples, every=1000)


@app.command()
def export(work: Work, to: Annotated[Path, typer.Option(help="Folder to write the pipeline to.")]) -> None:
    """Write the pipeline with the averaged weights, in bf16, as ``PixelWanPipeline.from_pretrained`` reads it."""
    pipe = build()
    ema_weights(work, "sprites", trained_part(pipe))
    write_bf16(pipe, to)


if __name__ == "__main__":
    app()
