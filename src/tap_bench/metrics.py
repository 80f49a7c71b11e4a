"""Distances to the full result, and how sure a difference is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from tap_diffusion.apps import generate

CEILING_DB = 120.0  # of results that are equal, whose PSNR is infinite


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each sample of pictures or videos in [0, 1], (B,), dB, at most 120."""
    return torch.tensor(generate.psnr(pictures, reference, span=1.0), dtype=torch.float64).clamp_max(CEILING_DB)


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each sample, (B,); of a video, the mean over its frames."""
    frames = pictures.flatten(0, -4), reference.flatten(0, -4)
    values = structural_similarity_index_measure(*frames, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values.reshape(len(pictures), -1).mean(1)


def latent_error(latents: Tensor, reference: Tensor) -> Tensor:
    """‖x - x_ref‖ / ‖x_ref‖ of each sample, (B,)."""
    return (latents - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def bootstrap_interval(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron 1979), with a fixed seed.

    For the difference between two methods give the differences of their samples, pair by pair.
    """
    array = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(0).integers(len(array), size=(resamples, len(array)))
    low, high = np.percentile(array[rows].mean(1), [2.5, 97.5])
    return float(low), float(high)


def difference(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """What a cell tells of its PSNR against another's of the same samples: mean and interval, pair by pair.

    Raises:
        ValueError: the two have not as many samples.
    """
    pairs = [value - other for value, other in zip(values, others, strict=True)]
    return {"difference_db": fmean(pairs), "difference_ci": bootstrap_interval(pairs)}
