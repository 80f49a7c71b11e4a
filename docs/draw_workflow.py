"""Draws a ComfyUI workflow as its editor lays it out: python docs/draw_workflow.py WORKFLOW.json PICTURE.jpg."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

SCALE, MARGIN, TITLE, ROW = 1, 40, 30, 22
COLORS = {
    "MODEL": "#b39ddb", "CLIP": "#ffd500", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6",
}  # fmt: skip
LABELS = {  # of widgets, which the file gives by position
    "UNETLoader": ["unet_name", "weight_dtype"],
    "DualCLIPLoader": ["clip_name1", "clip_name2", "type", "device"],
    "VAELoader": ["vae_name"],
    "TAPAccelerate": ["speedup", "full_steps", "config"],
    "CLIPTextEncode": ["text"],
    "FluxGuidance": ["guidance"],
    "EmptySD3LatentImage": ["width", "height", "batch_size"],
    "KSampler": ["seed", "control", "steps", "cfg", "sampler_name", "scheduler", "denoise"],
    "SaveImage": ["filename_prefix"],
}


def draw(graph: dict[str, Any]) -> Image.Image:
    """The picture."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    right = max(node["pos"][0] + node["size"][0] for node in nodes.values())
    bottom = max(node["pos"][1] + node["size"][1] for node in nodes.values())
    picture = Image.new("RGB", (int(right) + MARGIN, int(bottom) + MARGIN), "#222222")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    for _, origin, out, target, into, kind in graph["links"]:
        start, end = _slot(nodes[origin], "outputs", out), _slot(nodes[target], "inputs", into)
        pen.line(_curve(start, end), fill=COLORS[kind], width=3)
    for node in nodes.values():
        x, y = node["pos"]
        w, h = node["size"]
        pen.rounded_rectangle((x, y - TITLE, x + w, y + h), 8, fill=node.get("bgcolor", "#353535"), outline="#111111")
        pen.text((x + 10, y - TITLE + 8), node.get("title", node["type"]), fill="#dddddd", font=font)
        pen.line((x, y, x + w, y), fill="#111111")
        for side in ("inputs", "outputs"):
            for i, slot in enumerate(node[side]):
                a, b = _slot(node, side, i)
                pen.ellipse((a - 5, b - 5, a + 5, b + 5), fill=COLORS[slot["type"]])
                anchor, shift = ("lm", 10) if side == "inputs" else ("rm", -10)
                pen.text((a + shift, b), slot["name"], fill="#aaaaaa", font=font, anchor=anchor)
        top = y + 8 + ROW * max(len(node["inputs"]), len(node["outputs"]))
        for label, value in zip(LABELS.get(node["type"], []), node["widgets_values"], strict=False):
            if label in ("text", "config"):
                pen.rectangle((x + 10, top, x + w - 10, y + h - 8), fill="#1a1a1a")
                lines = textwrap.wrap(str(value) or f"{label} (JSON)", int(w / 8))
                pen.text((x + 16, top + 5), "\n".join(lines), fill="#cccccc" if value else "#666666", font=font)
            else:
                pen.rounded_rectangle((x + 10, top, x + w - 10, top + ROW - 4), 9, fill="#1a1a1a")
                pen.text((x + 20, top + 9), label, fill="#999999", font=font, anchor="lm")
                pen.text((x + w - 20, top + 9), str(value), fill="#dddddd", font=font, anchor="rm")
            top += ROW
    return picture


def _slot(node: dict[str, Any], side: str, index: int) -> tuple[float, float]:
    x, y = node["pos"]
    return x + (0 if side == "inputs" else node["size"][0]), y + 14 + ROW * index


def _curve(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """A cubic Bézier curve that leaves and arrives level."""
    bend = max(40.0, abs(end[0] - start[0]) / 2)
    points = [start, (start[0] + bend, start[1]), (end[0] - bend, end[1]), end]
    weights = [((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3) for t in (i / 40 for i in range(41))]
    return [
        (
            sum(w * p[0] for w, p in zip(row, points, strict=True)),
            sum(w * p[1] for w, p in zip(row, points, strict=True)),
        )
        for row in weights
    ]


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    draw(json.loads(source.read_text(encoding="utf-8"))).save(target, quality=92)
