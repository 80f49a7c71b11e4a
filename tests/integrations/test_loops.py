"""Loops of one's own, where TAP is told the noise: the same as in a pipeline, and clear where it can't be."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import tap_diffusion as tap
from loops import ARGUMENTS, Flux, denoise, flux_of, guided, inputs, sample_euler
from tap_diffusion import ConfigError, TAPConfig, TAPWarning, UnsupportedModelError
from tap_diffusion.core.timeline import Timeline
from tap_diffusion.integrations.diffusers.loops import Loop
from tap_diffusion.integrations.diffusers.schedulers import timeline
from tiny import TOKENS, WORDS, build_transformer, engine_of, sample

STEPS = 16
CONFIG = TAPConfig(full_steps=5)
SIGMAS = torch.linspace(1, 0, STEPS + 1)
START = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def flux(pipe: Any) -> Flux:
    return flux_of(pipe.transformer)


def full_steps(model: Any) -> list[int]:
    return [step for step, is_full, _ in tap.report(model).calls if is_full]


# ------------------------------------------------------------------------------------------- as in the same pipeline


@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS.tolist(), SIGMAS.numpy()], ids=["tensor", "list", "array"])
def test_a_loop_has_what_a_pipeline_has(pipe: Any, flux: Flux, sigmas: Any) -> None:
    """The same full steps, clock and hindsight, and so the same latents."""
    plain = sample(pipe, WORDS[0], steps=STEPS, latents=START)
    with tap.enabled(pipe, CONFIG):
        expected = sample(pipe, WORDS[0], steps=STEPS, latents=START)
        planned = full_steps(pipe)
    condition = inputs(pipe, WORDS[:1], TOKENS)
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=sigmas)
    own = denoise(flux, START, SIGMAS.tolist(), **condition)
    assert full_steps(flux) == planned
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)
    assert (expected - plain).norm() > 1e-3 * plain.norm()
    assert engine_of(flux).cache_bytes == 0  # the loop tells which step is the last
    tap.disable(flux)
    torch.testing.assert_close(denoise(flux, START, SIGMAS.tolist(), **condition), plain, atol=1e-5, rtol=1e-4)


def test_guidance_by_a_batch_made_at_each_call(pipe: Any, flux: Flux) -> None:
    with tap.enabled(pipe, CONFIG):
        expected = sample(pipe, WORDS[0], steps=STEPS, latents=START, negative_prompt="", true_cfg_scale=2.0)
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=SIGMAS)
    extra = {"cond": inputs(pipe, WORDS[:1], TOKENS), "uncond": inputs(pipe, [""], TOKENS), "scale": 2.0}
    own = sample_euler(guided(flux), START, SIGMAS, extra)
    assert (tap.report(flux).full_steps, tap.report(flux).steps) == (5, STEPS)
    torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("clock", "times"),
    [
        (lambda told: told / 1000, [1000 * s for s in SIGMAS.tolist()]),
        (lambda told: 1 - told, [1 - s for s in SIGMAS.tolist()]),
        (lambda told: 1 - told / 1000, [1000 - 1000 * s for s in SIGMAS.tolist()]),
        (lambda told: told.exp(), [s.log().item() for s in SIGMAS[:-1]] + [-math.inf]),
    ],
    ids=["thousandths", "rising", "rising thousandths", "logarithms"],
)
def test_the_timestep_may_be_anything(pipe: Any, flux: Flux, clock: Any, times: list[float]) -> None:
    """What it is at each step is found, or told."""
    condition = inputs(pipe, WORDS[:1], TOKENS)
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=SIGMAS)
    expected = denoise(flux, START, SIGMAS.tolist(), **condition)
    flux.clock = clock
    told: dict[str, Any] = {"times": times[:-1]} if times[-1] == -math.inf else {}
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=SIGMAS, **told)
    x = START
    with torch.no_grad():
        for time, (now, then) in zip(times[:-1], pairwise(SIGMAS.tolist()), strict=True):
            x = x + (then - now) * flux(img=x, timesteps=torch.tensor([time]), **condition)
    assert (tap.report(flux).full_steps, tap.report(flux).steps) == (5, STEPS)
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [16, 50])
def test_bfloat16_timesteps(pipe: Any, flux: Flux, steps: int) -> None:
    """Of FLUX's shifted sigmas, which are close together at the start."""
    even = torch.linspace(1, 0, steps + 1)
    sigmas = (3.16 * even / (1 + 2.16 * even)).tolist()
    condition = {name: value.bfloat16() for name, value in inputs(pipe, WORDS[:1], TOKENS).items()}
    flux.bfloat16()
    tap.apply_tap(flux, TAPConfig(full_steps=8), **ARGUMENTS, sigmas=sigmas)
    denoise(flux, START.bfloat16(), sigmas, **condition)
    assert (tap.report(flux).full_steps, tap.report(flux).steps) == (8, steps)


