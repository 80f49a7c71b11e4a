"""ComfyUI: against a double of its patching interface, its batching of conditions, its samplers and models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import comfy_double as double
import tap_diffusion as tap
from tap_diffusion import TAPConfig, TAPWarning, UnsupportedModelError
from tap_diffusion.integrations import passes
from tap_diffusion.integrations import specs as models
from tap_diffusion.integrations.comfyui import accelerate, report
from tap_diffusion.integrations.comfyui import wrappers as comfy
from tap_diffusion.integrations.specs import Stream

FOLDER = Path(__file__).parents[1] / "comfyui"
STEPS = 12
CONFIG = TAPConfig(full_steps=6)
ONCE = [double.sample_euler, double.sample_dpmpp_2m, double.sample_euler_ancestral]
TWICE = [double.sample_heun, double.sample_dpm_2]


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    with double.installed(), torch.inference_mode():  # in which ComfyUI runs its graphs
        yield


def text(seed: int, length: int = 5) -> Tensor:
    return torch.randn(1, length, double.TEXT, generator=torch.Generator().manual_seed(seed))


def sample(
    patcher: Any,
    sampler: Callable[..., Tensor] = double.sample_euler,
    *,
    kind: str = "Flux",
    positive: list[dict[str, Any]] | None = None,
    negative: list[dict[str, Any]] | None = None,
    together: Callable[[], bool] = lambda: True,
    sigmas: Tensor | None = None,
    size: int = 8,
    latent: Tensor | None = None,
    callback: Any = None,
    **extra: Any,
) -> Tensor:
    guider = double.CFGGuider(
        patcher, positive or [{"context": text(1)}], negative or [{"context": text(2)}], 3.0, together
    )
    noise = torch.randn(double.latent_shape(kind, size), generator=torch.Generator().manual_seed(3))
    latent = torch.zeros_like(noise) if latent is None else latent
    sigmas = double.flow_sigmas(STEPS) if sigmas is None else sigmas
    return guider.sample(noise, latent, double.KSAMPLER(sampler, extra), sigmas, callback)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def calls_of(modules: list[nn.Module]) -> list[int]:
    """A list whose only item counts the calls of all these from now on."""
    count = [0]

    def hook(*_: Any) -> None:
        count[0] += 1

    for module in modules:
        module.register_forward_hook(hook)
    return count


def traces(patcher: Any) -> list[dict[str, Any]]:
    """All that a module of the model could keep."""
    return [{name: double.copied(value) for name, value in vars(m).items()} for m in patcher.model.modules()]


# ------------------------------------------------------------------------------------------------------ the same result


@pytest.mark.parametrize("sampler", [*ONCE, *TWICE], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", double.MODELS)
def test_full_steps_are_bit_identical(kind: str, sampler: Any) -> None:
    patcher = double.build(kind)
    plain = sample(patcher, sampler, kind=kind)
    for config in (TAPConfig(interval=1), TAPConfig(full_steps=tuple(range(STEPS)), hindsight=0)):
        accelerated = accelerate(patcher, config)
        if config.predicts:
            with pytest.warns(TAPWarning, match="predicted no step"):
                result = sample(accelerated, sampler, kind=kind)
        else:
            result = sample(accelerated, sampler, kind=kind)
        assert torch.equal(result, plain)


@pytest.mark.parametrize("kind", double.MODELS)
def test_predicted_steps_run_no_block_beyond_the_probe(kind: str) -> None:
    patcher = double.build(kind)
    model: Any = patcher.model.diffusion_model
    spec = comfy.SPECS[type(model).__name__]
    blocks = [block for name in spec.blocks for block in getattr(model, name)]
    whole, ends = calls_of(blocks), calls_of([model.get_submodule(str(spec.streams[0].head))])
    plain = sample(patcher, kind=kind)
    assert (whole[0], ends[0]) == (STEPS * len(blocks), STEPS)
    whole[0] = 0
    accelerated = accelerate(patcher, replace(CONFIG, hindsight=0.0))
    result = sample(accelerated, kind=kind)
    found = report(accelerated)
    assert found is not None
    assert (found.full_steps, found.predicted_steps) == (6, STEPS - 6)
    assert {choice.branch for choice in found.choices} == {"cond", "uncond"}
    assert whole[0] == 6 * len(blocks)
    assert 0 < distance(result, plain) < 0.05
    # A residual that is missing shows.
    assert distance(sample_without_depth(patcher, kind), plain) > 5 * distance(result, plain)


def sample_without_depth(patcher: Any, kind: str) -> Tensor:
    """With the depth left out and nothing in its place, at the steps that TAP predicts."""

    def predict(_: Any, depth: Any, calls: Any, forward: Any) -> Any:
        with depth.left_out(lambda given: {s.argument: given[s.argument] for s in depth.spec.streams}, {}) as view:
            return forward(view, ()), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy._Lane, "_predict", predict)
        return sample(accelerate(patcher, replace(CONFIG, hindsight=0.0)), kind=kind)


@pytest.mark.parametrize("kind", double.MODELS)
@pytest.mark.parametrize("sampler", TWICE, ids=lambda f: f.__name__)
def test_samplers_that_evaluate_twice_per_step(kind: str, sampler: Any) -> None:
    """Both evaluations of a full step are full, and each has a history of its own."""
    patcher = double.build(kind)
    plain = sample(patcher, sampler, kind=kind)
    accelerated = accelerate(patcher, CONFIG)
    result = sample(accelerated, sampler, kind=kind)
    found = report(accelerated)
    assert found is not None
    assert 0 < distance(result, plain) < 0.05
    assert {choice.branch for choice in found.choices} == {"cond", "cond 2", "uncond", "uncond 2"}
    evaluations = 2 * STEPS - 1
    assert len(found.calls) == 2 * evaluations
    assert found.full_calls <= 2 * (2 * 6 + 1)  # of Heun's corrections, the first one has no history yet


@pytest.mark.parametrize("kind", double.MODELS)
@pytest.mark.parametrize("granularity", ["token", "batch"])
def test_conditions_together_or_apart_give_the_same(kind: str, granularity: Any) -> None:
    """Also where memory makes ComfyUI change its mind from step to step."""
    accelerated = accelerate(double.build(kind), replace(CONFIG, granularity=granularity))
    coin = torch.Generator().manual_seed(7)
    results = []
    for together in (lambda: True, lambda: False, lambda: bool(torch.rand((), generator=coin) < 0.5)):
        results.append(sample(accelerated, kind=kind, together=together))
        found = report(accelerated)
        assert found is not None
        assert found.full_steps == 6
        assert not found.fallbacks
        assert len(found.calls) == 2 * STEPS
    assert torch.allclose(results[0], results[1], atol=1e-5)
    assert torch.allclose(results[0], results[2], atol=1e-5)


def test_areas_and_conditions_that_come_and_go() -> None:
    patcher = double.build()
    conditions: dict[str, Any] = {
        "positive": [
            {"context": text(1)},
            {"context": text(4), "area": (4, 8, 0, 0)},
            {"context": text(5, 9), "start": 0.7, "end": 0.3},
        ],
        "negative": [{"context": text(2)}, {"context": text(2), "area": (4, 8, 0, 0)}],
    }
    plain = sample(patcher, **conditions)
    assert torch.equal(sample(accelerate(patcher, TAPConfig(interval=1)), **conditions), plain)
    accelerated = accelerate(patcher, CONFIG)
    for together in (lambda: True, lambda: False):
        result = sample(accelerated, together=together, **conditions)
        found = report(accelerated)
        assert found is not None
        assert 0 < distance(result, plain) < 0.1
        assert list(found.fallbacks) == ["the branch has only just begun"]  # of the one that comes later
        assert {"cond", "cond 2", "uncond", "uncond 2"} <= {choice.branch for choice in found.choices}


# --------------------------------------------------------------------------------------------------- one run at a time


def test_nothing_of_a_run_reaches_the_next() -> None:
    """Another resolution, prompt, length and strength between two equal runs, with one patched model."""
    accelerated = accelerate(double.build(), CONFIG)
    before = sample(accelerated)
    sample(accelerated, size=12, positive=[{"context": text(8, 7)}])
    sample(accelerated, sigmas=double.flow_sigmas(7, denoise=0.5))
    sample(accelerated, double.sample_heun)
    assert torch.equal(sample(accelerated), before)


def test_two_branches_of_a_graph_share_the_model() -> None:
    """One plain, one accelerated, and one accelerated otherwise on top of that, in turns."""
    patcher = double.build()
    plain = sample(patcher)
    one = accelerate(patcher, CONFIG)
    other = accelerate(one, TAPConfig.paper(interval=3))
    alone = [sample(model) for model in (one, other)]
    assert distance(*alone) > 0
    assert torch.equal(sample(patcher), plain)
    assert torch.equal(sample(one), alone[0])
    assert torch.equal(sample(other), alone[1])
    assert all(len(group) == 1 for groups in other.wrappers.values() for group in groups.values())
    # A run within a run: the graph of a callback, or a sampler that another sampler calls.
    inner: list[Tensor] = []
    outer = sample(one, callback=lambda i: inner.append(sample(other)) if i == 5 else None)
    assert torch.equal(outer, alone[0])
    assert torch.equal(inner[0], alone[1])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_leaves_nothing_behind(error: type[BaseException]) -> None:
    patcher = double.build()
    plain = sample(patcher)
    accelerated = accelerate(patcher, CONFIG)
    before = sample(accelerated)
    kept = traces(patcher)

    def stop(i: int) -> None:
        if i == 4:
            raise error

    with pytest.raises(error):
        sample(accelerated, callback=stop)
    broken: Any = patcher.model.diffusion_model
    hook = broken.single_blocks[1].register_forward_pre_hook(lambda *_: stop(4))
    with pytest.raises(error):
        sample(accelerated)
    hook.remove()
    assert traces(patcher) == kept
    assert torch.equal(sample(accelerated), before)
    assert torch.equal(sample(patcher), plain)


@pytest.mark.parametrize("kind", double.MODELS)
def test_accelerating_leaves_no_trace_on_the_model_or_its_patcher(kind: str) -> None:
    patcher = double.build(kind)
    kept, options = traces(patcher), double.copied(vars(patcher))
    accelerated = accelerate(patcher, CONFIG)
    sample(accelerated, kind=kind)
    assert traces(patcher) == kept
    assert double.copied(vars(patcher)) == options
    assert accelerated.model_options == patcher.model_options
    for place in list(accelerated.wrappers):
        accelerated.remove_wrappers_with_key(place, comfy.KEY)
    assert torch.equal(sample(accelerated, kind=kind), sample(patcher, kind=kind))


def test_partial_denoise_begins_at_its_own_start() -> None:
    patcher = double.build()
    latent = torch.randn(double.latent_shape("Flux"), generator=torch.Generator().manual_seed(5))
    sigmas = double.flow_sigmas(10, denoise=0.5)
    assert float(sigmas[0]) < 0.8
    plain = sample(patcher, sigmas=sigmas, latent=latent)
    accelerated = accelerate(patcher, TAPConfig(full_steps=5))
    result = sample(accelerated, sigmas=sigmas, latent=latent)
    found = report(accelerated)
    assert found is not None
    assert (found.steps, found.full_steps) == (10, 5)
    assert 0 < distance(result, plain) < 0.01


def test_a_run_that_stops_before_the_end_and_goes_on_in_another() -> None:
    """KSampler (Advanced), or Wan 2.2 with a model for each half."""
    sigmas = double.flow_sigmas(20)
    accelerated = accelerate(double.build(), TAPConfig(full_steps=5))
    sample(accelerated, sigmas=sigmas[:11])
    found = report(accelerated)
    assert found is not None
    assert (found.steps, found.full_steps) == (10, 5)
    sample(accelerated, sigmas=sigmas[10:])
    assert (found := report(accelerated)) is not None
    assert (found.steps, found.full_steps) == (10, 5)


def test_a_sampler_that_goes_back_to_more_noise_starts_anew_there() -> None:
    patcher = double.build()
    plain = sample(patcher, double.sample_restarting)
    accelerated = accelerate(patcher, CONFIG)
    result = sample(accelerated, double.sample_restarting)
    found = report(accelerated)
    assert found is not None
    assert found.predicted_calls > 0
    assert 0 < distance(result, plain) < 0.05


# ----------------------------------------------------------------------------------------------------------- hindsight


def test_hindsight_is_for_euler_alone_and_flow_matching(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    timeline = comfy._timeline

    def seen(*args: Any) -> Any:
        asked.append(timeline(*args))
        return asked[-1]

    monkeypatch.setattr(comfy, "_timeline", seen)
    patcher = double.build()
    accelerated = accelerate(patcher, CONFIG)
    for sampler in (*ONCE, *TWICE):
        sample(accelerated, sampler)
    assert [found.prediction for found in asked] == ["flow", None, None, None, None]
    sigmas = double.flow_sigmas(STEPS)[:-1].double()
    assert asked[0].noise == pytest.approx((sigmas / (1 - sigmas)).tolist())
    asked.clear()
    sample(accelerated, sampler=with_churn, s_churn=0.5)
    other = patcher.clone()
    other.add_object_patch("model_sampling", Eps())
    sample(accelerate(other, CONFIG))
    assert [found.prediction for found in asked] == [None, None]
    assert asked[1].noise == pytest.approx(sigmas.tolist())


def with_churn(model: Any, x: Tensor, sigmas: Tensor, s_churn: float, **rest: Any) -> Tensor:
    return double.sample_euler(model, x, sigmas, **rest)


with_churn.__name__ = "sample_euler"


class Eps:
    """Any other model sampling."""

    timestep, denoised, noised = double.CONST.timestep, double.CONST.denoised, double.CONST.noised


def test_hindsight_moves_each_condition_by_its_own_share() -> None:
    output, other = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    predicted = output + 0.05 * other  # near enough that nothing is held back
    share = torch.tensor([[0.5], [0.5], [-2.0], [-2.0]])
    assert torch.allclose(passes._moved(output, predicted, [0.5, -2.0]), output + share * (output - predicted))
    assert torch.allclose(passes._moved(output, predicted, [0.5]), output + 0.5 * (output - predicted))
    predicted[3, 1] = torch.inf
    assert passes._moved(output, predicted, [0.5, -2.0])[3, 1] == output[3, 1]


# -------------------------------------------------------------------------------------------- what else works on models


def test_controlnet_residuals_between_blocks_reach_the_output_once() -> None:
    for kind, name in (("Flux", "input"), ("Flux", "output"), ("Qwen-Image", "input"), ("SD3", "output")):
        patcher = double.build(kind)
        residual = torch.randn(4, 16, double.WIDTH, generator=torch.Generator().manual_seed(9))
        positive = [{"context": text(1), "control": {"input": [], "output": []} | {name: [residual, None, residual]}}]
        negative = [{"context": text(2), "control": positive[0]["control"]}]
        plain = sample(patcher, kind=kind, positive=positive, negative=negative)
        assert distance(sample(patcher, kind=kind), plain) > 0.02
        result = sample(accelerate(patcher, CONFIG), kind=kind, positive=positive, negative=negative)
        assert 0 < distance(result, plain) < 0.02


def test_block_patches_and_a_further_evaluation_with_layers_skipped() -> None:
    """Skip-layer guidance: the conditions once more, within the same evaluation, with a block replaced."""
    patcher = double.build().clone()

    def skip(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return args

    def guide(args: dict[str, Any]) -> Tensor:
        options = copy.deepcopy(args["model_options"])
        options["transformer_options"].setdefault("patches_replace", {}).setdefault("dit", {})["double_block", 1] = skip
        (weak,) = double.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        result: Tensor = args["denoised"] + (args["cond_denoised"] - weak)
        return result

    def passing(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = extra["original_block"](args)
        return result

    patcher.model_options["sampler_post_cfg_function"] = [guide]
    patcher.set_model_patch_replace(passing, "dit", "double_block", 0)
    plain = sample(patcher)
    accelerated = accelerate(patcher, CONFIG)
    result = sample(accelerated)
    found = report(accelerated)
    assert found is not None
    assert not found.fallbacks
    assert {choice.branch for choice in found.choices} == {"cond", "uncond", "cond 2"}
    assert 0 < distance(result, plain) < 0.1


def test_lora_weights_that_change_between_runs() -> None:
    patcher = double.build()
    accelerated = accelerate(patcher, CONFIG)
    sample(accelerated)
    weight: Any = patcher.model.diffusion_model.get_submodule("single_blocks.1.linear2").weight
    weight.add_(0.3)
    assert distance(sample(accelerated), sample(patcher)) < 0.05
    assert torch.equal(sample(accelerate(patcher, CONFIG)), sample(accelerated))


def test_windows_of_frames_that_move() -> None:
    """Context windows: what has just come into view has no history, and what is out of view is forgotten."""
    accelerated = accelerate(double.build(), replace(CONFIG, hindsight=0.0))
    sizes: list[int] = []

    class Window:
        def __init__(self, frames: list[int]) -> None:
            self.index_list = frames

    def moving(still: bool) -> Callable[..., Tensor]:
        def sampler(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any) -> Tensor:
            options = extra_args["model_options"]["transformer_options"]
            for i in range(len(sigmas) - 1):
                options["context_window"] = Window([0, 1] if still else [i, i + 1])
                d = (x - model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)) / sigmas[i]
                x = x + d * (sigmas[i + 1] - sigmas[i])
                sizes.append(sum(lane.engine.cache_bytes for lane in options[comfy.KEY]._lanes.values()))
            return x

        return sampler

    sample(accelerated, moving(still=True))
    assert (found := report(accelerated)) is not None
    assert (found.full_steps, found.predicted_steps) == (6, 6)
    sizes.clear()
    with pytest.warns(TAPWarning, match="the branch has only just begun"):
        sample(accelerated, moving(still=False))
    assert max(sizes[3:]) <= max(sizes[:3])


def test_batches_that_an_extension_divides_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unet function wrapper that runs sample by sample, for which the conditions of a part are not known."""
    patcher = double.build()
    apply = patcher.model.apply_model

    def one_by_one(x: Tensor, t: Tensor, c_crossattn: Tensor, **rest: Any) -> Tensor:
        parts = [apply(x[i : i + 1], t[i : i + 1], c_crossattn=c_crossattn[i : i + 1], **rest) for i in range(len(x))]
        return torch.cat(parts)

    monkeypatch.setattr(patcher.model, "apply_model", one_by_one)
    plain = sample(patcher)
    accelerated = accelerate(patcher, CONFIG)
    assert 0 < distance(sample(accelerated), plain) < 0.05
    assert (found := report(accelerated)) is not None
    assert found.full_steps == 6
    assert not found.fallbacks


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["model", "blocks"])
def test_torch_compile_of_the_model_or_of_its_blocks(whole: bool) -> None:
    """As TorchCompileModel does it: compiled modules stand in for the others around each call of the model."""
    for kind in ("Flux", "Wan", "SD3"):
        torch.compiler.reset()
        patcher = double.build(kind)
        expected = sample(accelerate(patcher, CONFIG), kind=kind)
        inner: Any = patcher.model.diffusion_model
        compiled: dict[tuple[nn.Module, str], Any] = {}
        if whole:
            compiled[patcher.model, "diffusion_model"] = torch.compile(inner, backend="eager")
        else:
            for name in comfy.SPECS[type(inner).__name__].blocks:
                blocks = getattr(inner, name)
                for number, block in blocks.named_children():
                    compiled[blocks, number] = torch.compile(block, backend="eager")

        def wrapper(executor: Any, *args: Any, compiled: Any = compiled, **kwargs: Any) -> Any:
            own = {place: place[0]._modules[place[1]] for place in compiled}
            try:
                for (parent, name), module in compiled.items():
                    parent._modules[name] = module
                return executor(*args, **kwargs)
            finally:
                for (parent, name), module in own.items():
                    parent._modules[name] = module

        for first in (True, False):  # this node before or behind TAP's
            model = patcher.clone() if first else accelerate(patcher, CONFIG)
            model.add_wrapper_with_key(double.WrappersMP.APPLY_MODEL, "torch.compile", wrapper)
            model = accelerate(model, CONFIG) if first else model
            assert torch.allclose(sample(model, kind=kind), expected, atol=1e-5), (kind, first)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_samplers_that_choose_their_own_steps_are_left_alone() -> None:
    patcher = double.build()
    with pytest.warns(TAPWarning, match="sample_dpm_adaptive chooses its own steps"):
        result = sample(accelerate(patcher, CONFIG), double.sample_dpm_adaptive)
    assert torch.equal(result, sample(patcher, double.sample_dpm_adaptive))
    up = torch.tensor([0.5, 0.9, 0.3, 0.0])
    with pytest.warns(TAPWarning, match="do not fall"):
        result = sample(accelerate(patcher, CONFIG), sigmas=up)
    assert torch.equal(result, sample(patcher, sigmas=up))


