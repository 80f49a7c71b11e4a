"""A sampling loop of one's own: what its author says of its noise stands in for a scheduler."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any, get_args

import torch
from numpy.typing import NDArray
from torch import Tensor

from tap_diffusion.core.call import Call
from tap_diffusion.core.errors import ConfigError
from tap_diffusion.core.timeline import Prediction, Timeline
from tap_diffusion.integrations.diffusers.tracking import Told, number

Numbers = Sequence[float] | Tensor | NDArray[Any]


class Loop:
    """The steps of a sampling loop. Arguments as of :func:`~tap_diffusion.trajectory`.

    Raises:
        ConfigError: a value is out of its domain, or two contradict each other.
    """

    def __init__(
        self,
        sigmas: Numbers | None,
        alphas_cumprod: Numbers | None,
        times: Numbers | None,
        prediction: Prediction | None,
        fresh_noise: bool,
    ) -> None:
        if (sigmas is None) == (alphas_cumprod is None):
            raise ConfigError("give either sigmas or alphas_cumprod, by which TAP knows the noise of each step")
        if prediction is not None and prediction not in get_args(Prediction):
            raise ConfigError(f"prediction is {prediction!r}; it must be None or {_either(get_args(Prediction))}")
        self._prediction, self._fresh_noise = prediction, fresh_noise
        self._name = "alphas_cumprod" if sigmas is None else "sigmas"
        conventions: list[list[float]] = []  # of the timestep, the smaller first, of which calls tell the right one
        if sigmas is None:
            if prediction == "flow":
                raise ConfigError(
                    "alphas_cumprod are not the noise of a flow: give sigmas, or say what the model predicts,"
                    f" prediction={_either(kind for kind in get_args(Prediction) if kind != 'flow')}"
                )
            if times is None:
                raise ConfigError("alphas_cumprod do not tell the timesteps of your loop: give them too, times=...")
            self._noise = [math.sqrt(_ratio(1 - a, a)) for a in _levels(self._name, alphas_cumprod, 1)]
        elif prediction == "flow":
            levels = _levels(self._name, sigmas, 1)
            # An inversion is a flow to the noise, of which less and less is missing.
            self._noise = [_ratio(s, 1 - s) if levels[-1] < levels[0] else _ratio(1 - s, s) for s in levels]
            directions = levels, [1 - s for s in levels]
            conventions = [[scale * s for s in direction] for scale in (1, 1000) for direction in directions]
        else:
            self._noise = _levels(self._name, sigmas, math.inf)
            conventions = [self._noise]
        self._times = [values[:-1] for values in conventions] if times is None else [self._checked(times)]
        self._is_begun = times is not None  # else it is the first step that tells what the timestep is

    def _checked(self, times: Numbers) -> list[float]:
        found = _numbers("times", times)
        if len(found) != len(self):
            raise ConfigError(
                f"there are {len(found)} times and {len(self) + 1} {self._name}: give a time for each step, and one of"
                f" the {self._name} more, where the last step ends"
            )
        _check_order("times", found)
        return found

    def __len__(self) -> int:
        return len(self._noise) - 1

    def told(self, timestep: Any, rising: bool) -> Told:
        """Which step a call is, by the transformer's timestep argument, which is read on the host.

        Raises:
            ValueError: it is none of the loop's.
        """
        time = number(timestep, rising)
        is_float = isinstance(timestep, Tensor) and timestep.is_floating_point()
        precision = torch.finfo(timestep.dtype if is_float else torch.float32).eps
        possible = self._times if self._is_begun else [times for times in self._times if _is_near(time, times[0])]
        places = [(times, _place(times, time, precision)) for times in possible]
        found = [(times, step) for times, step in places if step is not None]
        if not found:
            begin = _either(format(times[0], "g") for times in self._times)
            raise ValueError(
                f"a call of the loop has timestep {time:g}, which is none of its {len(self)} steps by the {self._name}"
                f" that TAP was told, which begin with {begin}: give those that the loop runs through, the last being"
                " where the last step ends (mostly clean), and its timesteps, times=..., where they are something else"
            )
        self._times, self._is_begun = [times for times, _ in found], True
        return Told(found[0][1], len(self))

    def known(self, call: Call, step: int) -> Call:
        """A call at a step, with what the loop knows of the trajectory that it starts.

        Raises:
            ValueError: steps have been left out.
        """
        first = len(self) - (call.steps or 0)
        if call.starts_trajectory:
            if self._noise[-1] > self._noise[0]:
                return replace(call, unread="the noise of this loop rises, which TAP follows where a flow is predicted")
            return replace(call, timeline=self._timeline(first))
        if first + call.step != step:
            raise ValueError(
                f"the loop went from step {first + call.step - 1} right to step {step} of the {self._name} that TAP was"
                " told, counted from 0: give those that it runs through; if they are, its timesteps are too coarse to"
                " tell (bfloat16)"
            )
        return call

    def _timeline(self, first: int) -> Timeline:
        noise = self._noise[first:-1]
        # Of ancestral steps, as DDPM's: σ²/σ'² of the noise in the next latent is new, so much that σ'/σ is kept.
        kept = median([b / a for a, b in pairwise(noise)] or [0.0]) if self._fresh_noise else 1.0
        fresh = "This loop" if self._fresh_noise else None
        return Timeline(tuple(noise), self._prediction, fresh_noise=fresh, kept=kept, end=self._noise[-1])


def _levels(name: str, values: Numbers | None, largest: float) -> list[float]:
    """Numbers from 0 to ``largest`` that fall or rise from step to step."""
    levels = _numbers(name, values)
    if len(levels) < 2:
        raise ConfigError(
            f"{name} are {levels}: give one more than there are steps, the last being where the last ends"
        )
    for level in levels:
        if not 0 <= level <= largest:
            raise ConfigError(f"{name} contain {level:g}, and must be from 0 to {largest:g}")
    _check_order(name, levels)
    return levels


def _numbers(name: str, values: Any) -> list[float]:
    try:
        return [float(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be a sequence of numbers, not {values!r}") from error


def _check_order(name: str, values: list[float]) -> None:
    falls = values[-1] < values[0]
    for i, (a, b) in enumerate(pairwise(values)):
        if not (b < a if falls else b > a):
            raise ConfigError(
                f"{name} must fall from step to step, or rise, and from number {i} to number {i + 1} they go from {a:g}"
                f" to {b:g}"
            )


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else math.inf


def _is_near(time: float, first: float) -> bool:
    """Up to rounding to bfloat16."""
    return math.isclose(time, first, rel_tol=1e-2, abs_tol=4e-3)


def _place(times: list[float], time: float, precision: float) -> int | None:
    """The step that begins at a time; None where none does, up to rounding and a quarter of the way to its neighbours.

    Args:
        precision: relative, of the time.
    """
    step = min(range(len(times)), key=lambda i: abs(times[i] - time))
    neighbours = times[max(step - 1, 0) : step + 2]
    apart = min((abs(other - times[step]) for other in neighbours if other != times[step]), default=0.0)
    allowed = max(apart / 4, 2 * precision * max(map(abs, times)))
    return step if abs(times[step] - time) <= allowed else None


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
