"""TAP beside what users combine it with, on two families each."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor

import tap_diffusion as tap
from tap_diffusion.core.schedule import full_steps
from tiny import engine_of, interrupt_at
from zoo import CASES, Conditions, build, denoise, evaluate, start
from zoo.checks import A_LITTLE_LATER, CONFIG, INTERVAL, REUSE, WARMUP, blocks_of

pytestmark = pytest.mark.slow
FAMILIES = pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])


def accelerated(name: str) -> Tensor:
    model = build(name)
    with tap.enabled(model, CONFIG):
        return denoise(model, CASES[name])[0]


@FAMILIES
@pytest.mark.parametrize(
    ("how", "enabled_first"),
    [
        ("compile_repeated_blocks", False),
        ("compile_repeated_blocks", True),
        ("torch.compile", False),
        ("compile", True),
    ],
)
def test_compiled(name: str, how: str, enabled_first: bool) -> None:
    """The same result, and nothing is compiled again after the first run, nor for another trajectory."""
    expected = accelerated(name)
    torch._dynamo.reset()
    model = build(name)
    if enabled_first:
        tap.enable(model, CONFIG)
    if how == "torch.compile":
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        getattr(model, how)(backend="eager")
    if not enabled_first:
        tap.enable(compiled, CONFIG)
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    denoise(compiled, CASES[name])
    assert tap.report(compiled).predicted_steps > 0
    after_one = graphs["unique_graphs"]
    assert 0 < after_one < 16
    for _ in range(2):
        torch.testing.assert_close(denoise(compiled, CASES[name])[0], expected, rtol=1e-4, atol=1e-5)
    assert graphs["unique_graphs"] == after_one
    tap.disable(compiled)
    torch.testing.assert_close(denoise(model, CASES[name])[0], denoise(build(name), CASES[name])[0])


@FAMILIES
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("enabled_first", [False, True])
def test_group_offloading(name: str, level: str, enabled_first: bool) -> None:
    model, expected = build(name), accelerated(name)
    if enabled_first:
        tap.enable(model, CONFIG)
    cpu = torch.device("cpu")
    apply_group_offloading(
        model, onload_device=cpu, offload_device=cpu, offload_type=level, num_blocks_per_group=1, use_stream=False
    )
    if not enabled_first:
        tap.enable(model, CONFIG)
    assert torch.equal(denoise(model, CASES[name])[0], expected)
    assert tap.report(model).predicted_steps > 0


def raise_interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@FAMILIES
@pytest.mark.parametrize("enabled_first", [False, True])
def test_model_offloading(name: str, enabled_first: bool) -> None:
    """Pipelines take accelerate's hook off after each run and put it on again."""
    model, expected = build(name), accelerated(name)
    plain = denoise(model, CASES[name])[0]
    if enabled_first:
        tap.enable(model, CONFIG)
    accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    if not enabled_first:
        tap.enable(model, CONFIG)
    for _ in range(3):
        assert torch.equal(denoise(model, CASES[name])[0], expected)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    assert tap.report(model).trajectories == 3
    tap.disable(model)
    assert torch.equal(denoise(model, CASES[name])[0], plain)
    assert hasattr(model, "_hf_hook")
    model._hf_hook.pre_forward = raise_interrupt
    with pytest.raises(KeyboardInterrupt):  # the hook of accelerate still works
        denoise(model, CASES[name])


@FAMILIES
@pytest.mark.parametrize("enabled_first", [False, True])
def test_sequential_offloading(name: str, enabled_first: bool) -> None:
    model, expected = build(name), accelerated(name)
    if enabled_first:
        tap.enable(model, CONFIG)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if not enabled_first:
        tap.enable(model, CONFIG)
    for _ in range(2):
        assert torch.equal(denoise(model, CASES[name])[0], expected)
    assert tap.report(model).predicted_steps > 0


