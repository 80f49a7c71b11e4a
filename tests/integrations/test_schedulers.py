"""Reading schedulers of diffusers, and of others, by their arithmetic."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from tap_diffusion.integrations.diffusers import schedulers
from tap_diffusion.integrations.diffusers.schedulers import Reading, read, timeline

STEPS = 20


@pytest.fixture(autouse=True)
def nothing_read_before() -> None:
    schedulers._readings.clear()


def made(kind: Any, count: int = STEPS, setting: dict[str, Any] | None = None, **config: Any) -> Any:
    scheduler = kind(**config)
    scheduler.set_timesteps(count, **setting or {})
    return scheduler


# ------------------------------------------------------------------------------------------------------ every scheduler

# What a model predicts for them as they come.
READ: dict[str, tuple[str, dict[str, Any]]] = {
    "CogVideoXDDIMScheduler": ("epsilon", {}),
    "CogVideoXDPMScheduler": ("epsilon", {}),
    "DDIMParallelScheduler": ("epsilon", {}),
    "DDIMScheduler": ("epsilon", {}),
    "DDPMParallelScheduler": ("epsilon", {}),
    "DDPMScheduler": ("epsilon", {}),
    "DEISMultistepScheduler": ("epsilon", {}),
    "DPMSolverMultistepScheduler": ("epsilon", {}),
    "DPMSolverSinglestepScheduler": ("epsilon", {}),
    "EDMDPMSolverMultistepScheduler": ("v_prediction", {}),  # behind its preconditioning (Karras et al., table 1)
    "EDMEulerScheduler": ("v_prediction", {}),
    "EulerAncestralDiscreteScheduler": ("epsilon", {}),
    "EulerDiscreteScheduler": ("epsilon", {}),
    "FlowMapEulerDiscreteScheduler": ("flow", {}),
    "FlowMatchEulerDiscreteScheduler": ("flow", {}),
    "FlowMatchLCMScheduler": ("flow", {}),
    "HeliosScheduler": ("flow", {"stage_index": 0}),
    "LCMScheduler": ("epsilon", {}),
    "LTXEulerAncestralRFScheduler": ("flow", {}),
    "MiniMaxH3Scheduler": ("flow", {}),  # of x₀ - ε
    "SASolverScheduler": ("epsilon", {}),
    "TCDScheduler": ("epsilon", {}),
    "UniPCMultistepScheduler": ("epsilon", {}),
}
RANDOM = {
    "CogVideoXDPMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler",
    "FlowMatchLCMScheduler", "LCMScheduler", "LTXEulerAncestralRFScheduler", "SASolverScheduler", "TCDScheduler",
}  # fmt: skip
# Those that are read as something without a timeline: by which words, and whether their steps are random.
UNREAD: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "BlockRefinementScheduler": ("does not tell a noise", False, {}),  # of discrete tokens
    "CMStochasticIterativeScheduler": ("does not end at the clean sample", True, {}),
    "DDIMInverseScheduler": ("does not end at the clean sample", False, {}),  # goes from x₀ to noise
    "DDPMWuerstchenScheduler": ("can't be tried out: IndexError", False, {}),
    "DPMSolverMultistepInverseScheduler": ("does not end at the clean sample", False, {}),
    "DiscreteDDIMScheduler": ("does not tell a noise", False, {}),
    "EntropyBoundScheduler": ("does not tell a noise", False, {}),
    "FlowMatchHeunDiscreteScheduler": ("does not tell a noise", False, {}),  # evaluates twice at some noise
    "HeliosDMDScheduler": ("can't be tried out", False, {"stage_index": 0}),  # its step wants what a pipeline has
    "HeunDiscreteScheduler": ("does not tell a noise", False, {}),
    "IPNDMScheduler": ("does not tell a noise", False, {}),
    "KDPM2AncestralDiscreteScheduler": ("does not tell a noise", True, {}),
    "KDPM2DiscreteScheduler": ("does not tell a noise", False, {}),
    "KarrasVeScheduler": ("does not tell a noise", False, {}),  # no step from a timestep
    "PNDMScheduler": ("does not tell a noise", False, {}),
    "PiflowScheduler": ("can't be tried out: ValueError", False, {}),  # a model with ten outputs at once
    "RePaintScheduler": ("does not tell a noise", False, {}),  # goes back and forth
    "ScoreSdeVeScheduler": ("has no step method", False, {}),
    "UnCLIPScheduler": ("does not end at the clean sample", True, {}),  # unless it is told each step's end
}
UNUSABLE = {
    "AmusedScheduler": "of discrete tokens",
    "CosineDPMSolverMultistepScheduler": "needs torchsde",
    "DPMSolverSDEScheduler": "needs torchsde",
    "LMSDiscreteScheduler": "needs scipy",
    "RFD4ProteinaScheduler": "of proteins",
    "SCMScheduler": "of two steps: see below",
    "SchedulerMixin": "is none",
    "VQDiffusionScheduler": "of discrete tokens",
}
NAMES = [
    name
    for name in dir(diffusers)
    if name.endswith(("Scheduler", "SchedulerMixin")) and inspect.isclass(getattr(diffusers, name))
    if not name.startswith("Flax")  # before diffusers 0.40, and for no model in torch
]


@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_of_diffusers(name: str) -> None:
    if name in UNUSABLE:
        pytest.skip(UNUSABLE[name])
    kind = getattr(diffusers, name)
    if name in READ:
        prediction, setting = READ[name]
        reading = read(made(kind, setting=setting), 0)
        assert reading.unread is None
        assert reading.timeline is not None
        assert (reading.timeline.prediction, reading.fresh_noise) == (prediction, name in RANDOM)
        assert reading.timeline.fresh_noise == (name if name in RANDOM else None)
        assert all(a > b > 0 for a, b in pairwise(reading.timeline.noise))
        assert len(reading.timeline) == (STEPS if name != "MiniMaxH3Scheduler" else STEPS - 1)
    else:
        words, fresh, setting = UNREAD[name]
        reading = read(made(kind, setting=setting), 0)
        assert reading.timeline is None
        assert reading.unread is not None
        assert reading.unread.startswith(f"{name} {words}")
        assert reading.fresh_noise == fresh


def test_two_steps_of_a_consistency_model_are_unread() -> None:
    reading = read(made(diffusers.SCMScheduler, 2), 0)
    assert (reading.timeline, reading.fresh_noise) == (None, True)


# ------------------------------------------------------------------------------------------ noise levels in closed form


def of_flow(scheduler: Any) -> Tensor:
    sigma = scheduler.sigmas[: len(scheduler.timesteps)].double()
    return sigma / (1 - sigma)


def of_exploding(scheduler: Any) -> Tensor:
    return scheduler.sigmas[: len(scheduler.timesteps)].double()


def of_edm(scheduler: Any) -> Tensor:
    return scheduler.sigmas[:-1].double() / scheduler.config.sigma_data


def of_preserving(scheduler: Any) -> Tensor:
    product = scheduler.alphas_cumprod[scheduler.timesteps].double()
    return ((1 - product) / product).sqrt()


Flow, DDIM, DPM, UniPC = (
    FlowMatchEulerDiscreteScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
)  # fmt: skip
AS_FLOW: dict[str, Any] = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
NO_SIGNAL: dict[str, Any] = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
CLOSED: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor], str]] = {
    "flow": (lambda: made(Flow), of_flow, "flow"),
    "shifted": (lambda: made(Flow, shift=3.0), of_flow, "flow"),
    "dynamic": (lambda: made(Flow, setting={"mu": 1.15}, use_dynamic_shifting=True), of_flow, "flow"),
    "flow karras": (lambda: made(Flow, use_karras_sigmas=True), of_flow, "flow"),
    "flow exponential": (lambda: made(Flow, use_exponential_sigmas=True), of_flow, "flow"),
    "flow that ends early": (lambda: made(Flow, shift_terminal=0.1), of_flow, "flow"),
    "flow by hand": (lambda: made(Flow, 3, {"sigmas": [0.9, 0.4, 0.1]}), of_flow, "flow"),
    "flow, random": (lambda: made(Flow, stochastic_sampling=True), of_flow, "flow"),
    "ddim": (lambda: made(DDIM), of_preserving, "epsilon"),
    "ddim of SD": (
        lambda: made(DDIM, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1),
        of_preserving,
        "epsilon",
    ),
    "ddim v": (lambda: made(DDIM, prediction_type="v_prediction", **NO_SIGNAL), of_preserving, "v_prediction"),
    "ddim sample": (lambda: made(DDIM, prediction_type="sample", clip_sample=False), of_preserving, "sample"),
    "ddpm": (lambda: made(DDPMScheduler), of_preserving, "epsilon"),
    "ddpm large": (lambda: made(DDPMScheduler, variance_type="fixed_large"), of_preserving, "epsilon"),
    "dpm": (lambda: made(DPM), of_exploding, "epsilon"),
    "dpm 3": (lambda: made(DPM, solver_order=3), of_exploding, "epsilon"),
    "dpm flow": (lambda: made(DPM, **AS_FLOW, flow_shift=3.0), of_flow, "flow"),
    "dpm karras": (lambda: made(DPM, 50, use_karras_sigmas=True), of_exploding, "epsilon"),  # repeats timesteps
    "dpm lu": (lambda: made(DPM, 50, use_lu_lambdas=True), of_exploding, "epsilon"),
    "dpm thresholding": (lambda: made(DPM, thresholding=True), of_exploding, "epsilon"),
    "dpm on noise": (
        lambda: made(DPM, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"), of_exploding, "epsilon"
    ),
    "dpm v": (lambda: made(DPM, prediction_type="v_prediction"), of_exploding, "v_prediction"),
    "dpm sde": (lambda: made(DPM, algorithm_type="sde-dpmsolver++"), of_exploding, "epsilon"),
    "dpm sde flow": (lambda: made(DPM, algorithm_type="sde-dpmsolver++", **AS_FLOW), of_flow, "flow"),
    "unipc": (lambda: made(UniPC), of_exploding, "epsilon"),
    "unipc flow": (lambda: made(UniPC, **AS_FLOW, flow_shift=5.0), of_flow, "flow"),
    "deis flow": (lambda: made(diffusers.DEISMultistepScheduler, **AS_FLOW), of_flow, "flow"),
    "single flow": (lambda: made(diffusers.DPMSolverSinglestepScheduler, **AS_FLOW), of_flow, "flow"),
    "euler": (lambda: made(EulerDiscreteScheduler), of_exploding, "epsilon"),
    "euler v": (
        lambda: made(EulerDiscreteScheduler, prediction_type="v_prediction", **NO_SIGNAL), of_exploding, "v_prediction"
    ),
    "euler sample": (lambda: made(EulerDiscreteScheduler, prediction_type="sample"), of_exploding, "sample"),
    "euler to σ min": (lambda: made(EulerDiscreteScheduler, final_sigmas_type="sigma_min"), of_exploding, "epsilon"),
    "ancestral": (lambda: made(diffusers.EulerAncestralDiscreteScheduler), of_exploding, "epsilon"),
    "edm": (lambda: made(diffusers.EDMEulerScheduler), of_edm, "v_prediction"),
    "cosmos": (
        lambda: made(
            diffusers.EDMEulerScheduler, sigma_max=80.0, sigma_min=0.002, sigma_data=0.5, final_sigmas_type="sigma_min"
        ),
        of_edm,
        "v_prediction",
    ),
    "cogvideox": (
        lambda: made(diffusers.CogVideoXDDIMScheduler, prediction_type="v_prediction", **NO_SIGNAL),
        of_preserving,
        "v_prediction",
    ),
    "cogvideox 5b": (
        lambda: made(diffusers.CogVideoXDPMScheduler, prediction_type="v_prediction", **NO_SIGNAL),
        of_preserving,
        "v_prediction",
    ),
    "ltx": (lambda: made(diffusers.LTXEulerAncestralRFScheduler), of_flow, "flow"),
    "helios": (lambda: made(diffusers.HeliosScheduler, stages=1), of_flow, "flow"),
}  # fmt: skip


RANDOM_CASES = {
    "flow, random", "ddpm", "ddpm large", "dpm sde", "dpm sde flow", "ancestral", "cogvideox 5b", "ltx"
}  # fmt: skip


@pytest.mark.parametrize("case", CLOSED)
def test_noise_and_prediction_in_closed_form(case: str) -> None:
    make, noise, prediction = CLOSED[case]
    scheduler = make()
    reading = read(scheduler, 0)
    assert reading.timeline is not None, reading.unread
    torch.testing.assert_close(
        torch.tensor(reading.timeline.noise, dtype=torch.float64), noise(scheduler), rtol=1e-6, atol=0
    )
    assert (reading.timeline.prediction, reading.fresh_noise) == (prediction, case in RANDOM_CASES)


@pytest.mark.parametrize("case", ["shifted", "ddim", "dpm flow", "unipc", "euler", "edm", "ddpm", "dpm sde flow"])
def test_image_to_image_begins_later(case: str) -> None:
    whole, part = read(CLOSED[case][0](), 0), read(CLOSED[case][0](), 12)
    assert whole.timeline is not None
    assert part.timeline is not None
    assert part.timeline.noise == pytest.approx(whole.timeline.noise[12:], rel=1e-9)
    assert (part.timeline.prediction, part.fresh_noise) == (whole.timeline.prediction, whole.fresh_noise)


def test_the_noise_of_a_flow_that_is_stored_upside_down() -> None:
    """Mochi's σ rises from 0 for noise to 1, and its model predicts x₀ - ε."""
    known = timeline(made(Flow, invert_sigmas=True), 0)
    usual = timeline(made(Flow), 0)
    assert known is not None
    assert usual is not None
    assert known.prediction == "flow"
    assert known.noise == pytest.approx(usual.noise, rel=1e-3)


