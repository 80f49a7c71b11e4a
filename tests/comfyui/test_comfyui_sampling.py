"""ComfyUI's samplers, conditions and other nodes around an accelerated model."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import real  # noqa: F401 - finds ComfyUI

# isort: split
import nodes
import torch
from comfy import controlnet, model_management, ops, samplers, sd
from comfy.cldm.mmdit import ControlNet as ControlNetSD3
from comfy.ldm.flux.controlnet import ControlNetFlux
from comfy.ldm.hydit.controlnet import HunYuanControlNet
from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_sd3 import SkipLayerGuidanceSD3
from runs import STEPS, distance, sample, sample_with, watched
from tiny_comfy import CPU, MODELS, build, fill, noise
from torch import Tensor

from tap_diffusion import TAPConfig, UnsupportedModelError
from tap_diffusion.core.doubts import UNEXPLAINED
from tap_diffusion.core.schedule import spaced_steps
from tap_diffusion.core.timeline import Timeline
from tap_diffusion.integrations.comfyui import accelerate, report
from tap_diffusion.integrations.comfyui import wrappers as comfy

FULL = 5
CONFIG = TAPConfig(full_steps=FULL)
WHOLE = TAPConfig(interval=1)
SAMPLERS = [
    "euler", "euler_ancestral", "heun", "heunpp2", "dpm_2", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "lcm", "uni_pc",
    "res_multistep", "seeds_3", "sa_solver_pece",
]  # fmt: skip
OWN_STEPS = "dpm_adaptive"
# Evaluations of the model per step.
SEVERAL = {"heun": 2, "heunpp2": 3, "dpm_2": 2, "dpmpp_sde": 2, "seeds_3": 3, "sa_solver_pece": 2}


@pytest.fixture(autouse=True)
def in_inference_mode() -> Iterator[None]:
    with torch.inference_mode():  # in which ComfyUI runs its graphs
        yield


@pytest.fixture
def flux() -> Any:
    return build("Flux")


@pytest.fixture
def wan() -> Any:
    return build("WAN21_T2V")


def found_in(accelerated: Any) -> Any:
    found = report(accelerated)
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("sampler", samplers.SAMPLER_NAMES)
def test_full_steps_are_bit_identical(flux: Any, sampler: str) -> None:
    expected = sample(flux, "Flux", sampler)
    assert torch.equal(sample(accelerate(flux, WHOLE), "Flux", sampler), expected)


def test_a_sampler_that_chooses_its_own_steps_is_left_alone_and_told_of_in_every_run(
    flux: Any, caplog: pytest.LogCaptureFixture
) -> None:
    expected, accelerated = sample(flux, "Flux", OWN_STEPS), accelerate(flux, CONFIG)
    sample(accelerated, "Flux")
    for _ in range(2):
        caplog.clear()
        assert torch.equal(sample(accelerated, "Flux", OWN_STEPS), expected)
        assert warned(caplog) == [f"TAP leaves this run alone: {OWN_STEPS}_function chooses its own steps"]
        assert report(accelerated) is None  # not that of the run before


def test_every_run_ends_with_a_line(flux: Any, caplog: pytest.LogCaptureFixture) -> None:
    accelerated = accelerate(flux, CONFIG)
    with caplog.at_level(logging.INFO, "tap_diffusion"):
        for _ in range(2):
            caplog.clear()
            sample(accelerated, "Flux")
            (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("tap_diffusion")]
            assert re.fullmatch(r"TAP: 5 of 12 steps full, \d+\.\dx faster, cache [\d.]+ MB", line)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The beginnings, up to the reason, of what TAP's logger has warned of."""
    records = [record for record in caplog.records if record.name.startswith("tap_diffusion")]
    return [re.split(", since| \\(", record.getMessage())[0] for record in records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("name", ["Flux", "WAN21_T2V"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_have_the_full_steps_asked_for(name: str, sampler: str) -> None:
    patcher = build(name)
    plain = sample(patcher, name, sampler)
    accelerated = accelerate(patcher, CONFIG)
    result = sample(accelerated, name, sampler)
    found = found_in(accelerated)
    assert 0 < distance(result, plain) < 1
    assert found.steps == STEPS
    # Random weights know no smooth way: now and then a step matches nothing before.
    assert set(found.fallbacks) <= {UNEXPLAINED, *(["the branch has only just begun"] if sampler == "heunpp2" else [])}
    assert FULL <= found.full_steps <= FULL + found.fallbacks.total() / 2
    several = SEVERAL.get(sampler, 1)
    # At its end each has fewer evaluations, since there is no step behind the last.
    assert 2 * (STEPS - 2) * several < len(found.calls) <= 2 * STEPS * several


def test_a_run_of_which_no_step_may_be_predicted_says_so(flux: Any, caplog: pytest.LogCaptureFixture) -> None:
    result = sample(accelerate(flux, TAPConfig(full_steps=tuple(range(STEPS)))), "Flux")
    assert torch.equal(result, sample(flux, "Flux"))
    assert "predicted no step" in warned(caplog)[0]


def test_each_evaluation_of_a_step_has_a_history_of_its_own(flux: Any) -> None:
    accelerated = accelerate(flux, CONFIG)
    sample(accelerated, "Flux", "heun")
    assert {choice.branch for choice in found_in(accelerated).choices} == {"cond", "cond 2", "uncond", "uncond 2"}


def test_sigmas_that_do_not_fall_are_left_alone(flux: Any, caplog: pytest.LogCaptureFixture) -> None:
    up = torch.tensor([0.5, 0.9, 0.3, 0.0])
    result = sample_with(accelerate(flux, CONFIG), "Flux", "euler", up)
    assert warned(caplog) == ["TAP leaves this run alone: its sigmas do not fall from step to step."]
    assert torch.equal(result, sample_with(flux, "Flux", "euler", up))


def test_a_sampler_that_goes_back_to_more_noise_starts_anew_there(flux: Any) -> None:
    sigmas = torch.linspace(1, 0, STEPS + 1)

    def restarting(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any) -> Tensor:
        for i in [*range(8), *range(4, STEPS)]:
            if i == 4:
                x = x + 0.3 * noise(*x.shape, seed=i)
            d = (x - model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)) / sigmas[i]
            x = x + d * (sigmas[i + 1] - sigmas[i])
        return x

    plain = sample_with(flux, "Flux", restarting, sigmas)
    accelerated = accelerate(flux, CONFIG)
    result = sample_with(accelerated, "Flux", restarting, sigmas)
    assert found_in(accelerated).predicted_calls > 0
    assert 0 < distance(result, plain) < 0.5


def test_a_part_of_the_steps_is_planned_by_its_noise_and_the_tokens() -> None:
    patcher = build("Flux")
    sampling = patcher.get_model_object("model_sampling")
    start, end = (float(sampling.percent_to_sigma(percent)) for percent in (0.1, 0.9))
    for size, tokens in (((16, 8, 8), 16), ((16, 32, 32), 256)):
        accelerated = accelerate(patcher, TAPConfig(full_steps=5), start_percent=0.1, end_percent=0.9)
        sample(accelerated, "Flux", steps=24, size=size)
        levels = samplers.calculate_sigmas(sampling, "simple", 24).tolist()[:-1]
        inside = [step for step, level in enumerate(levels) if end <= level <= start]
        noise_inside = tuple(level / (1 - level) for level in levels[inside[0] : inside[-1] + 1])
        known = Timeline(noise_inside, "flow", tokens=tokens)
        wanted = [inside[0] + step for step in spaced_steps(TAPConfig(), len(inside), 5, known)]
        found = found_in(accelerated)
        assert not found.fallbacks
        full = {step for step, is_full, _ in found.calls if is_full}
        assert full == {0, *(step for step in range(24) if step not in inside), *wanted}


@pytest.mark.parametrize("name", ["Flux", "WAN21_T2V"])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize(("denoise", "batch"), [(1.0, 1), (0.5, 1), (1.0, 3)])
def test_guidance_part_of_the_noise_and_batches(name: str, cfg: float, denoise: float, batch: int) -> None:
    patcher = build(name)
    kind: Any = {"cfg": cfg, "denoise": denoise, "batch": batch}
    plain = sample(patcher, name, **kind)
    assert torch.equal(sample(accelerate(patcher, WHOLE), name, **kind), plain)
    accelerated = accelerate(patcher, CONFIG)
    result = sample(accelerated, name, **kind)
    found = found_in(accelerated)
    assert (found.steps, found.full_steps) == (STEPS, FULL)
    assert {choice.branch for choice in found.choices} == ({"cond"} if cfg == 1 else {"cond", "uncond"})
    assert {len(choice.index) for choice in found.choices} == {batch}
    assert 0 < distance(result, plain) < 0.5
    if batch > 1:  # each picture is as it is alone
        x = noise(batch, *MODELS[name].latent, seed=3)
        assert distance(x[0], x[1]) > 0.5
        assert distance(result[:1], plain[:1]) < 0.5


def test_a_run_that_stops_before_the_end_and_goes_on_in_another(flux: Any) -> None:
    """KSampler (Advanced), or Wan 2.2 with a model for each half."""
    accelerated = accelerate(flux, CONFIG)
    sample(accelerated, "Flux", steps=20, last_step=10, force_full_denoise=False)
    assert (found_in(accelerated).steps, found_in(accelerated).full_steps) == (10, FULL)
    sample(accelerated, "Flux", steps=20, start_step=10, disable_noise=True)
    assert (found_in(accelerated).steps, found_in(accelerated).full_steps) == (10, FULL)


def test_a_mask_keeps_what_it_covers(flux: Any) -> None:
    """Set Latent Noise Mask, for inpainting: ComfyUI puts back the noisy original around each evaluation."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    kind: Any = {"denoise": 0.7, "noise_mask": mask}
    plain = sample(flux, "Flux", **kind)
    accelerated = accelerate(flux, CONFIG)
    result = sample(accelerated, "Flux", **kind)
    assert found_in(accelerated).full_steps == FULL
    assert torch.allclose(result[..., :4], plain[..., :4], atol=1e-5)
    assert 0 < distance(result, plain) < 0.3


def test_a_frame_that_is_given_to_a_model_for_one_sample_at_a_time() -> None:
    """HunyuanVideo's image to video in its second form has a time of its own for the first frame's tokens."""
    name = "HunyuanVideoI2V"
    patcher = build(name)
    ((features, rest),) = MODELS[name].condition(1)
    kind: Any = {"positive": [[features, rest | {"guiding_frame_index": 0}]], "cfg": 1.0}
    plain = sample(patcher, name, **kind)
    assert torch.equal(sample(accelerate(patcher, WHOLE), name, **kind), plain)
    accelerated = accelerate(patcher, CONFIG)
    with watched(patcher, standing_still=True) as calls:
        sample(accelerated, name, **kind)
    assert (found_in(accelerated).full_steps, found_in(accelerated).fallbacks) == (FULL, {})
    assert max(distance(call.output, calls[0].output) for call in calls) < 1e-5


@pytest.mark.parametrize("name", ["Flux", "WAN21_T2V", "SD3"])
@pytest.mark.parametrize(
    ("dtype", "computed_in"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float8_e4m3fn, torch.bfloat16)],
    ids=["bfloat16", "float16", "float8 weights"],
)
def test_half_precision(name: str, dtype: torch.dtype, computed_in: torch.dtype | None) -> None:
    patcher = build(name, dtype=dtype, computed_in=computed_in)
    plain = sample(patcher, name)
    assert torch.equal(sample(accelerate(patcher, WHOLE), name), plain)
    accelerated = accelerate(patcher, CONFIG)
    with watched(patcher, standing_still=True) as calls:
        sample(accelerated, name)
    assert (found_in(accelerated).full_steps, found_in(accelerated).fallbacks) == (FULL, {})
    assert calls[0].output.dtype == (computed_in or dtype)
    assert max(distance(call.output, calls[0].output) for call in calls) < 0.02


# ----------------------------------------------------------------------------------------------------------- conditions


def conditions(name: str) -> dict[str, Any]:
    """A picture's half, a mask and part of the time with conditions of their own, on ComfyUI's own nodes."""
    tiny = MODELS[name]
    (half,) = nodes.ConditioningSetArea().append(tiny.condition(4), 64, 32, 0, 0, 1.0)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    (masked,) = nodes.ConditioningSetMask().append(tiny.condition(5), mask, "default", 0.8)
    (late,) = nodes.ConditioningSetTimestepRange().set_range(tiny.condition(6, tokens=9), 0.1, 0.9)
    return {
        "positive": [*tiny.condition(1), *half, *masked, *late],
        "negative": [*tiny.condition(2), *nodes.ConditioningSetArea().append(tiny.condition(2), 64, 32, 0, 0, 1.0)[0]],
    }


def test_areas_masks_and_conditions_that_come_and_go(flux: Any) -> None:
    mixed = conditions("Flux")
    plain = sample(flux, "Flux", **mixed)
    assert distance(plain, sample(flux, "Flux")) > 0.1
    assert torch.equal(sample(accelerate(flux, WHOLE), "Flux", **mixed), plain)
    accelerated = accelerate(flux, CONFIG)
    result = sample(accelerated, "Flux", **mixed)
    found = found_in(accelerated)
    assert 0 < distance(result, plain) < 0.5
    assert found.full_steps == FULL
    assert {choice.branch for choice in found.choices} == {
        "cond", "cond 2", "cond 3", "cond 4", "uncond", "uncond 2"
    }  # fmt: skip


@pytest.mark.parametrize("granularity", ["token", "batch"])
def test_conditions_together_or_apart_give_the_same(
    flux: Any, granularity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where memory makes ComfyUI change its mind from step to step."""
    accelerated = accelerate(flux, replace(CONFIG, granularity=granularity))
    coin, results, passes = torch.Generator().manual_seed(7), [], []
    for memory in (lambda: 1e12, lambda: 0, lambda: 1e12 * bool(torch.rand((), generator=coin) < 0.5)):
        monkeypatch.setattr(model_management, "get_free_memory", lambda *_, memory=memory, **__: memory())
        with watched(flux) as calls:
            results.append(sample(accelerated, "Flux"))
        passes.append(len(calls))
        found = found_in(accelerated)
        assert found.full_steps == FULL
        assert not found.fallbacks
        assert len(found.calls) == 2 * STEPS
    assert passes[0] < passes[2] < passes[1]
    assert torch.allclose(results[0], results[1], atol=1e-4)
    assert torch.allclose(results[0], results[2], atol=1e-4)


@pytest.mark.parametrize("schedule", ["standard_static", "looped_uniform"])
def test_windows_of_frames(wan: Any, schedule: str, caplog: pytest.LogCaptureFixture) -> None:
    """A video of more frames than the model takes at once. Those of a looped schedule move at each step."""
    kind: Any = {"size": (16, 9, 8, 8)}
    (windowed,) = WanContextWindowsManualNode.execute(wan, 13, 5, schedule, 1, True, "pyramid").result
    plain = sample(windowed, "WAN21_T2V", **kind)
    assert distance(plain, sample(wan, "WAN21_T2V", **kind)) > 0.01
    accelerated = accelerate(windowed, CONFIG)
    result = sample(accelerated, "WAN21_T2V", **kind)
    found = found_in(accelerated)
    assert found.steps == STEPS
    assert 0 < distance(result, plain) < 0.5
    if schedule == "standard_static":
        assert (found.full_steps, found.fallbacks) == (FULL, {})
    else:  # no window has a past, and none is kept for long
        (static,) = WanContextWindowsManualNode.execute(wan, 13, 5, "standard_static", 1, True, "pyramid").result
        static = accelerate(static, CONFIG)
        sample(static, "WAN21_T2V", **kind)
        assert found.cache_bytes < 1.5 * found_in(static).cache_bytes
        assert warned(caplog) == ["TAP ran 12 of 12 steps in full where 5 were planned: the branch has only just begun"]


# ---------------------------------------------------------------------------------------------------- one run at a time


def test_nothing_of_a_run_reaches_the_next(flux: Any) -> None:
    """Another resolution, prompt, length and strength between two equal runs, with one patched model."""
    accelerated = accelerate(flux, CONFIG)
    before = sample(accelerated, "Flux")
    sample(accelerated, "Flux", size=(16, 12, 8), positive=MODELS["Flux"].condition(8, tokens=7))
    sample(accelerated, "Flux", steps=7, denoise=0.5)
    sample(accelerated, "Flux", "heun")
    assert torch.equal(sample(accelerated, "Flux"), before)


def test_two_branches_of_a_graph_share_the_model(flux: Any) -> None:
    """One plain, one accelerated, and one accelerated otherwise on top of that, in turns."""
    plain = sample(flux, "Flux")
    one = accelerate(flux, CONFIG)
    other = accelerate(one, TAPConfig.paper(interval=3))
    alone = [sample(model, "Flux") for model in (one, other)]
    assert distance(*alone) > 0
    assert torch.equal(sample(flux, "Flux"), plain)
    assert torch.equal(sample(one, "Flux"), alone[0])
    assert torch.equal(sample(other, "Flux"), alone[1])
    assert all(len(groups.get(comfy.KEY, [])) <= 1 for groups in other.wrappers.values())


@pytest.mark.parametrize("error", [model_management.InterruptProcessingException, RuntimeError])
def test_an_interrupt_leaves_nothing_behind(flux: Any, error: type[BaseException]) -> None:
    plain = sample(flux, "Flux")
    accelerated = accelerate(flux, CONFIG)
    before = sample(accelerated, "Flux")

    def stop(step: int, *_: Any) -> None:
        if step == 4:
            raise error

    with pytest.raises(error):
        sample(accelerated, "Flux", callback=stop)
    hook = flux.model.diffusion_model.single_blocks[1].register_forward_pre_hook(lambda *_: stop(4))
    with pytest.raises(error):
        sample(accelerated, "Flux")
    hook.remove()
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in flux.model.modules())
    assert torch.equal(sample(accelerated, "Flux"), before)
    assert torch.equal(sample(flux, "Flux"), plain)


def test_the_patcher_given_stays_as_it_is_and_the_wrappers_are_all_there_is(flux: Any) -> None:
    wrappers, attachments, options = dict(flux.wrappers), dict(flux.attachments), dict(flux.model_options)
    accelerated = accelerate(flux, CONFIG)
    sample(accelerated, "Flux")
    assert (flux.wrappers, flux.attachments, flux.model_options) == (wrappers, attachments, options)
    for place in list(accelerated.wrappers):
        accelerated.remove_wrappers_with_key(place, comfy.KEY)
    assert torch.equal(sample(accelerated, "Flux"), sample(flux, "Flux"))


def test_calls_outside_of_a_sampling_run_are_plain(flux: Any) -> None:
    accelerated = accelerate(flux, CONFIG)
    x, t, condition = noise(1, 16, 8, 8), torch.tensor([0.5]), MODELS["Flux"].condition(1)[0]
    rest = {"c_crossattn": condition[0], "y": condition[1]["pooled_output"], "guidance": torch.tensor([3.5])}
    result = accelerated.model.apply_model(x, t, transformer_options={"wrappers": accelerated.wrappers}, **rest)
    assert torch.equal(result, flux.model.apply_model(x, t, **rest))
    with pytest.raises(ValueError, match="not accelerated"):
        report(flux)


def test_a_guider_that_tells_no_evaluations_runs_plain_and_says_so(
    flux: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = sample(flux, "Flux")
    monkeypatch.setattr(samplers.CFGGuider, "__call__", lambda self, *args, **kw: self.predict_noise(*args, **kw))
    assert torch.equal(sample(accelerate(flux, CONFIG), "Flux"), plain)
    assert warned(caplog)[0].startswith("TAP did not see this run")


# --------------------------------------------------------------------------------------------- other nodes on the model


def control_net(name: str) -> tuple[Any, Tensor]:
    """A ControlNet of few blocks, and what it is to see: pixels for Flux (XLabs' form), else a latent."""
    settings: dict[str, Any] = {"operations": ops.disable_weight_init, "device": CPU, "dtype": torch.float32}
    settings |= MODELS[name].settings
    if name == "Flux":
        model = ControlNetFlux(**settings | {"depth": 2, "depth_single_blocks": 1})
        model.main_model_double, model.main_model_single = 3, 3
        image = noise(1, 64, 64, 3, seed=9).sigmoid()
    else:
        model = QwenImageControlNetModel(**settings) if name == "QwenImage" else ControlNetSD3(**settings)
        image = noise(1, 8, 8, 16, seed=9) if name == "SD3" else noise(1, 1, 8, 8, 16, seed=9)
    fill(model, 7)
    extra = ["y", "guidance"] if name == "Flux" else ["y"] if name == "SD3" else []
    ratio = 8 if name == "Flux" else 1
    return controlnet.ControlNet(model, load_device=CPU, extra_conds=extra, compression_ratio=ratio), image


@pytest.mark.parametrize("name", ["Flux", "QwenImage", "SD3"])
@pytest.mark.parametrize("part", [(0.0, 1.0), (0.0, 0.6)], ids=["all", "at first"])
def test_controlnet_between_blocks_reaches_the_output_once(name: str, part: tuple[float, float]) -> None:
    patcher, tiny, (net, image) = build(name), MODELS[name], control_net(name)
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        tiny.condition(1), tiny.condition(2), net, image, 0.5, *part
    )
    kind: Any = {"positive": positive, "negative": negative}
    plain = sample(patcher, name, **kind)
    assert distance(sample(patcher, name), plain) > 0.1
    assert torch.equal(sample(accelerate(patcher, WHOLE), name, **kind), plain)
    accelerated = accelerate(patcher, CONFIG)
    result = sample(accelerated, name, **kind)
    assert found_in(accelerated).full_steps == FULL
    assert 0 < distance(result, plain) < 0.5
    # Standing still, with what the ControlNet gave at first.
    with watched(patcher) as calls:
        sample(patcher, name, **kind)
    first = calls[0].kwargs["control"]
    keep = patcher.model.diffusion_model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"control": first}), with_kwargs=True
    )
    with watched(patcher, standing_still=True) as calls:
        sample(accelerated, name, **kind)
    keep.remove()
    assert max(distance(call.output, calls[0].output) for call in calls) < 1e-5


