"""SeaCache: TeaCache's rule on a modulated input of which a filter leaves what is signal at this noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tap_bench.calibration import Calibration
from tap_bench.method import Method, Setting
from tap_bench.methods.teacache import TeaCacheEngine
from tap_bench.methods.thresholds import tuned
from tap_bench.variant import Variant
from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig

IMAGES, VIDEOS = 2.0, 3.0  # p of the spectra, as published
LARGEST = 1e6  # σ/α; without noise to bound it, the filter would leave constants alone

Grid = tuple[int, ...]  # of the tokens: (height, width), or (frames, height, width)


def spectral_filter(features: Tensor, grid: Grid, noise: float, power: float) -> Tensor:
    """Features with the share of each frequency that is signal at this noise (arXiv 2602.18993, section 3).

    The Wiener filter of a signal whose power falls as |f|^-p along each axis: the gain at f is the product over the
    axes of S / (S + (σ/α)²), S = |f|^-p, and over all frequencies it is 1 in the mean, so that distances of different
    steps compare.

    Args:
        features: (B, N, D), tokens in the order of the grid, the last axis fastest.
        grid: its sizes have the product N.
        noise: σ/α, at least 0.
        power: p.

    Returns:
        (B, N, D) float32.
    """
    gain = torch.ones((), device=features.device)
    for size in grid:
        weakness = torch.fft.fftfreq(size, device=features.device).abs() ** power  # 1 / S
        gain = gain[..., None] / (1 + min(noise, LARGEST) ** 2 * weakness)
    axes = tuple(range(1, 1 + len(grid)))
    spectrum = torch.fft.fftn(features.float().unflatten(1, grid), dim=axes)
    return torch.fft.ifftn(spectrum * (gain / gain.mean())[..., None], dim=axes).real.flatten(1, len(grid))


def filtered_input(features: Tensor, grid: Grid, noise: float) -> Tensor:
    """The same with the published power for pictures, on a grid of two axes, or videos, on three."""
    return spectral_filter(features, grid, noise, IMAGES if len(grid) == 2 else VIDEOS)


class SeaCacheEngine(TeaCacheEngine):
    """Accumulates the relative change of the filtered modulated input, and reuses the residual.

    The published scripts compare the first step after the forced ones with an input that has not been filtered; here,
    as in diffusers, all are.

    Args:
        config: with the first and the last step full, as in the published code.
        threshold: of the accumulated change.
        grid: of the tokens.
    """

    def __init__(self, config: TAPConfig, threshold: float, grid: Grid) -> None:
        super().__init__(config, threshold, (1.0, 0.0))
        self._grid = grid

    def _compared(self, call: Call, h: Tensor) -> Tensor:
        assert self._timeline is not None  # else there is no grid
        return filtered_input(h, self._grid, self._timeline.noise[call.step])


def token_grid(calibration: Calibration) -> Grid | None:
    """How the tokens of the model's pictures or videos lie, from their number and shape; None if that does not fit."""
    timeline = calibration.timeline
    if timeline is None or timeline.tokens is None:
        return None
    latents, pictures = calibration.full.latents, calibration.full.pictures
    if pictures.ndim == 5 and latents.ndim != 5:
        return None
    frames = latents.shape[2:3] if pictures.ndim == 5 else ()
    each = timeline.tokens / math.prod(frames)
    height = round((each * pictures.shape[-2] / pictures.shape[-1]) ** 0.5)
    grid = (*frames, height, round(each / height))
    return grid if math.prod(grid) == timeline.tokens else None


def variants(setting: Setting) -> Iterator[Variant]:
    """One, with its threshold tuned."""
    grid = token_grid(setting.calibration)
    if grid is None or setting.budget < 2:
        return
    config = TAPConfig.paper(full_steps=(0, setting.steps - 1), orders=(0,))
    engine = partial(SeaCacheEngine, grid=grid)
    yield tuned(setting, "seacache", "by threshold", config, engine, grid=list(grid))


METHODS = [Method("seacache", "rival", "SeaCache, arXiv 2602.18993", variants)]