@FAMILIES
def test_int8_weights(name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = build(name)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    check_quantized(name, model)


@FAMILIES
def test_int8_weights_of_a_gguf_file(name: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = build(name)
    model.save_config(tmp_path)
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "tiny")
    kinds = gguf.GGMLQuantizationType
    for key, weight in model.state_dict().items():
        kind = kinds.Q8_0 if weight.ndim == 2 and weight.shape[1] % 32 == 0 else kinds.F32
        writer.add_tensor(key, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    how = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    quantized = type(model).from_single_file(str(file), config=str(tmp_path), quantization_config=how)
    assert any(type(module).__name__ == "GGUFLinear" for module in quantized.modules())
    check_quantized(name, quantized.eval())


def check_quantized(name: str, model: Any) -> None:
    plain = denoise(model, CASES[name])[0]
    with tap.enabled(model, CONFIG):
        first = denoise(model, CASES[name])[0]
        assert torch.equal(denoise(model, CASES[name])[0], first)
        assert tap.report(model).predicted_steps > 0
        assert not tap.report(model).fallbacks
    assert 0 < (first - plain).norm() / plain.norm() < 0.3
    assert torch.equal(denoise(model, CASES[name])[0], plain)


@FAMILIES
def test_layerwise_casting(name: str) -> None:
    model = build(name)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    plain = denoise(model, CASES[name])[0]
    with tap.enabled(model, CONFIG):
        first = denoise(model, CASES[name])[0]
        assert torch.equal(denoise(model, CASES[name])[0], first)
        assert not torch.equal(first, plain)
        assert not tap.report(model).fallbacks
    assert torch.equal(denoise(model, CASES[name])[0], plain)


@FAMILIES
def test_lora_comes_and_goes_while_enabled(name: str) -> None:
    from peft import LoraConfig

    model, expected = build(name), accelerated(name)
    tap.enable(model, CONFIG)
    assert torch.equal(denoise(model, CASES[name])[0], expected)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_out"], init_lora_weights=False))
    with_lora = denoise(model, CASES[name])[0]
    assert not torch.equal(with_lora, expected)
    model.disable_adapters()
    torch.testing.assert_close(denoise(model, CASES[name])[0], expected)
    model.enable_adapters()
    assert torch.equal(denoise(model, CASES[name])[0], with_lora)
    model.delete_adapters("default")
    torch.testing.assert_close(denoise(model, CASES[name])[0], expected)


@FAMILIES
def test_attention_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # diffusers makes it the default of the process too, and it changes torch's global flags in every thread.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    model, expected = build(name), accelerated(name)
    tap.enable(model, CONFIG)
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(denoise(model, CASES[name])[0], expected, rtol=1e-3, atol=1e-4)


@FAMILIES
def test_gradient_checkpointing(name: str) -> None:
    model, expected, case = build(name), accelerated(name), CASES[name]
    model.enable_gradient_checkpointing()
    tap.enable(model, CONFIG)
    z, conditions = start(case), Conditions(100, 1, torch.float32)
    for step in range(12):
        t = torch.full((1,), 1 - step / 12)
        output = model(**case.inputs(z, t, conditions.step()), return_dict=False)[0]
        z = z - output.detach() / 12
    torch.testing.assert_close(z, expected)


@FAMILIES
def test_cache_in_another_dtype(name: str) -> None:
    model, case = build(name), CASES[name]
    plain, expected = denoise(model, case)[0], accelerated(name)
    with tap.enabled(model, CONFIG):
        denoise(model, case)
        bytes_in_float32 = tap.report(model).cache_bytes
    with tap.enabled(model, dataclasses.replace(CONFIG, cache_dtype="bfloat16")):
        result = denoise(model, case)[0]
        assert not tap.report(model).fallbacks
        assert tap.report(model).cache_bytes < 0.7 * bytes_in_float32
    assert not torch.equal(result, expected)
    assert (result - expected).norm() < 0.3 * (expected - plain).norm()


@FAMILIES
@pytest.mark.parametrize("branches", [(0,), (1, 2)])
def test_offloaded_cache(name: str, branches: tuple[int, ...]) -> None:
    """The same bits, and nothing on the device while a full step runs its depth."""
    model, case = build(name), CASES[name]
    with tap.enabled(model, CONFIG):
        expected = denoise(model, case, branches=branches)
    held: list[int] = []
    blocks_of(name, model)[-1].register_forward_pre_hook(lambda *_: held.append(engine_of(model).cache_bytes))
    with tap.enabled(model, dataclasses.replace(CONFIG, offload="cpu")):
        results = denoise(model, case, branches=branches)
        assert tap.report(model).cache_bytes > 0
    assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))
    assert set(held) == {0}