def test_a_flow_of_noise_alone_is_infinite_at_first() -> None:
    known = timeline(made(Flow), 0)
    assert known is not None
    assert known.noise[0] == math.inf


@pytest.mark.parametrize("case", ["ddpm", "flow, random", "dpm sde", "ancestral", "ltx", "cogvideox 5b"])
def test_random_steps_have_a_clock_and_no_hindsight(case: str) -> None:
    known = timeline(CLOSED[case][0](), 0)
    assert known is not None
    assert known.hindsight([3, 0], 7) == 0
    assert len(known.clock) == STEPS


# ----------------------------------------------------------------------------------------------- what pipelines pass on


def test_eta_makes_ddim_random() -> None:
    scheduler = made(DDIM)
    assert not read(scheduler, 0).fresh_noise
    assert not read(scheduler, 0, {"eta": 0.0}).fresh_noise
    reading = read(scheduler, 0, {"eta": 1.0, "generator": torch.Generator().manual_seed(0)})
    assert reading.fresh_noise
    assert reading.timeline is not None
    assert reading.timeline.prediction == "epsilon"


def test_how_much_of_the_noise_is_kept() -> None:
    """DDIM with η: √(1 - ᾱ' - s²) of √(1 - ᾱ'), s being η √((1 - ᾱ') / (1 - ᾱ)) √(1 - ᾱ / ᾱ') (arXiv 2010.02502)."""
    scheduler = made(DDIM)
    after = scheduler.alphas_cumprod[scheduler.timesteps[1:]].double()
    before = scheduler.alphas_cumprod[scheduler.timesteps[:-1]].double()
    for eta in (0.3, 1.0):
        fresh = eta**2 * (1 - after) / (1 - before) * (1 - before / after)
        known = timeline(scheduler, 0, {"eta": eta})
        assert known is not None
        assert known.kept == pytest.approx(float((1 - fresh / (1 - after)).sqrt().median()), abs=0.05)
    assert timeline(scheduler, 0).kept == 1  # type: ignore[union-attr]
    for kind in (lambda: made(Flow, stochastic_sampling=True), lambda: made(diffusers.LCMScheduler)):
        known = timeline(kind(), 0)
        assert known is not None
        assert abs(known.kept) < 0.2


