"""LoRA adapters for a pipeline, by diffusers' own loading code: ``tap generate --lora``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import is_peft_available

from tap_diffusion.core.errors import UsageError


@dataclass(frozen=True)
class Lora:
    """One adapter.

    Attributes:
        source: a folder, a ``.safetensors`` file, or a hub id ``owner/name``.
        scale: how strongly it acts; 1 as trained.
    """

    source: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """``SOURCE`` or ``SOURCE:SCALE``. Raises UsageError where the scale is not finite."""
        source, _, scale = text.rpartition(":")
        try:
            value = float(scale)
        except ValueError:
            return cls(text)  # a colon may be part of a path
        if not source:
            return cls(text)
        if not math.isfinite(value):
            raise UsageError(f"the scale of the LoRA {source} is {scale}; give a number, such as {source}:0.8")
        return cls(source, value)


def check(pipe: Any, lora: Lora) -> None:
    """Raise UsageError where a pipeline takes no LoRA, or this one can't be anywhere."""
    if not hasattr(pipe, "load_lora_weights"):
        raise UsageError(f"{type(pipe).__name__} takes no LoRA; leave out --lora")
    if not is_peft_available():
        raise UsageError("a LoRA needs peft: pip install peft")
    if not Path(lora.source).exists() and (lora.source.count("/") != 1 or lora.source.startswith((".", "/", "~"))):
        raise UsageError(
            f"there is no LoRA {lora.source}: give a folder, a .safetensors file, or a hub id owner/name,"
            " and :SCALE behind it if wanted"
        )


def load(pipe: Any, lora: Lora, name: str) -> None:
    """Load an adapter under this name. Raises UsageError where none of its weights are for this pipeline."""
    pipe.load_lora_weights(lora.source, adapter_name=name)
    if not any(name in names for names in pipe.get_list_adapters().values()):
        raise UsageError(f"the LoRA {lora.source} has no weights for {type(pipe).__name__}; it is of another model")


def activate(pipe: Any, loras: Sequence[Lora], names: Sequence[str]) -> None:
    """Make the adapters act together, each with its scale."""
    pipe.set_adapters(list(names), [lora.scale for lora in loras])
