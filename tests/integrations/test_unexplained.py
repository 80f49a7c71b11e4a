"""Steps that the past doesn't explain: latents rolled or replaced, frames that move along, an image exchanged."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_engine import Driver
from torch import Tensor

import tap_diffusion as tap
from tap_bench.models import MODELS, BenchModel, draw
from tap_diffusion import TAPConfig, TAPWarning
from tap_diffusion.apps.generate import psnr
from tap_diffusion.core import engine as engine_module
from tap_diffusion.core.doubts import UNEXPLAINED
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.selection import mean_and_spread, squared_distance, unexplained
from tiny import build_transformer

SHAPE = (2, 32, 16)
CONFIG = TAPConfig.paper(interval=4)
LATE = f"{UNEXPLAINED}, noticed a step late"


# ------------------------------------------------------------------------------------------------------- the criterion


def features(step: int, seed: int = 0) -> Tensor:
    """Tokens that go their ways, each from a place of its own."""
    base, slope = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return base + 0.05 * step * slope


def is_unexplained(predicted: Tensor, h: Tensor, anchor: Tensor) -> list[bool]:
    mean, spread = mean_and_spread(anchor)
    error = (predicted - h).square().sum((1, 2))
    found: list[bool] = unexplained(error, squared_distance(h, mean), spread).tolist()
    return found


def test_what_the_criterion_is_told_is_what_brute_force_finds() -> None:
    """In float64, token by token."""
    anchor, h = features(0).double(), features(3, seed=1).double()
    mean, spread = mean_and_spread(anchor)
    distance = squared_distance(h, mean)
    for b in range(SHAPE[0]):
        tokens = list(anchor[b])
        middle = sum(tokens[1:], tokens[0]) / len(tokens)
        torch.testing.assert_close(mean[b], middle)
        torch.testing.assert_close(spread[b], sum((t - middle) @ (t - middle) for t in tokens))
        torch.testing.assert_close(distance[b], sum((t - middle) @ (t - middle) for t in h[b]))


def test_other_tokens_are_not_explained_and_each_sample_counts_for_itself() -> None:
    anchor, h = features(0), features(4)
    assert is_unexplained(anchor, h, anchor) == [False, False]
    assert is_unexplained(anchor.roll(1, 1), h, anchor) == [True, True]
    other = h.clone()
    other[1] = features(4, seed=1)[1]
    assert is_unexplained(anchor, other, anchor) == [False, True]


@pytest.mark.parametrize("scale", [0.51, 0.8, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_what_a_model_does_to_all_tokens_alike_is_explained(scale: float, shift: float) -> None:
    """Modulation by the time shifts all of them, and scales them."""
    anchor = features(0)
    assert is_unexplained(anchor, scale * anchor + shift, anchor) == [False, False]


def test_not_a_number_is_another_doubt() -> None:
    bad = features(0)
    bad[0, 0, 0] = math.nan
    assert is_unexplained(features(0), bad, features(0)) == [False, False]
    assert is_unexplained(bad, features(0), features(0)) == [False, False]


# ---------------------------------------------------------------------------------------------------------- the engine


def drive(config: TAPConfig, of: Callable[[int], Tensor], driver: Driver | None = None) -> Driver:
    """Twelve steps with these features, whose residuals are minus the probe."""
    probe = {step: of(step) for step in range(12)}
    zeros = {step: torch.zeros_like(h) for step, h in probe.items()}
    return (driver or Driver(config)).run(probe=probe, residual={i: -h for i, h in probe.items()}, stream=zeros)


def since(step: int) -> Callable[[int], Tensor]:
    """Other features from a step on."""
    return lambda i: features(i, seed=int(i >= step))


@pytest.mark.parametrize("granularity", ["token", "sample", "batch"])
@pytest.mark.parametrize("loss", ["cosine", "l2", "relative_l2", "l1"])
def test_a_step_that_the_past_does_not_explain_is_full_and_the_past_forgotten(loss: Any, granularity: Any) -> None:
    driver = drive(TAPConfig.paper(interval=4, loss=loss, granularity=granularity), since(4))
    assert driver.full == [0, 1, 2, 4, 6, 10]
    assert driver.engine.report.fallbacks == {UNEXPLAINED: 1}
    torch.testing.assert_close(driver.outputs[5], -features(4, seed=1))  # reuse of what there is


def test_features_that_change_at_every_step_make_all_of_them_full() -> None:
    with pytest.warns(TAPWarning, match=rf"predicted no step of this trajectory: {UNEXPLAINED} \(7 calls\)"):
        driver = drive(CONFIG, lambda i: features(i, seed=i))
    assert driver.full == list(range(12))


def test_one_sample_that_is_not_explained_makes_the_step_full() -> None:
    """A pass is either full or predicted, for the whole batch."""

    def one_changes(step: int) -> Tensor:
        return torch.cat([features(step)[:1], since(4)(step)[1:]])

    assert drive(CONFIG, one_changes).full == [0, 1, 2, 4, 6, 10]


def test_a_full_step_that_the_past_does_not_explain_begins_a_history_anew() -> None:
    """Differences between features that have nothing in common would spoil the steps after it."""
    driver = drive(CONFIG, since(6))
    assert driver.full == [0, 1, 2, 6, 10]
    assert not driver.engine.report.fallbacks
    torch.testing.assert_close(driver.outputs[7], -features(6, seed=1))


def test_with_one_candidate_nothing_is_checked() -> None:
    assert drive(TAPConfig.paper(interval=4, orders=(1,), horizon_span=0.0), since(4)).full == [0, 1, 2, 6, 10]


@pytest.mark.parametrize(("at", "full"), [(4, [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]), (6, [0, 1, 2, 6, 7, 8, 9, 10, 11])])
def test_on_a_gpu_it_is_noticed_a_step_late_and_awaited_from_then_on(
    at: int, full: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4 is predicted, step 6 full. After one surprise the next would come too late at every second step."""
    monkeypatch.setattr(Engine, "checks_late", staticmethod(lambda _: True))
    driver = drive(CONFIG, lambda i: features(i, seed=i if i >= at else 0))
    assert driver.full == full
    assert driver.engine.report.fallbacks == {LATE: 1, UNEXPLAINED: 4 if at == 4 else 3}
    driver.full = []
    assert drive(CONFIG, features, driver).full == [0, 1, 2, 6, 10]  # the next trajectory waits for nothing again


