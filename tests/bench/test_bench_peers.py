"""Other packages' caches in the bench: what they run in full, and that they leave nothing behind."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, MagCacheConfig
from test_sprites import PROMPTS
from test_sprites import build as build_wan
from torch import Tensor

import tap_diffusion as tap
from tap_bench.calibration import SEED, Calibration, run
from tap_bench.counting import Counts, counted
from tap_bench.method import Setting
from tap_bench.methods import cachedit, diffusers_caches, registry
from tap_bench.models import BenchModel, draw
from tap_bench.pixels import PixelDiTPipeline
from tap_bench.variant import Variant
from tap_diffusion.core.schedule import clock_steps, even_steps, growing_steps, paper_steps
from tap_diffusion.core.timeline import TAIL
from tiny import TOKENS, WORDS, build_pipeline, interrupt_at

STEPS, BUDGET = 14, 6
PEERS = {method.name: method for module in (diffusers_caches, cachedit) for method in module.METHODS}
BY_THRESHOLD = ("diffusers-first-block", "diffusers-magcache", "cache-dit-dynamic")
ON_WAN = ("diffusers-seacache",)  # by threshold too, where pipelines tell the noise
BY_SCHEDULE = tuple(name for name in PEERS if name not in BY_THRESHOLD + ON_WAN)


def flux() -> tuple[Any, BenchModel]:
    def arguments(prompts: Any) -> dict[str, Any]:
        return {"prompt": list(prompts), "negative_prompt": [""] * len(prompts), "true_cfg_scale": 3.0,
                "height": 32, "width": 32, "max_sequence_length": TOKENS}  # fmt: skip

    pipe = build_pipeline()
    for module in pipe.transformer.modules():  # so that steps differ visibly
        if isinstance(module, torch.nn.Linear):
            module.weight.data *= 2
    return pipe, BenchModel("flux", lambda: pipe, WORDS, WORDS[:2], arguments)


def wan() -> tuple[Any, BenchModel]:
    pipe = build_wan()
    return pipe, BenchModel("wan", lambda: pipe, PROMPTS, PROMPTS, lambda prompts: {"prompt": list(prompts)})


def dit() -> tuple[Any, BenchModel]:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=1, num_layers=3, sample_size=8, num_embeds_ada_norm=10
    )
    pipe = PixelDiTPipeline(transformer.eval(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe, BenchModel("dit", lambda: pipe, [1, 2], [1, 2], lambda labels: {"class_labels": list(labels)})


def setting_of(make: Callable[[], tuple[Any, BenchModel]]) -> Setting:
    pipe, model = make()
    return Setting(pipe, STEPS, BUDGET, Calibration(pipe, model, STEPS))


@pytest.fixture(scope="module")
def on_flux() -> Setting:
    return setting_of(flux)


def variants(setting: Setting, name: str, threshold: float = 0.5) -> list[Variant]:
    """With a threshold that has not been tuned, where there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setting.calibration, "threshold", lambda *_: threshold)
        return list(PEERS[name].variants(setting))


def latents(setting: Setting, variant: Variant | None, count: int = 2) -> Tensor:
    model = setting.calibration.model
    return run(setting.pipe, model, variant, model.calibration[:count], SEED, STEPS).latents


@contextmanager
def watched(pipe: Any) -> Iterator[list[bool]]:
    """Whether each call of the transformer was full."""
    calls: list[bool] = []
    counts = Counts()

    def note(*_: Any) -> None:
        calls.append(counts.full > sum(calls))

    handle = pipe.transformer.register_forward_hook(note)
    with counted(pipe, counts):
        yield calls
    handle.remove()


def attributes(pipe: Any) -> list[Any]:
    """What there is on the pipeline, its class, and the modules of its transformer, in order."""
    modules = [(name, [*vars(module)], [*module._modules]) for name, module in pipe.transformer.named_modules()]
    return [*modules, sorted(vars(pipe)), sorted(vars(type(pipe))), type(pipe).__call__]


def test_all_are_registered() -> None:
    known = registry()
    assert all(known[name].kind == "peer" for name in PEERS)


@pytest.mark.parametrize("name", BY_SCHEDULE)
def test_runs_on_its_schedule(on_flux: Setting, name: str) -> None:
    """Exactly the steps that the settings name are full, in both branches."""
    found = variants(on_flux, name)
    assert len(found) > 1
    for variant in found:
        with watched(on_flux.pipe) as calls:
            latents(on_flux, variant)
        for branch in (calls[0::2], calls[1::2]):
            full = [step for step, is_full in enumerate(branch) if is_full]
            mask = variant.settings.get("steps_computation_mask")
            assert full == (variant.settings["full_steps"] if mask is None else [s for s in range(STEPS) if mask[s]])
            assert len(full) == BUDGET
            assert len(branch) == STEPS


def test_cache_dit_has_the_schedules_of_all(on_flux: Setting) -> None:
    masks = [variant.settings["steps_computation_mask"] for variant in variants(on_flux, "cache-dit")]
    known = on_flux.calibration.timeline
    assert known is not None
    schedules = (
        paper_steps(STEPS, BUDGET), even_steps(STEPS, BUDGET), even_steps(STEPS, BUDGET, warmup=2),
        clock_steps(known.spacing, BUDGET, TAIL), growing_steps(STEPS, BUDGET),
    )  # fmt: skip
    assert masks == [[int(step in full) for step in range(STEPS)] for full in schedules]


