"""diffusers' modular pipelines, whose guiders call the transformer for each of their branches and name none of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines import FluxAutoBlocks, WanBlocks
from test_generate import wan
from torch import Tensor

import tap_diffusion as tap
from tiny import TOKENS, build_pipeline, engine_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Guiders are currently")]
STEPS, FULL = 20, 5


def modular(blocks: Any, parts: Any) -> Any:
    pipe = blocks.init_pipeline()
    given = {name: part for name, part in parts.components.items() if part is not None and name in pipe.components}
    pipe.update_components(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, output: str, **arguments: Any) -> Tensor:
    result = pipe(
        prompt="red apple", height=32, width=32, num_inference_steps=STEPS, output=output,
        generator=torch.Generator().manual_seed(0), **arguments,
    )  # fmt: skip
    return torch.as_tensor(result)


def test_flux() -> None:
    pipe = modular(FluxAutoBlocks(), build_pipeline())
    arguments = {"max_sequence_length": TOKENS, "output_type": "latent"}
    plain = sample(pipe, "images", **arguments)
    with tap.enabled(pipe, tap.TAPConfig(full_steps=FULL)):
        accelerated = sample(pipe, "images", **arguments)
        report = tap.report(pipe)
        assert (report.steps, report.full_calls, len(report.calls)) == (STEPS, FULL, STEPS)
        assert engine_of(pipe.transformer).cache_bytes == 0
        assert torch.equal(sample(pipe, "images", **arguments), accelerated)
    assert not torch.equal(accelerated, plain)
    assert torch.equal(sample(pipe, "images", **arguments), plain)


# Guider, calls of each branch, and of these full ones beyond the schedule's.
GUIDERS = {
    "classifier-free": (lambda: ClassifierFreeGuidance(guidance_scale=3.0), [20, 20], 0),
    "projected": (lambda: AdaptiveProjectedGuidance(guidance_scale=3.0), [20, 20], 0),
    # In steps 5 to 9 a third branch, which has the first one's embeddings; the second ends with step 17.
    "skipping layers": (
        lambda: SkipLayerGuidance(
            guidance_scale=3.0, stop=0.9, skip_layer_config=LayerSkipConfig(indices=[1], fqn="blocks"),
            skip_layer_guidance_start=0.2, skip_layer_guidance_stop=0.5,
        ),
        [20, 18, 5], 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GUIDERS)
def test_wan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaner = SimpleNamespace(fix_text=lambda text: text)  # a package that mends broken encodings
    monkeypatch.setattr("diffusers.modular_pipelines.wan.encoders.ftfy", cleaner, raising=False)
    guider, calls, begun = GUIDERS[name]
    pipe = modular(WanBlocks(), wan())

    def videos() -> Tensor:
        pipe.update_components(guider=guider())  # one that has stopped encodes no negative prompt for the next run
        return sample(pipe, "videos", num_frames=5, output_type="pt")

    plain = videos()
    found: dict[str, list[int]] = {}
    with tap.enabled(pipe, tap.TAPConfig(full_steps=FULL)):
        engine = engine_of(pipe.transformer)
        begin = engine.begin

        def noted(call: Any) -> bool:
            found.setdefault(call.branch, []).append(call.step)
            return begin(call)

        monkeypatch.setattr(engine, "begin", noted)
        accelerated = videos()
        assert [len(steps) for steps in found.values()] == calls
        assert all(steps == list(range(steps[0], steps[0] + len(steps))) for steps in found.values())
        assert tap.report(pipe).fallbacks["the branch has only just begun"] == begun
        assert engine.cache_bytes == 0
        assert torch.equal(videos(), accelerated)
    assert not torch.equal(accelerated, plain)
    assert torch.equal(videos(), plain)
