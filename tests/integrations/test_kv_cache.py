"""Pipelines that keep keys and values of the reference tokens: the first step sees more tokens than the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tap_diffusion as tap
from zoo import CASES, Conditions, build, start

CONFIG = tap.TAPConfig.paper(interval=4, warmup=2, orders=(0,), horizon_span=0)
Step = Callable[[Tensor, float], Tensor]


def _flux2(model: Any) -> Step:
    """As Flux2KleinKVPipeline does it."""
    transformer_flux2 = pytest.importorskip("diffusers.models.transformers.transformer_flux2")
    if not hasattr(transformer_flux2, "Flux2KVAttnProcessor"):
        pytest.skip("this version of diffusers keeps no keys and values for FLUX.2")
    for block in model.transformer_blocks:
        block.attn.set_processor(transformer_flux2.Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(transformer_flux2.Flux2KVParallelSelfAttnProcessor())
    conditions = Conditions(0, 1, torch.float32)
    cache: Any = None

    @torch.no_grad()
    def step(z: Tensor, time: float) -> Tensor:
        nonlocal cache
        inputs = CASES["Flux2Transformer2DModel"].inputs(z, torch.full((1,), time), conditions.step())
        if cache is not None:
            velocity: Tensor = model(**inputs, kv_cache=cache, kv_cache_mode="cached", return_dict=False)[0]
            return velocity
        inputs["hidden_states"] = torch.cat([conditions(8, 16), z], dim=1)
        inputs["img_ids"] = torch.cat([inputs["img_ids"][:, :8] + 10, inputs["img_ids"]], dim=1)
        velocity, cache = model(**inputs, kv_cache_mode="extract", num_ref_tokens=8, return_dict=False)
        return velocity

    return step


def _qwenimage21(model: Any) -> Step:
    """As QwenImage21Pipeline does it."""
    transformer_qwenimage21 = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage21")
    conditions = Conditions(0, 1, torch.float32)
    cache = transformer_qwenimage21.QwenImage21KVCache(len(model.transformer_blocks))
    mode = "extract"

    @torch.no_grad()
    def step(z: Tensor, time: float) -> Tensor:
        nonlocal mode
        inputs = CASES["QwenImage21Transformer2DModel"].inputs(z, torch.full((1,), time), conditions.step())
        velocity: Tensor = model(**inputs, kv_cache=cache, kv_cache_mode=mode, return_dict=False)[0]
        mode = "cached"
        return velocity[:, -z.shape[1] :]

    return step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pipeline"), [("Flux2Transformer2DModel", _flux2), ("QwenImage21Transformer2DModel", _qwenimage21)]
)
def test_steps_after_the_one_that_fills_the_cache_are_predicted(name: str, pipeline: Callable[[Any], Step]) -> None:
    model = build(name)
    z = start(CASES[name])
    plain = pipeline(model)
    for time in (1.0, 0.8):
        expected = plain(z, time)
    with tap.enabled(model, CONFIG):
        step = pipeline(model)
        for time in (1.0, 0.8):
            full = step(z, time)
        predicted = step(z, 0.8 * (1 - 1e-5))
        report = tap.report(model)
        assert (report.full_steps, report.predicted_steps, report.fallbacks) == (2, 1, {})
    assert torch.equal(full, expected)
    assert (predicted - full).norm() / full.norm() < 1e-2
