"""Rivals that decide by themselves which steps are full, against plain loops in float64 on scripted trajectories."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tap_bench.calibration import Calibration, Trajectories
from tap_bench.method import Setting
from tap_bench.methods import dpcache, magcache, registry, teacache
from tap_bench.methods.dicache import DiCacheEngine, Error
from tap_bench.methods.first_block_cache import FirstBlockCacheEngine
from tap_bench.methods.teacache import TeaCacheEngine
from tap_bench.models import BenchModel
from tap_bench.variant import on_engine
from tap_diffusion import TAPConfig
from tap_diffusion.core.call import Call
from tap_diffusion.core.doubts import Fallback
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.timeline import Timeline
from tiny import TOKENS, WORDS, build_pipeline

STEPS, SHAPE = 24, (2, 5, 4)
Array = NDArray[np.float64]
COEFFICIENTS = (40.0, -6.0, 0.5, 1.3, 0.01)


@dataclass
class Script:
    """x, h and r of one branch at each step, as float64 arrays."""

    x: Array
    h: Array
    r: Array


def script(seed: int) -> Script:
    """Smooth features that turn faster as time goes on, and a little noise."""
    rng = np.random.default_rng(seed)
    t = (np.arange(STEPS) / STEPS)[:, None, None, None] ** 1.5

    def features() -> Array:
        a, b, phase, noise = (rng.normal(size=(1, *SHAPE)) for _ in range(4))
        return np.asarray(a + b * np.sin(4 * t + phase) + 0.02 * noise * rng.normal(size=(STEPS, 1, 1, 1)))

    return Script(features(), features(), features())


@dataclass
class Run:
    full: dict[str, list[int]] = field(default_factory=dict)
    outputs: dict[tuple[str, int], Tensor] = field(default_factory=dict)


def drive(engine: Engine, scripts: dict[str, Script], timeline: Timeline | None = None) -> Run:
    """One trajectory, its branches called by turns, as the hook calls an engine."""
    run = Run({branch: [] for branch in scripts})
    for step in range(STEPS):
        for branch, features in scripts.items():
            begins = step == 0 and branch == next(iter(scripts))
            call = Call(step, branch, begins, step == STEPS - 1, timeline=timeline)
            x, h, r = (torch.from_numpy(part[step]) for part in (features.x, features.h, features.r))
            full = engine.begin(call)
            if not full:
                try:
                    run.outputs[branch, step] = engine.predict(call, x, lambda h=h: h)  # type: ignore[misc]
                except Fallback as fallback:
                    engine.fall_back(call, str(fallback))
                    full = True
            if full:
                run.full[branch].append(step)
                engine.record(call, x, x + r, h)
            engine.end(call, full, lambda: 1.0)
    return run


Expected = Iterator[tuple[bool, Array | None]]  # of each step: whether it is full, or else what is predicted


def change(now: Array, before: Array) -> float:
    total = sum(abs(float(a) - float(b)) for a, b in zip(now.flat, before.flat, strict=True))
    return total / sum(abs(float(b)) for b in before.flat)


def teacache_by_hand(s: Script, threshold: float) -> Expected:
    accumulated, residual = 0.0, s.r[0]
    for t in range(STEPS):
        full = t in (0, STEPS - 1)
        if not full:
            d = change(s.h[t], s.h[t - 1])
            accumulated += sum(c * d ** (4 - i) for i, c in enumerate(COEFFICIENTS))
            full = accumulated >= threshold
        if full:
            accumulated, residual = 0.0, s.r[t]
        yield full, None if full else s.x[t] + residual


def first_block_by_hand(s: Script, threshold: float) -> Expected:
    last = 0
    for t in range(STEPS):
        full = t == 0 or change(s.h[t], s.h[last]) > threshold
        last = t if full else last
        # The first block's output now, and what the other blocks added at the last full step.
        yield full, None if full else (s.x[t] + s.h[t]) + ((s.x[last] + s.r[last]) - (s.x[last] + s.h[last]))


def dicache_by_hand(error: Error, first: int) -> Callable[[Script, float], Expected]:
    def by_hand(s: Script, threshold: float) -> Expected:
        accumulated, anchors = 0.0, []
        y = s.x + s.h
        for t in range(STEPS):
            full = t < first or t == STEPS - 1
            if not full:
                delta_y, delta_x = change(y[t], y[t - 1]), change(s.x[t], s.x[t - 1])
                accumulated += delta_y if error == "delta_y" else abs(delta_y - delta_x)
                full = accumulated >= threshold
            if full:
                accumulated = 0.0
                anchors.append(t)
                yield True, None
            elif len(anchors) == 1:
                yield False, s.x[t] + s.r[anchors[-1]]
            else:
                a, b = anchors[-2:]
                ratio = np.abs(s.h[t] - s.h[a]).mean() / np.abs(s.h[b] - s.h[a]).mean()
                yield False, s.x[t] + s.r[a] + min(max(ratio, 1.0), 1.5) * (s.r[b] - s.r[a])

    return by_hand


def dicache(error: Error, first: int) -> Callable[[float], Engine]:
    config = TAPConfig.paper(
        full_steps=(*range(first), STEPS - 1), orders=(1,), horizon_span=0.0, probe="first_block",
    )  # fmt: skip
    return lambda threshold: DiCacheEngine(config, threshold, error)


RIVALS: dict[str, tuple[Callable[[float], Engine], Callable[[Script, float], Expected]]] = {
    "teacache": (
        lambda threshold: TeaCacheEngine(
            TAPConfig.paper(full_steps=(0, STEPS - 1), orders=(0,)), threshold, COEFFICIENTS
        ),
        teacache_by_hand,
    ),
    "first-block-cache": (
        lambda threshold: FirstBlockCacheEngine(
            TAPConfig.paper(full_steps=(0,), orders=(0,), probe="first_block"), threshold
        ),
        first_block_by_hand,
    ),
    "dicache, y": (dicache("delta_y", 3), dicache_by_hand("delta_y", 3)),
    "dicache, y - x": (dicache("delta_minus", 1), dicache_by_hand("delta_minus", 1)),
}  # fmt: skip
THRESHOLDS = (0.02, 0.1, 0.25, 0.6, 1.5)
each_rival = pytest.mark.parametrize(("engine", "by_hand"), RIVALS.values(), ids=RIVALS)


@each_rival
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_decides_and_predicts_as_worked_out_by_hand(
    engine: Callable[[float], Engine], by_hand: Callable[[Script, float], Expected], threshold: float
) -> None:
    """Two branches by turns: each as if it were alone."""
    scripts = {"a": script(1), "b": script(2)}
    run = drive(engine(threshold), scripts)
    for branch, features in scripts.items():
        expected = list(by_hand(features, threshold))
        assert run.full[branch] == [t for t, (full, _) in enumerate(expected) if full]
        for t, (_, output) in enumerate(expected):
            if output is not None:
                np.testing.assert_allclose(run.outputs[branch, t].numpy(), output, rtol=1e-10, atol=1e-12)


@each_rival
def test_full_steps_are_more_than_the_forced_and_fewer_with_a_larger_threshold(
    engine: Callable[[float], Engine], by_hand: Callable[[Script, float], Expected]
) -> None:
    counts = [len(drive(engine(threshold), {"a": script(1)}).full["a"]) for threshold in THRESHOLDS]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) >= 3


@each_rival
def test_trajectories_are_alike_and_wanted_steps_are_no_fallbacks(
    engine: Callable[[float], Engine], by_hand: Callable[[Script, float], Expected]
) -> None:
    one, other = engine(0.25), script(7)
    first = drive(one, {"a": script(1)})
    drive(one, {"a": other})
    again = drive(one, {"a": script(1)})
    assert again.full == first.full
    assert all(torch.equal(again.outputs[key], output) for key, output in first.outputs.items())
    assert not one.report.fallbacks


@each_rival
def test_broken_features_run_in_full_until_a_finite_anchor(
    engine: Callable[[float], Engine], by_hand: Callable[[Script, float], Expected]
) -> None:
    broken = script(1)
    broken.r[0] = math.nan
    run = drive(engine(30.0), {"a": broken})
    assert run.full["a"][:2] == [0, 1]
    assert len(run.full["a"]) <= 4
    assert all(output.isfinite().all() for output in run.outputs.values())


def test_teacache_recovers_a_polynomial() -> None:
    """Features are constant in each sample, so that changes can be set one by one."""
    rng = np.random.default_rng(0)
    wanted = np.poly1d([2.0, -3.0, 1.5, 0.4, 0.05])
    changes = rng.uniform(0.05, 0.9, size=(2, STEPS - 1, 3))

    def features(of: Array, size: int) -> list[Tensor]:
        values = np.concatenate([np.ones((2, 1, 3)), np.cumprod(1 + of, axis=1)], axis=1)
        signs = rng.choice([-1.0, 1.0], size=(1, 1, 1, 4, size))
        return list(torch.from_numpy(values[..., None, None] * signs))

    found = teacache.fit(Trajectories(features(changes, 6), features(wanted(changes), 5), []))
    np.testing.assert_allclose(found, wanted.coeffs, rtol=1e-6)


def test_magcache_ratios_are_those_of_the_magnitudes() -> None:
    known = [1.0, 1.2, 1.1, 0.9, 0.5]
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(2, len(known), 3, 4, 6))  # turning does not matter
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    lengths = rng.uniform(0.5, 2, size=(2, 1, 3, 4, 1)) * np.cumprod(known)[None, :, None, None, None]
    residuals = list(torch.from_numpy(directions * lengths))
    np.testing.assert_allclose(magcache.ratios(residuals), known, rtol=1e-12)


def test_magcache_ratios_are_means_of_ratios_over_tokens_and_branches() -> None:
    residuals = [torch.tensor([[[[1.0], [2.0]]], [[[3.0], [2.0]]]]), torch.tensor([[[[1.0], [1.0]]], [[[1.0], [3.0]]]])]
    assert magcache.ratios(residuals) == [1.0, ((3 + 1) / 2 + (1 + 3) / 2) / 2]


def magcache_by_hand(ratios: list[float], threshold: float, max_skip: int) -> tuple[int, ...]:
    """The state machine as published, step by step."""
    full, product, error, skipped = [], 1.0, 0.0, 0
    for t, ratio in enumerate(ratios):
        if t < int(0.1 * len(ratios) + 0.5):
            full.append(t)
            continue
        product, skipped = product * ratio, skipped + 1
        error += abs(1 - product)
        if error > threshold or skipped > max_skip:
            full.append(t)
            product, error, skipped = 1.0, 0.0, 0
    return tuple(full)


@pytest.mark.parametrize("threshold", [0.0, 0.03, 0.24, 1.0, math.inf])
@pytest.mark.parametrize("max_skip", [2, 5, 50])
def test_magcache_plan(threshold: float, max_skip: int) -> None:
    ratios = [1.0, *np.random.default_rng(3).normal(1, 0.05, size=49).tolist()]
    assert magcache.plan(ratios, threshold, max_skip) == magcache_by_hand(ratios, threshold, max_skip)


def test_magcache_predicts_up_to_the_threshold() -> None:
    assert magcache.plan([1.0, 1.25, 1.0, 1.25], 0.25, 5) == (0, 2)
    assert magcache.plan([1.0, 1.25, 1.0, 1.25], 0.5, 5) == (0, 3)
    assert magcache.plan([1.0, 1.25, 1.0, 1.25], 0.5, 1) == (0, 2)


@pytest.mark.parametrize("budget", [6, 8, 10, 14])
def test_magcache_takes_the_threshold_that_uses_the_budget(budget: int) -> None:
    ratios = [1.0, *np.random.default_rng(3).normal(1, 0.05, size=49).tolist()]
    found = magcache.planned(ratios, budget, max_skip=50)
    assert found is not None
    threshold, full = found
    assert full == magcache_by_hand(ratios, threshold, 50)
    others = [len(magcache_by_hand(ratios, t, 50)) for t in np.geomspace(1e-3, 30, 2000)]
    assert len(full) == max(count for count in others if count <= budget)


def test_magcache_has_no_plan_below_what_it_retains() -> None:
    assert magcache.planned([1.0] * 50, 4, max_skip=50) is None


def cost_by_hand(r: list[Array], i: int, j: int, k: int, order: int) -> float:
    """Sum over the steps after j, up to k, of the mean error of the Taylor prediction."""
    steps, total = len(r), 0.0

    def extrapolated(a: int, b: int, c: int, t: int) -> Array:
        slope = (r[a] - r[b]) / (a - b)
        curvature = (slope - (r[b] - r[c]) / (b - c)) / (a - b)
        return r[a] + slope * (t - a) + (curvature * (t - a) ** 2 / 2 if order == 2 else 0)

    for t in range(j + 1, k + 1):
        if t == steps:
            last = r[-order - 1 :]
            truth = 0.8 * extrapolated(steps - 1, steps - 2, steps - 3, steps) + 0.2 * sum(last) / len(last)
        else:
            truth = r[t]
        total += float(np.abs(extrapolated(j, i, i - 1, t) - truth).mean())
    return total


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("budget", [3, 4, 5, 6])
def test_dpcache_plan_is_the_cheapest_of_all(order: int, budget: int) -> None:
    steps, longest = 11, 6 if budget > 3 else 9
    r = np.random.default_rng(budget).normal(size=(steps, 2, 3, 4)).cumsum(0)
    found = dpcache.costs([torch.from_numpy(r[:, :, :1]), torch.from_numpy(r[:, :, 1:])], order, longest)

    # A mean over branches of 1 and 2 tokens is one over all tokens.
    def total(full: tuple[int, ...]) -> float:
        path = (*full, steps)
        windows = [path[n : n + 3] for n in range(1, len(path) - 2)]
        if any(k - j > longest or j - i > longest for i, j, k in windows):
            return math.inf
        return sum(cost_by_hand(list(r), i, j, k, order) for i, j, k in windows)

    plans = [(0, 1, 2, *rest) for rest in itertools.combinations(range(3, steps), budget - 3)]
    best = min(plans, key=total)
    assert dpcache.plan(found, budget) == list(best)
    for i, j, k in ((1, 2, 3), (2, 5, 9), (4, 6, 11)):
        assert found[i, j, k] == pytest.approx(cost_by_hand(list(r), i, j, k, order), rel=1e-12)


def test_dpcache_plans_full_steps_where_the_residual_bends() -> None:
    t = torch.arange(40.0, dtype=torch.float64)
    bent = torch.where(t < 20, t, 20 + 3 * (t - 20))[:, None, None, None]
    full = dpcache.plan(dpcache.costs([bent], 1, 38), 6)
    assert {20, 21} <= set(full) or {21, 22} <= set(full)


NAMES = ("teacache", "first-block-cache", "magcache", "dicache", "dpcache")


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    def arguments(prompts: Sequence[Any]) -> dict[str, Any]:
        size = {"height": 32, "width": 32, "max_sequence_length": TOKENS}
        return {"prompt": list(prompts), "negative_prompt": [""] * len(prompts), "true_cfg_scale": 2.0} | size

    pipe = build_pipeline()
    return Calibration(pipe, BenchModel("tiny", lambda: pipe, WORDS, WORDS[:2], arguments, batch=2), steps=14)


@pytest.mark.parametrize("name", NAMES)
def test_keeps_to_the_budget_on_a_pipeline(name: str, calibration: Calibration) -> None:
    """Full steps are counted from outside, on two branches."""
    variants = list(registry()[name].variants(Setting(calibration.pipe, 14, 6, calibration)))
    assert variants
    assert len({variant.schedule for variant in variants}) == len(variants)
    for variant in variants:
        quality, full_steps = calibration.quality(variant)
        assert abs(full_steps - 6) <= 1
        assert 20 < quality < 200
        assert json.loads(json.dumps(variant.settings)) == variant.settings


@each_rival
def test_without_tolerance_it_is_the_plain_pipeline(
    engine: Callable[[float], Engine], by_hand: Callable[[Script, float], Expected], calibration: Calibration
) -> None:
    config = engine(1e-9).config
    drawn, full_steps = calibration.run(on_engine("none", config, lambda _: engine(1e-9)))
    assert full_steps == calibration.steps
    assert torch.equal(drawn.latents, calibration.full.latents)


@each_rival
def test_a_step_is_decided_by_the_probe_that_it_would_record(
    engine: Callable[[float], Engine], by_hand: Callable[[Script, float], Expected], calibration: Calibration
) -> None:
    """A rival may read a probe where TAP, with the same configuration, would not."""
    seen: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []

    def watched(_: TAPConfig) -> Engine:
        made = engine(1e-9)
        predict, record = made.predict, made.record

        def noting(call: Call, hidden_states: Tensor, probe: Callable[[], Tensor], stream: str = "") -> Tensor:
            seen.append(probe())
            return predict(call, hidden_states, probe, stream)

        def comparing(call: Call, before: Tensor, after: Tensor, probe: Tensor | None, stream: str = "") -> None:
            assert probe is not None
            pairs.extend((deciding, probe) for deciding in seen)
            seen.clear()
            record(call, before, after, probe, stream)

        made.predict, made.record = noting, comparing  # type: ignore[method-assign]
        return made

    calibration.run(on_engine("none", engine(1e-9).config, watched))
    assert len(pairs) >= 2 * (calibration.steps - 4)
    for deciding, recorded in pairs:
        assert torch.equal(deciding, recorded)


def test_all_are_registered_as_rivals() -> None:
    assert {name: registry()[name].kind for name in NAMES} == dict.fromkeys(NAMES, "rival")
