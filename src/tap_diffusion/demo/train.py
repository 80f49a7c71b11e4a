"""Train the demo model: a complete miniature FLUX pipeline on captioned emoji.

    python -m tap_diffusion.demo.train autoencoder --work out/train
    python -m tap_diffusion.demo.train transformer --work out/train
    python -m tap_diffusion.demo.train export --work out/train --to src/tap_diffusion_demo/emoji

Each stage keeps a checkpoint in the work folder and goes on from it when called again (Ctrl-C is safe), writes
sample sheets as it goes, and runs on CPU or GPU without changes. ``--from`` goes on from an exported pipeline, such as
the shipped one, where no checkpoint is left.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Punctuation, Sequence, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from tap_diffusion.apps.generate import psnr
from tap_diffusion.apps.sheets import sheet
from tap_diffusion.demo import data
from tap_diffusion.integrations.diffusers.versions import of_dtype

MAX_TOKENS = 8  # of a caption, in both tokenizers
CAPTION_DROPOUT = 0.1  # share of samples trained without caption, for classifier-free guidance
SYNONYMS = 0.4  # share of samples trained with another caption that means the same, where there is one
HELD_OUT = 128  # pictures that the autoencoder never sees

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Work = Annotated[Path, typer.Option(help="Folder of checkpoints and sheets.")]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of the npm packages [default: WORK/data].")]
Steps = Annotated[int, typer.Option(min=1, help="Training steps in all; the learning rate decays to their end.")]
Batch = Annotated[int, typer.Option(min=1)]
LearningRate = Annotated[float, typer.Option(min=0)]
Start = Annotated[Path | None, typer.Option("--from", help="Go on from the weights of this exported pipeline.")]
Minutes = Annotated[float, typer.Option(help="Stop after this time; call again to go on.")]


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def fast_arithmetic(dev: torch.device) -> Iterator[None]:
    """What speeds training on this device.

    bf16 where its matrix products are in hardware; elsewhere they can be a hundred times slower than fp32. And on
    CPUs plain attention, in bf16 too: over so few tokens the fused form takes a third of a training step or more,
    mostly going back.
    """
    bf16 = dev.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    attention = sdpa_kernel(SDPBackend.MATH) if dev.type == "cpu" else nullcontext()
    # Plain attention reads this setting on every device; off, it computes bf16 in fp32.
    reduced = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with torch.autocast(dev.type, dtype=torch.bfloat16, enabled=bf16), attention:
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(reduced)


# ------------------------------------------------------------------------------------------------------- the models


def build_autoencoder() -> AutoencoderKL:
    """64×64 pixels to 16×16 latents of 8 channels, 0.66 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=8,
        sample_size=data.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_tokenizers(captions: list[str]) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Both tokenizers of FLUX with one token per caption word, and letters for words that no caption has."""
    words = sorted({word for caption in captions for word in caption.split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789-")

    # CLIP: byte-pair encoding, merged until every word is one token.
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = Sequence([WhitespaceSplit(), Punctuation()])
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = [*special, *letters, *(f"{letter}</w>" for letter in letters)]
    bpe.train_from_iterator(
        words, BpeTrainer(vocab_size=10_000, min_frequency=1, special_tokens=alphabet, end_of_word_suffix="</w>")
    )
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    clip = CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_TOKENS)

    # T5: unigrams; a whole word always scores better than its letters.
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(letter, -8.0) for letter in letters] + [(f"▁{word}", -4.0) for word in words]
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)
    return clip, t5


def build_pipeline(vae: AutoencoderKL, captions: list[str]) -> FluxPipeline:
    """FLUX in miniature around a trained autoencoder: 3 double- and 10 single-stream blocks of width 192."""
    clip_tokenizer, t5_tokenizer = build_tokenizers(captions)
    text = dict(
        vocab_size=len(clip_tokenizer),
        hidden_size=128,
        intermediate_size=256,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(t5_tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
                     dropout_rate=0.0, feed_forward_proj="gated-gelu")
        ),
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=4 * vae.config.latent_channels,
            num_layers=3,
            num_single_layers=10,
            attention_head_dim=32,
            num_attention_heads=6,
            joint_attention_dim=128,
            pooled_projection_dim=128,
            axes_dims_rope=(8, 12, 12),
        ),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- the training


def run(
    work: Path,
    name: str,
    model: nn.Module,
    steps: int,
    lr: float,
    minutes: float,
    loss_of: Callable[[], Tensor],
    samples: Callable[[Any, Path], None],
    every: int,
) -> None:
    """AdamW with warm-up and cosine decay, EMA, checkpoints and sample sheets, until ``steps`` or ``minutes``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    ema = EMAModel(model.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    file = work / f"{name}.pt"
    start = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        torch.set_rng_state(state["rng"])
        start = state["step"]
    ema.to(next(model.parameters()).device)

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
        partial = file.with_suffix(".partial")
        torch.save(state | {"rng": torch.get_rng_state(), "step": step}, partial)
        partial.replace(file)

    def show(step: int) -> None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        model.eval()
        with torch.no_grad():
            samples(model, work / f"{name}-{step:06d}.png")
        model.train()
        ema.restore(model.parameters())

    deadline = time.monotonic() + 60 * minutes
    step, average = start, math.nan
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=name)
    try:
        for step in progress:
            rate = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            loss = loss_of()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.step(model.parameters())
            average = loss.item() if math.isnan(average) else 0.99 * average + 0.01 * loss.item()
            progress.set_postfix(loss=f"{average:.4f}")
            if (step + 1) % every == 0:
                save(step + 1)
                show(step + 1)
            if time.monotonic() > deadline:
                break
    finally:
        progress.close()
        if step + 1 > start:
            save(step + 1)
    show(step + 1)