def test_a_late_doubt_of_one_change_costs_one_full_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "checks_late", staticmethod(lambda _: True))
    driver = drive(CONFIG, since(4))
    assert driver.full == [0, 1, 2, 5, 6, 10]
    assert driver.engine.report.fallbacks == {LATE: 1}


def test_an_image_that_is_exchanged_is_noticed() -> None:
    """A transformer that is given an image in further channels, as FLUX.1-Fill, Control or Wan's image to video are."""
    transformer = build_transformer(in_channels=64, out_channels=16)
    tap.apply_tap(transformer, TAPConfig.paper(interval=4, steps=12))
    generator = torch.Generator().manual_seed(0)
    x, images = torch.randn(1, 64, 16, generator=generator), torch.randn(2, 1, 64, 48, generator=generator)
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1)
    text, pooled = torch.zeros(1, 6, 16), torch.zeros(1, 16)
    for step in range(12):
        with torch.no_grad():
            transformer(
                torch.cat([x + 0.01 * step, images[int(step >= 4)]], -1), text, pooled,
                torch.tensor([1 - step / 12]), ids.view(-1, 3), torch.zeros(6, 3),
            )  # fmt: skip
    found = tap.report(transformer)
    assert found.fallbacks == {UNEXPLAINED: 1}
    assert found.full_steps == 6


# ------------------------------------------------------------------------------------------------------ trained models


