"""Scores by models from elsewhere, for recipes: they load their weights from the hub and need packages of their own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from tap_diffusion.errors import UsageError


@cache
def _clip(model: str) -> tuple[Any, Any]:
    # Not torchmetrics' CLIPScore: version 1.9 fails with transformers 5.
    return CLIPModel.from_pretrained(model).eval(), CLIPProcessor.from_pretrained(model)


@torch.no_grad()
def clip_score(
    pictures: Tensor, prompts: Sequence[str], model: str = "openai/clip-vit-large-patch14"
) -> dict[str, list[float]]:
    """CLIP score (arXiv 2104.08718), 100 · cos of picture and prompt, of each pair.

    Args:
        pictures: (B, 3, H, W) in [0, 1].
        prompts: B of them; what is too long for the model is cut off.
        model: folder or hub id.
    """
    clip, processor = _clip(model)
    found = []
    for picture, prompt in zip((255 * pictures).round().to(torch.uint8), prompts, strict=True):
        inputs = processor(text=[prompt], images=[picture], return_tensors="pt", padding=True, truncation=True)
        output = clip(**inputs)
        found.append(100 * float(torch.cosine_similarity(output.image_embeds, output.text_embeds)))
    return {"clip_score": found}


@cache
def _reward() -> Any:
    try:
        import ImageReward
    except ImportError as error:
        raise UsageError(f"the score image_reward needs its package: pip install image-reward ({error})") from error
    return ImageReward.load("ImageReward-v1.0")


def image_reward(pictures: Tensor, prompts: Sequence[str]) -> dict[str, list[float]]:
    """ImageReward (arXiv 2304.05977), by its own package.

    Args:
        pictures: (B, 3, H, W) in [0, 1].
        prompts: B of them.

    Raises:
        UsageError: the package is missing.
    """
    arrays = (255 * pictures).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    model = _reward()
    pairs = zip(map(Image.fromarray, arrays), prompts, strict=True)
    return {"image_reward": [float(model.score(prompt, picture)) for picture, prompt in pairs]}


SCORES = {"clip_score": clip_score, "image_reward": image_reward}