def test_a_model_that_uses_its_controlnet_up() -> None:
    """HunyuanDiT's later blocks take one output of the ControlNet each, and it insists that none is left."""
    patcher, tiny = build("HunyuanDiT1"), MODELS["HunyuanDiT1"]
    net = HunYuanControlNet(**{**tiny.settings, "operations": ops.disable_weight_init, "device": CPU, "depth": 40})
    net.depth = tiny.settings["depth"]
    net.blocks, net.after_proj_list = net.blocks[:2], net.after_proj_list[:2]  # as many as this depth has skips
    fill(net, 7)
    extra = ["text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5", "image_meta_size", "style"]
    extra += ["cos_cis_img", "sin_cis_img"]
    control = controlnet.ControlNet(net, load_device=CPU, extra_conds=extra, compression_ratio=1)
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(
        tiny.condition(1), tiny.condition(2), control, noise(1, 8, 8, 4, seed=9), 0.5, 0.0, 1.0
    )
    kind: Any = {"positive": positive, "negative": negative}
    plain = sample(patcher, "HunyuanDiT1", **kind)
    assert distance(sample(patcher, "HunyuanDiT1"), plain) > 0.01
    accelerated = accelerate(patcher, CONFIG)
    result = sample(accelerated, "HunyuanDiT1", **kind)
    assert (found_in(accelerated).full_steps, found_in(accelerated).fallbacks) == (FULL, {})
    assert 0 < distance(result, plain) < 0.5


