"""The state machine, driven by hand: faults, fallbacks, endings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from tap_diffusion import ConfigError, TAPConfig, TAPWarning
from tap_diffusion.core.call import Call
from tap_diffusion.core.distributed import Ranks
from tap_diffusion.core.doubts import Fallback, LateFlag
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.predictors import candidates, chebyshev
from tap_diffusion.core.schedule import spaced_steps
from tap_diffusion.core.timeline import Timeline

SHAPE = (2, 4, 3)
CONFIG = TAPConfig.paper(interval=4)


def call(step: int, branch: str = "a", last: bool = False) -> Call:
    return Call(step, branch, starts_trajectory=step == 0 and branch == "a", is_last_step=last)


def features(step: int) -> Tensor:
    """A quadratic in time, different for each token."""
    base = torch.arange(math.prod(SHAPE), dtype=torch.float32).reshape(SHAPE) / 10 + 1
    return base + 0.1 * step * base.flip(2) + 0.01 * step * step


def drifting_noise(shape: tuple[int, ...]) -> dict[int, Tensor]:
    """A probe of which each token has its own way, and nothing says what is best."""
    base = torch.randn(shape)
    return {step: base + 0.2 * torch.randn(shape) for step in range(12)}


class Driver:
    """Runs an engine over a trajectory, with faults where they are wanted."""

    def __init__(self, config: TAPConfig = CONFIG) -> None:
        self.engine = Engine(config)
        self.full: list[int] = []
        self.outputs: dict[int, Tensor] = {}

    def run(
        self,
        steps: int = 12,
        branch: str = "a",
        residual: dict[int, Tensor] | None = None,
        probe: dict[int, Tensor] | None = None,
        stream: dict[int, Tensor] | None = None,
        ends: bool = True,
    ) -> Driver:
        for step in range(steps):
            where = call(step, branch, last=ends and step == steps - 1)
            x = (stream or {}).get(step, torch.zeros(SHAPE))
            h = (probe or {}).get(step, features(step))
            full = self.engine.begin(where)
            if not full:
                try:
                    self.outputs[step] = self.engine.predict(where, x, lambda h=h: h)  # type: ignore[misc]
                except Fallback as fallback:
                    self.engine.fall_back(where, str(fallback))
                    full = True
            if full:
                self.full.append(step)
                self.engine.record(where, x, x + (residual or {}).get(step, -features(step)), h)
            self.engine.end(where, full, lambda: 1.0)
        return self


def test_runs_the_schedule() -> None:
    driver = Driver().run()
    assert driver.full == [0, 1, 2, 6, 10]
    report = driver.engine.report
    assert (report.steps, report.full_steps, report.predicted_steps) == (12, 5, 7)
    assert report.evaluations_speedup == 12 / 5
    assert not report.fallbacks


def test_prediction_is_that_of_the_best_candidate() -> None:
    """Residuals are minus the probe features, so the right choice can be worked out from them alone."""
    driver = Driver(TAPConfig.paper(interval=4, loss="l2", horizon_span=0)).run(4)
    _, weights = candidates("taylor", (0, 1, 2), 0, 1, [2, 1, 0], 3)
    predictions = torch.einsum(
        "kh,hbnd->kbnd", torch.from_numpy(weights).float(), torch.stack([features(i) for i in (2, 1, 0)])
    )
    best = (predictions - features(3)).square().sum(-1).argmin(0)
    expected = -predictions.gather(0, best[None, ..., None].expand(1, *SHAPE))[0]
    torch.testing.assert_close(driver.outputs[3], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(driver.engine.report.choices[0].index.long(), best)


@pytest.mark.parametrize(("slopes", "carried"), [(None, 0.4), (1.0, 1.0), (0.25, 0.25)])
def test_what_changed_in_a_window_changes_again_in_the_next_however_long_it_is(
    slopes: float | None, carried: float
) -> None:
    known = Timeline((math.inf, *(20.0 / 2**i for i in range(11))), "flow")
    engine = Engine(TAPConfig(full_steps=(0, 1, 4, 8), orders=(1,), slopes=slopes, hindsight=0.0))
    outputs: dict[int, Tensor] = {}
    for step in range(12):
        where = dataclasses.replace(call(step, last=step == 11), steps=12, timeline=known)
        zero = torch.zeros(SHAPE)
        if engine.begin(where):
            engine.record(where, zero, features(step), None)
        else:
            outputs[step] = engine.predict(where, zero, torch.empty)
        engine.end(where, step not in outputs, lambda: 1.0)
    assert sorted(outputs) == [2, 3, 5, 6, 7, 9, 10, 11]
    for step, (before, newest, following) in {2: (0, 1, 4), 3: (0, 1, 4), 6: (1, 4, 8)}.items():
        share = (known.pace[step] - known.pace[newest]) / (known.pace[following] - known.pace[newest])
        expected = features(newest) + carried * share * (features(newest) - features(before))
        torch.testing.assert_close(outputs[step], expected)


def test_full_steps_for_another_number_of_steps_are_refused_at_every_call() -> None:
    engine = Engine(TAPConfig(full_steps=(0, 3), steps=10))
    known = Timeline(tuple(20.0 / 2**i for i in range(12)), "flow")
    for step in range(2):
        with pytest.raises(ConfigError, match="10 steps, and this one has 12"):
            engine.begin(dataclasses.replace(call(step), steps=12, timeline=known))


@pytest.mark.parametrize("what", ["residual", "probe"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_anchor_is_not_kept(what: str, value: float) -> None:
    bad = features(6).clone()
    bad[0, 0, 0] = value
    driver = Driver().run(**{what: {6: bad}})  # type: ignore[arg-type]
    # 7 has no anchor and runs in full; 8 and 9 have that one.
    assert driver.full == [0, 1, 2, 6, 7, 10]
    assert driver.engine.report.fallbacks == {"non-finite values in the last full step": 1}
    assert all(output.isfinite().all() for output in driver.outputs.values())


def test_a_bad_probe_makes_the_step_full() -> None:
    bad = features(4).clone()
    bad[1, 2, 0] = math.nan
    driver = Driver().run(probe={4: bad, 5: features(5)}, residual={4: features(4)})
    assert 4 in driver.full
    assert driver.engine.report.fallbacks["non-finite values"] == 1


def test_an_overflowing_prediction_makes_the_step_full() -> None:
    """float16: the anchors are finite, the extrapolation is not."""
    big = {i: torch.full(SHAPE, 2.0**14 * (i + 1), dtype=torch.float16) for i in range(3)}
    half = {i: torch.zeros(SHAPE, dtype=torch.float16) for i in range(12)}
    driver = Driver(TAPConfig.paper(interval=4, orders=(2,), horizon_span=0))
    driver.run(stream=half, residual=big | {i: half[0] for i in range(3, 12)}, probe=half)
    assert driver.full[:4] == [0, 1, 2, 3]
    assert driver.engine.report.fallbacks == {"non-finite values": 1}


def test_late_checks_reuse_at_once_and_run_the_next_step_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens on a GPU, where reading the flag at once would wait."""
    monkeypatch.setattr(Engine, "checks_late", staticmethod(lambda _: True))
    bad = features(4).clone()
    bad[1, 2, 0] = math.nan
    driver = Driver().run(probe={4: bad})
    assert driver.full == [0, 1, 2, 5, 6, 10]
    assert driver.engine.report.fallbacks == {"non-finite values, noticed a step late": 1}
    assert driver.outputs[4].isfinite().all()
    torch.testing.assert_close(driver.outputs[4][1, 2], -features(2)[1, 2])


