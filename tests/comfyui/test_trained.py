"""ComfyUI's own Flux with the trained weights of the embedded model `emoji`, beside diffusers in the same process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import real  # noqa: F401 - finds ComfyUI

# isort: split
import torch
from comfy import latent_formats, model_detection, sample, samplers, supported_models
from comfy.model_patcher import ModelPatcher
from diffusers import FluxPipeline
from runs import distance
from safetensors.torch import load_file
from tiny_comfy import CPU, noise
from torch import Tensor

import tap_diffusion as tap
from tap_diffusion import TAPConfig
from tap_diffusion.integrations.comfyui import accelerate, report
from tap_diffusion_demo import EMOJI

STEPS, GUIDANCE = 14, 2.0
PROMPTS, EMPTY = ["red apple", "green frog face"], [""] * 2
CONFIG = TAPConfig(full_steps=6)
REUSE = TAPConfig(full_steps=6, orders=(0,), hindsight=0)


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = FluxPipeline.from_pretrained(EMOJI, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def flux() -> Any:
    """The same transformer as ComfyUI loads it from a file of diffusers."""
    weights = load_file(EMOJI / "transformer" / "diffusion_pytorch_model.safetensors")
    weights = {name: value.float() for name, value in weights.items()}
    config = supported_models.Flux(
        {
            "image_model": "flux", "in_channels": 8, "out_channels": 8, "vec_in_dim": 128, "context_in_dim": 128,
            "hidden_size": 192, "mlp_ratio": 4.0, "num_heads": 6, "depth": 3, "depth_single_blocks": 10,
            "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    model.latent_format = latent_formats.LatentFormat()  # latents as they are
    model.diffusion_model.load_state_dict(model_detection.convert_diffusers_mmdit(weights, ""))
    return ModelPatcher(model, load_device=CPU, offload_device=CPU)


def by_diffusers(pipe: Any, x: Tensor) -> Tensor:
    size = pipe.vae.config.sample_size
    drawn = pipe(
        prompt=PROMPTS, negative_prompt=EMPTY, true_cfg_scale=GUIDANCE, num_inference_steps=STEPS, height=size,
        width=size, latents=pipe._pack_latents(x, *x.shape), output_type="latent",
    ).images  # fmt: skip
    latents: Tensor = pipe._unpack_latents(drawn, size, size, pipe.vae_scale_factor)
    return latents


def by_comfyui(pipe: Any, patcher: Any, x: Tensor, sampler: str = "euler") -> Tensor:
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))  # as the pipeline does
    conditions = []
    for prompts in (PROMPTS, EMPTY):
        features, pooled, _ = pipe.encode_prompt(prompts, prompts)
        conditions.append([[features.detach(), {"pooled_output": pooled.detach()}]])
    with torch.inference_mode():
        latents: Tensor = sample.sample_custom(
            patcher, x, GUIDANCE, samplers.sampler_object(sampler), pipe.scheduler.sigmas, *conditions,
            torch.zeros_like(x), disable_pbar=True, seed=0,
        )  # fmt: skip
    return latents


def test_comfyui_gives_what_diffusers_gives(pipe: Any, flux: Any) -> None:
    """The same noise, sigmas, prompts and guidance through both, plain and accelerated."""
    x = noise(2, 8, 16, 16, seed=11)
    plain = by_diffusers(pipe, x)
    with tap.enabled(pipe, CONFIG):
        expected = by_diffusers(pipe, x)
    assert distance(by_comfyui(pipe, flux, x), plain) < 1e-5
    assert distance(by_comfyui(pipe, accelerate(flux, CONFIG), x), expected) < 1e-4
    assert distance(expected, plain) > 1e-3


@pytest.mark.parametrize(
    "sampler",
    ["euler_ancestral", "dpmpp_2m_sde", "lcm"],
)
def test_with_fresh_noise_nothing_is_worse_than_reuse(pipe: Any, flux: Any, sampler: str) -> None:
    x = noise(2, 8, 16, 16, seed=11)
    plain = by_comfyui(pipe, flux, x, sampler)
    errors = []
    for config in (CONFIG, REUSE):
        accelerated = accelerate(flux, config)
        errors.append(distance(by_comfyui(pipe, accelerated, x, sampler), plain))
        assert report(accelerated).predicted_steps >= STEPS - 7  # type: ignore[union-attr]
    assert 0 < errors[0] <= 1.01 * errors[1]


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_without_fresh_noise_choosing_beats_reuse(pipe: Any, flux: Any, sampler: str) -> None:
    x = noise(2, 8, 16, 16, seed=11)
    plain = by_comfyui(pipe, flux, x, sampler)
    errors = [distance(by_comfyui(pipe, accelerate(flux, config), x, sampler), plain) for config in (CONFIG, REUSE)]
    assert 0 < errors[0] < 0.8 * errors[1], errors
