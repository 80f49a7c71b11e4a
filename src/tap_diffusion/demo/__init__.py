"""The embedded model: a small, real FLUX trained on emoji, and what trains it."""

from pathlib import Path

EMOJI = Path(__file__).parent / "emoji"
"""Folder of the embedded pipeline, for ``FluxPipeline.from_pretrained``."""