def arriving_when_asked_twice() -> Any:
    asked = [0]

    def is_raised(flag: LateFlag) -> bool:
        asked[0] += bool(flag.flag.any())
        return bool(flag.flag.any()) and asked[0] > 1

    return is_raised


@pytest.mark.parametrize("what", ["residual", "probe"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_anchor_is_noticed_late_and_never_used_as_it_is(
    what: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a full step doesn't wait either, so that the host runs ahead into the predicted ones."""
    monkeypatch.setattr(Engine, "checks_late", staticmethod(lambda _: True))
    monkeypatch.setattr(LateFlag, "is_raised", arriving_when_asked_twice())
    bad = features(6).clone()
    bad[1, 2, 0] = value
    given: dict[str, Any] = {what: {6: bad}}
    driver = Driver().run(**given)
    assert driver.full == [0, 1, 2, 6, 8, 10]
    assert driver.engine.report.fallbacks == {"non-finite values, noticed a step late": 1}
    assert all(driver.outputs[step].isfinite().all() for step in (7, 9, 11))


def test_a_late_flag_is_not_lost_before_it_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "checks_late", staticmethod(lambda _: True))
    monkeypatch.setattr(LateFlag, "is_raised", arriving_when_asked_twice())
    bad = features(3).clone()
    bad[1, 2, 0] = math.nan
    assert Driver().run(probe={3: bad}).full == [0, 1, 2, 5, 6, 10]


def test_a_change_of_shape_runs_in_full() -> None:
    small = torch.zeros(1, *SHAPE[1:])
    driver = Driver()
    driver.run(stream={i: small for i in range(4, 12)}, probe={i: features(i)[:1] for i in range(4, 12)},
               residual={i: features(i)[:1] for i in range(4, 12)})  # fmt: skip
    assert driver.full == [0, 1, 2, 4, 6, 10]
    assert list(driver.engine.report.fallbacks) == ["the shape, dtype or device of the hidden states changed"]


def test_branches_have_histories_of_their_own() -> None:
    engine = Engine(CONFIG)
    outputs = {}
    for step in range(4):
        for sign, branch in ((1, "a"), (-1, "b")):
            where = call(step, branch)
            if engine.begin(where):
                engine.record(where, torch.zeros(SHAPE), sign * features(step), sign * features(step))
            else:
                outputs[branch] = engine.predict(where, torch.zeros(SHAPE), lambda s=sign: s * features(3))  # type: ignore[misc]
            engine.end(where, step < 3, lambda: 1.0)
    torch.testing.assert_close(outputs["a"], -outputs["b"])
    assert engine.report.steps == 4
    assert engine.report.full_calls == 6


def test_memory_is_freed_at_the_last_step() -> None:
    driver = Driver().run(11)
    assert driver.engine.cache_bytes == 0
    feature = features(0).nbytes
    gram, mean, spread = 2 * 4 * 3 * 3 * 4, 2 * 3 * 4, 2 * 4
    assert driver.engine.report.cache_bytes == 2 * 3 * feature + gram + mean + spread


def test_a_sketch_looks_at_some_channels_and_keeps_no_others() -> None:
    torch.manual_seed(0)
    noise = drifting_noise(SHAPE)
    whole, sketched = (Driver(dataclasses.replace(CONFIG, sketch=s)).run(11, probe=noise) for s in (1, 2))
    some = Driver().run(11, probe={step: h[..., ::2] for step, h in noise.items()})
    for step, output in some.outputs.items():
        assert torch.equal(sketched.outputs[step], output)
    assert any(not torch.equal(whole.outputs[step], output) for step, output in some.outputs.items())
    feature, kept, gram = features(0).nbytes, noise[0][..., ::2].numel() * 4, 2 * 4 * 3 * 3 * 4
    mean, spread = kept // 4, 2 * 4
    assert sketched.engine.report.cache_bytes == 3 * (feature + kept) + gram + mean + spread


@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (767, 1), (768, 2), (3072, 8), (5120, 13)])
def test_by_default_enough_channels_are_looked_at(channels: int, stride: int) -> None:
    torch.manual_seed(0)
    noise = drifting_noise((*SHAPE[:-1], channels))
    default = dataclasses.replace(CONFIG, sketch=None)
    itself, named, all_of_them = (
        Driver(config).run(11, probe=noise) for config in (default, dataclasses.replace(CONFIG, sketch=stride), CONFIG)
    )
    assert all(torch.equal(itself.outputs[step], output) for step, output in named.outputs.items())
    assert itself.engine.report.cache_bytes == named.engine.report.cache_bytes
    assert (itself.engine.report.cache_bytes < all_of_them.engine.report.cache_bytes) == (stride > 1)


