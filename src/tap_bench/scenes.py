"""The model ``scenes``: text to picture with FLUX's transformer, several emoji at free places over a free ground.

    python -m tap_bench.scenes autoencoder --work out/scenes
    python -m tap_bench.scenes train --work out/scenes
    python -m tap_bench.scenes export --work out/scenes --to DIR

Flow matching on an autoencoder's latents: 256 image tokens at 128×128 pixels. A caption such as ``two frog faces and a
red apple on grass at night`` says what there is and not where; some leave out the time of day too, or the ground. So
the model must decide on a layout. The scenes are made as they are needed, from Fluent Emoji (see
``tap_diffusion.demo.data``). Training starts from the autoencoder of ``emoji`` and some of its blocks, and sees scenes
at other numbers of tokens too.

The schedule is FLUX's at 1024×1024 pixels, where 4096 tokens show a picture. With 16 times fewer tokens a layout is
lost in 4 times less noise, so all of FLUX's shifts are divided by 4: a picture of N tokens gets the shift that FLUX
gives to one of 16 N, over 4.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tap_diffusion.apps.files import write_whole
from tap_diffusion.apps.generate import psnr
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
    checkpoint,
    device,
    ema_weights,
    encode,
    fast_arithmetic,
    run,
    trained_part,
    write_bf16,
)
from tap_diffusion_demo import EMOJI

SIZE = 128  # pixels
TOKEN = 8  # pixels of an image token's side
MAX_TOKENS = 20  # of a caption, in both tokenizers
GUIDANCE = 3.0
FEWER = 16  # times fewer tokens than FLUX's for a picture
UNIFORM = 0.4  # share of samples whose noise is drawn evenly, so that the first steps are learned too
SHARES = {8: 0.1, 16: 0.8, 24: 0.1}  # of training steps, by tokens of a picture's side
DOUBLE, SINGLE = (0,), (0, 1, 3, 5, 7, 9)  # blocks of ``emoji`` that training starts from

OBJECTS = (
    "red apple", "banana", "watermelon", "strawberry", "carrot", "eggplant", "mushroom", "hamburger", "doughnut",
    "birthday cake", "frog face", "pig face", "panda face", "fox face", "cow", "elephant", "penguin", "baby chick",
    "turtle", "octopus", "butterfly", "ladybug", "sunflower", "rose", "cactus", "christmas tree", "house", "red car",
    "tractor", "sailboat", "rocket", "planet", "star", "fire", "blue heart", "balloon", "gift", "soccer ball",
    "basketball", "alien",
)  # fmt: skip
GROUNDS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {  # colour near and far
    "grass": ((0.25, 0.55, 0.15), (0.55, 0.75, 0.35)),
    "sand": ((0.85, 0.70, 0.45), (0.95, 0.87, 0.68)),
    "snow": ((0.80, 0.86, 0.94), (0.97, 0.98, 1.00)),
    "water": ((0.05, 0.25, 0.50), (0.30, 0.60, 0.80)),
}
SKIES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]] = {
    # colour above, colour at the horizon, light on the ground
    "by day": ((0.30, 0.58, 0.92), (0.75, 0.88, 0.98), (1.0, 1.0, 1.0)),
    "at sunset": ((0.42, 0.28, 0.55), (0.98, 0.62, 0.32), (0.95, 0.70, 0.58)),
    "at night": ((0.03, 0.04, 0.14), (0.14, 0.17, 0.36), (0.30, 0.34, 0.50)),
}
WALLS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, 0.22, 0.20), "yellow": (0.95, 0.82, 0.30), "green": (0.30, 0.65, 0.40), "blue": (0.25, 0.42, 0.80),
    "purple": (0.52, 0.32, 0.68), "white": (0.94, 0.94, 0.94), "black": (0.10, 0.10, 0.11),
}  # fmt: skip
PLACES = (*(f"on {ground} {sky}" for ground in GROUNDS for sky in SKIES), *(f"on a {wall} wall" for wall in WALLS))
TOLD = {"place": 0.5, "ground": 0.25, "nothing": 0.25}  # of a scene's place in its caption, and for which share
_NUMBERS = ("", "a", "two", "three")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


# --------------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Scene:
    """What a picture shows, whatever its size; lengths in sides of the picture.

    Attributes:
        place: one of ``PLACES``.
        told: how much of it the caption says, of ``TOLD``.
        objects: index into ``OBJECTS``, x and y of the centre, and side of each, those behind first.
        free: 32 numbers, evenly drawn from 0 to 1, that place the horizon, tint the colours and cast the light.
    """

    place: str
    told: str
    objects: tuple[tuple[int, float, float, float], ...]
    free: tuple[float, ...]

    @property
    def caption(self) -> str:
        """What there is, in the order of ``OBJECTS``, and nothing of where it is."""
        kinds = sorted({kind for kind, *_ in self.objects})
        named = [_counted(OBJECTS[kind], sum(kind == other for other, *_ in self.objects)) for kind in kinds]
        where = {"place": f" {self.place}", "ground": f" {ground_of(self.place)}", "nothing": ""}[self.told]
        return " and ".join(named) + where


def ground_of(place: str) -> str:
    """What a caption says of a place that tells the ground alone."""
    words = place.split()
    return "on a wall" if words[-1] == "wall" else " ".join(words[:2])


def meaning(caption: str) -> tuple[list[int], str]:
    """The kinds that a caption names, as indices into ``OBJECTS``, and what it says of the place, or ""."""
    names, on, told = caption.partition(" on ")
    kinds = {_counted(name, count): kind for kind, name in enumerate(OBJECTS) for count in (1, 2, 3)}
    return [kinds[name] for name in names.split(" and ")], f"{on}{told}".strip()


def _counted(name: str, count: int) -> str:
    if count == 1:
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return f"{_NUMBERS[count]} {_plural(name)}"


def _plural(name: str) -> str:
    if name.endswith("y"):
        return f"{name[:-1]}ies" if name[-2] not in "aeiou" else f"{name}s"
    return f"{name}es" if name.endswith(("s", "x", "ch")) else f"{name}s"


def held_out(caption: str) -> bool:
    """Whether training leaves it out: one in 16."""
    return zlib.crc32(caption.encode()) % 16 == 0


def scene(generator: torch.Generator | None = None, split: Literal["train", "test"] = "train") -> Scene:
    """A random scene of 2 to 5 objects, of up to 3 kinds, whose caption is held out or is not."""

    def uniform(low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def below(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    while True:
        kinds = torch.randperm(len(OBJECTS), generator=generator)[: 1 + below(3)].tolist()
        chosen = list(kinds)
        while len(chosen) < 2 or (len(chosen) < 5 and uniform() < 0.4):
            kind = kinds[below(len(kinds))]
            if chosen.count(kind) < 3:
                chosen.append(kind)
            elif len(kinds) == 1:
                break
        objects: list[tuple[int, float, float, float]] = []
        for kind in chosen:
            for _ in range(30):  # as far apart as it goes
                side = uniform(0.2, 0.42)
                x, y = (uniform(0.45 * side, 1 - 0.45 * side) for _ in "xy")
                if all(math.hypot(x - u, y - v) > 0.45 * (side + other) for _, u, v, other in objects):
                    break
            objects.append((kind, x, y, side))
        free = tuple(torch.rand(32, generator=generator).tolist())
        place = PLACES[below(len(PLACES))]
        told = list(TOLD)[int(torch.multinomial(torch.tensor(list(TOLD.values())), 1, generator=generator))]
        result = Scene(place, told, tuple(objects), free)
        if held_out(result.caption) == (split == "test"):
            return result


def captions(count: int, split: Literal["train", "test"]) -> list[str]:
    """As many captions of random scenes, each once, always the same."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, None] = {}
    while len(found) < count:
        found[scene(generator, split).caption] = None
    return list(found)


