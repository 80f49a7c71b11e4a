"""What a pipeline of diffusers takes and gives, read off its call's signature and its parts."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tap_diffusion.core.errors import UsageError
from tap_diffusion.integrations.diffusers.api import supported, transformers
from tap_diffusion.integrations.specs import SPECS

CONDITIONS = ("prompt", "class_labels")
_SHOWN = 20  # classes that an error lists
_FRAMES = ("num_frames", "frames", "video_length")
_SCALES = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")


def parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Of the pipeline's call, by name."""
    found = dict(inspect.signature(type(pipe).__call__).parameters)
    del found["self"]
    return found


def condition(pipe: Any) -> str:
    """Name of the argument that says what to draw: ``prompt`` or ``class_labels``.

    Raises:
        UsageError: the pipeline has neither, or needs more than that.
    """
    known = parameters(pipe)
    names = [name for name in CONDITIONS if name in known]
    needed = [
        name
        for name, parameter in known.items()
        if parameter.default is parameter.empty and name not in CONDITIONS and name not in ("args", "kwargs")
    ]
    if not names or needed or "num_inference_steps" not in known:
        raise UsageError(
            f"{type(pipe).__name__} needs more than prompts ({', '.join(needed) or 'its own arguments'}):"
            " call it in Python, with tap.enable(pipe)"
        )
    return names[0]


def frames_argument(pipe: Any) -> str | None:
    """Name of the argument that says how many frames a video has; None where the pipeline makes pictures."""
    known = parameters(pipe)
    return next((name for name in _FRAMES if name in known), None)


def guidance_argument(pipe: Any) -> str | None:
    """Name of the argument that a guidance scale is given by; None where there is none.

    Where there is a ``true_cfg_scale`` it is that of classifier-free guidance, and ``guidance_scale`` is for
    transformers that have learnt to do without a second branch.
    """
    known = parameters(pipe)
    names = ("true_cfg_scale", "guidance_scale") if not embeds_guidance(pipe) else ("guidance_scale",)
    return next((name for name in names if name in known), None)


def embeds_guidance(pipe: Any) -> bool:
    """Whether the transformer takes the guidance scale as an input, as that of FLUX.1-dev does."""
    return bool(_config(pipe).get("guidance_embeds", False))


def class_number(pipe: Any, text: str) -> int:
    """The class label that a text means: its number, or its name where the pipeline knows names.

    Raises:
        UsageError: there is no such class. The message lists those that there are.
    """
    title, names = type(pipe).__name__, {name.casefold(): number for name, number in class_names(pipe).items()}
    count = _config(pipe).get("num_embeds_ada_norm") or float("inf")
    if text.isdecimal() and int(text) < count:
        return int(text)
    wanted = text.strip().casefold()
    if wanted in names:
        return names[wanted]
    known = [f"{number} {name}" for name, number in names.items()]
    if len(known) > _SHOWN:  # ImageNet's thousand
        near = [f"{names[name]} {name}" for name in difflib.get_close_matches(wanted, names, 3)]
        known = [*near, "…"] if near else [*known[:3], "…", known[-1]]
    listed = ", ".join(known) or (f"0 to {count - 1}" if count != float("inf") else "their numbers")
    raise UsageError(f"{title} draws classes, and '{text}' is none of them: give {listed}")


def class_names(pipe: Any) -> dict[str, int]:
    """Numbers of a pipeline's classes by their names, the ``labels`` of diffusers' ``DiTPipeline``; empty: unnamed."""
    return dict(getattr(pipe, "labels", None) or {})


def longest_prompt(pipe: Any, arguments: Mapping[str, Any]) -> int | None:
    """Tokens of a prompt that the pipeline uses, by its ``max_sequence_length``; None where it has no such limit."""
    known = parameters(pipe).get("max_sequence_length")
    limit = arguments.get("max_sequence_length", known.default if known is not None else None)
    return limit if isinstance(limit, int) else None


def compile_blocks(pipe: Any) -> None:
    """Compile the transformers' blocks: those that diffusers names for its class, or those that TAP knows of."""
    found: list[Any] = supported(pipe)
    for transformer in found:
        if getattr(transformer, "_repeated_blocks", None):
            transformer.compile_repeated_blocks()
            continue
        spec = next(SPECS[kind.__name__] for kind in type(transformer).__mro__ if kind.__name__ in SPECS)
        for block in (block for name in spec.blocks for block in transformer.get_submodule(name).children()):
            block.compile()


def is_compiled(pipe: Any) -> bool:
    """Whether a part of the transformers is compiled."""
    modules = (module for transformer in transformers(pipe) for module in transformer.modules())
    return any(module._compiled_call_impl is not None for module in modules)


def multiple(pipe: Any) -> int:
    """Pixels that height and width must be multiples of: the side of a token."""
    config = _config(pipe)
    patch = config.get("patch_size") or 1
    side = patch if isinstance(patch, int) else patch[-1]
    coded = pipe.vae.config if getattr(pipe, "vae", None) is not None else {}
    channels = coded.get("latent_channels") or coded.get("z_dim")
    if channels and config.get("in_channels") == 4 * channels:  # FLUX and others pack latents two by two
        side = max(2, side)
    return side * next((getattr(pipe, name) for name in _SCALES if hasattr(pipe, name)), 1)


def _config(pipe: Any) -> Mapping[str, Any]:
    config: Any = transformers(pipe)[0].config
    return config


def grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of a picture's tokens; None where there are others among them, such as those of the prompt."""
    rows = max(1, round((tokens * height / width) ** 0.5))
    columns = tokens // rows
    return (rows, columns) if rows * columns == tokens and rows * width == columns * height else None


def drawn(output: Any) -> Tensor:
    """Pictures (count, C, H, W) or videos (count, F, C, H, W) in [0, 1], on the CPU in float32.

    Args:
        output: of a pipeline's call with ``output_type="pt"``.

    Raises:
        UsageError: it has neither.
    """
    values = getattr(output, "images", None)
    if values is None:
        values = getattr(output, "frames", None)
    if values is None:
        raise UsageError(f"a pipeline that returns {type(output).__name__} makes neither pictures nor videos")
    if isinstance(values, np.ndarray):  # as DiTPipeline gave whatever was asked for
        values = torch.from_numpy(values).movedim(-1, -3)
    elif isinstance(values, list):
        values = torch.stack(values)
    return values.float().cpu().contiguous()
