"""The pixel-space pipeline, and the training script of the model ``fashion``, on made-up data."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor
from typer.testing import CliRunner

import tap_diffusion as tap
from tap_bench import fashion
from tap_bench.pixels import PixelDiTPipeline
from tap_diffusion.core.schedule import full_steps


@pytest.fixture
def pipe() -> PixelDiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=1, num_layers=3, sample_size=8, num_embeds_ada_norm=10
    )
    # With so little noise an untrained model's pictures stay within the range of pixels.
    pipe = PixelDiTPipeline(transformer.eval(), DDIMScheduler(beta_start=1e-5, beta_end=1e-4, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: PixelDiTPipeline, labels: list[int], **more: Any) -> Tensor:
    generator = [torch.Generator().manual_seed(label) for label in labels]
    images: Tensor = pipe(labels, num_inference_steps=12, generator=generator, output_type="pt", **more).images
    return images


def test_guidance_is_the_textbook_s(pipe: PixelDiTPipeline) -> None:
    """One DDIM step by hand: ε = ε(none) + s · (ε(label) - ε(none)); x̂ = (x - √(1-ᾱ) ε) / √ᾱ."""
    image = pipe([3], guidance_scale=2.5, num_inference_steps=1, generator=torch.Generator().manual_seed(0),
                 output_type="pt").images  # fmt: skip
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = pipe.scheduler.timesteps[0]
    with torch.no_grad():
        conditional, none = (
            pipe.transformer(x, timestep=t.expand(1), class_labels=torch.tensor([label])).sample for label in (3, 10)
        )
    noise = none + 2.5 * (conditional - none)
    alpha = pipe.scheduler.alphas_cumprod[t]
    final = pipe.scheduler.final_alpha_cumprod
    clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    expected = final.sqrt() * clean + (1 - final).sqrt() * noise
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1))
    assert ((image > 0) & (image < 1)).float().mean() > 0.5


def test_a_picture_does_not_depend_on_its_batch(pipe: PixelDiTPipeline) -> None:
    together = sample(pipe, [1, 7])
    torch.testing.assert_close(together, torch.cat([sample(pipe, [1]), sample(pipe, [7])]))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_with_tap(pipe: PixelDiTPipeline, scheduler: str, guidance: float) -> None:
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    plain = sample(pipe, [1, 7], guidance_scale=guidance)
    with tap.enabled(pipe, tap.TAPConfig.paper(interval=4)):
        accelerated = sample(pipe, [1, 7], guidance_scale=guidance)
        report = tap.report(pipe)
        assert (report.steps, report.full_steps) == (12, len(full_steps(12, 4, 3)))
        assert not report.fallbacks
        assert torch.equal(sample(pipe, [1, 7], guidance_scale=guidance), accelerated)
    assert not torch.equal(accelerated, plain)
    assert torch.equal(sample(pipe, [1, 7], guidance_scale=guidance), plain)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four pictures of each label, as bright as the label says, in the format of MNIST."""
    labels = np.arange(40, dtype=np.uint8) % 10
    pictures = np.repeat(25 * labels, 28 * 28)
    for split in ("train", "t10k"):
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pictures.tobytes()))
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    return tmp_path


def test_pictures_are_centred(data: Path) -> None:
    pictures, labels = fashion.load(data, "train")
    assert pictures.shape == (40, 1, 32, 32)
    assert pictures.dtype == torch.uint8
    assert (pictures[:, 0, 2:30, 2:30].amax((1, 2)) == 25 * labels).all()
    margin = pictures.clone()
    margin[:, :, 2:30, 2:30] = 0
    assert not margin.any()


@pytest.mark.slow
def test_training_stops_resumes_and_exports(data: Path, tmp_path: Path) -> None:
    def call(*arguments: Any) -> Any:
        return CliRunner().invoke(fashion.app, [str(argument) for argument in arguments])

    work = tmp_path / "work"
    assert "missing" in call("train", "--work", work, "--data", tmp_path / "none").output
    for steps in (2, 3):
        result = call("train", "--work", work, "--data", data, "--steps", steps, "--batch", 4)
        assert result.exit_code == 0, result.output
        assert torch.load(work / "fashion.pt", weights_only=True)["step"] == steps
        assert (work / f"fashion-{steps:06d}.png").exists()
    assert call("export", "--work", work, "--to", tmp_path / "model").exit_code == 0
    pipe = PixelDiTPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe([0], num_inference_steps=2).images[0].size == (32, 32)