def load(folder: Path) -> Tensor:
    """The objects, as premultiplied RGBA in [0, 1], (len(OBJECTS), 4, 96, 96); kept in the folder once made."""
    file = folder / "objects.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        objects = data.cutouts(folder, OBJECTS, "fluent", 96)
        write_whole(file, partial(save_file, {"objects": (255 * objects).round().to(torch.uint8).contiguous()}))
    return load_file(file)["objects"].float() / 255


def _ground(shown: Scene, size: int) -> Tensor:
    """RGB in [0, 1], (3, size, size)."""
    free = torch.tensor(shown.free)
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")

    def tinted(colour: tuple[float, float, float], which: int) -> Tensor:
        return (torch.tensor(colour) + 0.14 * (free[which : which + 3] - 0.5))[:, None, None]

    words = shown.place.split()
    if words[-1] == "wall":
        wall = WALLS[words[2]]
        colours = torch.lerp(tinted(wall, 0), tinted(wall, 3) * 0.8, y.expand(3, -1, -1))
    else:
        near, far = GROUNDS[words[1]]
        above, below, light = SKIES[" ".join(words[2:])]
        horizon = 0.2 + 0.55 * free[12] + 0.3 * (free[13] - 0.5) * (x - 0.5)
        horizon = horizon + 0.08 * free[14] * torch.sin(2 * math.pi * (x * (0.5 + free[15]) + free[16]))
        sky = torch.lerp(tinted(above, 0), tinted(below, 3), (y / horizon).clamp(0, 1).expand(3, -1, -1))
        depth = ((y - horizon) / (1 - horizon)).clamp(0, 1).expand(3, -1, -1)
        ground = torch.lerp(tinted(far, 6), tinted(near, 9), depth) * torch.tensor(light)[:, None, None]
        colours = torch.lerp(sky, ground, ((y - horizon) * size + 0.5).clamp(0, 1).expand(3, -1, -1))
    turn = 2 * math.pi * free[17]
    lit = 0.95 + 0.5 * (free[18] - 0.5) + 0.4 * free[19] * ((x - 0.5) * turn.cos() + (y - 0.5) * turn.sin())
    return (colours * lit).clamp(0, 1)