def test_churn_makes_euler_random() -> None:
    scheduler = made(EulerDiscreteScheduler)
    assert not read(scheduler, 0, {"s_churn": 0.0}).fresh_noise
    assert read(scheduler, 0, {"s_churn": 10.0}).fresh_noise


def test_what_step_does_not_take_is_no_matter() -> None:
    assert read(made(Flow), 0, {"eta": 0.5, "return_dict": False}) == read(made(Flow), 0)


def test_the_pipeline_s_generator_is_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    read(made(DDPMScheduler), 0, {"generator": generator})
    assert torch.equal(generator.get_state(), before)


# ----------------------------------------------------------------------------------------------------- other schedulers


class Anything(FlowMatchEulerDiscreteScheduler):
    """Unchanged, under a name that says nothing."""


class FlowMatchOfNoise(DDIMScheduler):
    """Says flow and is none."""


class Wrapper:
    """Forwards everything to another scheduler."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Bare:
    """A flow that tells nothing but timesteps, and does not count."""

    def __init__(self, steps: int, sign: int = 1) -> None:
        self.timesteps = torch.linspace(1000, 0, steps + 1)[:-1]
        self.sign, self.drop = sign, 1000 / steps

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> tuple[Tensor]:
        return (sample - self.sign * self.drop / 1000 * model_output,)


class WithEta(DDIMScheduler):
    """Random by itself, from the global random numbers, and takes no generator by name."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, eta=1.0, **kwargs)


