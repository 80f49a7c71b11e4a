"""What stands in for torchvision and torchaudio, which don't work beside every build of torch.

ComfyUI imports them at module level. The models tested here call nothing of them but a nearest-neighbour resize.
"""

from __future__ import annotations

import sys
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.nn import functional


class InterpolationMode(Enum):
    NEAREST = "nearest"


def resize(image: Tensor, size: list[int], interpolation: InterpolationMode = InterpolationMode.NEAREST) -> Tensor:
    return functional.interpolate(image, size, mode=interpolation.value)


class _Missing(ModuleType):
    """A module in which every class can be named, and none used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def install() -> None:
    """Put the stand-ins where `import` finds them."""
    import transformers.utils.import_utils  # noqa: F401 - looks for torchvision when it is first imported

    for name in (
        "torchvision", "torchvision.transforms", "torchvision.transforms.functional",
        "torchaudio", "torchaudio.transforms", "torchaudio.functional",
    ):  # fmt: skip
        module = _Missing(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    vision: Any = sys.modules["torchvision"]
    vision.transforms.InterpolationMode = InterpolationMode
    vision.transforms.functional.resize = resize
