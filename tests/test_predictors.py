"""Weights against closed forms and against the recursion of the paper, evaluated number by number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tap_diffusion.predictors import FAMILIES, candidates, difference_matrix, newton, taylor


@st.composite
def spacings(draw: st.DrawFn, min_size: int = 1, max_size: int = 5) -> list[float]:
    """Anchor times, newest first, with gaps of 1 to 12 steps."""
    gaps = draw(st.lists(st.integers(1, 12), min_size=min_size - 1, max_size=max_size - 1))
    newest = draw(st.integers(sum(gaps), sum(gaps) + 40))
    return [float(newest - sum(gaps[:i])) for i in range(len(gaps) + 1)]


def recursive_difference(values: Sequence[float], times: Sequence[float], i: int, j: int = 0) -> float:
    """Δ^iF(a_j), by the definition in section 1 of the design."""
    if i == 0:
        return values[j]
    upper = recursive_difference(values, times, i - 1, j)
    lower = recursive_difference(values, times, i - 1, j + 1)
    return (upper - lower) / (times[j] - times[j + 1])


@given(spacings(), st.data())
def test_differences_are_those_of_the_recursion(times: list[float], data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(-10, 10), min_size=len(times), max_size=len(times)))
    expected = [recursive_difference(values, times, i) for i in range(len(times))]
    np.testing.assert_allclose(difference_matrix(times) @ values, expected, atol=1e-9)


@given(spacings(), st.integers(1, 12), st.data())
def test_taylor_is_the_paper_s_sum(times: list[float], k: int, data: st.DataObject) -> None:
    order = data.draw(st.integers(0, len(times) - 1))
    values = data.draw(st.lists(st.floats(-10, 10), min_size=len(times), max_size=len(times)))
    expected = sum(recursive_difference(values, times, i) * float(k) ** i / math.factorial(i) for i in range(order + 1))
    scale = 1 + max(map(abs, values)) * float(k) ** order
    assert taylor(order)(times, times[0] + k) @ np.array(values) == pytest.approx(expected, abs=1e-9 * scale)


@pytest.mark.parametrize("family", FAMILIES)
@given(times=spacings(), k=st.floats(-4, 12), data=st.data())
def test_weights_sum_to_one(family: str, times: list[float], k: float, data: st.DataObject) -> None:
    order = data.draw(st.integers(0, len(times) - 1))
    weights = FAMILIES[family](order)(times, times[0] + k)
    assert weights.shape == (len(times),)
    assert weights.sum() == pytest.approx(1, abs=1e-9 * np.abs(weights).sum())


@pytest.mark.parametrize("family", FAMILIES)
@given(times=spacings(), k=st.floats(-4, 12))
def test_order_zero_is_reuse(family: str, times: list[float], k: float) -> None:
    np.testing.assert_array_equal(FAMILIES[family](0)(times, times[0] + k), [1.0] + [0.0] * (len(times) - 1))


@given(times=spacings(), k=st.floats(-4, 12), data=st.data())
def test_newton_reproduces_polynomials_of_its_degree(times: list[float], k: float, data: st.DataObject) -> None:
    order = data.draw(st.integers(0, len(times) - 1))
    polynomial = np.polynomial.Polynomial(
        data.draw(st.lists(st.floats(-3, 3), min_size=order + 1, max_size=order + 1)), domain=[0, 50], window=[0, 1]
    )
    weights = newton(order)(times, times[0] + k)
    predicted = weights @ polynomial(np.array(times))
    assert predicted == pytest.approx(polynomial(times[0] + k), abs=1e-8 * np.abs(weights).sum())


@given(times=spacings(min_size=2), k=st.floats(-4, 12), slope=st.floats(-3, 3), start=st.floats(-3, 3))
def test_taylor_reproduces_lines_on_any_spacing(times: list[float], k: float, slope: float, start: float) -> None:
    weights = taylor(1)(times, times[0] + k)
    assert weights @ (start + slope * np.array(times)) == pytest.approx(start + slope * (times[0] + k), abs=1e-6)


@given(times=spacings(min_size=3, max_size=3), k=st.floats(0, 12))
def test_taylor_misses_a_parabola_by_what_the_recursion_says(times: list[float], k: float) -> None:
    # f(t) = (t - a0)² with gaps p, q: Δ¹(a0) = -p, Δ¹(a1) = -(2p + q), so Δ² = (p + q) / p, where f'' is 2.
    p, q = times[0] - times[1], times[1] - times[2]
    values = (np.array(times) - times[0]) ** 2
    expected = -p * k + (p + q) * k**2 / (2 * p)
    assert taylor(2)(times, times[0] + k) @ values == pytest.approx(expected, abs=1e-6)


def test_newton_equals_divided_differences() -> None:
    times, values, t = [10.0, 7.0, 2.0], [3.0, -1.0, 4.0], 13.0
    first = (values[0] - values[1]) / (times[0] - times[1])
    second = (values[1] - values[2]) / (times[1] - times[2])
    both = (first - second) / (times[0] - times[2])
    expected = values[0] + first * (t - times[0]) + both * (t - times[0]) * (t - times[1])
    assert newton(2)(times, t) @ np.array(values) == pytest.approx(expected)


@pytest.mark.parametrize("times", [[], [1.0, 1.0], [1.0, 2.0]])
def test_times_must_fall(times: list[float]) -> None:
    with pytest.raises(ValueError, match="strictly decreasing"):
        difference_matrix(times)


def test_the_paper_has_eleven_distinct_candidates() -> None:
    members, weights = candidates("taylor", (0, 1, 2), 4, 1, [10.0, 2.0, 1.0], 15.0)
    assert weights.shape == (11, 3)
    assert [m.order for m in members] == [0] + [1] * 5 + [2] * 5
    assert [m.horizon for m in members[1:6]] == [5, 4, 3, 2, 1]
    assert len({tuple(row) for row in weights.round(12)}) == 11


def test_a_shorter_horizon_is_the_predictor_of_an_earlier_time() -> None:
    members, weights = candidates("newton", (2,), 2, 0.5, [10.0, 6.0, 1.0], 15.0)
    assert [m.lag for m in members] == [0, 0.5, 1, 1.5, 2]
    for member, row in zip(members, weights, strict=True):
        np.testing.assert_allclose(row, newton(2)([10.0, 6.0, 1.0], 15.0 - member.lag))


@pytest.mark.parametrize(
    ("orders", "anchors", "left"), [((0, 1, 2), 1, [0]), ((0, 1, 2), 2, [0, 1]), ((2,), 2, [1]), ((1, 2), 1, [0])]
)
def test_orders_need_their_anchors(orders: tuple[int, ...], anchors: int, left: list[int]) -> None:
    members, weights = candidates("taylor", orders, 0, 1, [float(-i) for i in range(anchors)], 3.0)
    assert [m.order for m in members] == left
    assert weights.shape == (len(left), anchors)
