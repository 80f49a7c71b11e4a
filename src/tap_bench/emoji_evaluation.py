"""Measure the demo model, and TAP on it.

    python -m tap_bench.emoji_evaluation --data out/train/data --out out/evaluation.json

Needs the training pictures, which it downloads with npm where they are missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from diffusers import FluxPipeline
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tap_diffusion.apps.generate import Request, psnr, run
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.demo import data
from tap_diffusion.demo.train import encode, split_pictures
from tap_diffusion.integrations.diffusers.api import enabled, report
from tap_diffusion_demo import EMOJI

METHODS: dict[str, dict[str, Any]] = {
    "reuse (order 0)": {"orders": (0,)},
    "Taylor, order 1": {"orders": (1,), "horizon_span": 0.0},
    "Taylor, order 2": {"orders": (2,), "horizon_span": 0.0},
    "TAP, full horizon only (λ = 0)": {"horizon_span": 0.0},
    "TAP as in the paper": {},
}


def retrieved(pictures: Tensor, captions: list[str], pipe: Any, training: Tensor, names: list[str]) -> float:
    """Share of pictures in [-1, 1] whose nearest training picture, by distance of latents, has their caption."""
    latents = encode(pipe.vae, ((pictures + 1) * 127.5).round())
    nearest = torch.cdist(latents.flatten(1), training.flatten(1)).argmin(1).tolist()
    hits = sum(names[i] == caption for i, caption in zip(nearest, captions, strict=True))
    return hits / len(captions)


def main(
    folder: Annotated[Path, typer.Option("--data", help="Folder of the npm packages.")] = Path("out/train/data"),
    model: Annotated[Path, typer.Option(help="Folder of the pipeline.")] = EMOJI,
    count: Annotated[int, typer.Option(help="Captions to draw, spread evenly over all.", min=1)] = 64,
    steps: Annotated[int, typer.Option(min=1)] = 50,
    guidance: Annotated[float, typer.Option(min=0)] = 2.0,
    intervals: Annotated[list[int] | None, typer.Option("--interval", help="Repeatable.", show_default="8 6 4")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    """Autoencoder PSNR, caption retrieval, and PSNR to the full result by method and interval."""
    pipe = FluxPipeline.from_pretrained(model, dtype=torch.float32)
    console = Console()

    _, held_out = split_pictures(folder)
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(held_out).latent_dist.mean).sample.clamp(-1, 1)
    result: dict[str, Any] = {
        "autoencoder_psnr_db": fmean(psnr(decoded, held_out)),
        "captions": count,
        "guidance": guidance,
    }

    pictures, names, _ = data.load(folder)
    training = encode(pipe.vae, pictures)
    unique = sorted(set(names))
    captions = [unique[i * len(unique) // count] for i in range(count)]
    request = Request(captions, steps=steps, guidance=guidance)
    full, _ = run(pipe, request, "full")
    result["full"] = {"retrieval": retrieved(full, captions, pipe, training, names)}

    table = Table("method", "interval", "full steps", "PSNR to full, dB", "retrieval")
    table.add_row("full model", "1", str(steps), "", f"{result['full']['retrieval']:.1%}")
    result["cells"] = []
    for interval in intervals or [8, 6, 4]:
        for name, changes in METHODS.items():
            with enabled(pipe, TAPConfig.paper(interval, **changes)):
                accelerated, _ = run(pipe, request, f"{name}, interval {interval}")
                account = report(pipe)
            cell = {
                "method": name,
                "interval": interval,
                "full_steps": account.full_steps,
                "psnr_db": fmean(psnr(accelerated, full)),
                "retrieval": retrieved(accelerated, captions, pipe, training, names),
            }
            result["cells"].append(cell)
            table.add_row(
                name, str(interval), str(account.full_steps), f"{cell['psnr_db']:.1f}", f"{cell['retrieval']:.1%}"
            )
    console.print(f"autoencoder, held-out pictures: {result['autoencoder_psnr_db']:.1f} dB")
    console.print(table)
    if out is not None:
        out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