def render(shown: Scene, cutouts: Tensor, size: int = SIZE) -> Tensor:
    """The picture of a scene.

    Args:
        shown: the scene.
        cutouts: as ``load`` gives them.
        size: pixels of its side.

    Returns:
        (3, size, size) uint8.
    """
    picture = _ground(shown, size)
    for kind, x, y, side in shown.objects:
        pixels = round(side * size)
        over = F.interpolate(cutouts[kind][None], [pixels, pixels], mode="bilinear", antialias=True)[0]
        left, top = round(x * size - pixels / 2), round(y * size - pixels / 2)
        over = over[:, max(0, -top) : size - top, max(0, -left) : size - left]
        top, left = max(0, top), max(0, left)
        under = picture[:, top : top + over.shape[1], left : left + over.shape[2]]
        under.mul_(1 - over[3:]).add_(over[:3])
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


# -------------------------------------------------------------------------------------------------------- the model


@cache
def _vocabulary() -> list[str]:
    """Captions that have all words."""
    phrases = [_counted(name, count) for name in OBJECTS for count in (1, 2, 3)]
    return [*phrases, "and", *PLACES]


def _singular(word: str, known: set[str]) -> str:
    stems = (word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y")
    return next((stem for stem in stems if stem in known), word)


def build() -> FluxPipeline:
    """1 double- and 6 single-stream blocks of width 192, with what they can take from ``emoji``; 5.6 M parameters."""
    old = FluxPipeline.from_pretrained(EMOJI, dtype=torch.float32)
    clip_tokenizer, t5_tokenizer = build_tokenizers(_vocabulary())
    clip_tokenizer.model_max_length = t5_tokenizer.model_max_length = MAX_TOKENS

    clip_config = CLIPTextConfig(
        **old.text_encoder.config.to_dict() | {"vocab_size": len(clip_tokenizer), "max_position_embeddings": MAX_TOKENS}
    )
    clip = CLIPTextModel(clip_config)
    t5 = T5EncoderModel(T5Config(**old.text_encoder_2.config.to_dict() | {"vocab_size": len(t5_tokenizer)}))
    for new, source, tokenizer, old_tokenizer in (
        (clip, old.text_encoder, clip_tokenizer, old.tokenizer),
        (t5, old.text_encoder_2, t5_tokenizer, old.tokenizer_2),
    ):
        weights = {name: w for name, w in source.state_dict().items() if w.shape == new.state_dict()[name].shape}
        new.load_state_dict(weights, strict=False)
        known, to = old_tokenizer.get_vocab(), new.get_input_embeddings().weight.data
        for token, row in tokenizer.get_vocab().items():
            end = "</w>" if token.endswith("</w>") else ""
            stem = _singular(token.removesuffix(end), {t.removesuffix(end) for t in known if t.endswith(end)}) + end
            if stem in known:
                to[row] = source.get_input_embeddings().weight.data[known[stem]]
    for positions, shorter in zip(_positions(clip), _positions(old.text_encoder), strict=True):
        positions.data[: len(shorter)] = shorter.data
        positions.data[len(shorter) :] = shorter.data[-1]

    config = dict(old.transformer.config) | {"num_layers": len(DOUBLE), "num_single_layers": len(SINGLE)}
    transformer = FluxTransformer2DModel.from_config(config)
    blocks: dict[str, tuple[int, ...]] = {"transformer_blocks": DOUBLE, "single_transformer_blocks": SINGLE}
    weights = old.transformer.state_dict()
    kept = {name: w for name, w in weights.items() if name.split(".")[0] not in blocks}
    for list_name, numbers in blocks.items():
        for new_number, number in enumerate(numbers):
            before, after = f"{list_name}.{number}.", f"{list_name}.{new_number}."
            kept |= {after + n.removeprefix(before): w for n, w in weights.items() if n.startswith(before)}
    transformer.load_state_dict(kept)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_image_seq_len=256 // FEWER,
            max_image_seq_len=4096 // FEWER,
            base_shift=0.5 - math.log(FEWER) / 2,
            max_shift=1.15 - math.log(FEWER) / 2,
        ),
        vae=old.vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


