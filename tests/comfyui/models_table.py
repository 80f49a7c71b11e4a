"""The list of models in docs/comfyui.md: `.venv-comfyui/bin/python tests/comfyui/models_table.py` writes it there."""

from __future__ import annotations

import re
from pathlib import Path

from tiny_comfy import MODELS, build

from tap_diffusion import UnsupportedModelError
from tap_diffusion.integrations.comfyui import accelerate
from tap_diffusion.integrations.comfyui.specs import REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "comfyui.md"
BETWEEN = re.compile(r"(?<=<!-- models -->\n).*?(?=<!-- end of models -->)", re.DOTALL)


def table() -> str:
    """An item for each class of transformer, with the names of ``comfy.supported_models`` that are built as it."""
    names: dict[str, set[str]] = {}
    refused = dict(REFUSED)
    for name, tiny in MODELS.items():
        patcher = build(name)
        kind = type(patcher.model.diffusion_model).__name__
        names.setdefault(kind, set()).add(tiny.name or name)
        try:
            accelerate(patcher)
        except UnsupportedModelError as error:
            refused.setdefault(kind, str(error))
    lines = []
    for kind in sorted(names, key=str.lower):
        said = f". **Refused**: {refused[kind]}" if kind in refused else ""
        lines.append(f"- `{kind}`: {', '.join(sorted(names[kind], key=str.lower))}{said}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(BETWEEN.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
