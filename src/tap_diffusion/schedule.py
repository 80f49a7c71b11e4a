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
