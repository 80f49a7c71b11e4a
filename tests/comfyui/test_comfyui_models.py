"""Every transformer class of ComfyUI 0.3.75, with tiny random models: accelerated as promised, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import real  # noqa: F401 - finds ComfyUI

# isort: split
import pytest
import torch
from comfy import supported_models
from runs import STEPS, distance, full_passes, sample, sample_from, watched
from tiny_comfy import MODELS, build, noise
from torch import Tensor, nn

from tap_diffusion import TAPConfig, UnsupportedModelError
from tap_diffusion.core.engine import Engine
from tap_diffusion.integrations.comfyui import accelerate, report
from tap_diffusion.integrations.comfyui.wrappers import KEY

# Models that TAP does not accelerate. Where a spec is added, its name goes from here, and all tests below apply.
REFUSED = {"CosmosI2V", "CosmosT2V"}
ACCELERATED = [name for name in MODELS if name not in REFUSED]

# What of comfy.supported_models is no transformer, and not for TAP: U-Nets, and Stable Cascade's stages.
OTHERS = {
    "KOALA_1B", "KOALA_700M", "LotusD", "SD15", "SD15_instructpix2pix", "SD20", "SD21UnclipH", "SD21UnclipL", "SDXL",
    "SDXLRefiner", "SDXL_instructpix2pix", "SD_X4Upscaler", "SSD1B", "SV3D_p", "SV3D_u", "SVD_img2vid",
    "Segmind_Vega", "Stable_Cascade_B", "Stable_Cascade_C", "Stable_Zero123",
}  # fmt: skip

# Lists of modules that run on predicted steps, too: of text and time, and what is before the blocks and behind them.
SHALLOW = {
    "caption_projection", "context_refiner", "distilled_guidance_layer.layers", "distilled_guidance_layer.norms",
    "nerf_blocks", "noise_refiner", "ref_image_refiner", "txt_in.individual_token_refiner.blocks",
}  # fmt: skip
# And what does not run at all there, since only blocks that are left out read it.
DEEP = (
    "audio_injector.", "casual_audio_encoder.", "face_adapter.", "face_encoder.", "motion_encoder.", "vace_blocks.",
)  # fmt: skip

FULL = 5
LEFT_OUT = 0.75  # of a full step's modules, a predicted one runs fewer


@pytest.fixture(autouse=True)
def in_inference_mode() -> Iterator[None]:
    with torch.inference_mode():  # in which ComfyUI runs its graphs
        yield


def test_all_models_of_this_comfyui_are_here() -> None:
    here = {tiny.name or name for name, tiny in MODELS.items()}
    assert {model.__name__ for model in supported_models.models} == here | OTHERS
    assert MODELS.keys() >= REFUSED


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_model_that_tap_does_not_accelerate_is_refused_by_its_class(name: str) -> None:
    patcher = build(name)
    with pytest.raises(UnsupportedModelError, match=rf"\b{type(patcher.model.diffusion_model).__name__}\b"):
        accelerate(patcher)


@pytest.fixture(scope="module", params=ACCELERATED)
def model(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Name and patcher, for all tests below: nothing of one is to reach the next."""
    return request.param, build(request.param)


@pytest.mark.parametrize("config", [TAPConfig(full_steps=FULL), TAPConfig(interval=1)], ids=["some", "all"])
def test_full_steps_are_bit_identical(model: tuple[str, Any], config: TAPConfig) -> None:
    """Each of them, against the plain model's call with the same arguments. If all are, so is the picture."""
    name, patcher = model
    plain = sample(patcher, name)
    accelerated = accelerate(patcher, config)
    with watched(patcher) as calls:
        result = sample(accelerated, name)
    full = full_passes(report(accelerated))
    assert len(full) == STEPS
    if config.interval == 1:
        assert all(full)
        assert torch.equal(result, plain)
    calls = _without_hindsight(calls, full)
    for call, is_full in zip(calls, full, strict=True):
        if is_full:
            assert torch.equal(call.output, patcher.model.diffusion_model(*call.args, **call.kwargs))


def _without_hindsight(calls: list[Any], full: list[bool]) -> list[Any]:
    """One call for each pass: where hindsight predicts a full step beside it, the latter, which comes after."""
    found, queue = [], list(calls)
    most = max(len(call.modules) for call in calls)
    for is_full in full:
        call = queue.pop(0)
        if is_full and len(call.modules) < LEFT_OUT * most:
            call = queue.pop(0)
        found.append(call)
    assert not queue
    return found


