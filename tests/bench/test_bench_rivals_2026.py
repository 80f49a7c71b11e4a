"""The rivals of 2026, against plain loops in float64, the packages that they come from, and training as published."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks.sea_cache import _apply_sea_filter
from hicache_pp import dmd_forecast_state, hicache_init, hicache_update_derivatives
from hicache_pp.dmd import auto_forecast_state, dmd_forecast, dmd_update_snapshots
from test_bench_peers import flux, setting_of, wan
from test_bench_rivals import STEPS, Array, Expected, Script, change, drive, script
from torch import Tensor

from tap_bench.calibration import Calibration
from tap_bench.method import Setting
from tap_bench.methods import easycache, hicache_pp, l2p, meancache, racer, registry, seacache
from tap_bench.variant import on_engine
from tap_diffusion import TAPConfig
from tap_diffusion.core.doubts import Fallback
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.predictors import chebyshev, newton
from tap_diffusion.core.timeline import Timeline

GRID = (1, 5)  # of the scripts' tokens
SIGMAS = np.linspace(1, 0.02, STEPS)
with np.errstate(divide="ignore"):
    TIMELINE = Timeline(tuple(float(noise) for noise in SIGMAS / (1 - SIGMAS)), "flow")
NAMES = ("seacache", "l2p", "meancache", "racer", "hicache-pp", "easycache")


# --------------------------------------------------------------------------------------------------------- by threshold


def filtered(h: Array, t: int) -> Array:
    """By a sum over the frequencies of each token's circle."""
    size, noise = GRID[1], min(TIMELINE.noise[t], 1e6)
    frequencies = [min(i, size - i) / size for i in range(size)]
    gains = np.array([1 / (1 + noise**2 * f**2) for f in frequencies])
    gains /= gains.mean()
    result = np.zeros_like(h)
    for n in range(size):
        for m in range(size):
            kernel = sum(g * math.cos(2 * math.pi * i * (n - m) / size) for i, g in enumerate(gains)) / size
            result[:, n] += kernel * h[:, m]
    return result


def seacache_by_hand(s: Script, threshold: float) -> Expected:
    accumulated, residual = 0.0, s.r[0]
    for t in range(STEPS):
        full = t in (0, STEPS - 1)
        if not full:
            accumulated += change(filtered(s.h[t], t), filtered(s.h[t - 1], t - 1))
            full = accumulated >= threshold
        if full:
            accumulated, residual = 0.0, s.r[t]
        yield full, None if full else s.x[t] + residual


def easycache_by_hand(retained: int) -> Callable[[Script, float], Expected]:
    def by_hand(s: Script, threshold: float) -> Expected:
        y, accumulated = s.x + s.r, 0.0
        anchors: list[int] = []
        for t in range(STEPS):
            full = t < retained or t == STEPS - 1 or len(anchors) < 2
            if not full:
                b, a = anchors[-2:]
                rate = np.abs(y[a] - y[b]).mean() / np.abs(s.x[a] - s.x[b]).mean()
                accumulated += rate * np.abs(s.x[t] - s.x[t - 1]).mean() / np.abs(y[a]).mean()
                full = accumulated >= threshold
            if full:
                accumulated = 0.0
                anchors.append(t)
            yield full, None if full else s.x[t] + s.r[anchors[-1]]

    return by_hand


def ends(retained: int = 1) -> TAPConfig:
    return TAPConfig.paper(full_steps=(*range(retained), STEPS - 1), orders=(0,))


BY_THRESHOLD: dict[str, tuple[Callable[[float], Engine], Callable[[Script, float], Expected]]] = {
    "seacache": (lambda threshold: seacache.SeaCacheEngine(ends(), threshold, GRID), seacache_by_hand),
    "easycache, 1": (lambda threshold: easycache.EasyCacheEngine(ends(), threshold), easycache_by_hand(1)),
    "easycache, 3": (lambda threshold: easycache.EasyCacheEngine(ends(3), threshold), easycache_by_hand(3)),
}
THRESHOLDS = (0.02, 0.1, 0.25, 0.6, 1.5)


@pytest.mark.parametrize(("engine", "by_hand"), BY_THRESHOLD.values(), ids=BY_THRESHOLD)
def test_decides_and_predicts_as_worked_out_by_hand(
    engine: Callable[[float], Engine], by_hand: Callable[[Script, float], Expected]
) -> None:
    """Two branches by turns: each as if it were alone; and again, as if nothing had been before."""
    scripts = {"a": script(1), "b": script(2)}
    counts = set()
    for threshold in THRESHOLDS:
        used = engine(threshold)
        for _ in range(2):
            run = drive(used, scripts, TIMELINE)
            for branch, features in scripts.items():
                expected = list(by_hand(features, threshold))
                assert run.full[branch] == [t for t, (full, _) in enumerate(expected) if full]
                counts.add(len(run.full[branch]))
                for t, (_, output) in enumerate(expected):
                    if output is not None:
                        np.testing.assert_allclose(run.outputs[branch, t].numpy(), output, rtol=1e-10, atol=1e-12)
            assert not used.report.fallbacks
    assert len(counts) >= 4


