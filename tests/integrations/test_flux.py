"""The promises (README, "What you can rely on"), on real FLUX pipelines with random weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_first_block_cache
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves

import tap_diffusion as tap
from tap_diffusion import ConfigError, TAPConfig, TAPWarning, UnsupportedModelError
from tap_diffusion.core.schedule import full_steps
from tap_diffusion.integrations.depth import Depth, StandIns
from tap_diffusion.integrations.diffusers.versions import VERSION
from tap_diffusion.integrations.specs import SPECS
from tiny import (
    TOKENS,
    Operations,
    build_pipeline,
    build_transformer,
    count_calls,
    counted_forward,
    engine_of,
    interrupt_at,
    sample,
)

CONFIGS = {
    "paper": TAPConfig.paper(4),
    "full horizon": TAPConfig.paper(interval=4, horizon_span=0),
    "reuse": TAPConfig.paper(interval=4, orders=(0,)),
    "first block": TAPConfig.paper(interval=4, probe="first_block"),
    "newton, l1, batch": TAPConfig.paper(interval=4, family="newton", loss="l1", granularity="batch"),
}


def snapshot(pipe: Any) -> dict[str, Any]:
    """All that enabling could leave behind: attributes, hooks and forwards of every module."""
    found: dict[str, Any] = {"transformer": pipe.transformer}
    for name, module in pipe.transformer.named_modules():
        for key, value in vars(module).items():
            if key in ("_modules", "_parameters", "_buffers"):
                found[f"{name}.{key}"] = {k: id(v) for k, v in value.items()}
            elif "hooks" in key:
                found[f"{name}.{key}"] = list(value)
            else:
                found[f"{name}.{key}"] = id(value)
        found[f"{name}.forward"] = module.forward
    return found


class TestPromise1:
    def test_interval_one_is_bit_identical(self, pipe: Any) -> None:
        plain = sample(pipe)
        with tap.enabled(pipe, TAPConfig.paper(interval=1)):
            assert torch.equal(sample(pipe), plain)
            report = tap.report(pipe)
        assert (report.full_steps, report.predicted_steps) == (20, 0)

    @pytest.mark.parametrize("name", CONFIGS)
    def test_disable_leaves_no_trace(self, pipe: Any, name: str) -> None:
        before = snapshot(pipe)
        plain = sample(pipe)
        # diffusers' own `cache_context` leaves an empty registry on the transformer.
        del pipe.transformer._diffusers_hook
        tap.enable(pipe, CONFIGS[name])
        accelerated = sample(pipe)
        tap.disable(pipe)
        assert not torch.equal(accelerated, plain)
        assert snapshot(pipe) == before
        assert torch.equal(sample(pipe), plain)

    def test_an_exception_within_enabled_leaves_no_trace(self, pipe: Any) -> None:
        before = snapshot(pipe)
        with pytest.raises(KeyboardInterrupt), tap.enabled(pipe, CONFIGS["paper"]):
            sample(pipe, callback_on_step_end=interrupt_at(7))
        assert snapshot(pipe) == before

    def test_a_registry_with_other_hooks_is_left_alone(self, pipe: Any) -> None:
        from diffusers.hooks import HookRegistry, ModelHook

        registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
        registry.register_hook(ModelHook(), "other")
        plain = sample(pipe)
        tap.enable(pipe, CONFIGS["paper"])
        sample(pipe)
        tap.disable(pipe)
        assert list(pipe.transformer._diffusers_hook.hooks) == ["other"]
        assert torch.equal(sample(pipe), plain)

    def test_full_steps_are_the_model_s_own(self, pipe: Any) -> None:
        """Up to the first predicted step, and at each full step on the same input, outputs are bit-identical."""
        seen: list[tuple[dict[str, Any], Tensor]] = []
        with tap.enabled(pipe, TAPConfig.paper(interval=4)):
            handle = pipe.transformer.register_forward_hook(
                lambda _, args, kwargs, output: seen.append((dict(kwargs), output[0])), with_kwargs=True
            )
            sample(pipe)
            handle.remove()
        schedule = full_steps(20, 4, 3)
        for step in range(20):
            kwargs, output = seen[step]
            with torch.no_grad():
                plain = pipe.transformer(**kwargs)[0]
            assert torch.equal(plain, output) == (step in schedule)


class TestPromise2:
    @pytest.fixture
    def fresh(self) -> Tensor:
        pipe = build_pipeline()
        tap.enable(pipe, CONFIGS["paper"])
        return sample(pipe)

    @pytest.fixture
    def used(self) -> Iterator[Any]:
        pipe = build_pipeline()
        tap.enable(pipe, CONFIGS["paper"])
        yield pipe
        tap.disable(pipe)

    def test_again(self, used: Any, fresh: Tensor) -> None:
        for _ in range(3):
            assert torch.equal(sample(used), fresh)

    @pytest.mark.parametrize("step", [0, 1, 2, 5, 18])
    def test_after_an_interrupt(self, used: Any, fresh: Tensor, step: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            sample(used, "blue book", seed=1, callback_on_step_end=interrupt_at(step))
        assert torch.equal(sample(used), fresh)

    @pytest.mark.parametrize("calls", [1, 4, 7])
    @pytest.mark.parametrize("block", [0, 1])
    def test_after_an_exception_inside_the_model(self, used: Any, fresh: Tensor, calls: int, block: int) -> None:
        count = count_calls(used.transformer.transformer_blocks[block])

        def fail(*_: Any) -> None:
            if count[0] == calls:
                raise RuntimeError("out of memory")

        handle = used.transformer.transformer_blocks[block].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            sample(used, "blue book", seed=1)
        handle.remove()
        assert torch.equal(sample(used), fresh)

    @pytest.mark.parametrize("step", [2, 6])
    @pytest.mark.parametrize(
        "other",
        [
            {"height": 16},
            {"prompt": ["red apple", "blue book"]},
            {"steps": 9},
            {"negative_prompt": "", "true_cfg_scale": 2.0},
        ],
        ids=["resolution", "batch size", "steps", "branches"],
    )
    def test_after_another_kind_of_run(self, used: Any, fresh: Tensor, other: dict[str, Any], step: int) -> None:
        sample(used, **other)
        assert torch.equal(sample(used), fresh)
        with pytest.raises(KeyboardInterrupt):
            sample(used, **other, callback_on_step_end=interrupt_at(step))
        assert torch.equal(sample(used), fresh)

    def test_after_another_dtype(self, used: Any, fresh: Tensor) -> None:
        state = {k: v.clone() for k, v in used.transformer.state_dict().items()}
        used.to(torch.float64)
        sample(used)
        used.to(torch.float32)
        used.transformer.load_state_dict(state)
        assert torch.equal(sample(used), fresh)

    def test_other_embeddings_mid_run_by_a_bare_transformer(self, fresh: Tensor) -> None:
        pipe = build_pipeline()
        tap.enable(pipe.transformer, CONFIGS["paper"])
        with pytest.raises(KeyboardInterrupt):
            sample(pipe, "blue book", callback_on_step_end=interrupt_at(5))
        assert torch.equal(sample(pipe), fresh)


class TestPromise3:
    def test_two_branches_equal_two_batches_of_one(self, pipe: Any) -> None:
        """True guidance in two calls a step: each is predicted from its own history, as if it ran alone."""
        outputs: list[Tensor] = []
        handle = pipe.transformer.register_forward_hook(lambda _, args, output: outputs.append(output[0]))
        with tap.enabled(pipe, CONFIGS["paper"]):
            sample(pipe, negative_prompt="blue book", true_cfg_scale=1.0001)
            report = tap.report(pipe)
        handle.remove()
        # With guidance 1.0001 the latents are nearly those of the conditional branch alone.
        alone: list[Tensor] = []
        pipe.transformer.register_forward_hook(lambda _, args, output: alone.append(output[0]))
        with tap.enabled(pipe, CONFIGS["paper"]):
            sample(pipe)
        torch.testing.assert_close(torch.stack(outputs[::2]), torch.stack(alone), rtol=1e-2, atol=1e-3)
        assert report.steps == 20
        assert report.full_calls == 2 * len(full_steps(20, 4, 3))
        assert {choice.branch for choice in report.choices} == {"cond", "uncond"}

    def test_two_pipelines_share_the_transformer(self, pipe: Any) -> None:
        other = FluxImg2ImgPipeline(**{**pipe.components, "scheduler": type(pipe.scheduler)()})
        other.set_progress_bar_config(disable=True)
        image = Image.fromarray(np.full((32, 32, 3), 90, np.uint8))
        tap.enable(pipe, CONFIGS["paper"])

        def sample_other() -> Tensor:
            return sample(other, image=image, strength=0.7)

        expected, expected_other = sample(pipe), sample_other()
        with pytest.raises(KeyboardInterrupt):
            sample(pipe, callback_on_step_end=interrupt_at(4))
        assert torch.equal(sample_other(), expected_other)
        assert torch.equal(sample(pipe), expected)
        tap.enable(other, CONFIGS["paper"])
        assert torch.equal(sample(pipe), expected)
        assert torch.equal(sample_other(), expected_other)

    def test_two_threads_with_two_pipelines(self) -> None:
        pipes = [build_pipeline(), build_pipeline()]
        results: dict[int, Tensor] = {}
        for pipe in pipes:
            tap.enable(pipe, CONFIGS["paper"])
        expected = [sample(pipe, seed=i) for i, pipe in enumerate(pipes)]

        def work(i: int) -> None:
            results[i] = sample(pipes[i], seed=i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(results[i], expected[i]) for i in range(2))


class TestPromise4:
    @pytest.mark.parametrize("orders", [(0,), (0, 1), (0, 1, 2)])
    @pytest.mark.parametrize("branches", [1, 2])
    def test_memory_does_not_depend_on_depth_and_is_freed(self, orders: tuple[int, ...], branches: int) -> None:
        used = set()
        for depth in (2, 6):
            pipe = build_pipeline(num_single_layers=depth)
            guidance: dict[str, Any] = {"negative_prompt": "", "true_cfg_scale": 2.0} if branches == 2 else {}
            tap.enable(pipe, TAPConfig.paper(interval=4, orders=orders))
            sample(pipe, **guidance)
            report = tap.report(pipe)
            assert engine_of(pipe.transformer).cache_bytes == 0
            used.add(report.cache_bytes)
        stream = 64 * 32 * 4
        anchors = len(orders)
        gram = 64 * anchors**2 * 4 if anchors > 1 else 0
        mean_and_spread = (32 + 1) * 4 if anchors > 1 else 0
        kinds = 2 if anchors > 1 else 1
        assert used == {branches * (kinds * anchors * stream + gram + mean_and_spread)}


class TestPromise5:
    @pytest.mark.parametrize("name", ["paper", "reuse"])
    def test_a_non_finite_residual(self, pipe: Any, name: str) -> None:
        """An overflow in the depth of one full step: its anchor is dropped, the next step runs in full."""
        block = pipe.transformer.single_transformer_blocks[1]
        count = count_calls(block)

        def overflow(_: Any, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            # Adds infinity and takes it away behind: the residual the cache sees is not finite.
            return (output[0], output[1] + float("inf")) if count[0] == 4 else output

        block.register_forward_hook(overflow)
        pipe.scheduler.step = keep_finite(pipe.scheduler.step)
        with tap.enabled(pipe, CONFIGS[name]):
            result = sample(pipe)
            report = tap.report(pipe)
        assert report.fallbacks == {"non-finite values in the last full step": 1}
        assert report.full_steps == len(full_steps(20, 4, 3)) + 1
        assert result.isfinite().all()

    def test_a_non_finite_probe(self, pipe: Any) -> None:
        norm = pipe.transformer.transformer_blocks[0].norm1
        calls = [0]

        def poison(_: Any, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            calls[0] += 1
            # 3 full steps call the norm twice each (the block and the probe): the 8th call is a predicted step's.
            return (output[0] * float("nan"), *output[1:]) if calls[0] == 8 else output

        norm.register_forward_hook(poison)
        with tap.enabled(pipe, CONFIGS["paper"]):
            result = sample(pipe)
            report = tap.report(pipe)
        assert report.fallbacks == {"non-finite values": 1}
        assert result.isfinite().all()


def keep_finite(step: Any) -> Any:
    def wrapped(velocity: Tensor, *args: Any, **kwargs: Any) -> Any:
        return step(velocity.nan_to_num(0, 0, 0), *args, **kwargs)

    return wrapped


class TestPromise6:
    def test_an_unknown_class_is_named_with_the_remedy(self) -> None:
        with pytest.raises(UnsupportedModelError, match=r"Linear is not known to TAP.*blocks="):
            tap.enable(torch.nn.Linear(1, 1))

    def test_a_unet_names_the_reason(self) -> None:
        unet = UNet2DConditionModel(
            block_out_channels=(8, 8), down_block_types=("DownBlock2D", "DownBlock2D"), layers_per_block=1,
            up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4, cross_attention_dim=8,
        )  # fmt: skip
        pipe = StableDiffusionPipeline(
            vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=None, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        with pytest.raises(UnsupportedModelError, match="StableDiffusionPipeline has a UNet"):
            tap.enable(pipe)

    def test_no_double_stream_block_to_probe(self) -> None:
        with pytest.raises(UnsupportedModelError, match="no transformer_blocks"):
            tap.enable(build_transformer(num_layers=0))

    def test_another_cache_is_enabled(self, pipe: Any) -> None:
        pipe.transformer.enable_cache(FirstBlockCacheConfig())
        with pytest.raises(ValueError, match=r"FirstBlockCacheConfig.*disable_cache"):
            tap.enable(pipe)

    def test_another_cache_is_applied_by_a_function(self, pipe: Any) -> None:
        apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig())
        with pytest.raises(ValueError, match=r"FBCHeadBlockHook is at work on it; load the model anew"):
            tap.enable(pipe)

    def test_another_cache_is_applied_later(self, pipe: Any) -> None:
        """TAP steps back, and the other works as if it were alone."""
        if (0, 38) <= VERSION < (0, 41):
            pytest.skip("its cache_context doesn't reach hooks that come after the first run, TAP or not")
        fresh = sample(pipe)
        cache = FirstBlockCacheConfig(threshold=0.5)
        pipe.transformer.enable_cache(cache)
        others = sample(pipe)
        pipe.transformer.disable_cache()
        with tap.enabled(pipe):
            pipe.transformer.enable_cache(cache)
            for _ in range(2):  # said in each run
                with pytest.warns(TAPWarning, match=r"no step.*FirstBlockCacheConfig is at work.*disable_cache"):
                    assert torch.equal(sample(pipe), others)
            assert tap.report(pipe).full_steps == tap.report(pipe).steps
            pipe.transformer.disable_cache()
            assert not torch.equal(sample(pipe), fresh)
        assert not torch.equal(others, fresh)
        assert torch.equal(sample(pipe), fresh)

    @pytest.mark.parametrize("config", [{"speedup": 5}, tap.TAPConfig, 5])
    def test_a_configuration_of_another_type_is_named(self, pipe: Any, config: Any) -> None:
        with pytest.raises(TypeError, match="give a TAPConfig"):
            tap.enable(pipe, config)
        assert "_diffusers_hook" not in vars(pipe.transformer)

    def test_too_few_steps_warn(self, pipe: Any) -> None:
        with tap.enabled(pipe), pytest.warns(TAPWarning, match="of its 3 steps speedup=5 leaves none to skip"):
            sample(pipe, steps=3)

    def test_report_without_enable(self, pipe: Any) -> None:
        with pytest.raises(ValueError, match="not enabled on this FluxPipeline"):
            tap.report(pipe)

    def test_disable_without_enable_does_nothing(self, pipe: Any) -> None:
        tap.disable(pipe)


class TestPromise7:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_predicted_steps_run_nothing_of_the_depth(self, pipe: Any, name: str) -> None:
        transformer = pipe.transformer
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        counts = [count_calls(block) for block in blocks]
        head = count_calls(transformer.proj_out)
        with tap.enabled(pipe, CONFIGS[name]):
            sample(pipe)
        full = len(full_steps(20, 4, 3))
        first = 20 if name == "first block" else full
        assert [count[0] for count in counts] == [first] + [full] * (len(blocks) - 1)
        assert head == [20]

    @pytest.mark.parametrize("name", CONFIGS)
    def test_text_and_positions_are_embedded_where_a_block_reads_them(self, pipe: Any, name: str) -> None:
        transformer = pipe.transformer
        counts = [count_calls(part) for part in (transformer.context_embedder, transformer.pos_embed)]
        with tap.enabled(pipe, CONFIGS[name]):
            sample(pipe)
        assert counts == [[20 if name == "first block" else len(full_steps(20, 4, 3))]] * 2

    @torch.no_grad()
    def test_text_of_another_length_is_embedded_on_a_predicted_step(self) -> None:
        transformer = build_transformer()
        config, counts = transformer.config, count_calls(transformer.context_embedder)
        image = torch.randn(1, 64, config.in_channels, generator=torch.Generator().manual_seed(0))

        def call(text: int, model: Any) -> Tensor:
            output: Tensor = model.forward(
                image, torch.ones(1, text, config.joint_attention_dim), torch.ones(1, config.pooled_projection_dim),
                torch.tensor([0.5]), img_ids=torch.zeros(64, 3), txt_ids=torch.zeros(text, 3), return_dict=False,
            )[0]  # fmt: skip
            return output

        unread: StandIns = {}
        depth = Depth(transformer, SPECS["FluxTransformer2DModel"])
        depth.attach()
        with depth.watched(lambda *_: None, lambda *_: None, lambda *_: None, unread):
            call(TOKENS, transformer)
        with depth.left_out(lambda arguments: {"hidden_states": arguments["hidden_states"]}, unread) as view:
            same = call(TOKENS, view)
            assert counts == [1]
            other = call(TOKENS + 5, view)
            assert counts == [2]
        assert torch.equal(same, other)
        held = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(unread) if isinstance(leaf, Tensor)]
        assert held
        assert max(held) <= 8

    @pytest.mark.parametrize("name", ["paper", "reuse", "first block"])
    def test_predicted_steps_do_not_grow_with_depth(self, name: str) -> None:
        operations = []
        for depth in (1, 8):
            pipe = build_pipeline(num_single_layers=depth)
            counter = Operations()
            with tap.enabled(pipe, CONFIGS[name]):
                sample(pipe)  # the first run makes coefficients that later ones find
                counted_forward(pipe.transformer, counter, set(range(20)) - set(full_steps(20, 4, 3)))
                sample(pipe)
            operations.append(counter.count)
        assert operations[0] == operations[1] > 0

    @pytest.mark.parametrize("name", CONFIGS)
    def test_steps_wait_for_nothing(self, pipe: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Reading a tensor's value on the host would wait for a GPU. As on one, finiteness is checked late.

        Full steps don't wait either, so that the host can run ahead into the predicted ones; but for the first, at
        which the timestep is read to see whose run this is.
        """
        monkeypatch.setattr("tap_diffusion.core.engine.Engine.checks_late", staticmethod(lambda _: True))
        monkeypatch.setattr("tap_diffusion.core.doubts.LateFlag.is_raised", lambda _: False)
        counter = Operations()
        with tap.enabled(pipe, CONFIGS[name]):
            counted_forward(pipe.transformer, counter, set(range(1, 20)))
            sample(pipe)
        assert counter.count > 0
        assert counter.reads == []


