from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tap_diffusion import ConfigError, TAPConfig
from tap_diffusion.core.schedule import (
    FEWEST,
    clock_steps,
    even_steps,
    full_steps,
    growing_steps,
    paper_steps,
    plan,
    spaced_steps,
    spectrum_steps,
)
from tap_diffusion.core.timeline import FEW, Timeline


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
    full = spectrum_steps(50)
    assert full == [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]  # 14 evaluations, as published


@given(
    st.integers(1, 120), st.integers(4, 40).map(lambda n: n / 4), st.integers(0, 60).map(lambda n: n / 20),
    st.integers(1, 12),
)  # fmt: skip
def test_growing_windows_are_those_of_the_counter(steps: int, window: float, growth: float, warmup: int) -> None:
    assert spectrum_steps(steps, window, growth, warmup) == counted_steps(steps, window, growth, warmup)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 12))
def test_windows_that_do_not_grow_are_the_interval(steps: int, interval: int, warmup: int) -> None:
    assert spectrum_steps(steps, interval, 0, warmup) == full_steps(steps, interval, warmup)


def test_tenths_add_up() -> None:
    # 2.4 + 0.3 + 0.3 is 2.9999999999999996.
    assert spectrum_steps(14, window=2.4, growth=0.3, warmup=1) == [0, 2, 4, 7, 10, 13]


@pytest.mark.parametrize("changes", [{"window": 0.5}, {"growth": -1}, {"warmup": 0}])
def test_windows_that_never_end_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        spectrum_steps(50, **changes)


@pytest.mark.parametrize(("count", "interval"), [(14, 4), (10, 6), (8, 8)])
def test_paper_schedule_of_a_budget(count: int, interval: int) -> None:
    assert paper_steps(50, count) == tuple(full_steps(50, interval, warmup=3))


@given(st.integers(1, 80), st.integers(3, 80))
def test_paper_schedule_spends_no_more_than_the_budget(steps: int, count: int) -> None:
    counts = [len(full_steps(steps, interval, warmup=3)) for interval in range(1, steps + 1)]
    assert len(paper_steps(steps, count)) == max(full for full in counts if full <= count)


def test_too_small_a_budget_for_the_warm_up() -> None:
    with pytest.raises(ValueError, match="3 warm-up steps are more than the 2"):
        paper_steps(50, 2)


def test_even_schedules_of_the_trials() -> None:
    assert even_steps(50, 8) == (0, 7, 14, 21, 27, 34, 41, 48)
    assert even_steps(50, 8, warmup=2) == (0, 1, 9, 17, 25, 32, 40, 48)


@given(st.data())
def test_even_windows_differ_by_a_step_at_most(data: st.DataObject) -> None:
    steps = data.draw(st.integers(4, 100))
    count = data.draw(st.integers(2, steps - 2))
    warmup = data.draw(st.integers(1, count - 1))
    full = even_steps(steps, count, warmup)
    assert len(full) == count
    assert full[:warmup] == tuple(range(warmup))
    assert full[-1] == steps - 2
    windows = [b - a for a, b in pairwise(full[warmup - 1 :])]
    assert max(windows) - min(windows) <= 1
    assert min(windows) >= 1


# ---------------------------------------------------------------------------------------------------- growing windows


def test_growing_windows_of_fifty_steps() -> None:
    assert growing_steps(50, 10) == (0, 1, 3, 6, 10, 15, 21, 28, 36, 45)
    assert growing_steps(50, 1) == (0,)
    assert growing_steps(4, 4) == growing_steps(4, 9) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="at least the first"):
        growing_steps(50, 0)


@given(st.data())
def test_growing_windows_lie_on_a_parabola_whose_last_window_is_cut_in_half(data: st.DataObject) -> None:
    steps = data.draw(st.integers(4, 120))
    count = data.draw(st.integers(2, steps - 1))
    full = growing_steps(steps, count)
    assert len(full) == count
    assert full[0] == 0
    assert full[-1] < steps
    assert all(a < b for a, b in pairwise(full))
    end = count - 0.5
    # Through (0, 0), (1, 1) and (end, steps).
    bend, slope = np.linalg.solve(np.array([[1, 1], [end**2, end]]), np.array([1, steps]))
    assert all(abs(bend * i**2 + slope * i - step) <= 0.5 + 1e-9 for i, step in enumerate(full))


# ------------------------------------------------------------------------------------------------------- on the clock


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=60), st.integers(1, 70))
def test_clock_steps_are_as_many_as_wanted_from_the_first_to_the_last_but_one(gaps: list[float], count: int) -> None:
    clock = list(accumulate(gaps))
    full = clock_steps(clock, count)
    assert len(full) == min(count, len(clock))
    assert full[0] == 0
    assert all(a < b for a, b in pairwise(full))
    if 1 < count <= len(clock) - 2:
        assert full[-1] == len(clock) - 2


def test_clock_steps_are_the_nearest() -> None:
    clock = [step**2 for step in range(12)]  # wanted at 0, 25, 50, 75, 100
    assert clock_steps(clock, 5) == (0, 5, 7, 9, 10)


