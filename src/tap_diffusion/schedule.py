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
