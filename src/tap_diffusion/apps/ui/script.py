"""A run of the page as a Python script that draws the same."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from tap_diffusion.apps import pipelines
from tap_diffusion.apps.files import FPS
from tap_diffusion.apps.generate import APART, Request
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.integrations.diffusers.api import transformers
from tap_diffusion.integrations.diffusers.versions import of_dtype


def script(model: str, pipe: Any, request: Request, config: TAPConfig) -> str:
    """Complete Python source: loads the model, turns TAP on, and saves what the page shows, equal to the bit.

    Args:
        model: as :func:`~tap_diffusion.apps.generate.load_pipeline` takes it.
        pipe: the same, loaded.
        request: of one picture or video.
    """
    dtype, device = next(transformers(pipe)[0].parameters()).dtype, str(pipe.device)
    if model in APART:
        imports = "import torch\n\nimport tap_diffusion as tap\nfrom tap_diffusion.apps.generate import load_pipeline\n"
        load = f"pipe = load_pipeline({_literal(model)}, {dtype}, {_literal(device)})"
    else:
        source = str(Path(model).resolve()) if Path(model).is_dir() else model
        imports = "import torch\nfrom diffusers import DiffusionPipeline\n\nimport tap_diffusion as tap\n"
        keyword = next(iter(of_dtype(dtype)))
        load = f"pipe = DiffusionPipeline.from_pretrained({_literal(source)}, {keyword}={dtype})"
        load += f".to({_literal(device)})"
    is_video = pipelines.frames_argument(pipe) is not None
    name, prompt = pipelines.condition(pipe), request.prompts[0]
    arguments = {name: [int(prompt)] if name == "class_labels" else prompt} | request.arguments(pipe)
    arguments["output_type"] = "np" if is_video else "pil"
    if request.negative_prompt:
        arguments["negative_prompt"] = request.negative_prompt
    lines = [
        *(f"{name}={_literal(value)}," for name, value in arguments.items()),
        f"generator=torch.Generator().manual_seed({request.seed}),",
    ]
    call = "pipe(\n" + "".join(f"    {line}\n" for line in lines) + ")"
    if is_video:
        imports = imports.replace("\nimport tap", "from diffusers.utils import export_to_video\n\nimport tap", 1)
        use = f'frames = {call}.frames[0]\nexport_to_video(frames, "video.mp4", fps={FPS})'
    else:
        use = f'picture = {call}.images[0]\npicture.save("picture.png")'
    return f"{imports}\n{load}\ntap.enable(pipe, {_source(config)})\n{use}\nprint(tap.report(pipe))\n"


def _source(config: TAPConfig) -> str:
    """What makes this configuration, as the second argument of ``tap.enable``: the shorter of two ways."""
    plain = _changes(config, TAPConfig())
    paper = _changes(config, TAPConfig.paper(full_steps=1))
    return min(plain, f"tap.TAPConfig.paper({paper})", key=len)


def _changes(config: TAPConfig, base: TAPConfig) -> str:
    values = ((field.name, getattr(config, field.name), getattr(base, field.name)) for field in fields(config))
    return ", ".join(f"{name}={_literal(value)}" for name, value, usual in values if value != usual)


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
