"""Weights against closed forms and against the recursion of the paper, evaluated number by number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tap_diffusion.core.cache import History
from tap_diffusion.core.predictors import (
    FAMILIES,
    adams_bashforth,
    candidates,
    chebyshev,
    difference_matrix,
    foca,
    hermite,
    newton,
    taylor,
)
from tap_diffusion.core.schedule import spectrum_steps
from tap_diffusion.core.selection import combine

REGRESSIONS = ("chebyshev", "chebyshev_linear")


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


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REGRESSIONS])
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


# ------------------------------------------------------------------------------------------------ HiCache's Hermite


HERMITE = [lambda x: 1.0, lambda x: 2 * x, lambda x: 4 * x**2 - 2, lambda x: 8 * x**3 - 12 * x]


@given(spacings(min_size=4), st.floats(-4, 12), st.floats(0.1, 1), st.data())
def test_hermite_is_the_paper_s_sum(times: list[float], k: float, sigma: float, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(-10, 10), min_size=len(times), max_size=len(times)))
    terms = [recursive_difference(values, times, i) / math.factorial(i) for i in range(4)]
    expected = sum(term * sigma**i * HERMITE[i](sigma * k) for i, term in enumerate(terms))
    scale = 1 + max(map(abs, values)) * (1 + abs(k)) ** 3
    assert hermite(3, sigma)(times, times[0] + k) @ np.array(values) == pytest.approx(expected, abs=1e-9 * scale)


def test_hermite_by_hand() -> None:
    # Δ¹ = (7 - 1) / 2 = 3 and, before it, (1 - 0) / 1 = 1, so Δ² = (3 - 1) / 2 = 1. At κ = 3 with σ = 1/2:
    # 7 + 3 · (1/2) · 2 · 1.5 + 1 · (1/4) · (4 · 1.5² - 2) / 2 = 7 + 4.5 + 0.875.
    assert hermite(2)([3.0, 1.0, 0.0], 6.0) @ np.array([7.0, 1.0, 0.0]) == pytest.approx(12.375)


@given(times=spacings(min_size=3), slope=st.floats(-3, 3), k=st.floats(0, 12))
def test_hermite_shortens_a_line_and_bends_at_the_anchor(times: list[float], slope: float, k: float) -> None:
    line = slope * (np.array(times) - times[0])
    assert hermite(1)(times, times[0] + k) @ line == pytest.approx(slope * k / 2, abs=1e-9)  # 2σ² = 1/2
    parabola = (np.array(times) - times[0]) ** 2
    at_anchor = -recursive_difference(parabola.tolist(), times, 2) / 4  # σ² H_2(0) / 2 = -1/4
    assert hermite(2)(times, times[0]) @ parabola == pytest.approx(at_anchor, abs=1e-9)


# --------------------------------------------------------------------------------------- AB-Cache's Adams-Bashforth


@given(order=st.integers(0, 5), gap=st.integers(1, 9), newest=st.integers(0, 40))
def test_adams_bashforth_has_the_paper_s_binomials_on_even_anchors(order: int, gap: int, newest: int) -> None:
    times = [float(newest - gap * j) for j in range(7)]
    expected = [(-1) ** j * math.comb(order + 1, j + 1) for j in range(7)]
    np.testing.assert_allclose(adams_bashforth(order)(times, newest + gap), expected, atol=1e-9)


@given(times=spacings(), steps=st.integers(1, 12), data=st.data())
def test_adams_bashforth_step_by_step_is_adams_bashforth_at_once(
    times: list[float], steps: int, data: st.DataObject
) -> None:
    order = data.draw(st.integers(0, min(2, len(times) - 1)))
    rows, points = list(np.eye(len(times))), list(times)
    for step in range(steps):
        target = times[0] + step + 1
        combined = adams_bashforth(order)(points, target) @ np.stack(rows)
        rows, points = [combined, *rows], [target, *points]
    np.testing.assert_allclose(rows[0], adams_bashforth(order)(times, times[0] + steps), atol=1e-6)


# ----------------------------------------------------------------------------------------------------- FoCa's recursion


def forecast_then_calibrate(values: dict[int, float], t: int) -> float:
    """Eqs. 6 to 8 of FoCa, number by number, from the two oldest full steps of ``values`` to the step t."""
    full = sorted(values)
    history = {full[0]: values[full[0]], full[1]: values[full[1]]}
    for step in range(full[1] + 1, t + 1):
        if step in values:
            history[step] = values[step]
            continue
        k, before = sorted(history, reverse=True)[:2]
        a, b = [s for s in sorted(full, reverse=True) if s < step][:2]
        h = step - k
        derivative = (history[k] - history[before]) / (k - before)
        forecast = (4 * history[k] - history[before] + 2 * h * derivative) / 3
        ahead = (3 * forecast - 4 * history[k] + history[before]) / (2 * h)
        anchored = (values[a] - values[b]) / (a - b)
        history[step] = history[k] + h / 2 * (anchored + ahead)
    return history[t]


@given(times=spacings(min_size=2), k=st.integers(1, 12), data=st.data())
def test_foca_is_the_paper_s_recursion(times: list[float], k: int, data: st.DataObject) -> None:
    order = data.draw(st.integers(1, len(times) - 1))
    values = data.draw(st.lists(st.floats(-10, 10), min_size=len(times), max_size=len(times)))
    expected = forecast_then_calibrate(
        {int(time): value for time, value in zip(times[: order + 1], values, strict=False)}, int(times[0]) + k
    )
    row = foca(order)(times, times[0] + k)
    assert row @ np.array(values) == pytest.approx(expected, abs=1e-9 * (1 + np.abs(row).sum() * 10))
    assert not row[order + 1 :].any()


def test_foca_by_hand() -> None:
    # Full steps 0, 2, 4 with values 0, 2, 6. Step 3 is predicted as 3, so the slope into 4 is 3 and that of the full
    # steps 2: step 5 has slope (3 + 2) / 2 and value 8.5, step 6 has slope (2.5 + 2) / 2 and value 10.75.
    row = foca(2)
    assert row([4.0, 2.0, 0.0], 5.0) @ np.array([6.0, 2.0, 0.0]) == pytest.approx(8.5)
    assert row([4.0, 2.0, 0.0], 6.0) @ np.array([6.0, 2.0, 0.0]) == pytest.approx(10.75)
    assert row([4.0, 2.0, 0.0], 5.5) @ np.array([6.0, 2.0, 0.0]) == pytest.approx(8.5 + 0.5 * 2.25)


@given(times=spacings(min_size=2), k=st.floats(-4, 12), slope=st.floats(-3, 3), data=st.data())
def test_foca_reproduces_lines(times: list[float], k: float, slope: float, data: st.DataObject) -> None:
    row = foca(data.draw(st.integers(1, len(times) - 1)))(times, times[0] + k)
    assert row @ (slope * np.array(times)) == pytest.approx(slope * (times[0] + k), abs=1e-6)


@given(times=spacings(min_size=2), k=st.floats(-4, 12))
def test_foca_of_order_one_is_linear_extrapolation(times: list[float], k: float) -> None:
    np.testing.assert_allclose(foca(1)(times, times[0] + k), newton(1)(times, times[0] + k), atol=1e-9)


# ------------------------------------------------------------------------------------------------ Spectrum's Chebyshev


def chebyshev_values(order: int, times: Sequence[float]) -> np.ndarray:
    """T_m(τ) = cos(m arccos τ) for times within [0, 50]."""
    tau = 2 * np.array(times) / 50 - 1
    return np.cos(np.arange(order + 1) * np.arccos(tau)[:, None])


def distinct_steps(last: int) -> st.SearchStrategy[list[float]]:
    steps = st.lists(st.integers(0, last), min_size=2, max_size=14, unique=True)
    return steps.map(lambda chosen: sorted(map(float, chosen), reverse=True))


@given(distinct_steps(40), st.integers(1, 9), st.sampled_from([0.01, 0.1, 1.0]), st.data())
def test_chebyshev_is_ridge_regression(times: list[float], k: int, ridge: float, data: st.DataObject) -> None:
    order = data.draw(st.integers(1, min(5, len(times) - 1)))
    values = np.array(data.draw(st.lists(st.floats(-10, 10), min_size=len(times), max_size=len(times))))
    # Least squares with √λ I below the design and zeros below the values is ridge regression.
    design = np.concatenate([chebyshev_values(order, times), math.sqrt(ridge) * np.eye(order + 1)])
    series = np.linalg.lstsq(design, np.concatenate([values, np.zeros(order + 1)]), rcond=None)[0]
    expected = (chebyshev_values(order, [times[0] + k]) @ series).item()
    assert chebyshev(order, ridge)(times, times[0] + k) @ values == pytest.approx(expected, abs=1e-6)


def test_chebyshev_by_hand() -> None:
    # Anchors at τ = 0 and -1, λ = 1, degree 1: XᵀX + I = [[3, -1], [-1, 2]], inverse [[2, 1], [1, 3]] / 5. At τ = 1
    # x (XᵀX + I)⁻¹ = [3, 4] / 5, so the weights are 3/5 for τ = 0 and 3/5 - 4/5 for τ = -1.
    np.testing.assert_allclose(chebyshev(1, ridge=1)([25.0, 0.0], 50.0), [0.6, -0.2])
    # Linear extrapolation has weights 2 and -1.
    np.testing.assert_allclose(chebyshev(1, ridge=1, blend=0.5)([25.0, 0.0], 50.0), [1.3, -0.6])
    mixed = (chebyshev(1)([25.0, 0.0], 50.0) + np.array([2, -1])) / 2
    np.testing.assert_allclose(FAMILIES["chebyshev_linear"](1)([25.0, 0.0], 50.0), mixed)


def test_chebyshev_shrinks_constants() -> None:
    # The weights sum to x · c, c being the ridge fit of the constant 1: 1 - λ x (XᵀX + λI)⁻¹ e_0.
    times = [20.0, 15.0, 11.0, 8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    design, target = chebyshev_values(4, times), chebyshev_values(4, [24.0])[0]
    shortfall = 0.1 * target @ np.linalg.inv(design.T @ design + 0.1 * np.eye(5))[:, 0]
    assert chebyshev(4)(times, 24.0).sum() == pytest.approx(1 - shortfall)
    assert shortfall > 0.01


@given(distinct_steps(40), st.integers(1, 9), st.data())
def test_chebyshev_without_ridge_reproduces_polynomials(times: list[float], k: int, data: st.DataObject) -> None:
    order = data.draw(st.integers(1, min(3, len(times) - 1)))
    coefficients = data.draw(st.lists(st.floats(-3, 3), min_size=order + 1, max_size=order + 1))
    polynomial = np.polynomial.Polynomial(coefficients, domain=[0, 50])
    row = chebyshev(order, ridge=1e-12)(times, times[0] + k)
    assert row @ polynomial(np.array(times)) == pytest.approx(
        polynomial(times[0] + k), abs=1e-3 * (1 + np.abs(row).sum())
    )


@pytest.mark.parametrize("steps", [spectrum_steps(28), spectrum_steps(50), list(range(0, 50, 5)), list(range(10))])
def test_differences_of_many_anchors_keep_precision_in_float32(steps: list[int]) -> None:
    rate, phase = torch.linspace(0.02, 0.2, 64), torch.linspace(0, 6, 64)
    features = {step: torch.sin(rate * step + phase).reshape(1, 1, 64) for step in steps}
    history = History(len(steps))
    for step in steps:
        history.add(step, features[step], None)
    row = chebyshev(4)(history.times, steps[-1] + 2)
    coefficients = np.linalg.solve(difference_matrix(history.times).T, row)
    expected = sum(weight * features[int(time)].double() for weight, time in zip(row, history.times, strict=True))
    difference = combine(history.residual, coefficients.tolist()) - expected
    assert difference.norm() < 1e-5 * expected.norm()


# ---------------------------------------------------------------------------------------------------------- candidates


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