def test_a_later_start_has_the_rest(pipe: Any, flux: Flux) -> None:
    """Image to image begins within the sigmas that were told."""
    condition = inputs(pipe, WORDS[:1], TOKENS)
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=SIGMAS, times=SIGMAS[:-1])
    rest = SIGMAS[6:].tolist()
    own = denoise(flux, START, rest, **condition)
    steps = full_steps(flux)
    assert (len(steps), tap.report(flux).steps) == (5, STEPS - 6)
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=rest)
    assert torch.equal(denoise(flux, START, rest, **condition), own)
    assert full_steps(flux) == steps


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_by_hand_has_what_ddim_has(pipe: Any, flux: Flux, prediction: Any) -> None:
    """Stepped by diffusers' scheduler, which TAP finds and reads, and by arithmetic of which it is told."""
    condition = inputs(pipe, WORDS[:1], TOKENS)
    ddim = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    ddim.set_timesteps(STEPS)
    times = ddim.timesteps.tolist()
    products = [*ddim.alphas_cumprod[ddim.timesteps].tolist(), 1.0]

    def output(x: Tensor, time: int) -> Tensor:
        return flux(img=x, timesteps=torch.tensor([time]), **condition)

    @torch.no_grad()
    def stepped(scheduler: Any) -> Tensor:
        x = START
        for time in scheduler.timesteps:
            x = scheduler.step(output(x, int(time)), time, x)[0]
        return x

    @torch.no_grad()
    def by_hand() -> Tensor:
        x = START
        for time, (now, then) in zip(times, pairwise(products), strict=True):
            f, alpha, sigma = output(x, time), now**0.5, (1 - now) ** 0.5
            clean = {"epsilon": (x - sigma * f) / alpha, "v_prediction": alpha * x - sigma * f, "sample": f}[prediction]
            x = then**0.5 * clean + (1 - then) ** 0.5 * (x - alpha * clean) / sigma
        return x

    flux.clock = lambda told: told / 1000
    tap.apply_tap(flux, CONFIG, **ARGUMENTS)
    expected = stepped(ddim)
    planned = full_steps(flux)
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, alphas_cumprod=products, times=times, prediction=prediction)
    own = by_hand()
    assert full_steps(flux) == planned
    assert len(planned) == 5
    assert (own - expected).norm() < 1e-3 * expected.norm()


# ----------------------------------------------------------------------------------------------- the noise that is told


def of_loop(**told: Any) -> Timeline:
    arguments = {"sigmas": None, "alphas_cumprod": None, "times": None, "prediction": "flow", "fresh_noise": False}
    return Loop(**arguments | told)._timeline(0)


def read(scheduler: Any) -> Timeline:
    found = timeline(scheduler, 0)
    assert found is not None
    return found


def assert_alike(told: Timeline, expected: Timeline) -> None:
    assert told.noise == pytest.approx(expected.noise, rel=1e-4)
    assert told.prediction == expected.prediction
    assert told.end == expected.end == 0


