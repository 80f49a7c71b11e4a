"""The emoji pictures and captions on which the demo model is trained.

Two npm packages hold the pictures: ``emoji-datasource-google`` (Noto Emoji, Apache-2.0; the package is MIT)
and ``@lobehub/fluent-emoji-3d`` (Microsoft Fluent Emoji, MIT). ``captions.tsv`` beside this file lists the
emoji that have a caption, as code points, caption and other captions that mean the same (``green frog face``);
both packages draw every one of them.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from tap_diffusion.core.errors import UsageError

PACKAGES = {
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/", ".png"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/", ".webp"),
}
SIZE = 64
_SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


def _table() -> list[list[str]]:
    text = Path(__file__).with_name("captions.tsv").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()]


@cache
def captions() -> dict[str, str]:
    """Caption of each emoji, keyed by code points in lower-case hex joined by ``-``."""
    return {code: caption for code, caption, *_ in _table()}


@cache
def synonyms() -> dict[str, list[str]]:
    """Other captions of the same emoji, keyed by its caption; empty for most."""
    return {caption: others for _, caption, *others in _table()}


def download(folder: Path) -> dict[str, Path]:
    """Fetch both packages with ``npm pack`` into ``folder``, unless they are there; return the tarballs.

    Raises:
        UsageError: npm is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tarballs = {}
    for style, (spec, _, _) in PACKAGES.items():
        marker = folder / f"{style}.tgz"
        if not marker.exists():
            try:
                packed = subprocess.run(
                    ["npm", "pack", "--json", spec], cwd=folder, check=True, capture_output=True, text=True
                )
            except FileNotFoundError as error:
                raise UsageError(f"npm fetches the pictures to train on ({spec}), and is not installed") from error
            (folder / json.loads(packed.stdout)[0]["filename"].replace("/", "-").lstrip("@")).rename(marker)
        tarballs[style] = marker
    return tarballs


def _resized(data: bytes, size: int) -> Image.Image:
    """In mode ``RGBa``, that is premultiplied: colours of fully transparent pixels must not bleed into the edges."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA").convert("RGBa")
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def _on_white(data: bytes, size: int) -> np.ndarray:
    picture = _resized(data, size).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))


def _is_plain(code: str) -> bool:
    parts = code.split("-")
    is_flag = 0x1F1E6 <= int(parts[0], 16) <= 0x1F1FF or parts[0] in {"1f3f4", "1f3f3"}
    return not is_flag and not _SKIN_TONES.intersection(parts[1:])


def _members(folder: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """Code points, style, caption (``""`` where none is listed) and encoded picture of all emoji of both packages."""
    names = captions()
    for style, tarball in download(folder).items():
        _, prefix, suffix = PACKAGES[style]
        with tarfile.open(tarball) as archive:
            for member in archive:
                if not (member.name.startswith(prefix) and member.name.endswith(suffix)):
                    continue
                code = member.name[len(prefix) : -len(suffix)].lower()
                caption = names.get(code) or names.get(f"{code}-fe0f") or names.get(code.removesuffix("-fe0f"), "")
                data = archive.extractfile(member)
                assert data is not None
                yield code, style, caption, data.read()


def load(folder: Path, which: Literal["captioned", "all"] = "captioned") -> tuple[torch.Tensor, list[str], list[str]]:
    """Pictures on white, their captions and their styles.

    Args:
        folder: where the npm packages are, or are downloaded to.
        which: only the emoji of ``captions.tsv``, or all but flags and skin-tone variants (caption ``""``
            where none is listed), which is what the autoencoder learns from.

    Returns:
        pictures (count, 3, 64, 64) uint8, captions, styles (``noto`` or ``fluent``), sorted by code points.
    """
    rows = [
        (code, style, caption, _on_white(data, SIZE))
        for code, style, caption, data in _members(folder)
        if caption or (which == "all" and _is_plain(code))
    ]
    rows.sort(key=lambda row: row[:2])
    pictures = torch.from_numpy(np.stack([row[3] for row in rows])).permute(0, 3, 1, 2).contiguous()
    return pictures, [row[2] for row in rows], [row[1] for row in rows]


def cutouts(folder: Path, wanted: Sequence[str], style: Literal["noto", "fluent"], size: int) -> torch.Tensor:
    """Emoji on transparent ground.

    Args:
        folder: where the npm packages are, or are downloaded to.
        wanted: captions.
        style: package to take them from.
        size: width and height in pixels.

    Returns:
        Premultiplied RGBA in [0, 1], (len(wanted), 4, size, size) float32.
    """
    found = {
        caption: torch.frombuffer(bytearray(_resized(data, size).tobytes()), dtype=torch.uint8)
        for _, drawn, caption, data in _members(folder)
        if drawn == style and caption in wanted
    }
    pictures = torch.stack([found[caption] for caption in wanted]).view(-1, size, size, 4)
    return pictures.permute(0, 3, 1, 2).float() / 255
