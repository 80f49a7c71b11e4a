"""Scores by models from elsewhere: they load their weights from the hub and need packages of their own.

Of a video each is the mean over its frames.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from transformers import CLIPModel, CLIPProcessor

from tap_diffusion.core.errors import UsageError


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
        pictures: (B, 3, H, W), or videos (B, F, 3, H, W), in [0, 1].
        prompts: B of them; what is too long for the model is cut off.
        model: folder or hub id.
    """
    clip, processor = _clip(model)

    def score(prompt: str, picture: Tensor) -> float:
        inputs = processor(text=[prompt], images=[picture], return_tensors="pt", padding=True, truncation=True)
        output = clip(**inputs)
        return 100 * float(torch.cosine_similarity(output.image_embeds, output.text_embeds))

    return {"clip_score": _each(score, prompts, (255 * pictures).round().to(torch.uint8))}


@cache
def _reward() -> Any:
    import ImageReward

    return ImageReward.load("ImageReward-v1.0")


def image_reward(pictures: Tensor, prompts: Sequence[str]) -> dict[str, list[float]]:
    """ImageReward (arXiv 2304.05977), by its own package.

    Args:
        pictures: (B, 3, H, W), or videos (B, F, 3, H, W), in [0, 1].
        prompts: B of them.
    """
    model = _reward()

    def score(prompt: str, picture: Tensor) -> float:
        return float(model.score(prompt, Image.fromarray(picture.permute(1, 2, 0).numpy())))

    return {"image_reward": _each(score, prompts, (255 * pictures).round().to(torch.uint8))}


def _each(score: Callable[[Any, Tensor], float], others: Sequence[Any], samples: Tensor) -> list[float]:
    """The score of each sample with what belongs to it."""
    if samples.ndim == 4:
        return [score(other, picture) for other, picture in zip(others, samples, strict=True)]
    return [fmean(score(other, frame) for frame in video) for other, video in zip(others, samples, strict=True)]


@cache
def _lpips() -> Any:
    return LearnedPerceptualImagePatchSimilarity("alex", normalize=True).eval()


@torch.no_grad()
def lpips(pictures: Tensor, reference: Tensor) -> dict[str, list[float]]:
    """LPIPS (arXiv 1801.03924) with AlexNet, by torchmetrics: distance of each sample to the reference's, 0 for none.

    Args:
        pictures: (B, C, H, W), or videos (B, F, C, H, W), in [0, 1], C of 1 or 3.
        reference: the same.
    """
    model = _lpips()

    def distances(frames: Tensor, others: Tensor) -> float:
        found = []
        for pair in zip(frames, others, strict=True):
            model.reset()
            found.append(float(model(*(one.expand(3, -1, -1)[None] for one in pair))))
        return fmean(found)

    pairs = zip(pictures, reference, strict=True)
    return {"lpips": [distances(*(one.reshape(-1, *one.shape[-3:]) for one in pair)) for pair in pairs]}


def check(names: Sequence[str]) -> None:
    """Raise UsageError where a score or distance is not known, or its package is missing."""
    for name in names:
        if name not in SCORES and name not in DISTANCES:
            raise UsageError(f"no score is named '{name}'; there are {', '.join([*SCORES, *DISTANCES])}")
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name][0]) is None:
            raise UsageError(f"the score {name} needs its package: pip install {PACKAGES[name][1]}")


SCORES = {"clip_score": clip_score, "image_reward": image_reward}  # of a result and what was asked for
DISTANCES = {"lpips": lpips}  # of a result to the full model's
PACKAGES = {  # beyond the bench's own: as they are imported, and as they are installed
    "image_reward": ("ImageReward", "image-reward"),
    "lpips": ("torchvision", "torchvision"),
}
