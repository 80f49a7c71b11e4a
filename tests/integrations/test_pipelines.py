"""Real pipelines of many families, around the tiny transformers of the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

import tap_diffusion as tap
from tap_diffusion.core.schedule import full_steps
from tiny import engine_of
from zoo import build
from zoo.checks import CONFIG, INTERVAL, WARMUP

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Setup:
    """A pipeline around a tiny transformer; embeddings are passed, so that nothing has to encode prompts.

    Attributes:
        branches: calls of the transformer per step.
    """

    transformer: str
    arguments: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    components: Callable[[], dict[str, Any]] = lambda: {}
    scheduler: Callable[[], Any] = FlowMatchEulerDiscreteScheduler
    missing: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    branches: int = 1


def text(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def mask(dtype: torch.dtype = torch.long) -> Tensor:
    return torch.ones(1, 6, dtype=dtype)


def embeddings(mask_name: str | None = None, width: int = 16) -> dict[str, Tensor]:
    given = {"prompt_embeds": text(6, width), "negative_prompt_embeds": text(6, width, seed=1)}
    if mask_name is not None:
        given |= {mask_name: mask(), f"negative_{mask_name}": mask()}
    return given


SETUPS = {
    "QwenImagePipeline": Setup(
        "QwenImageTransformer2DModel",
        embeddings("prompt_embeds_mask") | {"true_cfg_scale": 3.0, "height": 64, "width": 64},
        branches=2,
    ),
    "HunyuanVideoPipeline": Setup(
        "HunyuanVideoTransformer3DModel",
        embeddings("prompt_attention_mask")
        | {
            "pooled_prompt_embeds": text(16), "negative_pooled_prompt_embeds": text(16, seed=1), "true_cfg_scale": 3.0,
            "height": 64, "width": 64, "num_frames": 5,
        },
        missing=("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        branches=2,
    ),
    "LTXPipeline": Setup(
        "LTXVideoTransformer3DModel",
        embeddings("prompt_attention_mask") | {"height": 64, "width": 64, "num_frames": 9},
    ),
    "CogVideoXPipeline": Setup(
        "CogVideoXTransformer3DModel",
        embeddings() | {"height": 64, "width": 64, "num_frames": 5},
        changes={"in_channels": 4},
        scheduler=diffusers.CogVideoXDPMScheduler,
    ),
    "PixArtSigmaPipeline": Setup(
        "PixArtTransformer2DModel",
        embeddings("prompt_attention_mask")
        | {"height": 64, "width": 64, "use_resolution_binning": False, "prompt": None, "negative_prompt": None},
        changes={"use_additional_conditions": False},
        scheduler=diffusers.DPMSolverMultistepScheduler,
    ),
    "SanaPipeline": Setup(
        "SanaTransformer2DModel",
        embeddings("prompt_attention_mask")
        | {"height": 128, "width": 128, "use_resolution_binning": False, "negative_prompt": None},
        scheduler=lambda: diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    ),
    # Perturbed-attention guidance: a third branch, in the same batch.
    "StableDiffusion3PAGPipeline": Setup(
        "SD3Transformer2DModel",
        embeddings()
        | {
            "pooled_prompt_embeds": text(16), "negative_pooled_prompt_embeds": text(16, seed=1), "pag_scale": 2.0,
            "height": 64, "width": 64,
        },
        components=lambda: {"pag_applied_layers": "blocks.1"},
        missing=("vae", *(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))),
    ),
    "PixArtSigmaPAGPipeline": Setup(
        "PixArtTransformer2DModel",
        embeddings("prompt_attention_mask")
        | {
            "height": 64, "width": 64, "use_resolution_binning": False, "prompt": None, "negative_prompt": None,
            "pag_scale": 2.0,
        },
        changes={"use_additional_conditions": False},
        components=lambda: {"pag_applied_layers": "blocks.1"},
        scheduler=diffusers.DPMSolverMultistepScheduler,
    ),
    "ZImagePipeline": Setup(
        "ZImageTransformer2DModel",
        {
            "prompt": None, "prompt_embeds": [text(6, 16)[0]], "negative_prompt_embeds": [text(6, 16, seed=1)[0]],
            "height": 64, "width": 64,
        },
    ),
    "DiTPipeline": Setup(
        "DiTTransformer2DModel",
        {"class_labels": [1], "guidance_scale": 3.0, "output_type": "np"},
        changes={"num_embeds_ada_norm": 1000},
        components=lambda: {"vae": diffusers.AutoencoderKL(latent_channels=4, norm_num_groups=32).eval()},
        scheduler=diffusers.DDIMScheduler,
        missing=(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SETUPS))
def test_pipeline(name: str) -> None:
    """The schedule's full steps in each branch, nothing left behind, the same again, and no trace."""
    setup = SETUPS[name]
    torch.manual_seed(0)
    pipe = getattr(diffusers, name)(
        transformer=build(setup.transformer, **setup.changes), scheduler=setup.scheduler(), **setup.components(),
        **dict.fromkeys(setup.missing),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 12, "output_type": "latent", "generator": generator} | setup.arguments
        return torch.as_tensor(next(iter(pipe(**arguments).values())))

    plain = sample()
    assert plain.isfinite().all()
    with tap.enabled(pipe, CONFIG):
        accelerated = sample()
        report = tap.report(pipe)
        steps = len(pipe.scheduler.timesteps)
        assert report.steps == steps
        assert report.full_calls == setup.branches * len(full_steps(steps, INTERVAL, WARMUP))
        assert len(report.calls) == setup.branches * steps
        assert not report.fallbacks
        assert engine_of(pipe.transformer).cache_bytes == 0
        assert torch.equal(sample(), accelerated)
    with tap.enabled(pipe, tap.TAPConfig(full_steps=6)):
        recommended = sample()
        report = tap.report(pipe)
        assert report.full_calls == setup.branches * 6
        full = sorted({step for step, is_full, _ in report.calls if is_full})
        assert full[-1] == steps - 2
        assert not report.fallbacks
        assert engine_of(pipe.transformer).cache_bytes == 0
        assert torch.equal(sample(), recommended)
    assert recommended.isfinite().all()
    assert not torch.equal(recommended, accelerated)
    assert not torch.equal(accelerated, plain)
    assert torch.equal(sample(), plain)
