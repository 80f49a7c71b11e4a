"""A class-conditional pipeline in pixel space, for models too small to want an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class PixelDiTPipeline(DiffusionPipeline):
    """diffusers' ``DiTPipeline`` without its autoencoder (DiT, arXiv 2212.09748).

    Args:
        transformer: predicts the noise; label ``num_embeds_ada_norm`` stands for no class.
        scheduler: DDIM, DPM-Solver++ or another one for noise prediction.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

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
            output_type: ``pil``, ``np``, or ``pt`` for tensors (B, C, H, W) in [0, 1].
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
