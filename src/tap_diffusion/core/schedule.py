"""Which steps are full."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

from tap_diffusion.core.config import DEFAULT_SPEEDUP, TAPConfig
from tap_diffusion.core.errors import ConfigError
from tap_diffusion.core.timeline import TAIL, Timeline

FEWEST = 6  # full steps that a speed-up leaves: with fewer, windows are longer than has been seen to work


@lru_cache(maxsize=64)
def plan(
    config: TAPConfig,
    steps: int | None,
    timeline: Timeline | None,
    tokens: int | None = None,
    within: range | None = None,
) -> Callable[[int], bool]:
    """Which steps of a trajectory are full.

    Args:
        config: its ``full_steps``, ``interval`` or ``speedup``, in this order.
        steps: of the trajectory; None where nobody knows.
        timeline: its noise as its tokens see it, where it is known.
        tokens: of the stream, which count where there is no timeline; None: not known yet.
        within: steps among which the configuration divides, where all others are full whatever it says; None: all.

    Returns:
        A function of the step, counted from the start of the trajectory.

    Raises:
        ConfigError: a number of full steps is asked for, and nobody knows of how many steps; or the full steps are
            for another number of steps.
    """
    if within is not None:
        return _plan_within(config, timeline, tokens, within)
    if isinstance(config.full_steps, tuple):
        if config.steps is not None and steps is not None and steps != config.steps:
            raise ConfigError(
                f"these full steps are for trajectories of {config.steps} steps, and this one has {steps}: plan them"
                " anew (`tap tune`), or give their number, TAPConfig(full_steps=...)"
            )
        return frozenset(config.full_steps).__contains__
    steps = steps or config.steps
    interval = config.interval
    if interval is None and steps is None:
        if config.full_steps is not None:
            raise ConfigError(
                f"{config.full_steps} full steps are asked for, but a transformer by itself does not know the number"
                " of steps: enable TAP on the pipeline, or pass TAPConfig(steps=...) too"
            )
        interval = round(config.speedup)
    if interval is not None:
        return lambda step: is_full_step(step, interval, config.warmup)
    assert steps is not None
    count = _count(config, steps)
    full = frozenset(spaced_steps(config, steps, count, timeline, tokens))
    return lambda step: step in full or step >= steps  # none is predicted that was not planned


def _plan_within(
    config: TAPConfig, timeline: Timeline | None, tokens: int | None, within: range
) -> Callable[[int], bool]:
    if isinstance(config.full_steps, tuple):
        given = config.full_steps
        return lambda step: step == 0 or step not in within or step in given
    if not within:
        return lambda _: True
    part = None if timeline is None else replace(timeline, noise=timeline.noise[within.start : within.stop], full=())
    is_full = plan(config, len(within), part, tokens)
    return lambda step: step not in within or is_full(step - within.start)


def for_the_rest(config: TAPConfig, steps: int | None, steps_before: int, full_before: int) -> TAPConfig:
    """What a configuration asks of the rest of a sampling run that another transformer has begun (Wan 2.2).

    Full steps are those of the whole run, however many transformers share it. Each begins with a full step.

    Args:
        steps: of the rest.
        steps_before: that the run had before.
        full_before: how many of these were full.
    """
    if not steps_before or steps is None:
        return config
    if isinstance(config.full_steps, tuple):
        later = tuple(step - steps_before for step in config.full_steps if step > steps_before)
        return replace(config, full_steps=(0, *later), steps=steps if config.steps else None)
    if config.full_steps is not None:
        return replace(config, full_steps=max(1, config.full_steps - full_before))
    if config.interval is None:
        count = _count(config, steps_before + steps)
        return replace(config, full_steps=max(1, count - full_before), speedup=DEFAULT_SPEEDUP)
    return config


def _count(config: TAPConfig, steps: int) -> int:
    """How many of so many steps are full."""
    assert not isinstance(config.full_steps, tuple)
    return config.full_steps or max(min(FEWEST, steps), round(steps / config.speedup))


def spaced_steps(
    config: TAPConfig, steps: int, count: int, timeline: Timeline | None, tokens: int | None = None
) -> tuple[int, ...]:
    """``count`` full steps of a trajectory, even on the ``clock`` of a configuration (arguments as in :func:`plan`)."""
    if config.clock == "step":
        return clock_steps(range(steps), count)
    known = Timeline.untold(steps, tokens) if timeline is None else timeline
    return clock_steps(known.spacing, count, TAIL)


def is_full_step(step: int, interval: int, warmup: int) -> bool:
    """The paper's schedule: ``warmup`` full steps, then one full step in every ``interval``.

    With 3 warm-up steps and interval 8 the full steps are 0, 1, 2, 10, 18, 26, …
    """
    return step < warmup or (step - warmup + 1) % interval == 0


def full_steps(steps: int, interval: int, warmup: int) -> list[int]:
    """Indices of the full steps of a trajectory of ``steps`` steps."""
    return [step for step in range(steps) if is_full_step(step, interval, warmup)]


def paper_steps(steps: int, count: int, warmup: int = 3) -> tuple[int, ...]:
    """The paper's schedule with as many full steps as ``count``, by the smallest interval that gives no more.

    Intervals are whole numbers, so there may be fewer: of 50 steps 14, 10, 8 and 6 can be had, 11 can't.

    Raises:
        ValueError: even the warm-up is more than ``count``.
    """
    for interval in range(1, steps + 1):
        full = full_steps(steps, interval, warmup)
        if len(full) <= count:
            return tuple(full)
    raise ValueError(f"{warmup} warm-up steps are more than the {count} full steps wanted")


def even_steps(steps: int, count: int, warmup: int = 1) -> tuple[int, ...]:
    """``warmup`` full steps, the others evenly spaced from there to the last step but one.

    The last step moves the latent least, so it is better predicted from a full step just before than full.
    """
    if not 1 <= warmup <= count < steps:
        raise ValueError(f"{count} full steps of {steps} with {warmup} warm-up steps can't be had")
    first, windows = warmup - 1, count - warmup
    later = [first + round((steps - 2 - first) * i / windows) for i in range(1, windows + 1)]
    return (*range(warmup), *later)


def spectrum_steps(steps: int, window: float = 2.0, growth: float = 0.75, warmup: int = 5) -> list[int]:
    """Indices of the full steps by Spectrum's schedule, whose windows grow (arXiv 2603.01623, appendix B.1).

    After the warm-up the i-th next full step comes ⌊window + i·growth⌋ steps after the last, i = 0, 1, … With the
    defaults, of the published code, and 50 steps the full steps are 0 to 4, 6, 8, 11, 15, 20, 25, 31, 38 and 46.

    Args:
        steps: length of the trajectory.
        window: 𝒩, the first window, in steps.
        growth: α, by which each window is longer than the last, in steps.
        warmup: full steps at the start.

    Raises:
        ValueError: ``window`` or ``warmup`` is less than 1, or ``growth`` is negative.
    """
    if window < 1 or growth < 0 or warmup < 1:
        raise ValueError(
            f"window and warmup must be at least 1 and growth at least 0; got {window=}, {growth=}, {warmup=}"
        )
    full = list(range(min(warmup, steps)))
    step = warmup - 1
    while (step := step + math.floor(window)) < steps:
        full.append(step)
        window = round(window + growth, 3)  # as published: else floor(1.9999…) where 2 is meant
    return full


def growing_steps(steps: int, count: int) -> tuple[int, ...]:
    """``count`` full steps in windows that grow by as much each, the first of one step, the last half over at the end.

    After Spectrum, whose windows grow too (:func:`spectrum_steps`), but for any count, and without its warm-up: full
    step i comes at i + g i (i - 1) / 2, rounded, with the growth g that puts number ``count`` - ½ at the end. Of 50
    steps 10 full ones are 0, 1, 3, 6, 10, 15, 21, 28, 36 and 45.

    Args:
        steps: of the trajectory.
        count: full steps wanted; all steps are full where there are no more.

    Raises:
        ValueError: ``count`` is less than 1.
    """
    _require_any(count)
    if count >= steps:
        return tuple(range(steps))
    end = count - 0.5
    growth = 2 * (steps - end) / (end * (end - 1)) if count > 1 else 0.0
    return tuple(round(i + growth * i * (i - 1) / 2) for i in range(count))


def clock_steps(clock: Sequence[float], count: int, tail: float = 0.0) -> tuple[int, ...]:
    """``count`` full steps, evenly spaced on a clock from the first step to the last but one, or earlier.

    Args:
        clock: time of each step, increasing.
        count: full steps wanted; all steps are full where there are no more.
        tail: how much of a window is left after the last full step: 0: it is the last step but one; 1: a whole window,
            up to the end; linear in between.

    Raises:
        ValueError: ``count`` is less than 1.
    """
    _require_any(count)
    last = len(clock) - 2
    if count > last:
        return tuple(range(min(count, len(clock))))
    end = (1 - tail) * clock[last] + tail * (2 * clock[-1] - clock[last])
    full = [0]
    for i in range(1, count):
        wanted = clock[0] + (end - clock[0]) * i / (count - 1 + tail)
        possible = range(full[-1] + 1, last - (count - 1 - i) + 1)
        full.append(min(possible, key=lambda step: round(abs(clock[step] - wanted), 9)))
    return tuple(full)


def _require_any(count: int) -> None:
    if count < 1:
        raise ValueError(f"{count} full steps can't be had; at least the first step is full")