def test_order_zero_equals_an_independent_recomputation(pipe: Any) -> None:
    """The model's own head applied to first-block input plus the residual of the last full step.

    Catches a residual taken from the wrong place, or added twice.
    """
    transformer = pipe.transformer
    calls: list[tuple[dict[str, Any], Tensor]] = []
    entered: list[Tensor] = []
    left: list[Tensor] = []
    transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(kwargs["hidden_states"]), with_kwargs=True
    )
    transformer.single_transformer_blocks[-1].register_forward_hook(lambda _, args, output: left.append(output[1]))
    with tap.enabled(pipe, CONFIGS["reuse"]):
        handle = transformer.register_forward_hook(
            lambda _, args, kwargs, output: calls.append((dict(kwargs), output[0])), with_kwargs=True
        )
        sample(pipe)
        handle.remove()
    schedule = full_steps(20, 4, 3)
    with torch.no_grad():
        for step, (kwargs, output) in enumerate(calls):
            if step in schedule:
                continue
            anchor = max(i for i, full in enumerate(schedule) if full < step)
            x = transformer.x_embedder(kwargs["hidden_states"])
            temb = transformer.time_text_embed(kwargs["timestep"] * 1000, kwargs["pooled_projections"])
            stream = x + (left[anchor] - entered[anchor])
            expected = transformer.proj_out(transformer.norm_out(stream, temb))
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def picture(value: int = 90) -> Image.Image:
    pixels = np.random.default_rng(value).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