def test_a_whole_window_is_left_at_the_end() -> None:
    assert clock_steps(range(50), 8, tail=1.0) == (0, 6, 12, 19, 25, 31, 37, 44)  # 50 / 8 apart
    assert clock_steps(range(48), 6, tail=1.0) == (0, 8, 16, 24, 32, 40)
    assert clock_steps(range(48), 6, tail=0.5) == (0, 9, 17, 26, 34, 43)
    assert clock_steps(range(4), 3, tail=1.0) == (0, 1, 2)


def test_even_on_a_clock_that_counts_steps() -> None:
    assert clock_steps(range(50), 8) == (0, 7, 14, 21, 27, 34, 41, 48)


def test_a_plan_by_each_of_its_three_names() -> None:
    def full(config: TAPConfig, steps: int | None = 50) -> list[int]:
        is_full = plan(config, steps, None)
        return [step for step in range(50) if is_full(step)]

    assert full(TAPConfig(interval=8)) == full_steps(50, 8, 3)
    assert full(TAPConfig(full_steps=(0, 3, 20))) == [0, 3, 20]
    assert full(TAPConfig(full_steps=8)) == [0, 4, 11, 19, 27, 34, 41, 47]
    assert full(TAPConfig(speedup=6.25)) == full(TAPConfig(full_steps=8))
    assert len(full(TAPConfig(speedup=50))) == FEWEST
    assert full(TAPConfig(speedup=4), None) == full_steps(50, 4, 3)  # nobody knows the steps
    assert full(TAPConfig(full_steps=5, steps=20), None) == [0, 3, 8, 13, 17, *range(20, 50)]  # nor does the user
    with pytest.raises(ConfigError, match=r"8 full steps are asked for.*TAPConfig\(steps="):
        plan(TAPConfig(full_steps=8), None, None)


def test_few_steps_leave_few_to_predict() -> None:
    for steps, count in ((4, 4), (6, 6), (8, 6), (28, 6), (50, 10)):
        is_full = plan(TAPConfig(), steps, None)
        assert sum(map(is_full, range(steps))) == count


# --------------------------------------------------------------------------------------------------- as the tokens see


def flow(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """σ/α of flow matching with that shift."""
    return (math.inf, *(shift * (steps - step) / step for step in range(1, steps)))


def planned(is_full: Callable[[int], bool], steps: int) -> list[int]:
    return [step for step in range(steps) if is_full(step)]


@pytest.mark.parametrize(("steps", "count"), [(50, 6), (50, 10), (50, 14), (28, 7), (28, 9)])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_the_more_tokens_the_earlier_are_full_steps(steps: int, count: int, shift: float) -> None:
    known = Timeline(flow(steps, shift), "flow")
    config = TAPConfig(full_steps=count)
    before = planned(plan(config, steps, known), steps)
    assert before == planned(plan(config, steps, replace(known, tokens=FEW)), steps)
    assert before == planned(plan(config, steps, replace(known, tokens=1)), steps)
    # With noise that stays high, 128 tokens have a later start than 64: there is little of a layout to tell yet.
    for tokens in (*([128] if shift <= 1 else []), 256, 1024, 4096, 100_000):
        full = planned(plan(config, steps, replace(known, tokens=tokens)), steps)
        assert len(full) == count
        assert full[0] == 0
        assert sum(full) < sum(before)
        before = full


@given(st.integers(1, 120), st.integers(1, 120))
def test_without_noise_a_shift_of_3_is_assumed(steps: int, count: int) -> None:
    count = min(count, steps)
    for tokens in (None, 16, FEW, 4096, 10**6):
        shifted = Timeline(flow(steps, 3.0), "flow", tokens=tokens)
        assert spaced_steps(TAPConfig(), steps, count, None, tokens) == spaced_steps(TAPConfig(), steps, count, shifted)
    assert spaced_steps(TAPConfig(clock="step"), steps, count, None, 4096) == clock_steps(range(steps), count)


def test_without_noise_windows_grow_for_many_tokens() -> None:
    full = planned(plan(TAPConfig(full_steps=9), 50, None, 4096), 50)
    assert full[:4] == [0, 1, 2, 4]
    assert 36 <= full[-1] <= 44
    assert len(full) == 9
    windows = np.diff(full)
    assert (windows[1:] >= windows[:-1]).all()


def test_a_part_of_the_steps_is_planned_as_a_trajectory_of_its_own() -> None:
    known, part = Timeline(flow(50, 3.0), "flow", tokens=4096), range(10, 40)
    outside = [*range(10), *range(40, 50)]
    for config in (TAPConfig(), TAPConfig(full_steps=7), TAPConfig(interval=4)):
        of_part = Timeline(known.noise[10:40], "flow", tokens=4096)
        expected = [10 + step for step in planned(plan(config, 30, of_part), 30)]
        assert planned(plan(config, 50, known, within=part), 50) == sorted({*outside, *expected})
    given_steps = TAPConfig(full_steps=(0, 3, 12, 20), steps=20)  # of the whole run, whose length is known
    assert planned(plan(given_steps, 50, known, within=part), 50) == sorted({*outside, 12, 20})
    assert planned(plan(TAPConfig(), 50, known, within=range(0)), 50) == list(range(50))
    assert planned(plan(TAPConfig(full_steps=(0, 3)), 50, known, within=range(50)), 50) == [0, 3]