@pytest.mark.parametrize("sigma", [0.03, 0.4, 0.9, 1.0])
def test_the_filter_is_that_of_diffusers(sigma: float) -> None:
    """Of videos; it clamps σ where this clamps σ/α."""
    grid = (3, 4, 6)
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 72, 5))).float()
    noise = sigma / (1 - sigma) if sigma < 1 else math.inf
    found = seacache.spectral_filter(features, grid, noise, power=3.0)
    for one, ours in zip(features, found, strict=True):
        theirs = _apply_sea_filter(one.unflatten(0, grid), sigma, 3.0).flatten(0, 2)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("noise", [0.0, 0.5, 3.0])
def test_the_filter_keeps_what_it_should(noise: float) -> None:
    """A wave comes out as long as the gain at its frequency says."""
    grid, power = (6, 8), 2.0
    y, x = np.meshgrid(*(np.arange(size) for size in grid), indexing="ij")
    wave = np.cos(2 * np.pi * (y / 6 + 3 * x / 8)).reshape(1, -1, 1)

    def gain(fy: float, fx: float) -> float:
        return 1 / (1 + noise**2 * abs(fy) ** power) / (1 + noise**2 * abs(fx) ** power)

    mean = np.mean([gain(fy, fx) for fy in np.fft.fftfreq(6) for fx in np.fft.fftfreq(8)])
    found = seacache.spectral_filter(torch.from_numpy(wave), grid, noise, power)
    np.testing.assert_allclose(found.numpy(), wave * gain(1 / 6, 3 / 8) / mean, atol=1e-5)


def test_the_grid_of_the_tokens() -> None:
    assert seacache.token_grid(setting_of(wan).calibration) == (3, 2, 2)  # 3 frames of 8 by 8, in patches of 4
    calibration = setting_of(flux).calibration
    timeline = calibration.timeline
    assert timeline is not None
    grid = seacache.token_grid(calibration)
    assert grid is not None
    assert grid[0] == grid[1]
    assert math.prod(grid) == timeline.tokens


def test_diffusers_seacache_is_tuned_to_the_budget() -> None:
    setting = setting_of(wan)
    found = list(registry()["diffusers-seacache"].variants(setting))
    assert [variant.settings["order"] for variant in found] == [0, 1]
    for variant in found:
        assert abs(setting.calibration.run(variant)[1] - setting.budget) <= 1


# ------------------------------------------------------------------------------------------------------------------ L2P


def trajectories(seed: int, branches: int = 2, steps: int = 9) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(size=(steps, 3, 4, 6)).cumsum(0)) for _ in range(branches)]