@FAMILIES
def test_inference_mode(name: str) -> None:
    model, expected = build(name), accelerated(name)
    tap.enable(model, CONFIG)
    with torch.inference_mode():
        assert torch.equal(denoise(model, CASES[name])[0], expected)
        denoise(model, CASES[name], stop=6)
    assert torch.equal(denoise(model, CASES[name])[0], expected)


@FAMILIES
def test_overflow_in_float16(name: str) -> None:
    """Promise 5: what overflows on a predicted step runs in full instead, and is counted."""
    model, case = build(name).half(), CASES[name]
    tap.enable(model, tap.TAPConfig.paper(interval=4, warmup=2, orders=(1,), horizon_span=0))
    z, conditions = start(case, dtype=torch.float16), Conditions(100, 1, torch.float16)
    for step in range(4):
        if step == 3:
            history = engine_of(model)._branches["#0"].streams
            next(iter(history.values())).residual[1].fill_(60000)
        velocity = evaluate(model, case, z, 1 - step / 12, conditions)
        assert velocity.isfinite().all()
    assert tap.report(model).fallbacks == {"non-finite values": 1}


@FAMILIES
def test_copies_are_refused_and_saving_saves_the_plain_model(name: str, tmp_path: Path) -> None:
    model = build(name)
    plain = denoise(model, CASES[name])[0]
    tap.enable(model, CONFIG)
    with pytest.raises(RuntimeError, match=r"can't be copied while TAP is enabled.*tap.disable"):
        copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"can't be pickled while TAP is enabled.*tap.disable"):
        pickle.dumps(model)
    denoise(model, CASES[name], stop=5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(denoise(loaded, CASES[name])[0], plain)  # diffusers keeps parts of Wan in float32
    tap.disable(model)
    assert torch.equal(denoise(copy.deepcopy(model), CASES[name])[0], plain)


def test_two_threads_with_two_families() -> None:
    names = ["FluxTransformer2DModel", "WanTransformer3DModel"]
    expected = [accelerated(name) for name in names]
    models = {name: build(name) for name in names}
    results: dict[str, list[Tensor]] = {name: [] for name in names}

    def work(name: str) -> None:
        model = models[name]
        with tap.enabled(model, CONFIG):
            results[name] += [denoise(model, CASES[name])[0] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, right in zip(names, expected, strict=True):
        assert len(results[name]) == 3
        assert all(torch.equal(result, right) for result in results[name])


def test_controlnet_in_qwen_image_and_sd3() -> None:
    """Features added between the blocks are part of the residual: predicted steps must not add them again."""
    for name, argument in (
        ("QwenImageTransformer2DModel", "controlnet_block_samples"),
        ("SD3Transformer2DModel", "block_controlnet_hidden_states"),
    ):
        model, case, conditions = build(name), CASES[name], Conditions(0, 1, torch.float32)
        added = [torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        tap.enable(model, tap.TAPConfig.paper(interval=2, warmup=1, orders=(0,), horizon_span=0))
        outputs = []
        for t in (0.7, 0.7 * (1 - 1e-5)):
            inputs = case.inputs(start(case), torch.full((1,), t), conditions.step()) | {argument: added}
            outputs.append(model(**inputs, return_dict=False)[0])
        assert tap.report(model).predicted_steps == 1
        assert (outputs[1] - outputs[0]).norm() / outputs[0].norm() < 1e-2


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        (
            "FluxTransformer2DModel",
            lambda: FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=16, num_tokens=(4,), scale=[1.0]),
        ),
        (
            "SD3Transformer2DModel",
            lambda: SD3IPAdapterJointAttnProcessor2_0(
                hidden_size=32, ip_hidden_states_dim=16, head_dim=16, timesteps_emb_dim=32
            ),
        ),
    ],
)
def test_ip_adapter(name: str, processor: Any) -> None:
    """Image features enter the attention of each block: part of the depth, and so of the residual."""
    model, case = build(name), CASES[name]
    torch.manual_seed(0)
    for block in model.transformer_blocks:
        block.attn.set_processor(processor().requires_grad_(False))

    def inputs(z: Tensor, t: Tensor, given: Conditions) -> dict[str, Any]:
        arguments = case.inputs(z, t, given)
        if "Flux" in name:
            return arguments | {"joint_attention_kwargs": {"ip_hidden_states": [given(4, 16)]}}
        return arguments | {"joint_attention_kwargs": {"ip_hidden_states": given(4, 16), "temb": given(32)}}

    with_images = dataclasses.replace(case, inputs=inputs)
    plain = denoise(model, with_images)[0]
    z, conditions = start(case), Conditions(0, 1, torch.float32)
    with tap.enabled(model, REUSE):
        full = evaluate(model, with_images, z, 0.7, conditions)
        predicted = evaluate(model, with_images, z, A_LITTLE_LATER * 0.7, conditions)
        assert tap.report(model).predicted_steps == 1
    assert (predicted - full).norm() / full.norm() < 1e-2
    with tap.enabled(model, CONFIG):
        accelerated = denoise(model, with_images)[0]
        assert tap.report(model).predicted_steps > 0
        assert torch.equal(denoise(model, with_images)[0], accelerated)
    assert torch.equal(denoise(model, with_images)[0], plain)