TRUE_GUIDANCE: dict[str, Any] = {"negative_prompt": "", "true_cfg_scale": 2.0}
EDIT: dict[str, Any] = {"image": picture(), "strength": 0.6}
MASK: dict[str, Any] = {"mask_image": picture(7)}
KONTEXT: dict[str, Any] = {"image": picture(), "_auto_resize": False, "max_area": 32 * 32}

# pipeline, changes of the transformer's configuration, arguments of the call, steps that run
VARIANTS: dict[str, tuple[type, dict[str, Any], dict[str, Any], int]] = {
    "text to image": (FluxPipeline, {}, {}, 20),
    "embedded guidance": (FluxPipeline, {"guidance_embeds": True}, {"guidance_scale": 3.0}, 20),
    "true guidance": (FluxPipeline, {}, TRUE_GUIDANCE, 20),
    "image to image": (FluxImg2ImgPipeline, {}, EDIT, 12),
    "image to image, true guidance": (FluxImg2ImgPipeline, {}, EDIT | TRUE_GUIDANCE, 12),
    "inpaint": (FluxInpaintPipeline, {}, EDIT | MASK, 12),
    "inpaint, true guidance": (FluxInpaintPipeline, {}, EDIT | MASK | TRUE_GUIDANCE, 12),
    "control": (FluxControlPipeline, {"in_channels": 32, "out_channels": 16}, {"control_image": picture()}, 20),
    "fill": (FluxFillPipeline, {"in_channels": 48, "out_channels": 16}, {"image": picture()} | MASK, 20),
    "kontext": (FluxKontextPipeline, {}, KONTEXT, 20),
    "kontext, true guidance": (FluxKontextPipeline, {}, KONTEXT | TRUE_GUIDANCE, 20),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_flux_pipeline(name: str) -> None:
    pipeline, transformer, arguments, steps = VARIANTS[name]
    pipe = build_pipeline(pipeline, **transformer)
    plain = sample(pipe, **arguments)
    tap.enable(pipe, TAPConfig.paper(interval=1))
    assert torch.equal(sample(pipe, **arguments), plain)
    tap.enable(pipe, TAPConfig.paper(4))
    accelerated = sample(pipe, **arguments)
    report = tap.report(pipe)
    assert report.steps == steps
    assert report.full_steps == len(full_steps(steps, 4, 3))
    assert not report.fallbacks
    assert engine_of(pipe.transformer).cache_bytes == 0
    assert torch.equal(sample(pipe, **arguments), accelerated)
    error = (accelerated - plain).norm() / plain.norm()
    assert 0 < error < 0.3
    tap.disable(pipe)
    assert torch.equal(sample(pipe, **arguments), plain)


def test_controlnet_residuals_are_part_of_the_residual() -> None:
    """Between the blocks and behind the last: predicted steps must not add them again."""
    transformer = build_transformer()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    arguments = {
        "hidden_states": random(1, 16, 16), "encoder_hidden_states": random(1, TOKENS, 16),
        "pooled_projections": random(1, 16), "txt_ids": torch.zeros(TOKENS, 3),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, 4, 4, torch.device("cpu"), torch.float32),
        "controlnet_block_samples": [random(1, 16, 32)], "controlnet_single_block_samples": [random(1, 16, 32)] * 2,
        "return_dict": False,
    }  # fmt: skip
    outputs = []
    tap.enable(transformer, TAPConfig.paper(interval=4, orders=(0,)))
    with torch.no_grad():
        for t in (0.5, 0.4995, 0.499, 0.4985):
            outputs.append(transformer(timestep=torch.tensor([t]), **arguments)[0])
    report = tap.report(transformer)
    assert report.predicted_steps == 1
    # The inputs hardly change, so reuse is right to a hair; a ControlNet residual added twice would show.
    torch.testing.assert_close(outputs[3], outputs[2], rtol=1e-2, atol=1e-2)