def test_noise_is_what_real_schedulers_have() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(STEPS)
    assert_alike(of_loop(sigmas=flow.sigmas), read(flow))

    ddim = diffusers.DDIMScheduler(clip_sample=False)
    ddim.set_timesteps(STEPS)
    products = [*ddim.alphas_cumprod[ddim.timesteps].tolist(), 1.0]
    kinds: Any
    for kinds in ("epsilon", "sample", "v_prediction"):
        ddim.register_to_config(prediction_type=kinds)
        told = of_loop(alphas_cumprod=products, times=ddim.timesteps, prediction=kinds)
        assert_alike(told, read(ddim))

    karras = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)  # which counts as k-diffusion does
    karras.set_timesteps(STEPS)
    assert_alike(of_loop(sigmas=karras.sigmas, prediction="epsilon"), read(karras))

    edm = diffusers.EDMEulerScheduler()
    edm.set_timesteps(STEPS)
    assert_alike(of_loop(sigmas=edm.sigmas / edm.config.sigma_data, prediction="v_prediction"), read(edm))


def test_fresh_noise_that_is_told_is_what_is_read_off_a_scheduler() -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    found, told = read(scheduler), of_loop(sigmas=scheduler.sigmas, prediction="epsilon", fresh_noise=True)
    assert told.kept == pytest.approx(found.kept, abs=0.1)  # which is a correlation of 64 numbers
    assert (told.reuses, found.reuses) == (False, False)
    assert of_loop(sigmas=SIGMAS, fresh_noise=True).reuses
    assert told.hindsight([0], 3) == 0


@pytest.mark.parametrize("full", [(), (0, 4, 9, 13, 18)])
@pytest.mark.parametrize(("anchors", "step"), [((0,), 4), ((4, 0), 9), ((9, 4), 13), ((13, 9), 19)])
@pytest.mark.parametrize(
    "sigmas",
    [torch.linspace(0, 0.9, 21), torch.linspace(0.9, 0.2, 21), torch.linspace(0.1, 0.7, 21)],
    ids=["inversion", "a part of the way", "a part of an inversion"],
)
def test_hindsight_undoes_what_the_window_did(
    sigmas: Tensor, anchors: tuple[int, ...], step: int, full: tuple[int, ...]
) -> None:
    """Errors of the assumed form, on the perfect model of data, or in an inversion of noise, that is one point, in
    float64: after the full step, so moved, the latent is as if there had been none."""
    sigmas = sigmas.double()
    known = replace(of_loop(sigmas=sigmas), full=full)
    clock, rises = known.clock, bool(sigmas[-1] > sigmas[0])
    clean, noise, offset = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(error: float, moved: bool) -> Tensor:
        x = (1 - sigmas[0]) * clean + sigmas[0] * noise
        for k in range(step + 1):
            output = (noise - x) / (1 - sigmas[k]) if rises else (x - clean) / sigmas[k]
            if error == 0:
                undisturbed.append(output)
            elif k > anchors[0]:
                ramp = math.prod((clock[k] - clock[a]) / (clock[step] - clock[a]) for a in anchors)
                prediction = undisturbed[k] + error * ramp * offset
                share = known.hindsight(anchors, step) if moved else 0.0
                output = prediction if k < step else output + share * (output - prediction)
            x = x + (sigmas[k + 1] - sigmas[k]) * output
        return x

    undisturbed: list[Tensor] = []
    expected = run(error=0, moved=False)
    assert (run(error=1, moved=False) - expected).norm() > 1e-3
    assert (run(error=1, moved=True) - expected).norm() < 1e-9


def test_an_inversion_is_read_off_a_scheduler_likewise() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(STEPS)
    assert_alike(of_loop(sigmas=scheduler.sigmas), read(scheduler))


# -------------------------------------------------------------------------------------------------- runs and branches


