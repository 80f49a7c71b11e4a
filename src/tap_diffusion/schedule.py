"""Which steps are full."""

from __future__ import annotations

import math


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


def growing_steps(steps: int, window: float = 2.0, growth: float = 0.75, warmup: int = 5) -> list[int]:
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