@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_skip_layer_guidance(before: bool) -> None:
    """The conditions once more, within the same evaluation, with blocks replaced: a branch of its own."""
    patcher = build("SD3")

    def guided(model: Any) -> Any:
        return SkipLayerGuidanceSD3.execute(model, "1, 2", 2.0, 0.0, 1.0).result[0]

    plain = sample(guided(patcher), "SD3")
    assert distance(plain, sample(patcher, "SD3")) > 0.1
    accelerated = accelerate(guided(patcher), CONFIG) if before else guided(accelerate(patcher, CONFIG))
    result = sample(accelerated, "SD3")
    found = found_in(accelerated)
    assert (found.full_steps, found.fallbacks) == (FULL, {})
    assert {choice.branch for choice in found.choices} == {"cond", "uncond", "cond 2"}
    assert 0 < distance(result, plain) < 0.5


def test_a_patch_in_place_of_a_block(flux: Any) -> None:
    def weaker(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        before = args["img"].clone()  # the block may write into it
        out = dict(extra["original_block"](args))
        return out | {"img": before + 0.5 * (out["img"] - before)}

    patched = flux.clone()
    patched.set_model_patch_replace(weaker, "dit", "double_block", 2)
    patched.set_model_patch_replace(weaker, "dit", "single_block", 1)
    plain = sample(patched, "Flux")
    assert distance(plain, sample(flux, "Flux")) > 0.05
    assert torch.equal(sample(accelerate(patched, WHOLE), "Flux"), plain)
    accelerated = accelerate(patched, CONFIG)
    with watched(flux, standing_still=True) as calls:
        sample(accelerated, "Flux")
    assert (found_in(accelerated).full_steps, found_in(accelerated).fallbacks) == (FULL, {})
    assert max(distance(call.output, calls[0].output) for call in calls) < 1e-5


def test_lora_before_and_behind_give_the_same(flux: Any) -> None:
    place = "diffusion_model.single_blocks.1.linear2"
    rows, columns = flux.model.get_submodule(place).weight.shape
    lora = {
        f"{place}.lora_up.weight": noise(rows, 4, seed=21), f"{place}.lora_down.weight": noise(4, columns, seed=22),
    }  # fmt: skip

    def adapted(model: Any) -> Any:
        return sd.load_lora_for_models(model, None, dict(lora), 0.1, 0.0)[0]

    without, plain = sample(accelerate(flux, CONFIG), "Flux"), sample(adapted(flux), "Flux")
    assert distance(plain, sample(flux, "Flux")) > 0.1
    before, behind = accelerate(adapted(flux), CONFIG), adapted(accelerate(flux, CONFIG))
    result = sample(before, "Flux")
    assert torch.equal(sample(behind, "Flux"), result)
    assert found_in(behind).full_steps == FULL
    assert 0 < distance(result, plain) < 0.5
    assert torch.equal(sample(accelerate(flux, CONFIG), "Flux"), without)


def test_batches_that_an_extension_divides_in_its_own_way(flux: Any) -> None:
    """A model function wrapper that runs sample by sample, for which the conditions of a part are not known."""

    def one_by_one(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        x, t, c = args["input"], args["timestep"], args["c"]
        parts = []
        for i in range(len(x)):
            own = {k: v[i : i + 1] if isinstance(v, Tensor) and len(v) == len(x) else v for k, v in c.items()}
            parts.append(apply(x[i : i + 1], t[i : i + 1], **own))
        return torch.cat(parts)

    flux.set_model_unet_function_wrapper(one_by_one)
    plain = sample(flux, "Flux")
    accelerated = accelerate(flux, CONFIG)
    assert 0 < distance(sample(accelerated, "Flux"), plain) < 0.5
    assert (found_in(accelerated).full_steps, found_in(accelerated).fallbacks) == (FULL, {})


WHOLE_MODEL, BLOCKS = ["diffusion_model"], [f"diffusion_model.single_blocks.{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("before", "keys"),
    [
        pytest.param(True, WHOLE_MODEL, id="model, before"),
        pytest.param(False, WHOLE_MODEL, id="model, behind"),
        pytest.param(True, BLOCKS, id="blocks, before"),
        pytest.param(False, BLOCKS, id="blocks, behind"),
    ],
)  # fmt: skip
def test_torch_compile(flux: Any, before: bool, keys: list[str]) -> None:
    torch.compiler.reset()
    expected = sample(accelerate(flux, CONFIG), "Flux")

    def compiled(model: Any) -> Any:
        model = model.clone()
        set_torch_compile_wrapper(model, backend="eager", keys=keys)
        return model

    model = accelerate(compiled(flux), CONFIG) if before else compiled(accelerate(flux, CONFIG))
    assert distance(sample(model, "Flux"), expected) < 1e-3


def test_models_that_are_not_as_they_should_be_are_refused() -> None:
    patcher = build("Flux")
    del patcher.model.diffusion_model.get_submodule("double_blocks.0.img_attn")._modules["qkv"]
    with pytest.raises(UnsupportedModelError, match=r"not built as TAP knows it: .*qkv"):
        accelerate(patcher)
    patcher = build("Flux")
    del patcher.model.diffusion_model.double_blocks[:]
    with pytest.raises(UnsupportedModelError, match="no double_blocks"):
        accelerate(patcher)


def test_a_class_that_is_not_known_is_refused(flux: Any) -> None:
    class Other(type(flux.model.diffusion_model)):  # type: ignore[misc]
        pass

    flux.model.diffusion_model.__class__ = Other
    with pytest.raises(UnsupportedModelError, match=r"Other; of ComfyUI's it knows .*Flux, .*WanModel"):
        accelerate(flux)


def test_an_old_comfyui_is_refused(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(WrappersMP, "PREDICT_NOISE")
    with pytest.raises(RuntimeError, match="too old"):
        accelerate(flux)


@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize(("node", "title"), [(EasyCacheNode, "EasyCache"), (LazyCacheNode, "LazyCache")])
def test_other_caches_on_the_same_model_are_refused(flux: Any, node: Any, title: str, before: bool) -> None:
    def cached(model: Any) -> Any:
        return node.execute(model, 0.2, 0.15, 0.95, False).result[0]

    model = accelerate(cached(flux), CONFIG) if before else cached(accelerate(flux, CONFIG))
    with pytest.raises(ValueError, match=f"{title} and TAP"):
        sample(model, "Flux")


# ------------------------------------------------------------------------------------------------------------ hindsight


def test_hindsight_is_for_steps_of_euler_with_fresh_noise_or_without(
    flux: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    timeline = comfy._timeline

    def seen(*args: Any) -> Any:
        asked.append(timeline(*args))
        return asked[-1]

    monkeypatch.setattr(comfy, "_timeline", seen)
    accelerated = accelerate(flux, CONFIG)
    for sampler in ("euler", "dpmpp_2m", "euler_ancestral", "heun"):
        sample(accelerated, "Flux", sampler)
    assert [found.prediction for found in asked] == ["flow", None, "flow", None]
    sigmas = samplers.calculate_sigmas(flux.get_model_object("model_sampling"), "simple", STEPS)[:-1].double()
    assert asked[0].noise == pytest.approx((sigmas / (1 - sigmas)).tolist(), rel=1e-4)
    asked.clear()
    sample_with(accelerated, "Flux", samplers.ksampler("euler", {"s_churn": 0.5}), torch.linspace(1, 0, STEPS + 1))
    sample(accelerate(build("PixArtAlpha"), CONFIG), "PixArtAlpha")  # predicts noise
    assert [found.prediction for found in asked if found is not None][1:] == [None]