def test_an_inversion_and_an_edit(pipe: Any, flux: Flux) -> None:
    condition, other = (inputs(pipe, [word], TOKENS) for word in WORDS[:2])
    rising, falling = SIGMAS.flip(0).tolist(), SIGMAS.tolist()

    def edited() -> tuple[Tensor, Tensor]:
        noise = denoise(flux, START, rising, **condition)
        return noise, denoise(flux, noise, falling, **other)

    plain = edited()
    tap.apply_tap(flux, CONFIG, **ARGUMENTS)
    for _ in range(2):
        with tap.trajectory(flux, sigmas=rising):
            noise = denoise(flux, START, rising, **condition)
            assert (len(full_steps(flux)), tap.report(flux).steps) == (5, STEPS)
        with tap.trajectory(flux, sigmas=falling):
            picture = denoise(flux, noise, falling, **other)
            assert (len(full_steps(flux)), tap.report(flux).steps) == (5, STEPS)
        for found, expected in zip((noise, picture), plain, strict=True):
            assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    tap.disable(flux)
    assert all(map(torch.equal, edited(), plain))


def test_an_inversion_of_another_model_says_what_it_goes_without(pipe: Any, flux: Flux) -> None:
    """As that of a pipeline whose scheduler can't be read."""
    rising = SIGMAS.flip(0).tolist()
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=rising, prediction="epsilon")
    denoise(flux, START, rising, **inputs(pipe, WORDS[:1], TOKENS))
    assert tap.report(flux).full_steps == 5
    assert "nothing is made up for: the noise of this loop rises" in str(tap.report(flux))


def test_two_evaluations_in_a_step(pipe: Any, flux: Flux) -> None:
    """Heun's, of one prompt: each is predicted from those at its own place."""
    condition = inputs(pipe, WORDS[:1], TOKENS)

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return flux(img=x, timesteps=torch.tensor([sigma]), **condition)

    @torch.no_grad()
    def sample_heun() -> Tensor:
        x = START
        for now, then in pairwise(SIGMAS.tolist()):
            d = velocity(x, now)
            if then > 0:
                d = (d + velocity(x + (then - now) * d, then)) / 2
            x = x + (then - now) * d
        return x

    plain = sample_heun()
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=SIGMAS, prediction=None)
    accelerated = sample_heun()
    report = tap.report(flux)
    assert (report.trajectories, report.steps) == (1, STEPS)
    assert sum(is_full for _, is_full, _ in report.calls) == 2 * 5  # one more in step 1, where the second begins
    assert 0 < (accelerated - plain).norm() < 0.05 * plain.norm()


def test_two_runs_take_turns(pipe: Any, flux: Flux) -> None:
    """In step, and then one of them ahead; each is what it is alone."""
    conditions = [inputs(pipe, [word], TOKENS) for word in WORDS[:2]]
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=SIGMAS)
    alone = [denoise(flux, START, SIGMAS.tolist(), **condition) for condition in conditions]
    latents, steps = [START, START], [iter(pairwise(SIGMAS.tolist())) for _ in conditions]
    for lane in [0, 1] * 4 + [0] * 3 + [0, 1] * 9 + [1] * 3:
        now, then = next(steps[lane])
        with torch.no_grad():
            output = flux(img=latents[lane], timesteps=torch.tensor([now]), **conditions[lane])
        latents[lane] = latents[lane] + (then - now) * output
    for found, expected in zip(latents, alone, strict=True):
        torch.testing.assert_close(found, expected)


