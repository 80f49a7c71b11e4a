from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # TAP's kernels run on the CPU; must be said before triton is imported

from diffusers import FluxPipeline

from tap_diffusion.demo import EMOJI
from tiny import build_pipeline

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores, and the models are tiny


@pytest.fixture
def pipe() -> Any:
    """A FLUX pipeline of a few thousand parameters with random weights."""
    return build_pipeline()


@pytest.fixture(scope="session")
def emoji() -> Any:
    """The shipped model, in float32."""
    pipe = FluxPipeline.from_pretrained(EMOJI, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