def test_lora_scale_is_undone_after_a_fallback(pipe: Any) -> None:
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = [m for m in pipe.transformer.modules() if hasattr(m, "scaling")]
    scales = [dict(layer.scaling) for layer in layers]
    norm = pipe.transformer.transformer_blocks[0].norm1
    count = count_calls(norm)
    norm.register_forward_hook(
        lambda _, args, output: (output[0] * (float("nan") if count[0] == 8 else 1), *output[1:])
    )
    with tap.enabled(pipe, CONFIGS["paper"]):
        sample(pipe, joint_attention_kwargs={"scale": 0.5})
        assert tap.report(pipe).fallbacks == {"non-finite values": 1}
    assert [dict(layer.scaling) for layer in layers] == scales


def test_fields_in_place_of_a_configuration(pipe: Any) -> None:
    with tap.enabled(pipe, full_steps=3, orders=(0, 1)):
        sample(pipe, steps=6)
        assert tap.report(pipe).full_steps == 3
        assert engine_of(pipe.transformer).config == TAPConfig(full_steps=3, orders=(0, 1))
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"speed_up": 6}, "did you mean 'speedup'"),
        ({"speedup": 0}, "must be a number ≥ 1"),
    )
    for fields, message in wrong:
        with pytest.raises(ConfigError, match=message):
            tap.enable(pipe, **fields)
    with pytest.raises(ConfigError, match=r"give a TAPConfig or fields of one \(interval\), not both"):
        tap.enable(pipe, TAPConfig(), interval=4)
    assert "_diffusers_hook" not in vars(pipe.transformer)