def test_threads(pipe: Any, flux: Flux) -> None:
    conditions = [inputs(pipe, [word], TOKENS) for word in WORDS]
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=SIGMAS)
    alone = [denoise(flux, START, SIGMAS.tolist(), **condition) for condition in conditions]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        found[i] = denoise(flux, START, SIGMAS.tolist(), **conditions[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(WORDS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        torch.testing.assert_close(found[i], expected)


def test_an_interrupted_run_leaves_nothing(pipe: Any, flux: Flux) -> None:
    condition = inputs(pipe, WORDS[:1], TOKENS)
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=SIGMAS)
    expected = denoise(flux, START, SIGMAS.tolist(), **condition)
    for stop in (1, 5, STEPS):  # of which the first leaves time no sign
        denoise(flux, 2 * START, SIGMAS[: stop + 1].tolist(), **condition)
        with tap.trajectory(flux, sigmas=SIGMAS):
            assert torch.equal(denoise(flux, START, SIGMAS.tolist(), **condition), expected)
        with pytest.raises(TypeError), tap.trajectory(flux, sigmas=SIGMAS):
            denoise(flux, 2 * START, [*SIGMAS[: stop + 1].tolist(), "end"], **condition)  # type: ignore[list-item]
    assert torch.equal(denoise(flux, START, SIGMAS.tolist(), **condition), expected)


@pytest.mark.parametrize("uncond_steps", [range(STEPS), range(4, 9), [0, 1, 2, 8, 9, 10]])
def test_guidance_in_two_calls(pipe: Any, flux: Flux, uncond_steps: Any) -> None:
    """Also where it begins late, or pauses; each branch is predicted from itself."""
    uncond, cond = (inputs(pipe, [word], TOKENS) for word in ("", WORDS[0]))

    def run() -> Tensor:
        x = START
        with torch.no_grad():
            for step, (now, then) in enumerate(pairwise(SIGMAS.tolist())):
                time = torch.tensor([now])
                without = flux(img=x, timesteps=time, **uncond) if step in uncond_steps else None
                output = flux(img=x, timesteps=time, **cond)
                x = x + (then - now) * (output if without is None else 2 * output - without)
        return x

    plain = run()
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=SIGMAS)
    accelerated = run()
    report = tap.report(flux)
    assert (report.trajectories, report.steps) == (1, STEPS)
    assert len({step for step, is_full, _ in report.calls if is_full}) <= 8  # where one of the branches may be new
    assert 0 < (accelerated - plain).norm() < 0.1 * plain.norm()
    assert torch.equal(run(), accelerated)


# -------------------------------------------------------------------------------------------------------- what is wrong

falling = SIGMAS.tolist()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"sigmas": falling, "alphas_cumprod": falling}, "either sigmas or alphas_cumprod"),
        ({"times": falling}, "either sigmas or alphas_cumprod"),
        ({"fresh_noise": True}, "either sigmas or alphas_cumprod"),
        ({"sigmas": [1.0]}, r"sigmas are \[1.0\]: give one more than there are steps"),
        ({"sigmas": [1.0, 0.5, 0.5, 0.0]}, r"sigmas must fall .*from number 1 to number 2 they go from 0.5 to 0.5"),
        ({"sigmas": [0.0, 0.5, 0.4, 1.0]}, "from number 1 to number 2 they go from 0.5 to 0.4"),
        ({"sigmas": [1.0, math.nan, 0.0]}, "sigmas contain nan, and must be from 0 to 1"),
        ({"sigmas": [14.6, 3.0, 0.0]}, "sigmas contain 14.6, and must be from 0 to 1"),
        ({"sigmas": [14.6, 3.0, -1.0], "prediction": "epsilon"}, "contain -1, and must be from 0 to inf"),
        ({"sigmas": torch.ones(2, 2)}, "sigmas must be a sequence of numbers"),
        ({"sigmas": 0.5}, "sigmas must be a sequence of numbers, not 0.5"),
        ({"sigmas": falling, "prediction": "noise"}, "prediction is 'noise'; it must be None or flow, epsilon"),
        ({"sigmas": falling, "times": falling}, "there are 17 times and 17 sigmas: give a time for each step"),
        ({"sigmas": [1.0, 0.5, 0.0], "times": [3, 3]}, "times must fall"),
        ({"alphas_cumprod": [0.1, 0.5, 1.0], "times": [9, 1]}, "are not the noise of a flow: .*prediction=epsilon"),
        ({"alphas_cumprod": [0.1, 0.5, 1.0], "prediction": "epsilon"}, "do not tell the timesteps.*times="),
        ({"alphas_cumprod": [0.1, 0.5, 1.1], "times": [9, 1], "prediction": "epsilon"}, "contain 1.1"),
    ],
)  # fmt: skip
def test_what_can_t_be_is_told(told: dict[str, Any], message: str) -> None:
    model = build_transformer()
    with pytest.raises(ConfigError, match=message):
        tap.apply_tap(model, CONFIG, **told)
    tap.apply_tap(model, CONFIG)
    with pytest.raises(ConfigError, match=message), tap.trajectory(model, **told):
        pass


