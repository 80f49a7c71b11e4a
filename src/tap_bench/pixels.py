"""Pipelines in pixel space, for models too small to want an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    FluxPipeline,
    ImagePipelineOutput,
    WanTransformer3DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from tap_bench import WEIGHTS


class PixelDiTPipeline(DiffusionPipeline):
    """diffusers' ``DiTPipeline`` without its autoencoder (DiT, arXiv 2212.09748).

    Args:
        transformer: predicts the noise; label ``num_embeds_ada_norm`` stands for no class.
        scheduler: DDIM, DPM-Solver++ or another one for noise prediction.
        id2label: names of the classes by their numbers, which are strings as in JSON.

    Attributes:
        labels: numbers of the classes by their names, as ``DiTPipeline`` has it.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(
        self, transformer: DiTTransformer2DModel, scheduler: Any, id2label: dict[str, str] | None = None
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(id2label=id2label)
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 1.5,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw one picture per label, with both branches of classifier-free guidance in one batch.

        Args:
            class_labels: from 0 to ``num_embeds_ada_norm`` - 1.
            guidance_scale: 1 or less turns guidance off.
            num_inference_steps: evaluations of the transformer, with most schedulers.
            generator: for the initial noise, one or one per picture.
            output_type: ``pil``, ``np``, ``pt`` for tensors (B, C, H, W) in [0, 1], or ``latent`` for what the
                scheduler leaves, in about [-1, 1].
        """
        config, device = self.transformer.config, self._execution_device
        guided = guidance_scale > 1
        shape = (len(class_labels), config.in_channels, config.sample_size, config.sample_size)
        x = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        labels = torch.tensor(class_labels, device=device)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = x * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            both = self.scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            noise = self.transformer(both, timestep=t.expand(len(both)), class_labels=labels, return_dict=False)[0]
            if guided:
                conditional, unconditional = noise.chunk(2)
                noise = unconditional + guidance_scale * (conditional - unconditional)
            x = self.scheduler.step(noise, t, x, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=VaeImageProcessor(vae_scale_factor=1).postprocess(x, output_type))


class PixelWanPipeline(DiffusionPipeline):
    """diffusers' ``WanPipeline`` without its autoencoder (Wan, arXiv 2503.20314).

    Args:
        transformer: predicts the velocity, from noise to video, at times from 0 to 1000.
        text_encoder: encodes the prompt and the negative prompt, padded to ``tokenizer.model_max_length``.
        tokenizer: the text encoder's.
        scheduler: flow matching Euler, or UniPC or DPM-Solver++ with ``use_flow_sigmas``.
        num_frames: of every video.
        height: of every video, in pixels.
        width: of every video, in pixels.
    """

    model_cpu_offload_seq = "text_encoder->transformer"

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        text_encoder: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: Any,
        num_frames: int = 8,
        height: int = 32,
        width: int = 32,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.register_to_config(num_frames=num_frames, height=height, width=width)

    def encode_prompt(self, prompt: Sequence[str]) -> Tensor:
        """Text embeddings (B, tokenizer.model_max_length, D)."""
        tokens = self.tokenizer(list(prompt), padding="max_length", truncation=True, return_tensors="pt").input_ids
        embeddings: Tensor = self.text_encoder(tokens.to(self._execution_device))[0]
        return embeddings

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        num_frames: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> WanPipelineOutput:
        """Draw one video per prompt, calling the transformer once for each branch of classifier-free guidance.

        Args:
            prompt: one or several.
            negative_prompt: for all of them, or one for each.
            guidance_scale: 1 or less turns guidance off.
            num_inference_steps: evaluations of the transformer in each branch, with most schedulers.
            num_frames: None takes the configuration's, on which the model was trained.
            generator: for the initial noise, one or one per video.
            output_type: ``pil`` for a list of frames per video, ``np``, ``pt`` for tensors (B, F, C, H, W) in [0, 1],
                or ``latent`` for what the scheduler leaves, (B, C, F, H, W) in about [-1, 1].
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        config, device = self.transformer.config, self._execution_device
        branches = {"cond": self.encode_prompt(prompts)}
        if guidance_scale > 1:
            negative = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
            branches["uncond"] = self.encode_prompt(negative)
        frames = num_frames or self.config.num_frames
        shape = (len(prompts), config.in_channels, frames, self.config.height, self.config.width)
        dtype = self.transformer.dtype
        x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        for i, t in enumerate(self.progress_bar(timesteps)):
            velocities = {}
            # As diffusers' own Wan pipeline does, for caches that ask where a call stands.
            where = {"step_index": i, "sigma": float(self.scheduler.sigmas[i]), "num_inference_steps": len(timesteps)}
            for branch, embeddings in branches.items():
                with self.transformer.cache_context(branch, **where):
                    velocities[branch] = self.transformer(
                        x.to(dtype), t.expand(len(x)), embeddings.to(dtype), return_dict=False
                    )[0].float()
            velocity = velocities["cond"]
            if guidance_scale > 1:
                velocity = velocities["uncond"] + guidance_scale * (velocity - velocities["uncond"])
            x = self.scheduler.step(velocity, t, x, return_dict=False)[0]
        self.maybe_free_model_hooks()
        if output_type != "latent":
            x = VideoProcessor(vae_scale_factor=1).postprocess_video(x, output_type)
        return WanPipelineOutput(frames=x)


def fashion() -> tuple[Path, type[PixelDiTPipeline]]:
    """Folder and class of the model ``fashion``, for :func:`tap_diffusion.apps.generate.load_pipeline`."""
    return WEIGHTS / "fashion", PixelDiTPipeline


def sprites() -> tuple[Path, type[PixelWanPipeline]]:
    """The same of the model ``sprites``."""
    return WEIGHTS / "sprites", PixelWanPipeline


def scenes() -> tuple[Path, type[FluxPipeline]]:
    """The same of the model ``scenes``, which has an autoencoder."""
    return WEIGHTS / "scenes", FluxPipeline
