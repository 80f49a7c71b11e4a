"""What a sampler of ComfyUI does, read off its arithmetic: it is tried out on a few numbers in place of a model.

A sampler's function gets a model, a latent and the noise levels, and nobody says how often it will evaluate the model,
at which noise, or whether it adds noise of its own. So it is run beforehand, with stand-ins for the model. That takes
some milliseconds on the CPU, up to a third of a second with Brownian noise (``dpmpp_sde``), and leaves the sampler and
all random states as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_CLOSE = 1e-4  # relative; some samplers start a little below the first level
_MOST = 50  # evaluations for each step, of a sampler that may never end


@dataclass(frozen=True)
class Rehearsal:
    """What a sampler did.

    Attributes:
        levels: the noise σ that each step starts from, falling. Those given, or the sampler's own (DPM fast).
        evaluations: the noise of each evaluation of the model.
        fresh_noise: it adds random noise.
        kept: correlation of the noise in a step's latent with that in the next one's; 1: none is fresh.
        is_euler: each step is x + (σ' - σ) (x - D(x, σ)) / σ, D being what the model makes of x at σ.
    """

    levels: tuple[float, ...]
    evaluations: tuple[float, ...]
    fresh_noise: bool
    kept: float
    is_euler: bool


def step_at(levels: tuple[float, ...], sigma: float) -> int:
    """The last step that starts from this noise or more; 0 where none does."""
    return max((i for i, level in enumerate(levels) if level >= sigma * (1 - _CLOSE)), default=0)


class NotPlannedError(Exception):
    """A sampler chooses its steps as it goes. The argument says how that is known."""


def rehearse(sampler: Any, sigmas: Tensor, model_sampling: Any) -> Rehearsal | None:
    """Try a sampler out.

    Args:
        sampler: ComfyUI's ``KSAMPLER``, or anything else with ``sampler_function`` and ``extra_options``.
        sigmas: (steps + 1,), the noise levels that it will get.
        model_sampling: of the model, as some samplers ask it for levels.

    Returns:
        None where it can't be tried out.

    Raises:
        NotPlannedError: the steps depend on what the model says.
    """
    function = getattr(sampler, "sampler_function", None)
    if not callable(function):
        return None
    sigmas = sigmas.detach().float().cpu()

    def run(model: Callable[[Tensor, Tensor], Tensor], seed: int) -> _Watched:
        watched = _Watched(model, model_sampling, most=_MOST * len(sigmas))
        start = float(sigmas[0]) * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        torch.default_generator.manual_seed(seed)  # and not those of GPUs
        options = dict(getattr(sampler, "extra_options", {}))
        extra = {"model_options": {"transformer_options": {}}, "seed": seed}
        watched.end = function(watched, start, sigmas, extra_args=extra, callback=None, disable=True, **options)
        return watched

    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            one, same, empty = run(_curved, 0), run(_curved, 1), run(_nothing, 0)
    except Exception:  # whatever a strange sampler raises: it may ask for what only a real model has
        return None
    if one.noise != empty.noise:
        raise NotPlannedError("it evaluates one model at other noise levels than another")
    levels = _levels(sigmas.tolist()[:-1], one.noise)
    if levels is None:
        return None
    fresh = any(not torch.equal(a, b) for a, b in zip([*one.states, one.end], [*same.states, same.end], strict=True))
    starts = [next(x for x, noise in zip(empty.states, empty.noise, strict=True) if step_at(levels, noise) == step)
              for step in range(len(levels))]  # fmt: skip
    alike = [float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in pairwise(starts)]
    kept = min(median(alike), 1 - 1e-6) if fresh and alike else 1.0
    return Rehearsal(
        levels, tuple(one.noise), fresh, kept, not fresh and one.makes_euler_steps(levels, float(sigmas[-1]))
    )


def _levels(given: list[float], evaluated: list[float]) -> tuple[float, ...] | None:
    """Where steps start: at the given levels if the model is evaluated there, else wherever it is, if that falls."""
    if all(any(math.isclose(level, noise, rel_tol=2 * _CLOSE) for noise in evaluated) for level in given):
        return tuple(given)
    return tuple(evaluated) if all(a > b for a, b in pairwise(evaluated)) else None


class _Watched:
    """In the place of the model that a sampler's function gets.

    Attributes:
        states, noise: of each evaluation.
        end: what the sampler returns.
    """

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor], model_sampling: Any, most: int) -> None:
        self._model, self._most = model, most
        objects = {"model_sampling": model_sampling}
        self.inner_model = SimpleNamespace(
            inner_model=SimpleNamespace(model_sampling=model_sampling),
            model_patcher=SimpleNamespace(get_model_object=objects.__getitem__),
        )
        self.states: list[Tensor] = []
        self.noise: list[float] = []
        self.end = torch.zeros(())

    def __call__(self, x: Tensor, sigma: Tensor, model_options: Any = None, **_: Any) -> Tensor:
        self.states.append(x.clone())
        self.noise.append(float(sigma.max()))
        if len(self.noise) > self._most:
            raise RuntimeError("this takes more evaluations than any sampler should")
        denoised = self._model(x, sigma.reshape(-1, 1, 1, 1))
        for look in (model_options or {}).get("sampler_post_cfg_function", []):  # by which CFG++ gets the other branch
            seen = {"denoised": denoised, "cond_denoised": denoised, "uncond_denoised": 0.9 * denoised}
            denoised = look(seen | {"input": x, "sigma": sigma, "model_options": model_options})
        return denoised

    def makes_euler_steps(self, levels: tuple[float, ...], last: float) -> bool:
        if len(self.noise) != len(levels):
            return False
        after = [*zip(self.states[1:], self.noise[1:], strict=True), (self.end, last)]
        for x, noise, (then, lower) in zip(self.states, self.noise, after, strict=True):
            drift = (x - self._model(x, torch.tensor(noise))) / noise
            if not torch.allclose(then, x + (lower - noise) * drift, rtol=1e-3, atol=1e-3):
                return False
        return True


def _curved(x: Tensor, sigma: Tensor) -> Tensor:
    """The mean of two points, as x and σ leave it: steps of other solvers than Euler's end elsewhere."""
    return torch.tanh(x / (0.1 + sigma))


def _nothing(x: Tensor, sigma: Tensor) -> Tensor:
    """All that is in a latent is noise."""
    return torch.zeros_like(x)