def test_names_that_are_no_arguments_are_told(flux: Flux) -> None:
    for name in ("timestep", "conditioning"):
        arguments: Any = ARGUMENTS | {name: "sigma"}
        with pytest.raises(UnsupportedModelError, match=r"Flux.forward has no argument 'sigma', but img, img_ids, txt"):
            tap.apply_tap(flux, CONFIG, **arguments)
    with pytest.raises(ValueError, match="TAP is not enabled on this Flux"), tap.trajectory(flux, sigmas=SIGMAS):
        pass


def test_calls_that_are_not_of_the_loop_are_told(pipe: Any, flux: Flux) -> None:
    condition = inputs(pipe, WORDS[:1], TOKENS)

    def run(sigmas: list[float]) -> None:
        denoise(flux, START, sigmas, **condition)

    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=SIGMAS)
    with pytest.raises(ValueError, match=r"timestep 0\.7, which .* begin with 1, 0, 1000 or 0: .*times="):
        run([0.7, 0.3, 0])
    run(falling)
    with pytest.raises(ValueError, match=r"timestep 0\.9, which is none of its 16 steps by the sigmas"):
        run(torch.linspace(1, 0, 11).tolist())
    with pytest.raises(ValueError, match=r"went from step 0 right to step 2 of the sigmas"):
        run(falling[::2])
    run(falling)
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=SIGMAS[:-1])  # without where the last step ends
    with pytest.raises(ValueError, match=r"timestep 0\.0625, which is none of its 15 .*the last being"):
        run(falling)
    run(falling[:-1])
    assert tap.report(flux).full_steps == 5


def test_trajectories_that_are_not_run_are_told(pipe: Any, flux: Flux) -> None:
    tap.apply_tap(flux, CONFIG, **ARGUMENTS)
    with pytest.warns(TAPWarning, match="TAP saw no call of this Flux"), tap.trajectory(flux, sigmas=SIGMAS):
        pass
    with (
        pytest.warns(TAPWarning, match="ended with step 7 of the 16 for which"),
        tap.trajectory(flux, sigmas=SIGMAS),
    ):
        denoise(flux, START, falling[:8], **inputs(pipe, WORDS[:1], TOKENS))
    assert not engine_of(flux).holds_anchors


def test_fresh_noise_is_told_as_in_a_pipeline(pipe: Any, flux: Flux) -> None:
    tap.apply_tap(flux, CONFIG, **ARGUMENTS, sigmas=SIGMAS, fresh_noise=True)
    with pytest.warns(TAPWarning, match="This loop adds fresh noise at each step, so TAP reuses"):
        denoise(flux, START, falling, **inputs(pipe, WORDS[:1], TOKENS))


def test_no_prediction_means_no_hindsight_but_the_same_schedule(pipe: Any, flux: Flux) -> None:
    condition = inputs(pipe, WORDS[:1], TOKENS)
    runs = []
    for told in ({"prediction": None, "sigmas": [*np.tan(np.linspace(1.5, 0.1, STEPS)), 0.0]}, {"sigmas": SIGMAS}):
        arguments: Any = told
        tap.apply_tap(flux, replace(CONFIG, hindsight=0.0), **ARGUMENTS, times=falling[:-1], **arguments)
        without = denoise(flux, START, falling, **condition)
        tap.apply_tap(flux, CONFIG, **ARGUMENTS, times=falling[:-1], **arguments)
        runs.append(torch.equal(denoise(flux, START, falling, **condition), without))
    assert runs == [True, False]