def same(reading: Reading, other: Reading) -> bool:
    """But for the scheduler's class."""
    if reading.timeline is None or other.timeline is None:
        return False
    timelines = [
        replace(known, fresh_noise=known.fresh_noise and "any") for known in (reading.timeline, other.timeline)
    ]
    return timelines[0] == timelines[1] and reading.fresh_noise == other.fresh_noise


def test_an_unchanged_subclass_reads_as_what_it_is() -> None:
    assert same(read(made(Anything, shift=3.0), 0), read(made(Flow, shift=3.0), 0))
    assert same(read(made(FlowMatchOfNoise), 0), read(made(DDIM), 0))


def test_a_subclass_that_is_random_reads_as_such() -> None:
    assert same(read(made(WithEta), 0), read(made(DDIM), 0, {"eta": 1.0}))


@pytest.mark.parametrize("case", ["shifted", "dynamic", "ddim", "unipc", "dpm sde", "edm", "cogvideox 5b"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_wrapper_reads_as_what_it_holds(case: str, layers: int) -> None:
    wrapped = inner = CLOSED[case][0]()
    expected = read(inner, 0)
    for _ in range(layers):
        wrapped = Wrapper(wrapped)
    before = contents(inner)
    assert same(read(wrapped, 0), expected)
    assert contents(inner) == before


def test_two_wrappers_are_told_apart() -> None:
    config: dict[str, Any] = dict(prediction_type="epsilon", clip_sample=False)
    assert read(Wrapper(made(DDPMScheduler, **config)), 0).fresh_noise
    assert not read(Wrapper(made(DDIM, **config)), 0).fresh_noise


@pytest.mark.parametrize("sign", [1, -1])
def test_steps_alone_tell_a_flow_s_noise(sign: int) -> None:
    known = timeline(Bare(10, sign), 0)
    assert known is not None
    assert known.prediction == "flow"
    assert known.noise == pytest.approx([math.inf, *((10 - k) / k for k in range(1, 10))])


class Overshoots(FlowMatchEulerDiscreteScheduler):
    def step(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().step(1.01 * model_output, *args, **kwargs)


class Fails(FlowMatchEulerDiscreteScheduler):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("only on Tuesdays\nand not here")


class Random(FlowMatchEulerDiscreteScheduler):
    """Draws from other sources than PyTorch, and adds what it has drawn or not."""

    source: Any = random.gauss
    size = 0.1

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        sample = super().step(model_output, timestep, sample, return_dict=False)[0]
        noise = torch.tensor([type(self).source(0, 1) for _ in range(sample.numel())]).reshape(sample.shape)
        return (sample + self.size * noise,)


class RandomByNumpy(Random):
    source = np.random.normal


class DrawsForNothing(Random):
    size = 0.0


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Overshoots, "Overshoots does not end at the clean sample, whatever its model predicts"),
        (Fails, "Fails can't be tried out: RuntimeError: only on Tuesdays"),
    ],
)
def test_what_is_not_read_says_why(kind: Any, reason: str) -> None:
    reading = read(made(kind), 0)
    assert reading.timeline is None
    assert not reading.fresh_noise
    assert reading.unread is not None
    assert reading.unread.startswith(reason)
    assert "\n" not in reading.unread
    assert timeline(made(kind), 0) is None


