"""What a scheduler of diffusers tells about the noise of its steps: read off its arithmetic, never off its name.

A copy of the scheduler is run on a model of one point, for which a single x₀ is possible. Such a model's output is
known at any noise, for each kind of prediction. The right kind is the one whose steps all land on the scheduler's own
noise levels and end at x₀. Fresh noise shows in that runs with other random numbers differ.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import random
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, get_args

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from tap_diffusion.core.timeline import Prediction, Timeline


@dataclass(frozen=True)
class Reading:
    """What a scheduler's steps turned out to be.

    Attributes:
        timeline: the noise of the steps and what the model predicts; None where they can't be read.
        fresh_noise: each step, or some, adds random noise.
        unread: why there is no timeline, as one sentence that begins with the scheduler's class. None where there is.
    """

    timeline: Timeline | None
    fresh_noise: bool
    unread: str | None


def timeline(scheduler: Any, first: int, step_kwargs: Mapping[str, Any] | None = None) -> Timeline | None:
    """The noise from the step with index ``first`` on: the timeline of :func:`read`, with its arguments."""
    return read(scheduler, first, step_kwargs).timeline


def read(scheduler: Any, first: int, step_kwargs: Mapping[str, Any] | None = None) -> Reading:
    """Find out what the noise of a scheduler's steps is, what its model predicts, and whether steps are random.

    It takes some milliseconds, once for the same settings. The scheduler itself and all random states are left as they
    are. Whatever it raises is caught, and told as the reason why it is unread.

    Args:
        scheduler: after ``set_timesteps``; a scheduler of diffusers, or anything that behaves like one.
        first: index into its timesteps, where a trajectory begins (image to image begins later than at 0).
        step_kwargs: what the pipeline passes to ``step`` beside output, timestep and sample, such as ``eta``. Only
            numbers count, and only those that ``step`` takes.
    """
    name = type(scheduler).__name__
    try:
        with _random_states_kept():
            trial = _Trial(scheduler, first, step_kwargs or {})
            key = trial.key
            if key not in _readings:
                if len(_readings) >= 64:
                    _readings.pop(next(iter(_readings)), None)
                _readings[key] = trial.read()
            return _readings[key]
    except _UnreadError as error:
        return Reading(None, False, f"{name} {error}")
    except Exception as error:  # whatever a strange scheduler raises
        return Reading(None, False, f"{name} can't be tried out: {_told(error)}")


_readings: dict[Any, Reading] = {}

# Several points at once, so that chance does not fit. Clean values are within ±0.9, since some solvers clip at ±1.
_SHAPE = (1, 4, 2, 8)
_NOISE = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
_CLEAN = torch.linspace(-0.9, 0.9, 64, dtype=torch.float64).reshape(_SHAPE).flip(-1)


class _UnreadError(Exception):
    """The argument says why, as the end of a sentence that begins with the scheduler."""


@dataclass(frozen=True)
class _Levels:
    """States are x = α x₀ + σ ε. ``scale`` is the standard deviation that x₀ is scaled for, 1 but for EDM."""

    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    scale: float = 1.0

    @property
    def noise(self) -> tuple[float, ...]:
        pairs = zip(self.alpha, self.sigma, strict=True)
        return tuple(sigma / (alpha * self.scale) if alpha > 0 else math.inf for alpha, sigma in pairs)

    @property
    def falls(self) -> bool:
        noise = self.noise
        return noise[-1] > 0 and min(self.alpha) >= 0 and all(a > b for a, b in pairwise(noise))

    def output(self, step: int, kind: Prediction, clean: Tensor, x: Tensor) -> Tensor:
        """What a perfect model for ``clean`` makes of a state."""
        alpha, sigma = self.alpha[step], self.sigma[step]
        noise = (x - alpha * clean) / sigma
        match kind:
            case "flow":
                return noise - clean
            case "epsilon":
                return noise
            case "sample":
                return clean.clone()
            case "v_prediction":
                return (self.scale * alpha * noise - sigma * clean / self.scale) / math.hypot(self.scale * alpha, sigma)


class _Trial:
    """A scheduler's steps, tried out on copies of it that are on the CPU and that no step has been taken on."""

    def __init__(self, scheduler: Any, first: int, step_kwargs: Mapping[str, Any]) -> None:
        if not callable(getattr(scheduler, "step", None)):
            raise _UnreadError("has no step method")
        if not 0 <= first < len(scheduler.timesteps):
            raise _UnreadError(f"has no timestep number {first}")
        self._unused = _unused_twin(scheduler)
        if self._unused.timesteps is scheduler.timesteps:
            raise _UnreadError("can't be copied, and trying out the one in use would change it")
        self._first = first
        self._timesteps = self._unused.timesteps[first:]
        taken = dict(inspect.signature(scheduler.step).parameters)
        free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        if free and hasattr(type(scheduler), "step"):  # a watch around it, which takes whatever it takes
            taken |= inspect.signature(type(scheduler).step).parameters
        self._seeded = "generator" in taken
        self._looks_back = "old_pred_original_sample" in taken  # CogVideoX: its step has arguments of its own
        self._kwargs = {
            name: value
            for name, value in step_kwargs.items()
            if isinstance(value, bool | int | float) and name != "return_dict" and (free or name in taken)
        }
        self._raised: Exception | None = None

    @property
    def key(self) -> Any:
        """All that the reading depends on."""
        return self._first, _facts(self._unused), tuple(sorted(self._kwargs.items()))

    def read(self) -> Reading:
        name = type(self._unused).__name__
        falls = False
        for levels in self._possible_levels():
            falls = True
            for kind, sign in self._kinds(levels):
                try:
                    kept = self._kept(levels, kind, sign)
                except Exception as error:  # this kind may be what the solver can't take, such as ε at α = 0
                    self._raised = error
                    continue
                if kept is not None:
                    fresh = kept < 1
                    known = Timeline(levels.noise, kind, fresh_noise=name if fresh else None, kept=kept)
                    return Reading(known, fresh, None)
        if not falls:
            reason = "does not tell a noise that falls from step to step"
        elif self._raised is not None:
            reason = f"can't be tried out: {_told(self._raised)}"
        else:
            reason = (
                f"does not end at the clean sample, whatever its model predicts ({', '.join(get_args(Prediction))})"
            )
        return Reading(None, self._draws(), f"{name} {reason}")

    # ------------------------------------------------------------------------------------------------------ hypotheses

    def _possible_levels(self) -> Iterator[_Levels]:
        for source in (self._told_levels, self._flow_levels, self._run_levels):
            try:
                levels = source()
            except Exception as error:
                self._raised = error
                continue
            if levels is not None and levels.falls:
                yield levels

    def _told_levels(self) -> _Levels | None:
        """What the scheduler makes of x₀ = 1 without noise, and of noise without x₀."""
        twin, times = _copy(self._unused), self._timesteps
        clean, noise = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).expand(len(times), 2, 2).unbind(1)
        if hasattr(twin, "scale_noise"):
            make = twin.scale_noise
        elif hasattr(twin, "add_noise"):
            make = lambda clean, times, noise: twin.add_noise(clean, noise, times)  # noqa: E731
        else:
            return None
        if len(times.unique()) == len(times) or not hasattr(twin, "set_begin_index"):
            made = make(clean, times, noise)
        else:  # a timestep does not tell the level (Karras sigmas, many steps), but the place where a run begins does
            levels = []
            for step in range(len(times)):
                twin.set_begin_index(self._first + step)
                levels.append(make(clean[step : step + 1], times[step : step + 1], noise[step : step + 1]))
            made = torch.cat(levels)
        alpha, sigma = made.double().unbind(1)
        return self._scaled(_Levels(tuple(alpha.tolist()), tuple(sigma.tolist())))

    def _scaled(self, levels: _Levels) -> _Levels:
        """With the scale of data for which inputs of the model, so scaled as they are, have a variance of 1."""
        twin = self._begun(len(self._unused.timesteps) - 1)
        if not hasattr(twin, "scale_model_input"):
            return levels
        factor = float(twin.scale_model_input(torch.ones(_SHAPE, dtype=torch.float64), self._timesteps[-1]).mean())
        alpha, sigma = levels.alpha[-1], levels.sigma[-1]
        left = 1 / factor**2 - sigma**2
        if abs(factor - 1) < 1e-9 or left <= 0 or alpha <= 0:
            return levels
        scale = math.sqrt(left) / alpha
        return levels if abs(scale - 1) < 1e-3 else _Levels(levels.alpha, levels.sigma, scale)

    def _flow_levels(self) -> _Levels | None:
        """Its sigmas, taken for those of a flow."""
        sigmas = getattr(self._unused, "sigmas", None)
        if not isinstance(sigmas, Tensor) or len(sigmas) < len(self._unused.timesteps):
            return None
        sigma = sigmas[self._first :][: len(self._timesteps)].double()
        return _Levels(tuple((1 - sigma).tolist()), tuple(sigma.tolist()))

    def _run_levels(self) -> _Levels | None:
        """Those of a flow whose steps are these: under a constant output F = ε - x₀, σ changes as x does per F."""
        ones = torch.ones(_SHAPE, dtype=torch.float64)
        *moved, end = [float(x.mean()) for x in self._states(lambda *_: ones, 0 * ones, 0)]
        sigma = [abs(end - value) for value in moved]
        if abs(sigma[0] - 1) < 1e-5:  # rounding
            sigma[0] = 1.0
        return _Levels(tuple(1 - value for value in sigma), tuple(sigma))

    def _kinds(self, levels: _Levels) -> list[tuple[Prediction, int]]:
        """What the model may predict, or predict the negative of (MiniMax-H3, Mochi); the likeliest first."""
        told = getattr(self._unused, "config", {}).get("prediction_type", "epsilon")
        is_flow = all(abs(alpha + sigma - 1) < 1e-6 for alpha, sigma in zip(levels.alpha, levels.sigma, strict=True))
        kinds: list[Prediction] = sorted(
            get_args(Prediction), key=lambda kind: (not (is_flow and kind == "flow"), kind != told)
        )
        return [(kind, sign) for sign in (1, -1) for kind in kinds]

    def _kept(self, levels: _Levels, kind: Prediction, sign: int) -> float | None:
        """Correlation of each state's noise with the next one's, if the model predicts this; None if it does not."""

        def run(clean: Tensor, seed: int) -> Iterator[Tensor]:
            start = levels.alpha[0] * clean + levels.sigma[0] * _NOISE
            return self._states(lambda step, x: sign * levels.output(step, kind, clean, x), start, seed)

        places = [*zip(levels.alpha, levels.sigma, strict=True), None]
        reach = levels.alpha[0] + levels.sigma[0]
        for x, place in zip(run(_CLEAN, 0), places, strict=True):
            if place is None:
                return 1.0 if _ends_well(x, levels) else None
            alpha, sigma = place
            if not _near(x, alpha * _CLEAN + sigma * _NOISE, alpha + sigma, reach):
                if not self._has_drawn():
                    return None
                if _random_states() != self._drawn_before[2]:
                    # In spite of the generator (FlowMatchEulerDiscreteScheduler before diffusers 0.39).
                    self._seeded = False
                break
        # It draws. Then what a state holds beside α x₀ must be noise that knows nothing of x₀. It may be more than σ
        # (DDPM with a large variance), but not much less.
        noises = []
        for (x, bare), place in zip(self._both(run(_CLEAN, 0), run(0 * _CLEAN, 0)), places, strict=True):
            size = float(bare.square().mean().sqrt())
            if place is None:
                clean = float(((x - bare) * _CLEAN).sum() / _CLEAN.square().sum())
                if abs(clean - 1) > 1e-3 + size or size > 2 * levels.sigma[-1] + 1e-3:
                    return None
                break
            alpha, sigma = place
            if not sigma / 2 < size or not _near(x - bare, alpha * _CLEAN, alpha + sigma, reach):
                return None
            noises.append(bare.flatten())
        if not self._differs(run(_CLEAN, 0), run(_CLEAN, 1)):
            return None
        alike = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairwise(noises)]
        return min(median(alike), 1 - 1e-6) if alike else 0.0

    def _draws(self) -> bool:
        """Whether other random numbers make another result, with a model of no meaning."""
        try:
            return self._differs(*(self._states(lambda _, x: 0.1 * x, _NOISE, seed) for seed in (0, 1)))
        except Exception:
            return False

    def _differs(self, one: Iterator[Tensor], other: Iterator[Tensor]) -> bool:
        return any(not torch.equal(a, b) for a, b in self._both(one, other))

    def _both(self, one: Iterator[Tensor], other: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Two runs side by side; one after the other where they draw from the same random numbers."""
        return zip(one, other, strict=True) if self._seeded else zip([*one], [*other], strict=True)

    # ------------------------------------------------------------------------------------------------------------ runs

    def _begun(self, index: int) -> Any:
        """A copy that stands before a step."""
        twin = _copy(self._unused)
        if hasattr(twin, "set_begin_index"):
            twin.set_begin_index(index)
        return twin

    def _states(self, model: Any, start: Tensor, seed: int) -> Iterator[Tensor]:
        """What each step starts from, and then what the last one leaves; all float64.

        Args:
            model: output from the step, counted from the first, and the state.
            start: x at the first step.
            seed: of the random numbers.
        """
        twin = self._begun(self._first)
        generator = torch.Generator().manual_seed(seed)
        if not self._seeded:
            _seed_all(seed)
        self._drawn_before = generator, generator.get_state(), _random_states()
        scale = getattr(twin, "scale_model_input", None)
        kwargs = self._kwargs | ({"generator": generator} if self._seeded else {})
        x, clean = start, None
        for step, time in enumerate(self._timesteps):
            yield x
            if scale is not None:
                scale(x, time)
            output = model(step, x)
            if self._looks_back:
                before = twin.timesteps[self._first + step - 1] if step else None
                x, clean = twin.step(output, clean, time, before, x, **kwargs, return_dict=False)
            else:
                result = twin.step(output, time, x, **kwargs)
                x = result.prev_sample if hasattr(result, "prev_sample") else result[0]
            x = x.double()
        yield x

    def _has_drawn(self) -> bool:
        """Whether the run that was begun last has used random numbers."""
        generator, state, others = self._drawn_before
        return not torch.equal(generator.get_state(), state) or _random_states() != others


def _near(x: Tensor, expected: Tensor, level: float, reach: float) -> bool:
    """Equal up to rounding: to float32, at the size that x has and had at the start."""
    return bool((x - expected).abs().max() < 1e-4 * level + 1e-6 * reach)


def _ends_well(x: Tensor, levels: _Levels) -> bool:
    """Whether what the last step leaves is x₀, or a level with no more noise than that step began with."""
    basis = torch.stack([_CLEAN.flatten(), _NOISE.flatten()], dim=1)
    clean, noise = (float(part) for part in torch.linalg.solve(basis.T @ basis, basis.T @ x.flatten()))
    if not _near(x, clean * _CLEAN + noise * _NOISE, 1.0, levels.alpha[0] + levels.sigma[0]):
        return False
    is_level = any(abs(total - 1) < 1e-3 for total in (clean, clean + noise, clean**2 + noise**2))
    return is_level and -1e-3 < noise <= 1.001 * levels.noise[-1] * levels.scale * clean + 1e-3


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# -------------------------------------------------------------------------------------------------------- random states


def _random_states() -> tuple[Any, ...]:
    _, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(keys).tobytes(), *rest


def _seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # of the CPU alone, where torch.manual_seed also seeds devices
    random.seed(seed)
    np.random.seed(seed)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    before, of_torch, of_python, of_numpy = (
        _random_states(), torch.get_rng_state(), random.getstate(), np.random.get_state()
    )  # fmt: skip
    try:
        with torch.no_grad():
            yield
    finally:
        if _random_states() != before:
            torch.set_rng_state(of_torch)
            random.setstate(of_python)
            np.random.set_state(of_numpy)


# --------------------------------------------------------------------------------------------------------------- copies


def _unused_twin(scheduler: Any) -> Any:
    """A copy on the CPU, with the same timesteps and none of what steps have left."""
    parts: list[Any] = []
    twin = _copy(scheduler, parts=parts)
    kept = [{name: value for name, value in vars(part).items() if _is_setting(name, value)} for part in parts]
    steps = getattr(twin, "num_inference_steps", None) or len(twin.timesteps)
    for arguments in ({}, {"mu": 1.0}):  # with dynamic shifting mu is asked for
        try:
            twin.set_timesteps(steps, **arguments)
            break
        except Exception:
            continue
    for part, settings in zip(parts, kept, strict=True):
        vars(part).update(settings)
        vars(part).update({name: None for name in ("_step_index", "_begin_index") if name in vars(part)})
    return twin


def _is_setting(name: str, value: Any) -> bool:
    """Timesteps, noise levels and the like. What steps leave is something else: counters, lists and latents."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim == 1
    return isinstance(value, bool | str | float) or name == "num_inference_steps"


def _copy(value: Any, memo: dict[int, Any] | None = None, parts: list[Any] | None = None) -> Any:
    """A deep copy on the CPU.

    ``copy.deepcopy`` would double what is on a GPU, and fails on objects that forward all attributes to another one.

    Args:
        memo: copies made so far, by the id of what they are of.
        parts: the copied schedulers are added to it, wrappers among them.
    """
    memo, parts = {} if memo is None else memo, [] if parts is None else parts
    if isinstance(value, _PLAIN):
        return value
    if id(value) in memo:
        return memo[id(value)]
    made: Any
    if isinstance(value, Tensor):
        made = value.detach().to("cpu", copy=True)
    elif type(value) in (list, tuple):
        made = type(value)(_copy(item, memo, parts) for item in value)
    elif type(value) is dict:
        made = {name: _copy(item, memo, parts) for name, item in value.items()}
    elif isinstance(value, types.MethodType):
        made = types.MethodType(value.__func__, _copy(value.__self__, memo, parts))
    elif isinstance(value, types.FunctionType) and value.__closure__:
        # One in place of a method, such as a watch around step: the copy is to step the copy.
        cells = tuple(types.CellType(_copy(cell.cell_contents, memo, parts)) for cell in value.__closure__)
        made = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        made.__kwdefaults__ = value.__kwdefaults__
        vars(made).update(vars(value))
    elif isinstance(value, functools.partial):
        arguments = _copy(value.args, memo, parts), _copy(value.keywords, memo, parts)
        made = functools.partial(_copy(value.func, memo, parts), *arguments[0], **arguments[1])
    elif isinstance(value, DiffusionPipeline):
        raise _UnreadError("holds a pipeline, which is not copied")
    elif callable(getattr(value, "step", None)) and hasattr(value, "__dict__"):
        made = memo[id(value)] = object.__new__(type(value))
        parts.append(made)
        vars(made).update({name: _copy(item, memo, parts) for name, item in vars(value).items()})
    else:
        made = copy.deepcopy(value, memo)
    memo[id(value)] = made
    return made


# What a copy shares: numbers, names, and what nobody writes to while stepping.
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type, FrozenDict, nn.Module)


def _facts(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """A value as something hashable that is equal where the value is."""
    if id(value) in seen:
        return None
    if isinstance(value, Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            (value.float() if value.is_floating_point() else value).numpy().tobytes(),
        )
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, list | tuple):
        return type(value), tuple(_facts(item, seen) for item in value)
    if isinstance(value, Mapping):
        return type(value), tuple((name, _facts(item, seen)) for name, item in value.items())
    if isinstance(value, types.MethodType):
        return value.__func__, _facts(value.__self__, seen)
    if isinstance(value, types.FunctionType):
        return value.__code__, tuple(_facts(cell.cell_contents, seen) for cell in value.__closure__ or ())
    if isinstance(value, functools.partial):
        return _facts(value.func, seen), _facts(value.args, seen), _facts(value.keywords, seen)
    if callable(getattr(value, "step", None)) and hasattr(value, "__dict__"):
        return type(value), tuple((name, _facts(item, seen | {id(value)})) for name, item in vars(value).items())
    return type(value), repr(value)
