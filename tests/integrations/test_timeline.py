"""What the noise tells, against real schedulers: their steps, run by hand in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tap_diffusion.core.schedule import clock_steps, growing_steps
from tap_diffusion.core.timeline import TAIL, Timeline
from tap_diffusion.integrations.diffusers.schedulers import timeline

STEPS = 20


def flow(**config: Any) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(STEPS)
    return scheduler


def ddim(prediction: str, **config: Any) -> Any:
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False, **config)
    scheduler.set_timesteps(STEPS)
    return scheduler


def edm() -> Any:
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(STEPS)
    return scheduler


def reversed_flow() -> Any:
    scheduler = diffusers.MiniMaxH3Scheduler(shift=3.0)
    scheduler.set_timesteps(STEPS + 1)
    return scheduler


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "flow": flow,
    "shifted flow": lambda: flow(shift=3.0),
    "epsilon": lambda: ddim("epsilon"),
    "v": lambda: ddim("v_prediction", beta_schedule="scaled_linear"),
    "sample": lambda: ddim("sample"),
    "preconditioned": edm,
    "reversed flow": reversed_flow,
}
each_scheduler = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)


def model(scheduler: Any, clean: Tensor) -> Callable[[Tensor, int], Tensor]:
    """The perfect model of data that is one point."""

    def output(x: Tensor, step: int) -> Tensor:
        if hasattr(scheduler, "precondition_outputs"):  # to be (x₀ - c_skip x) / c_out, Karras et al., table 1
            sigma, data = scheduler.sigmas[step].double(), scheduler.config.sigma_data
            total = sigma**2 + data**2
            return (clean - data**2 / total * x) * total.sqrt() / (sigma * data)
        if isinstance(scheduler, diffusers.MiniMaxH3Scheduler):
            return (clean - x) / scheduler.sigmas[step].double()
        if hasattr(scheduler, "sigmas"):
            return (x - clean) / scheduler.sigmas[step].double()
        product = scheduler.alphas_cumprod[scheduler.timesteps[step]].double()
        alpha, sigma = product.sqrt(), (1 - product).sqrt()
        noise = (x - alpha * clean) / sigma
        kinds = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}
        return kinds[scheduler.config.prediction_type]

    return output


@pytest.mark.parametrize("full", [(), (0, 4, 9, 13, 18), (0, 4, 9, 10, 13, 18)])
@each_scheduler
@pytest.mark.parametrize(("anchors", "step"), [((0,), 4), ((4, 0), 9), ((9, 4), 10), ((9, 4), 13), ((13, 9), 18)])
def test_hindsight_undoes_what_the_window_did(
    make: Callable[[], Any], anchors: tuple[int, ...], step: int, full: tuple[int, ...]
) -> None:
    """Errors of the assumed form in the steps between: after the full step, so moved, the latent is as if none were."""
    scheduler = make()
    known = timeline(scheduler, 0)
    assert known is not None
    known = replace(known, full=full)
    generator = torch.Generator().manual_seed(0)
    clean, start, offset = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    true, clock = model(scheduler, clean), known.clock

    def run(error: float, moved: bool) -> Tensor:
        solver, x = make(), start
        for k in range(step + 1):
            output = true(x, k)
            if error == 0:
                undisturbed.append(output)
            elif k > anchors[0]:
                ramp = math.prod((clock[k] - clock[a]) / (clock[step] - clock[a]) for a in anchors)
                prediction = undisturbed[k] + error * ramp * offset
                surprise = output - prediction
                output = (
                    prediction if k < step else output + (known.hindsight(anchors, step) if moved else 0) * surprise
                )
            x = solver.step(output, solver.timesteps[k], x)[0].double()
        return x

    undisturbed: list[Tensor] = []
    expected = run(error=0, moved=False)
    scale = (run(error=1, moved=False) - expected).norm()
    left = (run(error=1, moved=True) - expected).norm()
    if step - anchors[0] > 1:
        assert scale > 1e-3
        assert left < 1e-4 * scale  # float32 in the schedulers
    else:
        assert known.hindsight(anchors, step) == 0


def test_the_pace_of_flow_matching_is_half_arcsine_half_steps() -> None:
    scheduler = flow(shift=2.0)
    known = timeline(scheduler, 0)
    assert known is not None
    angle = scheduler.sigmas[:-1].double().sqrt().asin()
    expected = (torch.arange(STEPS) + (STEPS - 1) * (angle[0] - angle) / (angle[0] - angle[-1])) / 2
    torch.testing.assert_close(torch.tensor(known.pace, dtype=torch.float64), expected.double(), atol=1e-5, rtol=0)


noises = st.tuples(
    st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=60, unique=True), st.lists(st.just(math.inf), max_size=1)
).map(lambda drawn: (*drawn[1], *sorted(drawn[0], reverse=True)))


@given(noises, st.data())
def test_pace_and_clock_rise_from_the_first_step_to_the_last(noise: tuple[float, ...], data: st.DataObject) -> None:
    known = Timeline(noise, "flow", full_steps_of(noise, data))
    for time in (known.pace, known.spacing, replace(known, tokens=4096).spacing, known.clock):
        assert time[0] == 0
        assert all(a < b for a, b in pairwise(time))
        if len(noise) > 1:
            assert time[-1] == pytest.approx(len(noise) - 1)


def full_steps_of(noise: tuple[float, ...], data: st.DataObject) -> tuple[int, ...]:
    later = st.sets(st.integers(1, len(noise) - 1)) if len(noise) > 1 else st.just(set[int]())
    return (0, *sorted(data.draw(later)))


@given(noises, st.data())
def test_full_steps_are_even_on_the_clock(noise: tuple[float, ...], data: st.DataObject) -> None:
    """Counted in windows, a step stands where its pace says between the full steps around it."""
    full = full_steps_of(noise, data)
    known = Timeline(noise, "flow", full)
    if len(full) < 2:
        assert known.clock == known.pace
        return
    window = known.clock[full[1]]
    for step, time in enumerate(known.clock):
        n = max(i for i, f in enumerate(full) if f <= step)
        start, end = (full[n], full[n + 1]) if n + 1 < len(full) else (full[n], None)
        length = known.pace[end] - known.pace[start] if end else known.pace[full[-1]] - known.pace[full[-2]]
        assert time / window == pytest.approx(n + (known.pace[step] - known.pace[start]) / length)


@given(st.integers(0, 16), st.data())
def test_hindsight_is_never_negative_nor_infinite(anchor: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(anchor + 1, 19))
    earlier = data.draw(st.none() | st.integers(0, anchor - 1)) if anchor else None
    for make in SCHEDULERS.values():
        known = timeline(make(), 0)
        assert known is not None
        value = known.hindsight([anchor] if earlier is None else [anchor, earlier], step)
        assert 0 <= value + 1e-12 < 100
        assert (value > 1e-9) == (anchor + 1 < step < 19)  # a perfect model needs no help at the last step


WHOLE = (math.inf, *((50 - step) / step for step in range(1, 50)))


@pytest.mark.parametrize("tokens", [None, 1, 64])
def test_few_tokens_have_full_steps_at_the_pace_of_half_the_noise(tokens: int | None) -> None:
    known = Timeline(WHOLE, "flow", tokens=tokens)
    assert known.spacing == pytest.approx(Timeline(tuple(noise / 2 for noise in WHOLE), "flow").pace)


@pytest.mark.parametrize("tokens", [256, 4096, 10**6])
def test_many_tokens_have_them_by_the_logarithm_of_the_signal_as_they_see_it(tokens: int) -> None:
    """α + σ = 1 here, and α of step s is s / 50."""
    spacing = Timeline(WHOLE, "flow", tokens=tokens).spacing
    told = [math.log(1 + 3 * tokens / 64 * step / 50) for step in range(50)]
    by_log = [49 * value / told[-1] for value in told]
    few = Timeline(WHOLE, "flow").spacing
    share = (64 / tokens) ** 2
    assert spacing == pytest.approx([share * f + (1 - share) * t for f, t in zip(few, by_log, strict=True)])


def test_one_step_or_noise_that_stays_has_a_spacing_too() -> None:
    assert Timeline((1.0,), "flow", tokens=4096).spacing == (0.0,)
    assert Timeline.untold(1, 4096).spacing == (0.0,)


@pytest.mark.parametrize(("full", "share"), [(6, 0.6), (9, 0.9), (10, 1.0), (14, 1.0)])
def test_fewer_than_ten_full_steps_that_are_dense_at_the_start_shorten_slopes(full: int, share: float) -> None:
    known = Timeline(WHOLE, "flow", growing_steps(50, full))
    assert known.slopes == pytest.approx(share)
    assert replace(known, full=()).slopes == 1.0
    # From half way on, in the angle arcsin √σ, full steps are as dense as twice as many on the whole way.
    half = replace(known, noise=WHOLE[25:], full=growing_steps(25, full))
    assert half.slopes == pytest.approx(min(1.0, 2 * share))


@pytest.mark.parametrize("make", [flow, lambda: ddim("epsilon"), lambda: flow(shift=3.0)])
def test_slopes_are_whole_where_full_steps_are_even_in_the_pace(make: Callable[[], Any]) -> None:
    known = timeline(make(), 0)
    assert known is not None
    for steps in (STEPS, 8):
        for count in range(1, steps):
            part = replace(known, noise=known.noise[:steps])
            assert replace(part, full=clock_steps(part.pace, count)).slopes == 1.0


def test_slopes_are_in_between_where_windows_grow_a_little() -> None:
    for tokens, share in ((64, 0.99), (90, 0.88), (512, 0.8), (4096, 0.8)):
        known = Timeline(WHOLE, "flow", tokens=tokens)
        full = clock_steps(known.spacing, 8, TAIL)
        assert replace(known, full=full).slopes == pytest.approx(share, abs=0.01)