@pytest.mark.parametrize("probe", ["modulated_input", "first_block"])
def test_at_a_standstill_a_predicted_step_gives_what_a_full_one_does(model: tuple[str, Any], probe: Any) -> None:
    """Whatever the blocks do to what they are given: with the same input, again and again, nothing is to be lost."""
    name, patcher = model
    accelerated = accelerate(patcher, TAPConfig(full_steps=FULL, probe=probe))
    with watched(patcher, standing_still=True) as calls:
        sample(accelerated, name, batch=1 if "Vace" in name else 2)  # whose nodes make conditions of one size
    found = report(accelerated)
    assert found is not None
    assert (found.full_steps, found.predicted_steps, found.fallbacks) == (FULL, STEPS - FULL, {})
    expected = calls[0].output
    assert torch.equal(expected, patcher.model.diffusion_model(*calls[0].args, **calls[0].kwargs))
    assert max(distance(call.output, expected) for call in calls) < 1e-5
    spec = accelerated.get_attachment(KEY).spec
    first, places = f"{spec.blocks[0]}.0.", (*spec.blocks, *spec.bypassed)
    depth = {
        module
        for module in max((call.modules for call in calls), key=len)
        if module.startswith(tuple(f"{place}." for place in places)) and not module.startswith(first)
    }
    assert depth
    fewest = min((call.modules for call in calls), key=len)
    assert _lists_that_ran(patcher, {module for module in fewest if not module.startswith(first)}) <= SHALLOW
    assert not [module for module in fewest if module.startswith(DEEP)]
    # A full step may be predicted as well, for hindsight.
    ran = [bool(call.modules & depth) for call in calls]
    assert (ran.count(True), ran.count(False)) == (FULL, len(calls) - FULL)
    assert len(calls) >= STEPS


def _lists_that_ran(patcher: Any, ran: set[str]) -> set[str]:
    """Lists of modules of which others than the first ran."""
    lists = [name for name, part in patcher.model.diffusion_model.named_modules() if isinstance(part, nn.ModuleList)]
    beyond = {name: re.compile(rf"{re.escape(name)}\.[1-9]") for name in lists}
    return {name for name in lists if any(beyond[name].match(module) for module in ran)}


def test_a_part_that_is_given(model: tuple[str, Any]) -> None:
    """A noise mask over the first frame or row, as image-to-video and inpainting nodes set it.

    Some models then have a time for each token.
    """
    name, patcher = model
    shape = MODELS[name].latent
    if name in ("HunyuanVideo15", "HunyuanImage21Refiner"):
        pytest.skip("takes no such mask")
    mask = torch.ones(1, 1, *shape[1:])
    mask[:, :, 0] = 0
    kind: Any = {"noise_mask": mask, "denoise": 0.9}
    plain = sample(patcher, name, **kind)
    assert torch.equal(sample(accelerate(patcher, TAPConfig(interval=1)), name, **kind), plain)
    accelerated = accelerate(patcher, TAPConfig(full_steps=FULL))
    with watched(patcher, standing_still=True) as calls:
        sample(accelerated, name, **kind)
    found = report(accelerated)
    assert found is not None
    assert (found.full_steps, found.predicted_steps, found.fallbacks) == (FULL, STEPS - FULL, {})
    assert max(distance(call.output, calls[0].output) for call in calls) < 1e-5


def test_each_token_has_its_own_probe_features(model: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the latent in one place changes the same tokens of the stream and of the probe."""
    name, patcher = model
    seen: list[tuple[Tensor, Tensor]] = []
    record = Engine.record

    def noted(self: Any, call: Any, before: Tensor, after: Tensor, probe: Tensor, *rest: Any) -> None:
        seen.append((before.clone(), probe.clone()))
        record(self, call, before, after, probe, *rest)

    monkeypatch.setattr(Engine, "record", noted)
    accelerated = accelerate(patcher, TAPConfig(full_steps=3, hindsight=0))
    x = noise(1, *MODELS[name].latent, seed=3)
    changed = x.clone()
    changed.flatten(2)[..., 0] += 1
    for latent in (x, changed):
        sample_from(accelerated, name, latent, steps=4)
    (before, probe), (other_before, other_probe) = seen[0], seen[len(seen) // 2]
    in_stream, in_probe = ((a - b).norm(dim=-1) > 1e-6 for a, b in ((before, other_before), (probe, other_probe)))
    assert in_stream.any()
    assert torch.equal(in_stream, in_probe)


def test_runs_have_the_full_steps_asked_for_repeat_and_leave_no_trace(model: tuple[str, Any]) -> None:
    name, patcher = model
    plain, before = sample(patcher, name), _traces(patcher)
    accelerated = accelerate(patcher, TAPConfig(full_steps=FULL))
    result = sample(accelerated, name)
    found = report(accelerated)
    assert found is not None
    assert (found.full_steps, found.predicted_steps, found.fallbacks) == (FULL, STEPS - FULL, {})
    assert 0 < distance(result, plain) < 0.7
    assert _traces(patcher) == before
    assert torch.equal(sample(patcher, name), plain)
    assert torch.equal(sample(accelerated, name), result)


def _traces(patcher: Any) -> list[Any]:
    """Whatever could be left in the model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (place, id(part), sorted(vars(part)), *(len(getattr(part, kind)) for kind in kinds))
        for place, part in patcher.model.named_modules()
    ]
