"""What the supported versions of diffusers call by different names."""

from __future__ import annotations

from typing import Any

import diffusers

VERSION = tuple(map(int, diffusers.__version__.split(".")[:2]))
"""Of diffusers, as (0, 42)."""


def of_dtype(dtype: Any) -> dict[str, Any]:
    """The keyword argument by which ``from_pretrained`` of a pipeline or model takes a dtype.

    diffusers warns of ``torch_dtype`` from 0.40, and before that takes no heed of ``dtype``.
    """
    return {"dtype" if VERSION >= (0, 40) else "torch_dtype": dtype}
