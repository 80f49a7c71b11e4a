"""Pictures as PNG, videos as MP4."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import export_to_video
from PIL import Image
from torch import Tensor

from tap_diffusion.apps.files import FPS
from tap_diffusion.apps.sheets import png, to_image
from tap_diffusion.core.errors import UsageError


def check_videos() -> None:
    """Raise UsageError where no videos can be written."""
    for name in ("imageio", "imageio_ffmpeg"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"videos need {name}: pip install 'tap-diffusion[video]'")


def encoded(sample: Tensor, fps: int = FPS) -> tuple[str, bytes]:
    """A file's suffix and content.

    Args:
        sample: a picture (3, H, W), or a video (F, 3, H, W), in [-1, 1]. One frame is a picture.
    """
    if sample.ndim == 4 and len(sample) > 1:
        return ".mp4", _mp4(sample, fps)
    return ".png", png(to_image(sample if sample.ndim == 3 else sample[0]))


def decoded(file: Path) -> Tensor:
    """What a file of :func:`encoded` shows: a picture (3, H, W), or a video (F, 3, H, W), in [-1, 1]."""
    if file.suffix == ".png":
        pixels = np.asarray(Image.open(file).convert("RGB"))
    else:
        import imageio

        pixels = np.stack(imageio.mimread(file, memtest=False))
    return torch.from_numpy(pixels.copy()).movedim(-1, -3) / 127.5 - 1


def _mp4(video: Tensor, fps: int) -> bytes:
    check_videos()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "video.mp4")
        # H.264 needs even sizes; imageio would enlarge to multiples of 16.
        export_to_video([to_image(frame) for frame in video], file, fps=fps, quality=8, macro_block_size=2)
        return Path(file).read_bytes()
