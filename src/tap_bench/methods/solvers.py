"""Solvers: what a user would otherwise do, namely take fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

from tap_bench.method import Method, Setting
from tap_bench.variant import Change, Variant


class AdamsBashforth2Scheduler(FlowMatchEulerDiscreteScheduler):
    """Two-step Adams–Bashforth for flow matching, on any spacing: x' = x + h (v + h / (2 h₋) (v - v₋))."""

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None,
        timesteps: Any = None,
    ) -> None:  # fmt: skip
        """As the base class, and forget the last run."""
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        """One step; the first is Euler's."""
        if self.step_index is None:
            self._init_step_index(timestep)
        span = self.sigmas[self.step_index + 1] - self.sigmas[self.step_index]
        slope = model_output
        if self._last is not None:
            last_output, last_span = self._last
            slope = model_output + span / (2 * last_span) * (model_output - last_output)
        self._last = model_output, span
        self._step_index += 1
        result = (sample.float() + span * slope.float()).to(sample.dtype)
        return (
            FlowMatchEulerDiscreteSchedulerOutput(prev_sample=result) if kwargs.get("return_dict", True) else (result,)
        )


@contextmanager
def _solved(scheduler: Callable[[Any], Any], steps: int, pipe: Any) -> Iterator[Change]:
    own = pipe.scheduler
    pipe.register_modules(scheduler=scheduler(own))
    try:
        yield {"num_inference_steps": steps}
    finally:
        pipe.register_modules(scheduler=own)


def _solver(name: str, source: str, make: dict[str, Callable[[Any], Any]]) -> Method:
    """A solver; ``make`` gives, for kinds of model, a scheduler from the pipeline's own."""

    def variants(setting: Setting) -> Iterator[Variant]:
        flow = isinstance(setting.pipe.scheduler, FlowMatchEulerDiscreteScheduler)
        scheduler = make.get("flow" if flow else "noise")
        if scheduler is not None:
            yield Variant(f"{setting.budget} steps", partial(_solved, scheduler, setting.budget), {"solver": name})

    return Method(name, "solver", source, variants)


class FlowDPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ 2M that ignores the shift which FLUX pipelines pass to any scheduler, dynamic or not."""

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, mu: Any = None, timesteps: Any = None
    ) -> None:
        """As the base class, which refuses a shift where it is not dynamic."""
        if not self.config.use_dynamic_shifting:
            mu = None
        super().set_timesteps(num_inference_steps, device, mu=mu, timesteps=timesteps)


def _flow(kind: Any) -> Callable[[Any], Any]:
    def make(own: Any) -> Any:
        return kind(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=own.config.shift,
            use_dynamic_shifting=own.config.use_dynamic_shifting,
            time_shift_type=own.config.time_shift_type,
        )

    return make


def _noise(kind: Any) -> Callable[[Any], Any]:
    return lambda own: kind.from_config(own.config)


METHODS = [
    _solver("euler", "fewer Euler steps", {"flow": lambda own: type(own).from_config(own.config)}),
    _solver("ddim", "DDIM, arXiv 2010.02502", {"noise": _noise(DDIMScheduler)}),
    _solver(
        "adams-bashforth-2",
        "two-step Adams–Bashforth",
        {"flow": lambda own: AdamsBashforth2Scheduler.from_config(own.config)},
    ),
    _solver(
        "dpm-solver++",
        "DPM-Solver++ 2M, arXiv 2211.01095",
        {"flow": _flow(FlowDPMSolver), "noise": _noise(DPMSolverMultistepScheduler)},
    ),
    _solver(
        "unipc",
        "UniPC, arXiv 2302.04867",
        {"flow": _flow(UniPCMultistepScheduler), "noise": _noise(UniPCMultistepScheduler)},
    ),
]