@pytest.mark.parametrize("name", PEERS)
def test_leaves_no_trace_and_repeats_itself(name: str) -> None:
    setting = setting_of(wan if name in ON_WAN else flux)
    setting.calibration.trajectories()  # TAP removes the empty registry of hooks that a run leaves
    plain = latents(setting, None)
    before = attributes(setting.pipe)
    variant = variants(setting, name)[-1]
    first = latents(setting, variant)
    assert not torch.equal(first, plain)
    assert attributes(setting.pipe) == before
    torch.testing.assert_close(latents(setting, None), plain, rtol=0, atol=0)
    one = latents(setting, variant, count=1)
    torch.testing.assert_close(latents(setting, variant), first, rtol=0, atol=0)
    torch.testing.assert_close(latents(setting, variant, count=1), one, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["diffusers-taylorseer-1", "diffusers-magcache", "cache-dit-taylorseer-1"])
def test_leaves_no_trace_after_an_interrupt(on_flux: Setting, name: str) -> None:
    variant = variants(on_flux, name)[-1]
    plain = latents(on_flux, None)
    before = attributes(on_flux.pipe)
    first = latents(on_flux, variant)
    model = on_flux.calibration.model
    with pytest.raises(KeyboardInterrupt), variant.applied(on_flux.pipe):
        draw(on_flux.pipe, model, WORDS[:1], 0, num_inference_steps=STEPS, callback_on_step_end=interrupt_at(7))
    assert attributes(on_flux.pipe) == before
    torch.testing.assert_close(latents(on_flux, variant), first, rtol=0, atol=0)
    torch.testing.assert_close(latents(on_flux, None), plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", BY_THRESHOLD)
def test_larger_thresholds_give_fewer_full_steps(on_flux: Setting, name: str) -> None:
    counts = []
    for threshold in (1e-6, 0.02, 0.1, 0.3, 0.9):
        counts.append([on_flux.calibration.run(variant)[1] for variant in variants(on_flux, name, threshold)])
    for of_variant in zip(*counts, strict=True):
        assert of_variant[0] == STEPS
        assert list(of_variant) == sorted(of_variant, reverse=True)
        assert of_variant[-1] < STEPS


@pytest.mark.parametrize("name", BY_THRESHOLD)
def test_thresholds_are_tuned_to_the_budget(on_flux: Setting, name: str) -> None:
    for variant in PEERS[name].variants(on_flux):
        assert abs(on_flux.calibration.run(variant)[1] - BUDGET) <= 1


def test_mag_ratios_are_those_that_diffusers_prints(on_flux: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    config = MagCacheConfig(calibrate=True, num_inference_steps=STEPS)
    latents(on_flux, Variant("", lambda pipe: diffusers_caches._cached(config, pipe)))
    printed = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")]
    assert len(printed) == 2
    expected = torch.tensor(printed).mean(0)
    found = torch.tensor(diffusers_caches.mag_ratios(on_flux.calibration.trajectories()))
    torch.testing.assert_close(found, expected)
    assert (found[1:] - 1).abs().max() > 1e-3


@pytest.mark.parametrize("budget", [6, 8, 10, 14])
def test_taylorseer_s_schedules_have_the_budget(budget: int) -> None:
    found = diffusers_caches.taylorseer_schedules(50, budget)
    assert all(len(full) == budget for full in found)
    assert min(warmup for _, warmup in found.values()) < 3 <= max(warmup for _, warmup in found.values())


@pytest.mark.parametrize("make", [wan, dit])
def test_cache_dit_takes_our_pipelines(make: Any) -> None:
    """By its adapter of the transformer's class."""
    setting = setting_of(make)
    plain = latents(setting, None)
    before = attributes(setting.pipe)
    for variant in variants(setting, "cache-dit-taylorseer-1"):
        drawn, full_steps = setting.calibration.run(variant)
        assert full_steps == BUDGET
        assert not torch.equal(drawn.latents, plain)
    assert attributes(setting.pipe) == before
    torch.testing.assert_close(latents(setting, None), plain, rtol=0, atol=0)


def test_diffusers_takes_what_it_knows() -> None:
    """It has no caches for DiT; of Wan's attention, attn1 and attn2, TaylorSeer by layers finds nothing.

    FLUX's pipeline does not tell it the noise, without which SeaCache runs every step in full.
    """
    names = [name for name in PEERS if name.startswith("diffusers-")]
    setting = setting_of(dit)
    assert not any(variants(setting, name) for name in names)
    assert not variants(setting_of(flux), "diffusers-seacache")
    setting = setting_of(wan)
    taken = {name: found for name in names if (found := variants(setting, name))}
    assert set(names) - set(taken) == {"diffusers-taylorseer-1", "diffusers-taylorseer-2"}
    plain = latents(setting, None)
    before = attributes(setting.pipe)
    for found in taken.values():
        drawn, full_steps = setting.calibration.run(found[0])
        assert full_steps < STEPS
        assert not torch.equal(drawn.latents, plain)
        assert attributes(setting.pipe) == before


def test_tap_refuses_to_work_with_cache_dit(on_flux: Setting) -> None:
    with (
        variants(on_flux, "cache-dit")[0].applied(on_flux.pipe),
        pytest.raises(ValueError, match=r"FluxTransformer2DModel: cache-dit.*cache_dit.disable_cache"),
    ):
        tap.enable(on_flux.pipe)


def test_without_cache_dit(on_flux: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    assert not any(variants(on_flux, name) for name in PEERS if name.startswith("cache-dit"))