def test_interval_one_keeps_nothing() -> None:
    driver = Driver(TAPConfig.paper(interval=1)).run(ends=False)
    assert driver.full == list(range(12))
    assert driver.engine.report.cache_bytes == 0


def test_one_candidate_needs_no_probe() -> None:
    engine = Engine(TAPConfig.paper(interval=4, orders=(1,), horizon_span=0))

    def never() -> Tensor:
        raise AssertionError("the probe ran")

    for step in range(4):
        if engine.begin(call(step)):
            engine.record(call(step), torch.zeros(SHAPE), features(step), None)
        else:
            result = engine.predict(call(step), torch.ones(SHAPE), never)
    torch.testing.assert_close(result, 1 + 2 * features(2) - features(1))


def test_a_longer_history_reaches_the_predictor() -> None:
    engine = Engine(
        TAPConfig.paper(
            interval=2, warmup=5, family="chebyshev", orders=(2,), horizon_span=0, history=6, cache_dtype="float32"
        )
    )
    for step in range(10):
        if engine.begin(call(step)):
            engine.record(call(step), torch.zeros(SHAPE), features(step), None)
        else:
            result = engine.predict(call(step), torch.ones(SHAPE), lambda: torch.empty(0))
    weights = chebyshev(2)([8, 6, 4, 3, 2, 1], 9)
    expected = 1 + sum(weight * features(step) for weight, step in zip(weights, (8, 6, 4, 3, 2, 1), strict=True))
    torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=1e-5)