def checkpoint(work: Path, name: str) -> Path:
    """The checkpoint of a stage; BadParameter where there is none."""
    file = work / f"{name}.pt"
    if not file.exists():
        raise typer.BadParameter(f"{file} is missing: run the stage '{name}' first", param_hint="--work")
    return file


def ema_weights(work: Path, name: str, model: nn.Module) -> nn.Module:
    """Load the averaged weights of a stage's checkpoint into ``model``."""
    state = torch.load(checkpoint(work, name), weights_only=True)
    model.load_state_dict(state["model"])
    for parameter, average in zip(model.parameters(), state["ema"]["shadow_params"], strict=True):
        parameter.data.copy_(average)
    return model.eval().requires_grad_(False)


def write_bf16(pipe: Any, to: Path) -> None:
    """Write a pipeline in bf16, as its ``from_pretrained`` reads it, and say how large it is."""
    pipe.to(torch.bfloat16).save_pretrained(to)
    for name, part in pipe.components.items():
        if isinstance(part, CLIPTextModel):
            _name_for_all_versions(to / name / "model.safetensors")
    size = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
    typer.echo(f"{to}: {size / 1e6:.1f} MB")


def _name_for_all_versions(clip: Path) -> None:
    """Later versions of transformers leave ``text_model.`` out, without which 5.0 finds no weight and draws its own."""
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(clip).items()}
    save_file(weights, clip, {"format": "pt"})


def batches(count: int, size: int) -> Iterator[Tensor]:
    """Index batches over shuffled epochs, without end."""
    while True:
        order = torch.randperm(count)
        yield from order[: count - count % size].split(size)


def split_pictures(folder: Path) -> tuple[Tensor, Tensor]:
    """Pictures in [-1, 1] for the autoencoder: training and held-out."""
    pictures, _, _ = data.load(folder, "all")
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    pictures = pictures[order].float() / 127.5 - 1
    return pictures[HELD_OUT:], pictures[:HELD_OUT]


@app.command()
def autoencoder(
    work: Work, data_folder: Data = None, steps: Steps = 2400, batch: Batch = 16, lr: LearningRate = 2e-3,
    minutes: Minutes = 1e9,
) -> None:  # fmt: skip
    """Stage 1: the autoencoder, on all emoji but flags and skin tones."""
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    train, held_out = split_pictures(data_folder or work / "data")
    dev = device()
    vae = build_autoencoder().to(dev, memory_format=torch.channels_last)
    order = batches(len(train), batch)

    def loss_of() -> Tensor:
        x = train[next(order)].to(dev, memory_format=torch.channels_last)
        with fast_arithmetic(dev):
            posterior = vae.encode(x).latent_dist
            reconstruction = vae.decode(posterior.sample()).sample.float()
        error = reconstruction - x
        return error.abs().mean() + error.square().mean() + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()

    def samples(model: Any, file: Path) -> None:
        decoded = model.decode(model.encode(held_out.to(dev)).latent_dist.mean).sample.clamp(-1, 1).cpu()
        tqdm.write(f"held-out PSNR {fmean(psnr(decoded, held_out)):.2f} dB")
        sheet([held_out[:16], decoded[:16]], ["picture", "decoded"]).save(file)

    run(work, "autoencoder", vae, steps, lr, minutes, loss_of, samples, every=400)


@torch.no_grad()
def encode(vae: Any, pictures: Tensor) -> Tensor:
    """Latent means of uint8 pictures (count, 3, H, W): (count, C, H/4, W/4), not normalised."""
    return torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in pictures.split(64)])