def test_unknown_and_altered_models_are_refused() -> None:
    class UNetModel(nn.Module):
        pass

    with pytest.raises(UnsupportedModelError, match=r"UNetModel.*Flux, HunyuanVideo"):
        accelerate(double.ModelPatcher(double.BaseModel(UNetModel())))
    patcher = double.build()
    del patcher.model.diffusion_model.get_submodule("double_blocks.0.img_attn")._modules["qkv"]
    with pytest.raises(UnsupportedModelError, match=r"not built as TAP knows it: .*qkv"):
        accelerate(patcher)
    patcher = double.ModelPatcher(double.BaseModel(double.Flux(double=0)))
    with pytest.raises(UnsupportedModelError, match="no double_blocks"):
        accelerate(patcher)


def test_other_caches_on_the_same_model_are_refused() -> None:
    accelerated = accelerate(double.build(), CONFIG)
    easy = accelerated.clone()
    easy.add_wrapper_with_key(double.WrappersMP.OUTER_SAMPLE, "easycache", lambda executor, *a, **k: executor(*a, **k))
    with pytest.raises(ValueError, match="EasyCache and TAP"):
        sample(easy)
    tea = accelerated.clone()
    tea.model_options["transformer_options"]["rel_l1_thresh"] = 0.4
    with pytest.raises(ValueError, match="TeaCache and TAP"):
        sample(tea)