def test_a_branch_that_begins_late_runs_in_full_and_says_so() -> None:
    """Guidance from some step on, as skip-layer guidance has it."""
    engine = Engine(TAPConfig.paper(interval=4, warmup=2, orders=(0,)))
    full: dict[str, list[int]] = {"cond": [], "late": []}
    for step in range(6):
        for branch in full if step >= 3 else ["cond"]:
            where = call(step, branch)
            if engine.begin(where):
                full[branch].append(step)
                engine.record(where, torch.zeros(SHAPE), features(step), None)
            engine.end(where, step in full[branch], lambda: 0.0)
    assert full == {"cond": [0, 1, 5], "late": [3, 5]}
    assert engine.report.fallbacks == {"the branch has only just begun": 1}


def test_without_effect_warns_with_the_reason() -> None:
    with pytest.warns(TAPWarning, match=r"it had 3 steps, and with warmup=3 the first predicted step is number 4"):
        Driver().run(3)
    bad = {i: torch.full(SHAPE, math.nan) for i in range(12)}
    with pytest.warns(TAPWarning, match=r"non-finite values in the last full step \(7 calls\)"):
        Driver().run(residual=bad)


def test_a_run_of_one_step_warns_but_not_one_step_that_nobody_calls_a_run() -> None:
    with pytest.warns(TAPWarning, match="it had 1 step"):
        Driver().run(1)
    engine = Engine(CONFIG)
    where = dataclasses.replace(call(0), is_last_step=None)
    assert engine.begin(where)
    engine.record(where, torch.zeros(SHAPE), features(0), features(0))
    engine.end(where, True, lambda: 1.0)
    engine.finish()


def test_report_prints_and_counts() -> None:
    driver = Driver().run()
    text = str(driver.engine.report)
    assert "12 steps, 5 full and 7 predicted (2.40x fewer evaluations)" in text
    assert driver.engine.report.full_step_ms == driver.engine.report.predicted_step_ms == 1.0
    shares = driver.engine.report.shares()
    assert sum(shares.values()) == pytest.approx(1)
    values: dict[str, Any] = driver.engine.report.to_dict()
    assert values["full_calls"] == 5
    assert str(Engine(CONFIG).report) == "TAP: nothing has run yet"
    with pytest.warns(TAPWarning):
        assert "predicted step" not in str(Driver().run(3).engine.report)


def test_a_report_in_a_notebook_is_a_few_lines() -> None:
    report = Driver().run().engine.report
    assert repr(report) == str(report)
    assert len(repr(report).splitlines()) == 4
    report.notes.append("σ < 1")
    table = ElementTree.fromstring(report._repr_html_())
    assert [[cell.text for cell in row] for row in table][2:] == [
        ["cache", "0.00 MB"],
        ["tokens by predictor", str(report).splitlines()[3].partition(": ")[2]],
        [None, "σ < 1"],
    ]


# ---------------------------------------------------------------------------------------------- planned by the tokens


