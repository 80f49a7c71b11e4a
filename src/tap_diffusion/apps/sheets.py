"""Contact sheets: pictures in rows and columns with words over them, and maps of what tokens chose."""

from __future__ import annotations

import colorsys
import io
import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tap_diffusion.core.predictors import Candidate
from tap_diffusion.core.report import Choice

_GAP = 4
_LINE = 17
_FONT = ImageFont.load_default(size=13)


def sheet(
    rows: Sequence[Tensor], labels: Sequence[str] = (), titles: Sequence[str] = (), scale: int = 2
) -> Image.Image:
    """Lay out pictures as a grid.

    Args:
        rows: one tensor (columns, 3, H, W) in [-1, 1] per row.
        labels: words left of each row.
        titles: words over the pictures: one for each column, or one for each picture in reading order.
        scale: pixels on the sheet for one of the picture.
    """
    columns, _, height, width = rows[0].shape
    height, width = height * scale, width * scale
    each = len(titles) > columns
    wrapped = ["\n".join(textwrap.wrap(title, max(4, width // 8))) for title in titles]
    head = max((_LINE * (title.count("\n") + 1) + _GAP for title in wrapped), default=0)
    lines = [line for label in labels for line in label.splitlines()]
    left = max((int(_FONT.getlength(line)) + 2 * _GAP for line in lines), default=0)
    size = (left + columns * (width + _GAP), len(rows) * (height + _GAP) + head * (len(rows) if each else 1))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for r, row in enumerate(rows):
        top = r * (height + _GAP) + head * (r + 1 if each else 1)
        if labels:
            up = _LINE * (labels[r].count("\n") + 1) // 2
            draw.multiline_text((_GAP, top + height // 2 - up), labels[r], fill="black", font=_FONT)
        for c, picture in enumerate(row):
            x = left + c * (width + _GAP)
            if titles and (each or r == 0) and r * columns + c < len(titles):
                draw.multiline_text((x, top - head), wrapped[r * columns + c], fill="black", font=_FONT)
            page.paste(to_image(picture).resize((width, height), Image.Resampling.NEAREST), (x, top))
    return page


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """One image under the other, on white."""
    page = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        page.paste(image, (0, top))
        top += image.height
    return page


def to_image(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) in [-1, 1] as 8-bit RGB."""
    pixels = ((picture.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def png(image: Image.Image) -> bytes:
    """An image as the content of a file."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def choices_sheet(
    choices: Sequence[Choice], pictures: Tensor, grid: tuple[int, int], titles: Sequence[str], scale: int = 2
) -> Image.Image:
    """Which candidate each token took, as a colour over the picture, one row for each choice, with a legend.

    Args:
        choices: of one branch; their index is (B, N) for the B pictures.
        pictures: (B, 3, H, W) in [-1, 1].
        grid: rows and columns of tokens, N in all.
    """
    rows = []
    for choice in choices:
        palette = torch.tensor([colour(candidate) for candidate in choice.candidates])
        colours = palette[choice.index.cpu().long()].unflatten(1, grid).permute(0, 3, 1, 2) * 2 - 1
        colours = torch.nn.functional.interpolate(colours, size=pictures.shape[-2:], mode="nearest")
        rows.append(0.35 * pictures.float() + 0.65 * colours)
    maps = sheet([pictures, *rows], ["picture", *(f"step {choice.step + 1}" for choice in choices)], titles, scale)
    return stack([maps, _legend(sorted({c._replace(horizon=0.0) for choice in choices for c in choice.candidates}))])


def colour(candidate: Candidate) -> tuple[float, float, float]:
    """A hue for each order; the shorter the horizon, the lighter."""
    if candidate.order == 0:
        return (0.45, 0.45, 0.45)
    hue = (0.60, 0.06, 0.36, 0.78, 0.14, 0.50, 0.90, 0.25)[(candidate.order - 1) % 8]
    return colorsys.hls_to_rgb(hue, min(0.45 + 0.1 * candidate.lag, 0.9), 0.9)


def _legend(members: Sequence[Candidate]) -> Image.Image:
    """One row for each order."""
    orders = [[member for member in members if member.order == order] for order in sorted({m.order for m in members})]
    cell, line = 180, _LINE + _GAP
    page = Image.new("RGB", (cell * max(map(len, orders)), line * len(orders) + 3 * _GAP), "white")
    draw = ImageDraw.Draw(page)
    for r, row in enumerate(orders):
        for c, member in enumerate(row):
            x, y = _GAP + cell * c, 2 * _GAP + line * r
            red, green, blue = (round(255 * part) for part in colour(member))
            draw.rectangle((x, y, x + _LINE, y + _LINE - _GAP), fill=(red, green, blue))
            draw.text((x + _LINE + 2 * _GAP, y - 2), str(member), fill="black", font=_FONT)
    return page
