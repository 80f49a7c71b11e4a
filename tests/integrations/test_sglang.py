"""The plugin in the real SGLang-Diffusion: loaded by its entry point, on pipelines that SGLang loads and runs.

It needs the package ``sglang``, whose dependencies want CUDA (docs/serving-engines.md); without it these tests are left
out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tap_diffusion as tap
from tap_diffusion.integrations import sglang as plugin

platforms = pytest.importorskip("sglang.multimodal_gen.runtime.platforms.plugins", reason="needs sglang")
pytestmark = pytest.mark.slow
STEPS, FULL_STEPS = 12, 6


@pytest.fixture(scope="module")
def model() -> str:
    from tap_diffusion_demo import EMOJI

    return str(EMOJI)


@pytest.fixture(scope="module")
def loaded(model: str) -> Iterator[Any]:
    """A pipeline as SGLang's worker loads it, after its plugins."""
    from sglang.multimodal_gen.runtime.server_args import ServerArgs, set_global_server_args

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(plugin.ENABLED, "true")
        patch.setenv(plugin.CONFIG, f'{{"full_steps": {FULL_STEPS}}}')
        platforms.load_plugins()
        platforms.apply_plugin_hooks()
        from sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline import DiffusersPipeline

        arguments = ServerArgs.from_kwargs(model_path=model, backend="diffusers", num_gpus=1)
        set_global_server_args(arguments)
        yield DiffusersPipeline(model, arguments), arguments


def test_nothing_is_hooked_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(plugin.ENABLED, raising=False)
    before = {target: list(hooks) for target, hooks in platforms.HookRegistry._hooks.items()}
    plugin.register()
    assert platforms.HookRegistry._hooks == before


def test_a_request_to_the_diffusers_backend(loaded: Any, model: str, caplog: pytest.LogCaptureFixture) -> None:
    """The picture is what diffusers gives with TAP at the same settings, and the log tells what ran."""
    from diffusers import FluxPipeline
    from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
    from sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline import DiffusersExecutionStage
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req

    pipeline, arguments = loaded
    size = {"height": 64, "width": 64, "num_inference_steps": STEPS, "guidance_scale": 1.0}
    request = Req(sampling_params=SamplingParams(prompt="red apple", seed=3, generator_device="cpu", **size))
    length = {"max_sequence_length": pipeline.diffusers_pipe.tokenizer_2.model_max_length}
    request.extra["diffusers_kwargs"] = length
    stage = DiffusersExecutionStage(pipeline.diffusers_pipe)
    with caplog.at_level(logging.INFO, logger=plugin.__name__):
        found = [stage.forward(request, arguments).output.clone() for _ in range(2)]

    pipe = FluxPipeline.from_pretrained(model, dtype=pipeline.diffusers_pipe.dtype)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "red apple", "output_type": "pt", **size, **length}
    plain = pipe(generator=torch.Generator().manual_seed(3), **call).images
    with tap.enabled(pipe, tap.TAPConfig(full_steps=FULL_STEPS)):
        expected = pipe(generator=torch.Generator().manual_seed(3), **call).images
    assert torch.equal(found[0], expected.float())
    assert torch.equal(found[1], found[0])
    assert not torch.equal(expected, plain)
    told = [record.getMessage() for record in caplog.records if record.name == plugin.__name__]
    assert sum(f"TAP: {STEPS} steps, {FULL_STEPS} full" in message for message in told) == 2


def test_warnings_reach_the_log(loaded: Any, caplog: pytest.LogCaptureFixture) -> None:
    """SGLang catches Python's warnings around the pipeline, and drops them."""
    from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
    from sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline import DiffusersExecutionStage
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req

    pipeline, arguments = loaded
    request = Req(
        sampling_params=SamplingParams(
            prompt="red apple", seed=3, generator_device="cpu", height=64, width=64, num_inference_steps=FULL_STEPS - 1
        )
    )
    request.extra["diffusers_kwargs"] = {"max_sequence_length": pipeline.diffusers_pipe.tokenizer_2.model_max_length}
    with caplog.at_level(logging.WARNING, logger=plugin.__name__):
        DiffusersExecutionStage(pipeline.diffusers_pipe).forward(request, arguments)
    assert any("predicted no step" in record.getMessage() for record in caplog.records)


def test_sglangs_own_pipelines_are_refused(loaded: Any, model: str) -> None:
    from sglang.multimodal_gen.runtime.pipelines.flux import FluxPipeline

    with pytest.raises(tap.UnsupportedModelError, match="SGLang's own FluxPipeline: give --backend diffusers"):
        FluxPipeline(model, loaded[1])


def test_a_configuration_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.CONFIG, '{"full_step": 8}')
    with pytest.raises(tap.ConfigError, match="SGLANG_TAP_CONFIG: TAPConfig has no field 'full_step'"):
        plugin.enable_loaded(object())