class Together(Ranks):
    """Two ranks, the other with as many tokens more."""

    def __init__(self, others: int) -> None:
        super().__init__()
        self.others = others

    @property
    def several(self) -> bool:
        return True

    def total(self, part: Tensor) -> Tensor:
        return part + self.others if part.dtype == torch.int64 and part.ndim == 0 else part

    def any(self, flag: Tensor) -> Tensor:
        return flag


def run_through(engine: Engine, tokens: int, steps: int = 50, known: Timeline | None = None, **more: Any) -> list[int]:
    """Full steps of a trajectory of two branches."""
    full = []
    for step in range(steps):
        for branch in ("a", "b"):
            where = dataclasses.replace(call(step, branch, step == steps - 1), steps=steps, timeline=known, **more)
            x = torch.zeros(1, tokens, 2)
            is_full = engine.begin(where)
            if is_full:
                engine.record(where, x, x + features(step)[:1, :1, :2], x + features(step)[1:, :1, :2])
                full.append(step)
            else:
                engine.predict(where, x, lambda: x)  # noqa: B023
            engine.end(where, is_full, lambda: 1.0)
    assert full[::2] == full[1::2]
    return full[::2]


FLOW = Timeline((math.inf, *((50 - step) / step for step in range(1, 50))), "flow")


class NotChecking(Engine):
    checks_past = False


@pytest.mark.parametrize("known", [FLOW, None])
def test_the_first_full_step_tells_the_tokens_by_which_the_others_are_planned(known: Timeline | None) -> None:
    engine = NotChecking(TAPConfig(full_steps=8))
    for tokens in (512, 16, 512, 2048):  # one trajectory after the other, nothing is left of the last one's
        as_seen = known and dataclasses.replace(known, tokens=tokens)
        assert run_through(engine, tokens, known=known) == list(spaced_steps(TAPConfig(), 50, 8, as_seen, tokens))
        assert not engine.report.fallbacks


def test_tokens_of_all_ranks_count() -> None:
    alone = run_through(NotChecking(TAPConfig(full_steps=8)), 512, known=FLOW)
    together = [run_through(NotChecking(TAPConfig(full_steps=8), Together(512 - n)), n, known=FLOW) for n in (200, 312)]
    assert together == [alone, alone]


def test_a_given_schedule_and_the_paper_s_do_not_look_at_tokens() -> None:
    given = (0, 4, 30)
    assert run_through(NotChecking(TAPConfig(full_steps=given)), 4096, known=FLOW) == list(given)
    for tokens in (16, 1024):
        paper = run_through(NotChecking(TAPConfig.paper(interval=8)), tokens, known=FLOW)
        assert paper == [0, 1, 2, 10, 18, 26, 34, 42]


def test_only_the_steps_within_are_divided(recwarn: pytest.WarningsRecorder) -> None:
    engine = NotChecking(TAPConfig(speedup=20))
    part = dataclasses.replace(FLOW, noise=FLOW.noise[10:40], tokens=512)
    inside = [10 + step for step in spaced_steps(TAPConfig(), 30, 6, part)]
    assert run_through(engine, 512, known=FLOW, within=range(10, 40)) == sorted({*range(10), *inside, *range(40, 50)})
    assert not recwarn


def test_a_trajectory_that_begins_with_less_noise_is_planned_by_that() -> None:
    rest = dataclasses.replace(FLOW, noise=FLOW.noise[20:])
    full = run_through(NotChecking(TAPConfig(full_steps=8)), 1024, 30, rest)
    assert full == list(spaced_steps(TAPConfig(), 30, 8, dataclasses.replace(rest, tokens=1024)))
    assert full[0] == 0
    assert full[3] > 3  # what the start decides is decided


def test_the_rest_of_a_run_that_another_transformer_began_is_planned_by_its_noise() -> None:
    rest = dataclasses.replace(FLOW, noise=FLOW.noise[20:])
    more = {"steps_before": 20, "full_before": 5}
    full = run_through(NotChecking(TAPConfig(full_steps=10)), 1024, 30, rest, **more)
    assert full == list(spaced_steps(TAPConfig(), 30, 5, dataclasses.replace(rest, tokens=1024)))
