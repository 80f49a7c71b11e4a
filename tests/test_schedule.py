from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tap_diffusion.schedule import full_steps


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