def test_l2p_learns_what_training_on_the_features_does() -> None:
    """As published: Adam by autograd on the mean squared error of all features, from reuse of the step before."""
    outputs = trajectories(0)
    steps = len(outputs[0])
    features = torch.stack([sample.flatten() for output in outputs for step in output for sample in step])
    features = features.reshape(2, steps, 3, -1).transpose(1, 2).flatten(0, 1)  # (samples, S, features)
    weights = torch.eye(steps, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.01)
    for _ in range(201):
        loss = ((weights.tril() @ features)[:, :-1] - features[:, 1:]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = torch.tensor(l2p.fit(outputs), dtype=torch.float64)
    torch.testing.assert_close(found[1:, :-1].tril(), weights.detach().tril()[:-1, :-1], rtol=1e-9, atol=1e-9)
    assert (found[2:, :-1].tril() - torch.eye(steps)[1:-1, :-1]).abs().max() > 0.1


def test_l2p_sums_over_what_was_predicted_too() -> None:
    rng = np.random.default_rng(1)
    matrix, true, full = rng.normal(size=(STEPS, STEPS)), rng.normal(size=STEPS), (0, 1, 5, 6, 11)
    shown: list[float] = []
    for t in range(STEPS):
        shown.append(true[t] if t in full else sum(matrix[t, j] * shown[j] for j in range(t)))
    for t in (2, 3, 8, 10, 14, 23):
        anchors = [s for s in reversed(full) if s < t]
        weights = l2p.over_anchors(matrix, anchors, t)
        assert weights @ true[anchors] == pytest.approx(shown[t], rel=1e-9)


def test_l2p_needs_the_first_step() -> None:
    with pytest.raises(Fallback, match="first step"):
        l2p.over_anchors(np.eye(STEPS), [5, 3], 7)


def test_l2p_predicts_the_hidden_states() -> None:
    features, full = script(1), (0, 1, 3, 7, 12, 18)
    matrix = np.tril(np.random.default_rng(2).normal(size=(STEPS, STEPS)) / STEPS, -1)
    config = TAPConfig.paper(full_steps=full, orders=(1,), horizon_span=0.0, history=len(full))
    run = drive(l2p.L2PEngine(config, matrix.tolist()), {"a": features})
    assert run.full["a"] == list(full)
    y = features.x + features.r
    shown: list[Array] = []
    for t in range(STEPS):
        shown.append(y[t] if t in full else sum(matrix[t, j] * shown[j] for j in range(t)))
        if t not in full:
            np.testing.assert_allclose(run.outputs["a", t].numpy(), shown[t], rtol=1e-8, atol=1e-10)


def test_l2p_s_published_schedules_have_their_numbers() -> None:
    for count, full in l2p.PUBLISHED.items():
        assert len(full) == count
        assert full == tuple(sorted(set(full)))
        assert full[-1] < 50


# ------------------------------------------------------------------------------------------------------------ MeanCache


@pytest.mark.parametrize("spans", [(1,) * 11, (2,) * 11, (5,) * 11, (1, 3, 2, 5, 4, 1, 2, 3, 4, 5, 6)])
def test_meancache_carries_on_what_the_latents_tell(spans: tuple[int, ...]) -> None:
    """As published: the mean velocity from the latents, on the way of Euler's steps with these velocities."""
    rng = np.random.default_rng(0)
    sigmas, steps = np.append(np.sort(rng.uniform(0.02, 1, size=11))[::-1], 0.0), 11
    v, latents = rng.normal(size=(steps, 7)), [rng.normal(size=7)]
    for t in range(steps):
        latents.append(latents[-1] + (sigmas[t + 1] - sigmas[t]) * v[t])
    rows = meancache.carried_on(sigmas, spans)
    for t in range(1, steps):
        s = max(0, t - spans[t])
        mean = (latents[t] - latents[s]) / (sigmas[t] - sigmas[s])
        slope = (v[s] - mean) / (sigmas[t] - sigmas[s])
        np.testing.assert_allclose(rows[t] @ v, v[t - 1] - slope * (sigmas[t + 1] - sigmas[t]), rtol=1e-9, atol=1e-11)
    assert not np.triu(rows).any()


def test_meancache_looks_back_as_each_window_says() -> None:
    assert meancache.by_window((0, 1, 4, 6), (1, 3, 2), 8) == [1, 1, 3, 3, 1, 2, 1, 1]
    for full, spans in meancache.PUBLISHED.values():
        assert len(full) == len(spans) + 1 == 10


# ---------------------------------------------------------------------------------------------------------------- RACER

SCHEDULE = (0, 1, 2, 6, 10, 14, 18, 22)


def racer_by_hand(s: Script, theta: float, refresh: float | None) -> Expected:
    y, anchors, owed = s.x + s.r, list[int](), 0
    for t in range(STEPS):
        scheduled = t in SCHEDULE
        full = scheduled and not owed
        if scheduled and owed:
            owed -= 1
        output = None
        if not full:
            times = anchors[::-1]
            order = min(4, len(times) - 1)
            forecast = np.tensordot(chebyshev(order)(times, t), y[times], 1)
            local = np.tensordot(newton(min(1, len(times) - 1))(times[:2], t), y[times[:2]], 1)
            r = float(np.linalg.norm(forecast - local) / np.linalg.norm(forecast))
            can_pay = sum(step > t for step in SCHEDULE) > owed
            if refresh is not None and r >= refresh and can_pay:
                full, owed = True, owed + 1
            else:
                trust = math.exp(-0.3 * max(t - times[0] - 1, 0)) / (1 + math.exp(4 * (r - theta)))
                output = y[times[0]] + trust * (forecast - y[times[0]])
        if full:
            anchors.append(t)
        yield full, output


@pytest.mark.parametrize("refresh", [None, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("theta", [0.15, 0.4])
def test_racer_trusts_and_refreshes_as_worked_out_by_hand(theta: float, refresh: float | None) -> None:
    config = TAPConfig.paper(full_steps=SCHEDULE, family="chebyshev", orders=(4,), horizon_span=0.0, history=8)
    scripts = {"a": script(1), "b": script(2)}
    engine = racer.RacerEngine(config, theta, refresh)
    for _ in range(2):
        run = drive(engine, scripts)
        for branch, features in scripts.items():
            expected = list(racer_by_hand(features, theta, refresh))
            assert run.full[branch] == [t for t, (full, _) in enumerate(expected) if full]
            assert len(run.full[branch]) == len(SCHEDULE)
            for t, (_, output) in enumerate(expected):
                if output is not None:
                    np.testing.assert_allclose(run.outputs[branch, t].numpy(), output, rtol=1e-8, atol=1e-10)
        assert not engine.report.fallbacks
    assert (run.full["a"] != list(SCHEDULE)) == (refresh is not None and refresh < 0.5)


# ------------------------------------------------------------------------------------------------------------ HiCache++


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("k", [0.2, 1.0, 2.5])
def test_exponentials_are_met_exactly(count: int, k: float) -> None:
    """A decaying oscillation, which has three poles with the constant."""
    a, b, c = np.random.default_rng(0).normal(size=(3, 40))

    def feature(t: float) -> Array:
        return np.asarray(c + 0.9**t * (a * math.cos(0.5 * t) + b * math.sin(0.5 * t)))

    known = torch.from_numpy(np.stack([feature(t) for t in range(count)]))
    weights = hicache_pp.exponential(known @ known.T, k)
    np.testing.assert_allclose(weights @ known, feature(count - 1 + k), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [4, 5])
def test_exponentials_are_those_of_the_package(count: int) -> None:
    known = torch.from_numpy(np.random.default_rng(count).normal(size=(count, 50)).cumsum(0))
    for k in (0.3, 1.0, 1.7):
        weights = hicache_pp.exponential(known @ known.T, k)
        torch.testing.assert_close(weights @ known, dmd_forecast(list(known), k), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("backend", ["dmd", "auto"])
@pytest.mark.parametrize("full", [(0, 4, 8, 12, 16, 20), (0, 1, 2, 6, 10, 14, 18, 22), (0, 3, 7, 9, 14, 20)])
def test_hicache_pp_forecasts_as_the_package(backend: hicache_pp.Backend, full: tuple[int, ...]) -> None:
    """In the same run, one sample at a time. Where spacings differ both fall back on HiCache's lines."""
    features = script(3)
    config = TAPConfig.paper(
        full_steps=full, family="hermite", orders=(1,), horizon_span=0.0, history=hicache_pp.WINDOW
    )
    run = drive(hicache_pp.HiCachePPEngine(config, backend), {"a": features})
    methods = set()
    for sample in range(features.r.shape[1]):
        state: dict[str, Any] = hicache_init(STEPS, backend=backend)
        for t in range(STEPS):
            state["step"] = t
            if t in full:
                residual = torch.from_numpy(features.r[t, sample])
                state["activated_steps"].append(t)
                hicache_update_derivatives(state, residual)
                dmd_update_snapshots(state, residual)
                continue
            theirs = (dmd_forecast_state if backend == "dmd" else auto_forecast_state)(state)
            ours = run.outputs["a", t][sample] - torch.from_numpy(features.x[t, sample])
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        methods |= {name for name, count in state["telemetry"]["method_counts"].items() if count}
    assert ("dmd" in methods) == (full != (0, 3, 7, 9, 14, 20)) or backend == "auto"
    assert "hermite" in methods


# -------------------------------------------------------------------------------------------------------- on a pipeline


@pytest.fixture(scope="module")
def on_flux() -> Setting:
    return setting_of(flux)


@pytest.mark.parametrize("name", NAMES)
def test_keeps_to_the_budget_on_a_pipeline(name: str, on_flux: Setting) -> None:
    """Full steps are counted from outside, on two branches."""
    method = registry()[name]
    assert method.kind == "rival"
    found = list(method.variants(on_flux))
    assert found
    assert len({variant.schedule for variant in found}) == len(found)
    for variant in found[:6]:
        quality, full_steps = on_flux.calibration.quality(variant)
        assert abs(full_steps - on_flux.budget) <= 1
        assert 10 < quality < 200
        assert json.loads(json.dumps(variant.settings)) == variant.settings


@pytest.mark.parametrize("name", ["seacache", "easycache"])
def test_without_tolerance_it_is_the_plain_pipeline(name: str, on_flux: Setting) -> None:
    calibration: Calibration = on_flux.calibration
    grid = seacache.token_grid(calibration)
    assert grid is not None
    config = TAPConfig.paper(full_steps=(0,), orders=(0,))

    def engine(config: TAPConfig) -> Engine:
        if name == "seacache":
            return seacache.SeaCacheEngine(config, 1e-9, grid)
        return easycache.EasyCacheEngine(config, 1e-9)

    drawn, full_steps = calibration.run(on_engine("none", config, engine))
    assert full_steps == calibration.steps
    assert torch.equal(drawn.latents, calibration.full.latents)