def test_what_is_no_scheduler_raises_nothing() -> None:
    for thing in (None, object(), Flow(), made(Flow), Wrapper(None)):
        assert read(thing, 1000).timeline is None


def test_random_numbers_of_any_source_are_seen_and_given_back() -> None:
    for kind in (Random, RandomByNumpy):
        before = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index]
        assert read(made(kind), 0).fresh_noise
        assert (random.getstate(), np.random.get_state()[1].tobytes()) == before  # type: ignore[index]
    assert same(read(made(DrawsForNothing), 0), read(made(Flow), 0))


@pytest.mark.parametrize("case", ["flow, random", "ddim", "ddpm", "dpm sde", "ancestral"])
def test_the_global_random_state_is_left_alone(case: str) -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    read(CLOSED[case][0](), 0)
    assert torch.equal(torch.randn(3), expected)


# --------------------------------------------------------------------------------------------------- nothing is changed


def contents(value: Any) -> Any:
    """All that an object holds, comparable."""
    if isinstance(value, Tensor):
        return str(value.dtype), str(value.device), value.tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [contents(item) for item in value]
    if isinstance(value, dict):
        return {name: contents(item) for name, item in value.items()}
    return {name: contents(item) for name, item in vars(value).items()} if hasattr(value, "step") else value


