"""What can be profiled: transformers of true size with random weights, and pipelines with their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tap_bench.models import MODELS
from tap_bench.profile import sizes
from tap_diffusion.apps.generate import load_pipeline
from tap_diffusion.core.report import stopwatch
from tap_diffusion.integrations.diffusers.api import transformers
from tap_diffusion.integrations.specs import SPECS


@dataclass(frozen=True)
class Subject:
    """What is profiled.

    Attributes:
        pipe: the pipeline.
        run: runs it once, with a number of steps.
        processor_time: counts instead of time on the clock, on a CPU: what others run on the machine costs none.
    """

    name: str
    pipe: Any
    run: Callable[[int], Any]
    processor_time: bool = False

    def stopwatch(self) -> Callable[[], Callable[[], float]]:
        """Start timing, as :func:`tap_diffusion.core.report.stopwatch` does."""
        if not self.processor_time:
            return stopwatch(self.device)
        start = time.process_time()

        def stop() -> Callable[[], float]:
            elapsed = 1000 * (time.process_time() - start)
            return lambda: elapsed

        return stop

    @cached_property
    def device(self) -> torch.device:
        """Of the transformer."""
        return next(transformers(self.pipe)[0].parameters()).device

    @property
    def blocks(self) -> dict[str, int]:
        """How many blocks each list of the first transformer has."""
        transformer: Any = transformers(self.pipe)[0]
        return {name: len(transformer.get_submodule(name)) for name in SPECS[type(transformer).__name__].blocks}

    @property
    def dtype(self) -> torch.dtype:
        """Of most of the transformer's weights."""
        transformer: Any = transformers(self.pipe)[0]
        dtype: torch.dtype = transformer.dtype
        return dtype


def of_size(name: str, dtype: torch.dtype, device: str, **shape: int | None) -> Subject:
    """A transformer of true size with random weights, see :func:`tap_bench.sizes.build`."""
    pipe = sizes.build(name, dtype, device, **shape)
    return Subject(name, pipe, lambda steps: pipe(num_inference_steps=steps))


def of_model(name: str, dtype: torch.dtype, device: str, batch: int | None = None) -> Subject:
    """A model of the bench, or any pipeline that takes a prompt, by folder or hub id."""
    if name in MODELS:
        model = MODELS[name]()
        pipe = model.load().to(device, dtype)
        arguments = model.arguments(model.measured[: batch or model.batch]) | {"output_type": "pt"}
    else:
        pipe = load_pipeline(name, dtype, device)
        arguments = {"prompt": ["a lighthouse in a storm"] * (batch or 1), "output_type": "latent"}
    pipe.set_progress_bar_config(disable=True)
    return Subject(name, pipe, lambda steps: pipe(num_inference_steps=steps, **arguments))
