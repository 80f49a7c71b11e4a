"""The model ``fashion``: a class-conditional DiT on Fashion-MNIST, the paper's DiT setting in small.

    python -m tap_bench.fashion train --work out/fashion --data /usr/share/datasets/fashion-mnist
    python -m tap_bench.fashion export --work out/fashion --to DIR

Noise prediction over 1000 linear steps (DDPM, arXiv 2006.11239), 32×32 grey pixels, labels dropped for guidance. The
data is Debian's package dataset-fashion-mnist (MIT), or the four files of https://github.com/zalandoresearch/fashion-mnist.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn

from tap_bench.pixels import PixelDiTPipeline
from tap_diffusion.apps.sheets import sheet
from tap_diffusion.demo.train import (
    Batch,
    LearningRate,
    Minutes,
    Steps,
    Work,
    batches,
    device,
    ema_weights,
    fast_arithmetic,
    run,
    write_bf16,
)

LABELS = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIZE = 32  # pixels, of 28 with a margin
LABEL_DROPOUT = 0.1  # share of samples trained without label, for classifier-free guidance

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Data = Annotated[Path, typer.Option("--data", help="Folder of the four idx files of Fashion-MNIST.")]


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, 32, 32) uint8 and labels (count,) int64 of the split ``train`` or ``t10k``."""

    def read(name: str, header: int) -> np.ndarray:
        file = folder / f"{split}-{name}-ubyte.gz"
        if not file.exists():
            raise typer.BadParameter(f"{file} is missing", param_hint="--data")
        return np.frombuffer(gzip.decompress(file.read_bytes()), dtype=np.uint8, offset=header).copy()

    pictures = torch.from_numpy(read("images-idx3", 16)).reshape(-1, 1, 28, 28)
    return F.pad(pictures, [(SIZE - 28) // 2] * 4), torch.from_numpy(read("labels-idx1", 8)).long()


def build() -> DiTTransformer2DModel:
    """12 blocks of width 128 on 64 tokens."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        num_layers=12,
        sample_size=SIZE,
        patch_size=4,
        num_embeds_ada_norm=len(LABELS),
    )
    for block in model.transformer_blocks:
        # Each block has label embeddings of its own, which drop labels each for itself; here all or none do.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
        # adaLN-Zero: blocks start as the identity (DiT, section 3.2).
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(model.proj_out_2.weight)
    nn.init.zeros_(model.proj_out_2.bias)
    return model


def scheduler() -> DDIMScheduler:
    """With the noise levels that the model is trained on."""
    return DDIMScheduler(clip_sample=False, steps_offset=1, timestep_spacing="leading")


@app.command()
def train(
    work: Work, data: Data, steps: Steps = 6000, batch: Batch = 64, lr: LearningRate = 1e-3, minutes: Minutes = 1e9,
) -> None:  # fmt: skip
    """Train, or go on from the checkpoint in the work folder."""
    work.mkdir(parents=True, exist_ok=True)
    dev = device()
    pictures, labels = load(data, "train")
    torch.manual_seed(0)
    model = build().to(dev).train()
    noise_levels = scheduler()
    order = batches(len(pictures), batch)

    def loss_of() -> Tensor:
        rows = next(order)
        x = pictures[rows].to(dev).float() / 127.5 - 1
        label = torch.where(torch.rand(len(rows)) < LABEL_DROPOUT, len(LABELS), labels[rows]).to(dev)
        t = torch.randint(1000, (len(rows),)).to(dev)
        noise = torch.randn(x.shape).to(dev)
        with fast_arithmetic(dev):
            predicted = model(noise_levels.add_noise(x, noise, t), timestep=t, class_labels=label).sample
        return F.mse_loss(predicted.float(), noise)

    def samples(trained: Any, file: Path) -> None:
        pipe = PixelDiTPipeline(trained, scheduler())
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe(
            list(range(10)) * 3, num_inference_steps=50, output_type="pt", generator=torch.Generator().manual_seed(0)
        ).images
        rows = (2 * drawn.cpu() - 1).repeat_interleave(3, dim=1).split(10)
        sheet(list(rows), titles=list(LABELS)).save(file)

    run(work, "fashion", model, steps, lr, minutes, loss_of, samples, every=1000)


@app.command()
def export(work: Work, to: Annotated[Path, typer.Option(help="Folder to write the pipeline to.")]) -> None:
    """Write the pipeline with the averaged weights, in bf16, as ``PixelDiTPipeline.from_pretrained`` reads it."""
    model: Any = ema_weights(work, "fashion", build())
    names = {str(number): name for number, name in enumerate(LABELS)}
    write_bf16(PixelDiTPipeline(model, scheduler(), names), to)


if __name__ == "__main__":
    app()
