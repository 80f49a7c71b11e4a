from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # TAP's kernels run on the CPU; must be said before triton is imported

from tap_diffusion.core import engine

with contextlib.suppress(ModuleNotFoundError):  # beside ComfyUI
    from hypothesis import settings

    settings.register_profile("unhurried", deadline=None)  # time says nothing of what is right, on busy machines least
    settings.load_profile("unhurried")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores, and the models are tiny


class _Root:
    """The repository's root has an ``__init__.py`` for ComfyUI alone; pytest is not to take it for a package."""

    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Dir | None:
        return pytest.Dir.from_parent(parent, path=path) if path == Path(__file__).parents[1] else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Root())  # globally: hooks of this file are for what lies under tests/


@pytest.fixture(autouse=True)
def nothing_is_unexplained_in_the_zoo(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights modulate features otherwise at each step: the past does explain nothing, and steps would be full.

    In modules that use the zoo or tiny models there is no such check; what it does is in test_unexplained.py.
    """
    used = {getattr(value, "__module__", None) for value in vars(request.module).values()}
    if used & {"zoo", "tiny", "tiny_comfy"} and request.module.__name__ != "test_unexplained":
        monkeypatch.setattr(engine, "unexplained", lambda error, *_: torch.zeros_like(error, dtype=torch.bool))


@pytest.fixture
def pipe() -> Any:
    """A FLUX pipeline of a few thousand parameters with random weights."""
    from tiny import build_pipeline  # only now: tests of the core do without diffusers

    return build_pipeline()


@pytest.fixture(scope="session")
def emoji() -> Any:
    """The shipped model, in float32."""
    from diffusers import FluxPipeline

    from tap_diffusion.integrations.diffusers.versions import of_dtype
    from tap_diffusion_demo import EMOJI

    pipe = FluxPipeline.from_pretrained(EMOJI, **of_dtype(torch.float32))
    pipe.set_progress_bar_config(disable=True)
    return pipe