def _positions(clip: Any) -> list[nn.Parameter]:
    return [weight for name, weight in clip.named_parameters() if "position_embedding" in name]


def shift(pipe: FluxPipeline, tokens: int) -> float:
    """Logarithm of the factor by which FLUX raises noise for so many image tokens."""
    config = pipe.scheduler.config
    return calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )


def pictures(cutouts: Tensor, side: int, scenes: list[Scene]) -> Tensor:
    """Pictures of so many tokens' side, (count, 3, H, W) uint8."""
    return torch.stack([render(shown, cutouts, side * TOKEN) for shown in scenes])


@app.command()
def autoencoder(
    work: Work, data_folder: Data = None, steps: Steps = 1500, batch: Batch = 16, lr: LearningRate = 1e-3,
    minutes: Minutes = 1e9,
) -> None:  # fmt: skip
    """Stage 1: the autoencoder of ``emoji``, which has seen white grounds only, goes on with scenes."""
    work.mkdir(parents=True, exist_ok=True)
    cutouts = load(data_folder or work / "data")
    torch.manual_seed(0)
    dev = device()
    vae = _vae()
    vae.to(dev, memory_format=torch.channels_last).requires_grad_(True).train()
    unseen = torch.Generator().manual_seed(1)
    held = pictures(cutouts, SIZE // TOKEN, [scene(unseen, "test") for _ in range(64)]).to(dev).float() / 127.5 - 1

    def loss_of() -> Tensor:
        side, count = _side_and_count(batch)
        x = pictures(cutouts, side, [scene() for _ in range(count)]).to(dev).float() / 127.5 - 1
        with fast_arithmetic(dev):
            posterior = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
            error = vae.decode(posterior.sample()).sample.float() - x
        return error.abs().mean() + error.square().mean() + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()

    def samples(model: Any, file: Path) -> None:
        decoded = model.decode(model.encode(held).latent_dist.mean).sample.clamp(-1, 1).cpu()
        tqdm.write(f"held-out PSNR {fmean(psnr(decoded, held.cpu())):.2f} dB")
        sheet([held[:8].cpu(), decoded[:8]], ["picture", "decoded"]).save(file)

    run(work, "autoencoder", vae, steps, lr, minutes, loss_of, samples, every=250)


def _vae() -> Any:
    """The autoencoder of ``emoji``."""
    return AutoencoderKL.from_pretrained(EMOJI, subfolder="vae", dtype=torch.float32)


def prepare(work: Path, cutouts: Tensor, start: Path | None = None) -> FluxPipeline:
    """A pipeline to train.

    Args:
        work: where stage 1 left the autoencoder.
        cutouts: as ``load`` gives them.
        start: folder of an exported pipeline to go on from, autoencoder included; None starts from ``emoji``.
    """
    torch.manual_seed(1)
    if start is not None:
        return FluxPipeline.from_pretrained(start, dtype=torch.float32)
    pipe = build()
    pipe.register_modules(vae=ema_weights(work, "autoencoder", _vae()))
    generator = torch.Generator().manual_seed(0)
    latents = encode(pipe.vae, pictures(cutouts, SIZE // TOKEN, [scene(generator) for _ in range(256)]))
    pipe.vae.register_to_config(sample_size=SIZE)
    pipe.vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    return pipe


def _side_and_count(batch: int) -> tuple[int, int]:
    """Tokens of a training picture's side, drawn by ``SHARES``, and pictures that have as many tokens in all."""
    side = list(SHARES)[int(torch.multinomial(torch.tensor(list(SHARES.values())), 1))]
    return side, max(1, round(batch * (16 / side) ** 2))


def loss(pipe: FluxPipeline, cutouts: Tensor, batch: int, compiled: bool = False) -> Callable[[], Tensor]:
    """A function that gives the flow matching loss of another batch each time.

    ``batch`` is for 256 tokens; other numbers of tokens have batches of about as many tokens in all. ``compiled`` has
    PyTorch compile the model for 256 tokens.
    """
    dev = pipe.device
    often = torch.compile(pipe.transformer, dynamic=False) if compiled else pipe.transformer
    text_ids = torch.zeros(MAX_TOKENS, 3, device=dev)

    def loss_of() -> Tensor:
        side, count = _side_and_count(batch)
        scenes = [scene() for _ in range(count)]
        with fast_arithmetic(dev):
            latents = encode(pipe.vae, pictures(cutouts, side, scenes).to(dev)).float()
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        x = FluxPipeline._pack_latents(latents, *latents.shape)
        noise = torch.randn(x.shape).to(dev)
        # As FLUX: logit-normal, shifted for the tokens.
        logit = torch.where(torch.rand(count) < UNIFORM, torch.rand(count).logit(1e-4), torch.randn(count))
        sigma = (logit + shift(pipe, side * side)).sigmoid().to(dev)
        texts = ["" if float(torch.rand(())) < CAPTION_DROPOUT else shown.caption for shown in scenes]
        clip_tokens, t5_tokens = (
            tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids.to(dev)
            for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
        )
        with fast_arithmetic(dev):
            velocity = (often if side * TOKEN == SIZE else pipe.transformer)(
                hidden_states=torch.lerp(x, noise, sigma[:, None, None]),
                timestep=sigma,
                pooled_projections=pipe.text_encoder(clip_tokens).pooler_output,
                encoder_hidden_states=pipe.text_encoder_2(t5_tokens)[0],
                txt_ids=text_ids,
                img_ids=pipe._prepare_latent_image_ids(1, side, side, dev, torch.float32),
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - x)

    return loss_of


def arguments(prompts: Sequence[str], size: int = SIZE) -> dict[str, Any]:
    """Of the pipeline's call, but for steps and generators."""
    return {
        "prompt": list(prompts), "negative_prompt": [""] * len(prompts), "true_cfg_scale": GUIDANCE,
        "height": size, "width": size, "max_sequence_length": MAX_TOKENS,
    }  # fmt: skip


@app.command()
def train(
    work: Work, data_folder: Data = None, steps: Steps = 8000, batch: Batch = 16, lr: LearningRate = 1e-3,
    minutes: Minutes = 1e9, start: Start = None,
    every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 250,
    compiled: Annotated[bool, typer.Option("--compile", help="A quarter faster on CPUs, after some minutes.")] = False,
) -> None:  # fmt: skip
    """Stage 2: the transformer together with both text encoders, from the checkpoint in the work folder if any."""
    work.mkdir(parents=True, exist_ok=True)
    if start is None:
        checkpoint(work, "autoencoder")  # before anything is downloaded
    cutouts = load(data_folder or work / "data")
    pipe = prepare(work, cutouts, start)
    pipe.to(device())
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.requires_grad_(False)
    model = trained_part(pipe).requires_grad_(True).train()

    shown = captions(8, "test")

    def samples(_: nn.Module, file: Path) -> None:
        generators = [torch.Generator().manual_seed(i) for i in range(len(shown))]
        with fast_arithmetic(pipe.device):
            pictures = pipe(
                **arguments(shown), num_inference_steps=25, generator=generators, output_type="pt"
            ).images.float()
        sheet(list((2 * pictures.cpu() - 1).split(4)), titles=shown).save(file)

    run(work, "scenes", model, steps, lr, minutes, loss(pipe, cutouts, batch, compiled), samples, every=every)


@app.command()
def export(
    work: Work,
    to: Annotated[Path, typer.Option(help="Folder to write the pipeline to.")],
    data_folder: Data = None,
    start: Start = None,
) -> None:
    """Stage 3: write the pipeline with the averaged weights, in bf16, as ``FluxPipeline.from_pretrained`` reads it."""
    pipe = prepare(work, load(data_folder or work / "data"), start)
    ema_weights(work, "scenes", trained_part(pipe))
    write_bf16(pipe, to)


if __name__ == "__main__":
    app()