def test_an_old_comfyui_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(double.WrappersMP, "PREDICT_NOISE")
    with pytest.raises(RuntimeError, match="too old"):
        accelerate(double.build())


def test_a_guider_that_tells_no_evaluations_runs_plain_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(double.CFGGuider, "__call__", double.CFGGuider.predict_noise)
    patcher = double.build()
    with pytest.warns(TAPWarning, match="TAP did not see this run"):
        result = sample(accelerate(patcher, CONFIG))
    assert torch.equal(result, sample(patcher))


def test_calls_outside_of_a_sampling_run_are_plain() -> None:
    accelerated = accelerate(double.build(), CONFIG)
    x, t = torch.randn(1, double.CHANNELS, 8, 8), torch.tensor([0.5])
    options = {"wrappers": accelerated.wrappers}
    result = accelerated.model.apply_model(x, t, c_crossattn=text(1), transformer_options=options)
    assert torch.equal(result, accelerated.model.apply_model(x, t, c_crossattn=text(1)))
    with pytest.raises(ValueError, match="not accelerated"):
        report(double.build())


# ------------------------------------------------------------------------------------------------------ trained weights


@pytest.mark.slow
def test_comfyui_gives_what_diffusers_gives_on_the_trained_model(emoji: Any) -> None:
    """The same noise, sigmas, prompts and guidance through both integrations, with their own Euler steps."""
    prompts, steps, config = ["red apple", "green frog face"], 14, TAPConfig(full_steps=6)
    size = emoji.vae.config.sample_size
    positive, pooled, _ = emoji.encode_prompt(prompts, prompts)
    negative, negative_pooled, _ = emoji.encode_prompt([""] * 2, [""] * 2)
    channels = emoji.transformer.config.in_channels // 4
    generator = torch.Generator().manual_seed(11)
    noise, ids = emoji.prepare_latents(2, channels, size, size, torch.float32, torch.device("cpu"), generator)

    def by_diffusers() -> Tensor:
        result: Tensor = emoji(
            prompt=prompts, negative_prompt=[""] * 2, true_cfg_scale=2.0, latents=noise, num_inference_steps=steps,
            height=size, width=size, output_type="latent",
        ).images  # fmt: skip
        return result

    plain = by_diffusers()
    with tap.enabled(emoji, config):
        expected = by_diffusers()
    known = models.SPECS["FluxTransformer2DModel"]
    spec = replace(
        known,
        blocks=tuple(f"transformer.{name}" for name in known.blocks),
        streams=(Stream("hidden_states", "transformer.norm_out"),),
    )
    patcher = double.ModelPatcher(double.BaseModel(double.DiffusersFlux(emoji.transformer, ids)))
    cond = [{"context": torch.cat([positive, pooled[:, None]], dim=1)}]
    uncond = [{"context": torch.cat([negative, negative_pooled[:, None]], dim=1)}]
    guider = double.CFGGuider(accelerate(patcher, config, spec), cond, uncond, 2.0)
    result = guider.sample(noise, torch.zeros_like(noise), double.KSAMPLER(double.sample_euler), emoji.scheduler.sigmas)
    assert distance(expected, plain) > 1e-2
    assert distance(result, expected) < 1e-3
