"""Sampling loops as authors of models write them, around a FLUX whose arguments are named as its authors name them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor


class Flux(FluxTransformer2DModel):
    """diffusers' FLUX under the names of its authors; ``clock`` is what its timesteps tell of σ."""

    clock: Callable[[Tensor], Tensor] = staticmethod(lambda told: told)

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor
    ) -> Tensor:
        output: Tensor = super().forward(
            hidden_states=img, encoder_hidden_states=txt, pooled_projections=y, timestep=self.clock(timesteps),
            img_ids=img_ids, txt_ids=txt_ids, return_dict=False,
        )[0]  # fmt: skip
        return output


ARGUMENTS: dict[str, Any] = {"timestep": "timesteps", "conditioning": "txt"}


def flux_of(transformer: FluxTransformer2DModel) -> Flux:
    """A copy of a transformer under its authors' names."""
    model = Flux.from_config(transformer.config).eval().requires_grad_(False)
    model.load_state_dict(transformer.state_dict())
    return model


def inputs(pipe: Any, prompts: Sequence[str], words: int, side: int = 8) -> dict[str, Tensor]:
    """What conditions FLUX, by a pipeline's encoders: ``words`` tokens of text, and pictures of ``side``² tokens."""
    with torch.no_grad():
        txt, y, txt_ids = pipe.encode_prompt(list(prompts), list(prompts), max_sequence_length=words)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(txt.dtype)
    return {"img_ids": ids, "txt": txt, "txt_ids": txt_ids, "y": y}


def denoise(model: Any, img: Tensor, timesteps: Sequence[float], **inputs: Tensor) -> Tensor:
    """As FLUX's authors do. With rising timesteps it is the inversion by RF-Solver's authors."""
    with torch.no_grad():
        for now, then in pairwise(timesteps):
            t_vec = torch.full((img.shape[0],), now, dtype=img.dtype)
            img = img + (then - now) * model(img=img, timesteps=t_vec, **inputs)
    return img


def sample_euler(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: dict[str, Any]) -> Tensor:
    """As in k-diffusion, whose models return what is left of ``x`` without the noise."""
    ones = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones, **extra_args)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def guided(model: Any) -> Callable[..., Tensor]:
    """A model as k-diffusion's samplers want it, both branches of guidance in one batch that is made at each call."""

    @torch.no_grad()
    def denoised(x: Tensor, sigma: Tensor, cond: dict[str, Tensor], uncond: dict[str, Tensor], scale: float) -> Tensor:
        both = {name: torch.cat([uncond[name], cond[name]]) for name in ("txt", "y")}
        output = model(img=x.repeat(2, 1, 1), timesteps=sigma.repeat(2), **cond | both)
        without, within = output.chunk(2)
        return x - sigma[:, None, None] * (without + scale * (within - without))

    return denoised
