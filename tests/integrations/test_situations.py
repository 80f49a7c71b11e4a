"""What users of such caches do and report: whose step it is, several users of one model, calls that are no sampling.

Each starts from a public report or from a way in which TAP itself was once wrong without a word.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, LayerSkipConfig
from diffusers.hooks import apply_layer_skip
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tap_diffusion as tap
from tap_diffusion import TAPConfig
from tap_diffusion.apps import generate
from tap_diffusion.apps.generate import Request, psnr
from tap_diffusion.integrations.diffusers.api import hooks
from tiny import TOKENS, build_pipeline, build_transformer, engine_of, sample
from zoo import CASES, Conditions, build, denoise, evaluate, start
from zoo.checks import CONFIG, trace

FAMILIES = pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])


class Otherwise(FlowMatchEulerDiscreteScheduler):
    """An unchanged subclass of another name."""


class Wrapper:
    """Passes everything on, as wrappers for logging do."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


# ----------------------------------------------------------------------------------------------------- whose step it is


def picture(pipe: Any) -> Tensor:
    """Red apple, (1, 3, H, W) in [-1, 1]."""
    return generate.run(pipe, Request(["red apple"], steps=50, seed=0, guidance=2.0), "red apple")[0]


@pytest.fixture(scope="module")
def plain(emoji: Any) -> Tensor:
    return picture(emoji)


def cloned(pipe: Any) -> Any:
    clone = copy.copy(pipe)
    clone.scheduler = copy.deepcopy(pipe.scheduler)
    return clone