def prepare(work: Path, folder: Path, start: Path | None = None) -> tuple[FluxPipeline, Tensor, list[str]]:
    """A pipeline to train, the packed latents (count, N, D) of its pictures, and their captions.

    Args:
        work: where stage 1 left the autoencoder.
        folder: of the npm packages.
        start: folder of an exported pipeline to go on from, autoencoder included; None starts from random weights.
    """
    if start is None:
        checkpoint(work, "autoencoder")  # before anything is downloaded
    pictures, captions, _ = data.load(folder)
    torch.manual_seed(1)
    if start is not None:
        pipe = FluxPipeline.from_pretrained(start, **of_dtype(torch.float32))
        latents = encode(pipe.vae, pictures)
    else:
        vae: Any = ema_weights(work, "autoencoder", build_autoencoder())
        latents = encode(vae, pictures)
        vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
        pipe = build_pipeline(vae, captions)
    pipe.set_progress_bar_config(disable=True)
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    return pipe, FluxPipeline._pack_latents(latents, *latents.shape), captions


def trained_part(pipe: FluxPipeline) -> nn.ModuleDict:
    """What stage 2 trains: all but the autoencoder."""
    return nn.ModuleDict(
        {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    )


@app.command()
def transformer(
    work: Work, data_folder: Data = None, steps: Steps = 6000, batch: Batch = 32, lr: LearningRate = 1e-3,
    minutes: Minutes = 1e9, start: Start = None,
) -> None:  # fmt: skip
    """Stage 2: the transformer together with both text encoders, on the latents of the captioned emoji."""
    dev = device()
    work.mkdir(parents=True, exist_ok=True)
    pipe, latents, captions = prepare(work, data_folder or work / "data", start)
    pipe.to(dev)
    model = trained_part(pipe).requires_grad_(True).train()
    side = int(latents.shape[1] ** 0.5)
    image_ids = pipe._prepare_latent_image_ids(1, side, side, dev, torch.float32)
    text_ids = torch.zeros(MAX_TOKENS, 3, device=dev)

    texts = sorted({"", *captions, *itertools.chain(*data.synonyms().values())})
    number = {text: i for i, text in enumerate(texts)}

    def tokens(tokenizer: Any) -> Tensor:
        return tokenizer(
            texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids.to(dev)

    def text_for(caption: str) -> int:
        others = data.synonyms()[caption]
        draw = float(torch.rand(()))
        if draw < CAPTION_DROPOUT:
            caption = ""
        elif others and draw < CAPTION_DROPOUT + SYNONYMS:
            caption = others[int(torch.randint(len(others), ()))]
        return number[caption]

    clip_tokens, t5_tokens = tokens(pipe.tokenizer), tokens(pipe.tokenizer_2)
    latents = latents.to(dev)
    order = batches(len(latents), batch)

    def loss_of() -> Tensor:
        rows = next(order)
        x, noise = latents[rows], torch.randn(latents[rows].shape).to(dev)
        text = torch.tensor([text_for(captions[row]) for row in rows.tolist()])
        sigma = torch.randn(len(rows)).sigmoid().to(dev)
        noisy = torch.lerp(x, noise, sigma[:, None, None])
        with fast_arithmetic(dev):
            velocity = pipe.transformer(
                hidden_states=noisy,
                timestep=sigma,
                pooled_projections=pipe.text_encoder(clip_tokens[text]).pooler_output,
                encoder_hidden_states=pipe.text_encoder_2(t5_tokens[text])[0],
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - x)

    shown = [captions[i] for i in torch.randperm(len(captions), generator=torch.Generator().manual_seed(2))[:32]]

    def samples(_: nn.Module, file: Path) -> None:
        pictures = pipe(
            shown, height=data.SIZE, width=data.SIZE, num_inference_steps=25, max_sequence_length=MAX_TOKENS,
            negative_prompt=[""] * len(shown), true_cfg_scale=2.0, output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images.cpu() * 2 - 1  # fmt: skip
        sheet(list(pictures.split(8)), titles=shown).save(file)

    run(work, "transformer", model, steps, lr, minutes, loss_of, samples, every=500)


@app.command()
def export(
    work: Work,
    to: Annotated[Path, typer.Option(help="Folder to write the pipeline to.")],
    data_folder: Data = None,
    start: Start = None,
) -> None:
    """Stage 3: write the pipeline with the averaged weights, in bf16, as ``FluxPipeline.from_pretrained`` reads it."""
    pipe, _, _ = prepare(work, data_folder or work / "data", start)
    ema_weights(work, "transformer", trained_part(pipe))
    write_bf16(pipe, to)


if __name__ == "__main__":
    app()