def test_what_there_is_to_use() -> None:
    assert set(dir(tap)) == {*tap.__all__, "__version__"}
    assert all(hasattr(tap, name) for name in dir(tap))


def test_enabling_again_replaces_the_configuration(pipe: Any) -> None:
    tap.enable(pipe, TAPConfig.paper(interval=4))
    tap.enable(pipe, TAPConfig.paper(interval=8))
    sample(pipe)
    assert tap.report(pipe).full_steps == len(full_steps(20, 8, 3))


def test_a_replaced_scheduler_is_noticed(pipe: Any) -> None:
    tap.enable(pipe, TAPConfig.paper(interval=4))
    first = sample(pipe)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=3.0)
    assert not torch.equal(sample(pipe), first)
    assert tap.report(pipe).steps == 20
    assert engine_of(pipe.transformer).cache_bytes == 0


def test_gradients_may_be_on(pipe: Any) -> None:
    transformer = pipe.transformer
    tap.enable(transformer, TAPConfig.paper(interval=4))
    arguments = {
        "encoder_hidden_states": torch.zeros(1, 3, 16), "pooled_projections": torch.zeros(1, 16),
        "txt_ids": torch.zeros(3, 3), "img_ids": torch.zeros(16, 3), "return_dict": False,
    }  # fmt: skip
    x = torch.randn(1, 16, 16)
    for i in range(5):
        transformer(hidden_states=x + 0.1 * i, timestep=torch.tensor([1 - i / 5]), **arguments)
    history = engine_of(pipe.transformer)._branches["#0"].streams["hidden_states"]
    assert not any(tensor.requires_grad for tensor in history.residual + history.probe)
    tap.disable(transformer)
