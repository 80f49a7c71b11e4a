from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tap_diffusion.schedule import full_steps, growing_steps


@pytest.mark.parametrize(("interval", "count"), [(4, 14), (6, 10), (8, 8)])
def test_full_evaluations_of_the_paper(interval: int, count: int) -> None:
    assert len(full_steps(50, interval, warmup=3)) == count


def test_full_steps_of_the_paper() -> None:
    assert full_steps(50, interval=8, warmup=3) == [0, 1, 2, 10, 18, 26, 34, 42]


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 12))
def test_warm_up_then_one_in_every_interval(steps: int, interval: int, warmup: int) -> None:
    full = full_steps(steps, interval, warmup)
    assert full[:warmup] == list(range(min(warmup, steps)))
    later = full[warmup - 1 :]
    assert all(b - a == interval for a, b in pairwise(later))
    assert steps - full[-1] <= max(interval, 1)


def counted_steps(steps: int, window: float, growth: float, warmup: int) -> list[int]:
    """Spectrum's rule as its code states it: count predicted steps, and grow the window at each full one."""
    full, predicted = [], 0
    for step in range(steps):
        is_full = step < warmup or (predicted + 1) % int(window) == 0
        if is_full:
            full.append(step)
            if step >= warmup:
                window = round(window + growth, 3)
        predicted = 0 if is_full else predicted + 1
    return full


def test_growing_windows_of_the_paper() -> None:
    full = growing_steps(50)
    assert full == [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]  # 14 evaluations, as published


@given(
    st.integers(1, 120), st.integers(4, 40).map(lambda n: n / 4), st.integers(0, 60).map(lambda n: n / 20),
    st.integers(1, 12),
)  # fmt: skip
def test_growing_windows_are_those_of_the_counter(steps: int, window: float, growth: float, warmup: int) -> None:
    assert growing_steps(steps, window, growth, warmup) == counted_steps(steps, window, growth, warmup)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 12))
def test_windows_that_do_not_grow_are_the_interval(steps: int, interval: int, warmup: int) -> None:
    assert growing_steps(steps, interval, 0, warmup) == full_steps(steps, interval, warmup)


def test_tenths_add_up() -> None:
    # 2.4 + 0.3 + 0.3 is 2.9999999999999996.
    assert growing_steps(14, window=2.4, growth=0.3, warmup=1) == [0, 2, 4, 7, 10, 13]


@pytest.mark.parametrize("changes", [{"window": 0.5}, {"growth": -1}, {"warmup": 0}])
def test_windows_that_never_end_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        growing_steps(50, **changes)