def steps_on(scheduler: Any, count: int) -> Tensor:
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    for t in scheduler.timesteps[:count]:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(0.5 * x, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("case", [case for case in CLOSED if case != "cogvideox 5b"])
def test_steps_taken_before_make_no_difference_and_are_not_undone(case: str) -> None:
    fresh = read(CLOSED[case][0](), 0)
    used = CLOSED[case][0]()
    torch.manual_seed(0)
    steps_on(used, min(7, len(used.timesteps) - 1))
    before = contents(used)
    schedulers._readings.clear()
    assert read(used, 0) == fresh
    assert contents(used) == before
    rest = len(used.timesteps) // 2
    assert read(used, rest).timeline == read(CLOSED[case][0](), rest).timeline


def test_a_run_is_the_same_with_and_without_a_look_ahead() -> None:
    plain, looked_at = made(UniPC), made(UniPC)
    read(looked_at, 0)
    assert torch.equal(steps_on(plain, STEPS), steps_on(looked_at, STEPS))


def watch(step: Any, seen: list[Any]) -> Any:
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        seen.append(result[0])
        return result

    return watched


@pytest.mark.parametrize("case", ["shifted", "dpm sde", "cogvideox 5b"])
@pytest.mark.parametrize("wrap", [watch, lambda step, _: functools.partial(step)])
def test_a_function_around_step_is_copied_with_what_it_steps(wrap: Callable[..., Any], case: str) -> None:
    scheduler, seen = CLOSED[case][0](), list[Any]()
    expected = read(scheduler, 0)
    before = contents(scheduler)
    scheduler.step = wrap(scheduler.step, seen)
    assert same(read(scheduler, 0), expected)
    del scheduler.step
    assert contents(scheduler) == before
    assert seen == []


def test_a_function_that_holds_the_pipeline_is_not_tried(pipe: Any) -> None:
    """A copy of it would hold a copy of all weights."""
    scheduler = pipe.scheduler = made(Flow)
    step = Flow.step
    scheduler.step = lambda *args, **kwargs: step(pipe.scheduler, *args, **kwargs)
    reading = read(scheduler, 0)
    assert scheduler.step_index is None
    assert reading.unread == "FlowMatchEulerDiscreteScheduler holds a pipeline, which is not copied"


def test_a_wrapper_that_can_t_be_copied_is_not_tried() -> None:
    inner = made(Flow)

    class Hidden:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

    reading = read(Hidden(), 0)
    assert inner.step_index is None
    assert reading.unread == "Hidden can't be copied, and trying out the one in use would change it"


# ----------------------------------------------------------------------------------------------------------- the memory


def test_the_same_settings_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    trial = schedulers._Trial.read

    def counted(self: Any) -> Reading:
        calls.append(self)
        return trial(self)

    monkeypatch.setattr(schedulers._Trial, "read", counted)
    scheduler = made(Flow)
    assert read(scheduler, 0) is read(copy.deepcopy(scheduler), 0)
    assert len(calls) == 1
    for other in (made(Flow, shift=2.0), made(Flow, 10), made(Anything)):
        read(other, 0)
    read(scheduler, 1)
    read(made(DDIM), 0)
    read(made(DDIM), 0, {"eta": 1.0})
    assert len(calls) == 7
    for steps in range(10, 90):
        read(made(Flow, steps), 0)
    assert len(schedulers._readings) <= 64