@contextmanager
def changed(pipe: Any, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Latents (B, …) are changed after each step, the i-th from 0."""
    scheduler, steps = pipe.scheduler, iter(range(50))
    step = scheduler.step
    scheduler.step = lambda *args, **kwargs: (change(next(steps), step(*args, **kwargs)[0]),)
    try:
        yield
    finally:
        vars(scheduler).pop("step", None)


def unpacked(x: Tensor) -> Tensor:
    """FLUX's latents (B, N, 4 C) as (B, C, H, W)."""
    side = math.isqrt(x.shape[1])
    return torch.nn.functional.pixel_shuffle(x.transpose(1, 2).unflatten(2, (side, side)), 2)


def packed(x: Tensor) -> Tensor:
    return torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


Change = Callable[[int, Tensor], Tensor]


def emoji_rolled() -> Change:
    """By whole tokens, another way after each step, as for seamless tiles; undone after the last."""
    generator, total = torch.Generator().manual_seed(0), torch.zeros(2, dtype=torch.int64)

    def change(step: int, x: Tensor) -> Tensor:
        by = 2 * torch.randint(1, 8, (2,), generator=generator) if step < 49 else -total
        total.add_(by)
        return packed(unpacked(x).roll(by.tolist(), (2, 3)))

    return change


def frames_moved_along() -> Change:
    return lambda step, x: x.roll(1 if step < 49 else -49, 2)


def replaced(at: int) -> Callable[[], Change]:
    """By the latents of another sample."""
    return lambda: lambda step, x: x.roll(1, 0) if step == at else x


def load(name: str) -> tuple[Any, BenchModel]:
    model = MODELS[name]()
    pipe = model.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe, model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make", "full_steps", "gain"),
    [
        ("emoji", emoji_rolled, (50, 50), 30.0),
        ("emoji", replaced(25), (8, 10), 2.0),  # the next step is full
        ("emoji", replaced(26), (8, 10), 5.0),  # it is predicted
        ("sprites", frames_moved_along, (30, 50), 3.0),  # late, over a ground that stands still, most is explained
    ],
)
def test_what_the_past_does_not_explain_is_not_predicted(
    name: str, make: Any, full_steps: tuple[int, int], gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, model = load(name)
    conditions = model.measured[: 4 if name == "emoji" else 1]

    def pictures() -> Tensor:
        with changed(pipe, make()):
            return draw(pipe, model, conditions, 0, num_inference_steps=50).pictures

    plain = pictures()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TAPWarning)  # that no step was predicted
        with tap.enabled(pipe, TAPConfig(full_steps=8)):
            checked = pictures()
            report = tap.report(pipe)
    with monkeypatch.context() as without, tap.enabled(pipe, TAPConfig(full_steps=8)):
        without.setattr(engine_module, "unexplained", lambda error, *_: torch.zeros_like(error, dtype=torch.bool))
        blind = pictures()
    before, after = (sum(psnr(some, plain, span=1.0)) / len(conditions) for some in (blind, checked))
    print(f"{name}: {before:.1f} dB without, {after:.1f} with, {report.full_steps} full steps")
    least, most = full_steps
    assert least <= report.full_steps <= most
    assert after >= before + gain
    if least == 50:
        assert torch.equal(checked, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["emoji", "fashion", "sprites"])
def test_the_bench_s_runs_are_explained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios: list[float] = []
    check = Engine._is_unexplained

    def watched(self: Engine, call: Any, h: Tensor, errors: Tensor, history: Any, late: bool) -> Tensor | None:
        ratios.append(float((errors.sum(-1) / history.spread).max()))
        return check(self, call, h, errors, history, late)

    monkeypatch.setattr(Engine, "_is_unexplained", watched)
    pipe, model = load(name)
    conditions = model.measured[: 2 if name == "sprites" else 4]
    for budget in (6, 8, 10, 14):
        with tap.enabled(pipe, TAPConfig(full_steps=budget)):
            draw(pipe, model, conditions, 0, num_inference_steps=50)
            assert not tap.report(pipe).fallbacks
    print(f"{name}: at most {max(ratios):.2f}")
    assert 0 < max(ratios) < (0.9 if name == "sprites" else 0.8)  # whose last windows are long (docs/experiments.md)
