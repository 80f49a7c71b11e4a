"""Loops of one's own on the shipped, trained weights: as near to the full model as the same model in its pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

import tap_diffusion as tap
from loops import ARGUMENTS, Flux, denoise, flux_of, guided, inputs, sample_euler
from tap_diffusion import TAPConfig
from tap_diffusion.apps.generate import psnr

pytestmark = pytest.mark.slow

PROMPTS = ["a red apple", "green frog face", "blue book", "elephant"]
EDITS = ["a green apple", "red frog face", "red book", "lion"]
STEPS, WORDS, SIZE = 50, 8, 64
CONFIG = TAPConfig(full_steps=10)
SIGMAS = torch.linspace(1, 0, STEPS + 1)
START = torch.cat([torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)])


@pytest.fixture(scope="module")
def flux(emoji: Any) -> Flux:
    return flux_of(emoji.transformer)


def latents(pipe: Any, start: Tensor, prompts: list[str] = PROMPTS, **more: Any) -> Tensor:
    """Of a run of the pipeline."""
    result: Tensor = pipe(
        prompts, latents=start, num_inference_steps=STEPS, height=SIZE, width=SIZE, max_sequence_length=WORDS,
        output_type="latent", **more,
    ).images  # fmt: skip
    return result


@torch.no_grad()
def pictures(pipe: Any, latents: Tensor) -> Tensor:
    unpacked = pipe._unpack_latents(latents, SIZE, SIZE, pipe.vae_scale_factor)
    scaled = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    decoded: Tensor = pipe.vae.decode(scaled, return_dict=False)[0].clamp(-1, 1)
    return decoded


def fidelity(pipe: Any, accelerated: Tensor, plain: Tensor) -> float:
    values = psnr(pictures(pipe, accelerated), pictures(pipe, plain))
    return sum(values) / len(values)


def compare(name: str, own: float, in_pipeline: float) -> None:
    print(f"{name}: PSNR at 10 of 50 full steps {own:.2f} dB, in the pipeline {in_pipeline:.2f} dB")
    assert own >= in_pipeline - 0.1


def test_sample_euler(emoji: Any, flux: Flux) -> None:
    guidance: dict[str, Any] = {"negative_prompt": [""] * 4, "true_cfg_scale": 2.0}
    with tap.enabled(emoji, CONFIG):
        in_pipeline = latents(emoji, START, **guidance)
    plain = latents(emoji, START, **guidance)
    extra = {"cond": inputs(emoji, PROMPTS, WORDS), "uncond": inputs(emoji, [""] * 4, WORDS), "scale": 2.0}
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=SIGMAS)
    own = sample_euler(guided(flux), START, SIGMAS, extra)
    assert (tap.report(flux).full_steps, tap.report(flux).steps) == (10, STEPS)
    tap.disable(flux)
    compare("sample_euler", fidelity(emoji, own, plain), fidelity(emoji, in_pipeline, plain))


def test_denoise(emoji: Any, flux: Flux) -> None:
    with tap.enabled(emoji, CONFIG):
        in_pipeline = latents(emoji, START)
    plain = latents(emoji, START)
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=SIGMAS.tolist())
    own = denoise(flux, START, SIGMAS.tolist(), **inputs(emoji, PROMPTS, WORDS))
    assert (tap.report(flux).full_steps, tap.report(flux).steps) == (10, STEPS)
    tap.disable(flux)
    compare("denoise", fidelity(emoji, own, plain), fidelity(emoji, in_pipeline, plain))


def test_inversion_and_edit(emoji: Any, flux: Flux) -> None:
    """The noise of a picture, by σ rising, is what its edit starts from, by σ falling."""
    inverting = FluxPipeline(**emoji.components | {"scheduler": FlowMatchEulerDiscreteScheduler(invert_sigmas=True)})
    inverting.set_progress_bar_config(disable=True)
    picture = latents(emoji, START)
    plain = latents(emoji, latents(inverting, picture), EDITS)
    with tap.enabled(inverting, CONFIG), tap.enabled(emoji, CONFIG):
        in_pipeline = latents(emoji, latents(inverting, picture), EDITS)
    source, target = (inputs(emoji, prompts, WORDS) for prompts in (PROMPTS, EDITS))
    rising, falling = SIGMAS.flip(0).tolist(), SIGMAS.tolist()
    tap.apply_tap(flux, CONFIG, **ARGUMENTS)
    with tap.trajectory(flux, sigmas=rising):
        noise = denoise(flux, picture, rising, **source)
    assert (tap.report(flux).full_steps, tap.report(flux).steps) == (10, STEPS)
    with tap.trajectory(flux, sigmas=falling):
        own = denoise(flux, noise, falling, **target)
    assert (tap.report(flux).full_steps, tap.report(flux).steps) == (10, STEPS)
    tap.disable(flux)
    assert fidelity(emoji, picture, plain) < 25  # the edit did something
    compare("inversion and edit", fidelity(emoji, own, plain), fidelity(emoji, in_pipeline, plain))
