"""The weights of `emoji`, a small FLUX trained on emoji; ``tap_diffusion.demo`` trained it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EMOJI = Path(__file__).parent / "emoji"
"""Folder of the pipeline, for ``FluxPipeline.from_pretrained``."""


def emoji() -> tuple[Path, Any]:
    """Folder and pipeline class, for :func:`tap_diffusion.apps.generate.load_pipeline`."""
    from diffusers import FluxPipeline

    return EMOJI, FluxPipeline
