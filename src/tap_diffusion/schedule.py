"""Which steps are full."""

from __future__ import annotations


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