class TestWan22:
    """Two transformers that share one run."""

    @pytest.fixture
    def pipe(self) -> Any:
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        )  # fmt: skip
        pipe = diffusers.WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae.eval(),
            scheduler=diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=build("WanTransformer3DModel"),
            transformer_2=build("WanTransformer3DModel", ffn_dim=48),
            boundary_ratio=0.7,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(self, pipe: Any, **more: Any) -> Tensor:
        result: Tensor = pipe(
            prompt_embeds=torch.ones(1, 6, 16), negative_prompt_embeds=torch.zeros(1, 6, 16), height=64, width=64,
            num_frames=5, output_type="latent", guidance_scale=2.0, generator=torch.Generator().manual_seed(0),
            **{"num_inference_steps": 20} | more,
        ).frames  # fmt: skip
        return result

    def test_both_are_accelerated_and_freed(self, pipe: Any) -> None:
        plain = self.sample(pipe)
        engines = []
        with tap.enabled(pipe, CONFIG):
            first = self.sample(pipe)
            report = tap.report(pipe)
            for transformer in (pipe.transformer, pipe.transformer_2):
                engine = engine_of(transformer)
                assert engine.report.predicted_steps > 0
                assert engine.cache_bytes == 0
                engines.append(engine)
            assert report.steps == 20
            assert len(report.calls) == 40
            assert report.predicted_calls == sum(engine.report.predicted_calls for engine in engines)
            assert torch.equal(self.sample(pipe), first)
            # An interrupt before and after the switch.
            for stop in (4, 15):
                with pytest.raises(KeyboardInterrupt):
                    self.sample(pipe, callback_on_step_end=interrupt_at(stop))
                assert torch.equal(self.sample(pipe), first)
        assert torch.equal(self.sample(pipe), plain)

    @pytest.mark.parametrize("steps", [20, 40])
    def test_full_steps_are_those_of_the_run(self, pipe: Any, steps: int) -> None:
        with tap.enabled(pipe, tap.TAPConfig(full_steps=8, orders=(1,))):
            self.sample(pipe, num_inference_steps=steps)
            assert (tap.report(pipe).steps, tap.report(pipe).full_steps) == (steps, 8)

    def test_a_timestep_for_each_token(self, pipe: Any) -> None:
        """As the 5B model has it, whose one transformer is told the time token by token."""
        parts = pipe.components | {"transformer_2": None}
        pipe = diffusers.WanPipeline(**parts, expand_timesteps=True)
        pipe.set_progress_bar_config(disable=True)
        plain = self.sample(pipe)
        with tap.enabled(pipe, tap.TAPConfig(full_steps=8)):
            first = self.sample(pipe)
            assert tap.report(pipe).full_steps == 8
            assert torch.equal(self.sample(pipe), first)
        assert 0 < (first - plain).norm() / plain.norm() < 0.1
        assert torch.equal(self.sample(pipe), plain)