def from_components(pipe: Any) -> Any:
    clone = FluxPipeline(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    clone.set_progress_bar_config(disable=True)
    return clone


def of_class(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def changed(pipe: Any) -> Any:
        clone = copy.copy(pipe)
        clone.scheduler = make(pipe.scheduler)
        return clone

    return changed


WAYS = {
    "itself": lambda pipe: pipe,
    "copy.copy": cloned,
    "from its components": from_components,
    "a subclass": of_class(lambda scheduler: Otherwise.from_config(scheduler.config)),
    "a wrapper": of_class(lambda scheduler: Wrapper(copy.deepcopy(scheduler))),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_scheduler_of_its_own_for_each_request(emoji: Any, plain: Tensor, way: str) -> None:
    """What serving code does (diffusers #12328): the enabled pipeline is a template, each request has a copy."""
    with tap.enabled(emoji, TAPConfig(full_steps=10)):
        pipe = WAYS[way](emoji)
        quality = psnr(picture(pipe), plain)[0]
        report = tap.report(pipe)
        assert (report.steps, report.full_steps) == (50, 10)
        assert quality >= 45, f"{quality:.1f} dB"
        assert engine_of(emoji.transformer).cache_bytes == 0


def test_enabling_again_and_again_leaves_one_of_each(pipe: Any) -> None:
    for _ in range(100):
        tap.enable(pipe, CONFIG)
    (hook,) = hooks(pipe)
    assert list(hook.pipelines) == [pipe]
    assert len(hook._known_schedulers()) == 1


def loop(
    pipe: Any, steps: int = 12, step_scheduler: bool = False, fresh: bool = False, seed: int = 0, stop: int = 100
) -> Iterator[Tensor]:
    """A loop of the user's own on a pipeline's transformer; gives the latents after each step."""
    config = pipe.transformer.config
    z = torch.randn(1, 64, config.in_channels, generator=torch.Generator().manual_seed(seed))
    text, pooled = torch.randn(1, TOKENS, config.joint_attention_dim), torch.randn(1, config.pooled_projection_dim)
    if not fresh:
        kept = text, pooled
    pipe.scheduler.set_timesteps(steps)
    for i, t in enumerate(pipe.scheduler.timesteps[:stop]):
        given = (text.clone(), pooled.clone()) if fresh else kept
        with torch.no_grad():
            velocity = pipe.transformer(
                z, *given, t.expand(1) / 1000, img_ids=torch.zeros(64, 3), txt_ids=torch.zeros(TOKENS, 3),
                return_dict=False,
            )[0]  # fmt: skip
        if step_scheduler:
            z = pipe.scheduler.step(velocity, t, z, return_dict=False)[0]
        else:
            z = z + (pipe.scheduler.sigmas[i + 1] - pipe.scheduler.sigmas[i]) * velocity
        yield z


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("step_scheduler", [False, True])
def test_a_loop_of_ones_own_on_an_enabled_pipeline(pipe: Any, step_scheduler: bool, fresh: bool) -> None:
    """Whether it steps the pipeline's scheduler or goes its own way: steps are predicted, and the cache stays small."""
    tap.enable(pipe, TAPConfig.paper(interval=4, warmup=2))
    sizes, found = [], []
    for _ in range(3):
        torch.manual_seed(0)
        *_, z = loop(pipe, step_scheduler=step_scheduler, fresh=fresh)
        report = tap.report(pipe)
        assert (report.steps, report.full_steps) == (12, 4)
        sizes.append(report.cache_bytes)
        found.append(z)
    assert len(set(sizes)) == 1
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@FAMILIES
def test_rising_time_on_a_bare_transformer(name: str) -> None:
    """Inversion, then generation: both are accelerated, and neither starts from what the other left."""
    case, model = CASES[name], build(name)
    conditions = Conditions(100, 1, torch.float32)

    def invert() -> Tensor:
        z = start(case)
        for step in range(16):
            z = z + evaluate(model, case, z, step / 16, conditions) / 16
        return z

    def sampled() -> Tensor:
        z = start(case)
        for step in range(16):
            z = z - evaluate(model, case, z, 1 - step / 16, conditions) / 16
        return z

    with tap.enabled(model, CONFIG):
        alone = sampled()
        assert tap.report(model).predicted_steps > 8
    with tap.enabled(model, CONFIG):
        first = invert()
        assert tap.report(model).predicted_steps >= 8
        after = sampled()
        assert tap.report(model).predicted_steps >= 8
        second = invert()
        assert tap.report(model).predicted_steps >= 8
    plain_inverse, plain = invert(), sampled()
    error = (alone - plain).norm()
    assert (after - plain).norm() < 1.5 * error
    for inverse in (first, second):
        assert (inverse - plain_inverse).norm() < 2 * error


def test_a_prompt_that_changes_in_mid_run_under_the_same_name(pipe: Any) -> None:
    """A pipeline that names its branches goes on under the name; the new prompt must not have the old one's anchors."""
    tap.enable(pipe, TAPConfig.paper(interval=4, warmup=2))
    prompt = pipe.encode_prompt("blue book", "blue book", max_sequence_length=TOKENS)[0]

    def other(_: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "prompt_embeds": prompt} if step == 9 else values

    sample(pipe, callback_on_step_end=other, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    branches = {choice.branch for choice in tap.report(pipe).choices}
    assert len(branches) == 2
    assert all(choice.step < 10 for choice in tap.report(pipe).choices if choice.branch == min(branches))


def test_the_step_that_a_pipeline_tells_is_believed(pipe: Any) -> None:
    """cache_context carries step and number of steps, from diffusers 0.41; the timestep says nothing here."""
    transformer = pipe.transformer
    if len(inspect.signature(transformer.cache_context).parameters) == 1:
        pytest.skip("this version's cache_context carries a name alone")
    tap.enable(transformer, TAPConfig(full_steps=4))
    config = transformer.config
    given = torch.ones(1, TOKENS, config.joint_attention_dim), torch.ones(1, config.pooled_projection_dim)
    for _ in range(2):
        for step in range(12):
            with torch.no_grad(), transformer.cache_context("cond", step_index=step, num_inference_steps=12):
                transformer(
                    torch.ones(1, 64, config.in_channels), *given, torch.tensor([0.5]),
                    img_ids=torch.zeros(64, 3), txt_ids=torch.zeros(TOKENS, 3),
                )  # fmt: skip
        assert (tap.report(transformer).steps, tap.report(transformer).full_steps) == (12, 4)
        assert engine_of(transformer).cache_bytes == 0


# ------------------------------------------------------------------------------------------- one model, several users


def users(name: str, count: int) -> list[Callable[[], Iterator[Tensor]]]:
    """Generators of the latents of sampling runs on one model, each of its own length, prompt and seed."""
    case, model = CASES[name], build(name)
    tap.enable(model, CONFIG)

    def run(number: int) -> Iterator[Tensor]:
        z, conditions, steps = start(case, number), Conditions(100 + number, 1, torch.float32), 10 + number
        for step in range(steps):
            z = z - evaluate(model, case, z, 1 - step / steps, conditions) / steps
            yield z

    return [lambda number=number: run(number) for number in range(count)]  # type: ignore[misc]


def pipelines(count: int) -> list[Callable[[], Iterator[Tensor]]]:
    """The same of pipelines that share a transformer, one enabled, the others copies of it; a scheduler each."""
    base = build_pipeline()
    tap.enable(base, CONFIG)
    copies = [base, *(cloned(base) for _ in range(count - 1))]
    return [
        lambda number=number, pipe=pipe: loop(pipe, 10 + number, step_scheduler=True, seed=number)  # type: ignore[misc]
        for number, pipe in enumerate(copies)
    ]


MAKERS = {
    "FLUX": lambda count: users("FluxTransformer2DModel", count),
    "Wan": lambda count: users("WanTransformer3DModel", count),
    "pipelines": pipelines,
}


def ends(runs: list[Callable[[], Iterator[Tensor]]]) -> list[Tensor]:
    """One after the other."""
    last = []
    for run in runs:
        torch.manual_seed(0)
        last.append(list(run())[-1])
    return last


def at_once(work: Callable[[int], None], count: int) -> None:
    """In as many threads."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("kind", MAKERS)
def test_taking_turns_step_by_step(kind: str, count: int) -> None:
    runs = MAKERS[kind](count)
    alone = ends(runs)
    going, found = {}, {}
    for number, run in enumerate(runs):
        torch.manual_seed(0)  # what a run draws before its first step
        going[number] = run()
        found[number] = next(going[number])
    while going:
        for number in list(going):
            try:
                found[number] = next(going[number])
            except StopIteration:
                del going[number]
    for number in range(count):
        assert torch.equal(found[number], alone[number]), number


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("kind", ["FLUX", "Wan"])
def test_threads_at_once(kind: str, count: int) -> None:
    runs = MAKERS[kind](count)
    alone = ends(runs)
    found: dict[int, Any] = {}
    barrier = threading.Barrier(count)

    def work(number: int) -> None:
        barrier.wait()
        try:
            found[number] = list(runs[number]())[-1]
        except BaseException as error:
            found[number] = error

    for _ in range(3):
        at_once(work, count)
        for number in range(count):
            assert not isinstance(found[number], BaseException), found[number]
            assert torch.equal(found[number], alone[number]), number


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 8])
def test_pipelines_in_threads(count: int) -> None:
    """Whole pipelines, which end their runs by diffusers' own call that resets all state on the transformer."""
    base = build_pipeline()
    tap.enable(base, CONFIG)
    copies = [cloned(base) for _ in range(count)]
    # Encoded before: plain pipelines that share text encoders differ between threads now and then.
    encoded = []
    for prompt in ("red apple", "green frog face", "blue book"):
        embeddings, pooled, _ = base.encode_prompt(prompt, prompt, max_sequence_length=TOKENS)
        encoded.append({"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled})

    def draw(number: int) -> Tensor:
        return sample(copies[number], None, seed=number, steps=12 + number, **encoded[number % 3])

    alone = [draw(number) for number in range(count)]
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        try:
            found[number] = [draw(number) for _ in range(2)]
        except BaseException as error:
            found[number] = error

    at_once(work, count)
    for number in range(count):
        assert not isinstance(found[number], BaseException), found[number]
        assert all(torch.equal(latents, alone[number]) for latents in found[number]), number
        assert tap.report(copies[number]).steps == 12 + number
    assert all(run.work.engine.cache_bytes == 0 for run in hooks(base)[0].runs)


def test_another_thread_sees_the_model_as_it_is() -> None:
    """While a predicted step runs."""
    case, model = CASES["FluxTransformer2DModel"], build("FluxTransformer2DModel")
    before, seen = list(model.modules()), []

    def look(*_: Any) -> None:
        thread = threading.Thread(target=lambda: seen.append(list(model.modules())))
        thread.start()
        thread.join()

    model.norm_out.register_forward_pre_hook(look)
    with tap.enabled(model, CONFIG):
        denoise(model, case)
        assert tap.report(model).predicted_steps > 0
    assert len(seen) == 12
    assert all(modules == before for modules in seen)


# ------------------------------------------------------------------------------------------------- not a sampling run


def test_training_is_left_alone() -> None:
    """Random times, and losses over falling times for each image."""
    model, plain = build_transformer(), build_transformer()
    case = CASES["FluxTransformer2DModel"]
    assert case is not None
    config = model.config
    given = {
        "encoder_hidden_states": torch.ones(1, TOKENS, config.joint_attention_dim),
        "pooled_projections": torch.ones(1, config.pooled_projection_dim),
        "img_ids": torch.zeros(64, 3), "txt_ids": torch.zeros(TOKENS, 3), "return_dict": False,
    }  # fmt: skip
    tap.enable(model, CONFIG)
    for one in (model, plain):
        one.train()
    times = [*torch.rand(6, generator=torch.Generator().manual_seed(0)).tolist(), *(1 - i / 10 for i in range(10))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for time in times:
            for one in (model, plain):
                one.zero_grad()
                z = torch.ones(1, 64, config.in_channels)
                one(z, timestep=torch.tensor([time]), **given)[0].square().mean().backward()
            pairs = zip(model.named_parameters(), plain.parameters(), strict=True)
            for (name, mine), theirs in pairs:
                assert (mine.grad is None) == (theirs.grad is None), name
                assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name
    told = [str(one.message) for one in caught if issubclass(one.category, tap.TAPWarning)]
    assert len(told) == 1
    assert "training mode" in told[0]


@FAMILIES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_a_sampling_run(name: str, checkpointing: bool) -> None:
    """Reward backpropagation (DRaFT): with TAP in eval mode, gradients reach the parameters and are right."""
    case, model = CASES[name], build(name).double().requires_grad_(True)
    conditions, steps = Conditions(100, 1, torch.float64), 8
    if checkpointing:
        model.enable_gradient_checkpointing()

    def reward() -> Tensor:
        z = start(case, dtype=torch.float64)
        for step in range(steps):
            t = torch.full((1,), 1 - step / steps, dtype=torch.float64)
            z = z - case.velocity(model(**case.inputs(z, t, conditions.step()), return_dict=False), z) / steps
        return z.square().mean()

    tap.enable(model, TAPConfig.paper(interval=2, warmup=1, orders=(0,), horizon_span=0))
    value = reward()
    assert tap.report(model).predicted_steps == 4
    value.backward()
    blocks = dict(model.named_parameters())
    head = blocks["proj_out.weight"]
    assert head.grad is not None
    direction = torch.randn(head.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = (head.grad * direction).sum()
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            head += sign * 1e-5 * direction
            values.append(reward())
            head -= sign * 1e-5 * direction
    # The residual that a predicted step reuses counts as a constant, so the head of those is exact and all of it not.
    assert torch.allclose(slope, (values[0] - values[1]) / 2e-5, rtol=0.2)
    assert all(p.grad is not None for n, p in blocks.items() if "blocks.1" in n and "weight" in n and p.ndim > 1)


@FAMILIES
@pytest.mark.filterwarnings("ignore::tap_diffusion.TAPWarning")  # of the two steps that it takes to see the gradients
def test_a_checkpoint_around_the_transformer(name: str) -> None:
    """It runs the model again in the backward pass: full steps give the plain gradients, predicted ones an error."""
    case, model = CASES[name], build(name).requires_grad_(True)
    conditions = Conditions(100, 1, torch.float32)

    def call(z: Tensor, time: float) -> Tensor:
        given = case.inputs(z, torch.full((1,), time), conditions.step())
        return case.velocity(model(**given, return_dict=False), z)

    def gradients(reentrant: bool, steps: int) -> list[Tensor]:
        model.zero_grad()
        z = start(case).requires_grad_(True)
        for step in range(steps):
            z = z - checkpoint(call, z, 1 - step / 12, use_reentrant=reentrant) / 12
        z.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for reentrant in (False, True):
        plain = gradients(reentrant, 2)
        with tap.enabled(model, CONFIG):
            found = gradients(reentrant, 2)
            assert all(map(torch.equal, found, plain))
            with pytest.raises(RuntimeError, match="enable_gradient_checkpointing"):
                gradients(reentrant, 4)


@pytest.mark.parametrize("left_out", [slice(None, -1), slice(3, None), slice(2, -2), slice(None)])
def test_pipelines_that_leave_out_timesteps(left_out: slice) -> None:
    """Sana Sprint leaves out the last, image to image the first: the cache is freed at the end of what is left."""
    case, model = CASES["WanTransformer3DModel"], build("WanTransformer3DModel")
    scheduler = FlowMatchEulerDiscreteScheduler()
    tap.enable(model, TAPConfig.paper(interval=4, warmup=2))
    for _ in range(2):
        z, conditions = start(case), Conditions(0, 1, torch.float32)
        scheduler.set_timesteps(16)
        timesteps = scheduler.timesteps[left_out]
        scheduler.set_begin_index(left_out.start or 0)
        for t in timesteps:
            z = scheduler.step(evaluate(model, case, z, float(t) / 1000, conditions), t, z, return_dict=False)[0]
        assert tap.report(model).steps == len(timesteps)
        assert tap.report(model).predicted_steps > 5
        assert engine_of(model).cache_bytes == 0
    assert tap.report(model).trajectories == 2


def test_segments_on_one_set_of_timesteps(pipe: Any) -> None:
    """As SkyReels-V2 draws long videos: copies of the scheduler are stepped, for one segment after the other."""
    tap.enable(pipe, TAPConfig(full_steps=5))
    scheduler = pipe.scheduler
    scheduler.set_timesteps(20)
    config = pipe.transformer.config
    for segment in range(3):
        text = torch.randn(1, TOKENS, config.joint_attention_dim), torch.randn(1, config.pooled_projection_dim)
        z, stepped = torch.randn(1, 64, config.in_channels), copy.deepcopy(scheduler)
        for t in scheduler.timesteps:
            with torch.no_grad():
                velocity = pipe.transformer(
                    z, *text, t.expand(1) / 1000, img_ids=torch.zeros(64, 3), txt_ids=torch.zeros(TOKENS, 3),
                    return_dict=False,
                )[0]  # fmt: skip
            z = z + velocity / 20
        assert (tap.report(pipe).steps, tap.report(pipe).full_steps) == (20, 5), segment
        assert stepped is not scheduler


def test_a_scheduler_whose_timesteps_rise_and_that_no_pipeline_has() -> None:
    """LongCat-Audio keeps its scheduler outside of its components."""
    name = "MochiTransformer3DModel"
    case, model = CASES[name], build(name)
    own_scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    own_scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 12, 12).tolist())
    tap.enable(model, TAPConfig.paper(interval=4, warmup=2))
    z, conditions = start(case), Conditions(0, 1, torch.float32)
    for t in own_scheduler.timesteps:
        z = own_scheduler.step(evaluate(model, case, z, 1 - float(t) / 1000, conditions), t, z, return_dict=False)[0]
    assert (tap.report(model).steps, tap.report(model).trajectories) == (12, 1)
    assert tap.report(model).predicted_steps == 8
    assert engine_of(model).cache_bytes == 0


# ------------------------------------------------------------------------------------------------ it says what happens


def told(action: Callable[[], object]) -> list[str]:
    """What TAP warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        action()
    return [str(one.message) for one in caught if issubclass(one.category, tap.TAPWarning)]


def test_fewer_steps_are_saved_than_asked_for_and_each_run_says_so(pipe: Any) -> None:
    with tap.enabled(pipe, TAPConfig(speedup=5)):
        for _ in range(2):
            (message,) = told(lambda: sample(pipe, steps=8))
            assert "6 of 8 steps in full, 1.33x fewer evaluations where speedup=5 is asked for" in message
        assert told(lambda: sample(pipe, steps=50)) == []
    with tap.enabled(pipe, TAPConfig(full_steps=8)):
        assert told(lambda: sample(pipe, steps=20)) == []
        (message,) = told(lambda: sample(pipe, steps=6))
        assert "predicted no step" in message


def test_more_steps_are_full_than_planned(pipe: Any) -> None:
    """A second branch begins where a step was to be predicted."""
    transformer = pipe.transformer
    tap.enable(pipe, TAPConfig.paper(interval=4))
    config = transformer.config

    def twice(_: Any, step: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            with transformer.cache_context("another"):
                transformer(
                    torch.ones(1, 64, config.in_channels), torch.ones(1, TOKENS, config.joint_attention_dim),
                    torch.ones(1, config.pooled_projection_dim), pipe.scheduler.timesteps[5:6] / 1000,
                    img_ids=torch.zeros(64, 3), txt_ids=torch.zeros(TOKENS, 3),
                )  # fmt: skip
        return values

    (message,) = told(lambda: sample(pipe, steps=12, callback_on_step_end=twice))
    assert "where 5 were planned: the branch has only just begun (1 calls)" in message


def test_another_cache_that_leaves_blocks_out(pipe: Any) -> None:
    """TeaCache and the like replace the class's forward, and skip all blocks at some steps."""
    transformer, calls = pipe.transformer, [0]
    plain = type(transformer).forward
    blocks = list(transformer.transformer_blocks), list(transformer.single_transformer_blocks)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] % 2:
            return plain(self, *args, **kwargs)
        lists = self.transformer_blocks, self.single_transformer_blocks
        self.transformer_blocks, self.single_transformer_blocks = torch.nn.ModuleList(), torch.nn.ModuleList()
        try:
            return plain(self, *args, **kwargs)
        finally:
            self.transformer_blocks, self.single_transformer_blocks = lists

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(transformer), "forward", forward)
        tap.enable(pipe, TAPConfig.paper(interval=4))
        (message,) = told(lambda: sample(pipe, steps=12))
    assert "something else left out the first block" in message
    assert (list(transformer.transformer_blocks), list(transformer.single_transformer_blocks)) == blocks


def test_blocks_that_something_else_has_replaced(pipe: Any) -> None:
    class Cached(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, hidden_states: Tensor, **more: Any) -> Any:
            return self.block(hidden_states=hidden_states, **more)

    pipe.transformer.transformer_blocks[0] = Cached(pipe.transformer.transformer_blocks[0])
    with tap.enabled(pipe, CONFIG), pytest.raises(tap.UnsupportedModelError, match="is a Cached without norm1"):
        sample(pipe)


def test_a_forward_that_can_not_be_seen_through_is_refused_without_a_trace() -> None:
    model = build("FluxTransformer2DModel")
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    before = trace(model)
    with pytest.raises(tap.UnsupportedModelError, match="has been replaced by"):
        tap.enable(model, CONFIG)
    assert trace(model) == before


def test_one_graph_of_the_whole_transformer() -> None:
    case, model = CASES["FluxTransformer2DModel"], build("FluxTransformer2DModel")
    tap.enable(model, CONFIG)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"compile_repeated_blocks\(fullgraph=True\)"):
        denoise(torch.compile(model, backend="eager", fullgraph=True), case)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    denoise(model, case)
    assert tap.report(model).predicted_steps > 0
    torch._dynamo.reset()


def test_a_skipped_first_layer() -> None:
    case, model = CASES["FluxTransformer2DModel"], build("FluxTransformer2DModel")
    apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn="transformer_blocks"))
    with tap.enabled(model, CONFIG), pytest.raises(tap.UnsupportedModelError, match="is skipped by layer_skip_hook"):
        denoise(model, case)


def test_wrapped_and_derived_transformers() -> None:
    from peft import LoraConfig, get_peft_model

    case = CASES["FluxTransformer2DModel"]

    class Derived(FluxTransformer2DModel):
        pass

    class DistributedDataParallel(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    derived = Derived(**case.config).eval()
    peft = get_peft_model(build("FluxTransformer2DModel"), LoraConfig(r=2, target_modules=["to_q"]))
    for model in (derived, peft, DistributedDataParallel(build("FluxTransformer2DModel"))):
        tap.enable(model, CONFIG)
        denoise(model, case)
        assert tap.report(model).predicted_steps > 0
        tap.disable(model)