class TestSchedulersAndGuidance:
    @pytest.fixture
    def pipe(self) -> Any:
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1, sample_size=16,
            shift_factor=0.0,
        )  # fmt: skip
        pipe = diffusers.StableDiffusion3Pipeline(
            transformer=build("SD3Transformer2DModel"), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=vae.eval(), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
            text_encoder_3=None, tokenizer_3=None,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(self, pipe: Any, steps: int = 20, **more: Any) -> Tensor:
        latents: Tensor = pipe(
            prompt_embeds=torch.ones(1, 6, 16), pooled_prompt_embeds=torch.ones(1, 16),
            negative_prompt_embeds=torch.zeros(1, 6, 16), negative_pooled_prompt_embeds=torch.zeros(1, 16),
            height=16, width=16, num_inference_steps=steps, output_type="latent", guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0), **more,
        ).images  # fmt: skip
        return latents

    def test_heun_evaluates_twice_per_step(self, pipe: Any) -> None:
        pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
        plain = self.sample(pipe, 12)
        with tap.enabled(pipe, CONFIG):
            first = self.sample(pipe, 12)
            report = tap.report(pipe)
            assert report.steps == len(pipe.scheduler.timesteps) == 23
            assert report.full_steps == len(full_steps(23, INTERVAL, WARMUP))
            assert engine_of(pipe.transformer).cache_bytes == 0
            assert torch.equal(self.sample(pipe, 12), first)
        assert 0 < (first - plain).norm() / plain.norm() < 0.5

    def test_a_distilled_schedule_of_four_steps(self, pipe: Any) -> None:
        """Nothing can be skipped, and TAP says so; with a single warm-up step something can."""
        plain = self.sample(pipe, 4)
        with tap.enabled(pipe, tap.TAPConfig.paper(warmup=4)), pytest.warns(tap.TAPWarning, match="a smaller warmup"):
            assert torch.equal(self.sample(pipe, 4), plain)
        with tap.enabled(pipe, tap.TAPConfig.paper(warmup=1, interval=2)):
            self.sample(pipe, 4)
            assert tap.report(pipe).predicted_steps == 2

    def test_skip_layer_guidance(self, pipe: Any) -> None:
        """A further branch without some layers, which only some of the steps have."""
        layers: dict[str, Any] = {
            "skip_guidance_layers": [1],
            "skip_layer_guidance_start": 0.0,
            "skip_layer_guidance_stop": 0.6,
        }
        plain, without = self.sample(pipe, **layers), self.sample(pipe)
        with tap.enabled(pipe, CONFIG):
            accelerated = self.sample(pipe, **layers)
            report = tap.report(pipe)
            assert report.full_steps == len(full_steps(20, INTERVAL, WARMUP))
            assert not report.fallbacks
            assert torch.equal(self.sample(pipe, **layers), accelerated)
            assert engine_of(pipe.transformer).cache_bytes == 0
        assert (accelerated - plain).norm() < (accelerated - without).norm()
        assert torch.equal(self.sample(pipe, **layers), plain)
