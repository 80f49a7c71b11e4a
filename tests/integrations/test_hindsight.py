"""Hindsight in real pipelines: what it adds to a full step, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from torch import Tensor

import tap_diffusion as tap
from tap_diffusion import ConfigError, TAPConfig
from tap_diffusion.core.doubts import Fallback
from tap_diffusion.core.engine import Engine
from tap_diffusion.integrations.depth import Depth
from tap_diffusion.integrations.diffusers.schedulers import timeline
from tap_diffusion.integrations.passes import LARGEST_MOVE, Passes, _moved
from tiny import build_pipeline, count_calls, engine_of, sample
from zoo import CASES, build, denoise

STEPS = 16


def latents_after(pipe: Any, step: int, config: TAPConfig) -> Tensor:
    """The latents that a step of a run leaves."""
    kept: dict[int, Tensor] = {}

    def keep(_: Any, i: int, t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        kept[i] = values["latents"].clone()
        return values

    with tap.enabled(pipe, config):
        sample(pipe, steps=STEPS, callback_on_step_end=keep)
    return kept[step]


@pytest.mark.parametrize(("gain", "orders"), [(1.0, (0, 1, 2)), (0.5, (1,)), (2.0, (0,))])
def test_a_full_step_moves_away_from_its_prediction(
    pipe: Any, gain: float, orders: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Euler's steps are linear in the output: the latent moves from where it had gone, away from where the prediction
    would have taken it, by the share that the timeline gives."""
    full = (0, 1, 4, 9)
    with_it = TAPConfig(full_steps=full, hindsight=gain, orders=orders)
    without = replace(with_it, hindsight=0.0)
    moved, plain = (latents_after(pipe, 4, config) for config in (with_it, without))
    before = latents_after(pipe, 3, with_it), latents_after(pipe, 3, without)
    begin = Engine.begin
    monkeypatch.setattr(Engine, "begin", lambda self, call: begin(self, call) and call.step != 4)
    foreseen = latents_after(pipe, 4, without)
    known = timeline(pipe.scheduler, 0)
    assert known is not None
    known = replace(known, full=full)
    share = gain * known.hindsight([1, 0][: with_it.anchors], 4)
    assert share > 0.1 * gain
    assert (plain - foreseen).norm() > 1e-4 * plain.norm()
    torch.testing.assert_close(moved, plain + share * (plain - foreseen), atol=1e-5, rtol=1e-4)
    assert torch.equal(*before)


def test_looking_back_is_neither_a_step_nor_a_choice(pipe: Any) -> None:
    blocks = count_calls(pipe.transformer.single_transformer_blocks[-1])
    with tap.enabled(pipe, TAPConfig(full_steps=5)):
        first = sample(pipe, steps=STEPS)
        report = tap.report(pipe)
        assert (report.steps, report.full_steps, report.fallbacks) == (STEPS, 5, {})
        assert blocks == [5]
        full = [step for step, is_full, _ in report.calls if is_full]
        chosen = [step for step in range(full[2], STEPS) if step not in full]  # before, there is one candidate
        assert [choice.step for choice in report.choices] == chosen
        assert engine_of(pipe.transformer).cache_bytes == 0
        assert torch.equal(sample(pipe, steps=STEPS), first)


def test_the_probe_runs_once_at_each_step(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full step takes that of its prediction, which is the one it would find by itself."""
    attention_input, run_in_full = Depth.attention_input, Passes._run_in_full
    probes: list[Tensor] = []

    def counted(self: Depth, arguments: dict[str, Any]) -> Tensor:
        probes.append(attention_input(self, arguments))
        return probes[-1]

    def by_itself(self: Passes, depth: Depth, calls: Any, forward: Any, _: Any) -> Any:
        return run_in_full(self, depth, calls, forward, {})

    monkeypatch.setattr(Depth, "attention_input", counted)
    with tap.enabled(pipe, TAPConfig(full_steps=5)):
        shared = sample(pipe, steps=STEPS)
        assert len(probes) == STEPS
        monkeypatch.setattr(Passes, "_run_in_full", by_itself)
        assert torch.equal(sample(pipe, steps=STEPS), shared)
        assert len(probes) > 2 * STEPS


def test_what_can_t_be_foreseen_is_not_moved(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A non-finite prediction at a full step is no reason for anything."""
    config = TAPConfig(full_steps=(0, 1, 5, 9))
    without = latents_after(pipe, 5, TAPConfig(full_steps=(0, 1, 5, 9), hindsight=0.0))
    predict = Engine.predict

    def fails(self: Engine, call: Any, *args: Any) -> Tensor:
        if call.step == 5:
            raise Fallback("non-finite values")
        return predict(self, call, *args)

    monkeypatch.setattr(Engine, "predict", fails)
    assert torch.equal(latents_after(pipe, 5, config), without)


def test_an_overflow_of_the_correction_leaves_the_output(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "hindsight", lambda self, call: 1e38 if call.step == 5 else 0.0)
    half = TAPConfig(full_steps=(0, 1, 5, 9))
    assert latents_after(pipe, 5, half).isfinite().all()


@pytest.mark.parametrize("kind", ["batch", "list"])
def test_no_sample_is_moved_by_more_than_a_share_of_its_norm(kind: str) -> None:
    torch.manual_seed(0)
    output, surprise = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    surprise[0] *= 10  # moved as far as is allowed; the others as far as they are to be
    surprise[1:] *= 0.1
    predicted = output - surprise
    if kind == "batch":
        result, label = _moved((output, "kept"), (predicted, "kept"), [2.0])
    else:
        samples, label = _moved((list(output), "kept"), (list(predicted), "kept"), [2.0])
        result = torch.stack(samples)
    assert label == "kept"
    torch.testing.assert_close(result[1:], output[1:] + 2 * surprise[1:])
    direction = surprise[0] / surprise[0].square().sum().sqrt()
    torch.testing.assert_close(result[0], output[0] + LARGEST_MOVE * output[0].square().sum().sqrt() * direction)


def test_image_to_image_plans_for_the_steps_that_run(pipe: Any) -> None:
    other = FluxImg2ImgPipeline(**pipe.components)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with tap.enabled(other, TAPConfig(full_steps=4)):
        sample(other, steps=20, image=image, strength=0.5)
        report = tap.report(other)
    assert (report.steps, report.full_steps) == (10, 4)
    assert [step for step, full, _ in report.calls if full][-1] == 8  # the last but one


def test_the_number_of_full_steps_holds_for_any_length(pipe: Any) -> None:
    with tap.enabled(pipe):
        for steps, full in ((8, 6), (20, 6), (40, 8), (50, 10)):
            sample(pipe, steps=steps)
            assert (tap.report(pipe).steps, tap.report(pipe).full_steps) == (steps, full)


def test_four_steps_are_left_alone(pipe: Any) -> None:
    plain = sample(pipe, steps=4)
    with tap.enabled(pipe), pytest.warns(tap.TAPWarning, match="of its 4 steps speedup=5 leaves none to skip"):
        assert torch.equal(sample(pipe, steps=4), plain)


class TestTransformerByItself:
    """No scheduler tells how long a trajectory is, nor its noise."""

    name = "FluxTransformer2DModel"

    def test_a_speed_up_becomes_an_interval(self) -> None:
        model = build(self.name)
        with tap.enabled(model, TAPConfig(speedup=4, orders=(1,))):
            denoise(model, CASES[self.name])
            full = [step for step, is_full, _ in tap.report(model).calls if is_full]
        assert sorted(set(full)) == [0, 1, 2, 6, 10]

    def test_a_number_of_full_steps_needs_the_number_of_steps(self) -> None:
        model = build(self.name)
        with (
            tap.enabled(model, TAPConfig(full_steps=4)),
            pytest.raises(ConfigError, match=r"enable TAP on the pipeline, or pass TAPConfig\(steps="),
        ):
            denoise(model, CASES[self.name])
        with tap.enabled(model, TAPConfig(full_steps=4, steps=12)):
            denoise(model, CASES[self.name])
            full = [step for step, is_full, _ in tap.report(model).calls if is_full]
        assert sorted(set(full)) == [0, 3, 6, 10]


def test_the_output_keeps_its_dtype() -> None:
    pipe = build_pipeline().to(torch.bfloat16)
    with tap.enabled(pipe, TAPConfig(full_steps=5)):
        assert sample(pipe, steps=STEPS).dtype == torch.bfloat16


def test_compiled(pipe: Any) -> None:
    """The same result, and nothing is compiled again after the first run."""
    with tap.enabled(pipe, TAPConfig(full_steps=5)):
        expected = sample(pipe, steps=STEPS)
    torch._dynamo.reset()
    pipe.transformer.compile(backend="eager")
    with tap.enabled(pipe, TAPConfig(full_steps=5)):
        torch._dynamo.utils.counters.clear()
        graphs = torch._dynamo.utils.counters["stats"]
        torch.testing.assert_close(sample(pipe, steps=STEPS), expected, rtol=1e-4, atol=1e-5)
        after_one = graphs["unique_graphs"]
        assert 0 < after_one < 16
        sample(pipe, steps=STEPS, seed=1)
        assert graphs["unique_graphs"] == after_one


def test_hindsight_moves_each_condition_by_its_own_share() -> None:
    output, other = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    predicted = output + 0.05 * other  # near enough that nothing is held back
    share = torch.tensor([[0.5], [0.5], [-2.0], [-2.0]])
    assert torch.allclose(_moved(output, predicted, [0.5, -2.0]), output + share * (output - predicted))
    assert torch.allclose(_moved(output, predicted, [0.5]), output + 0.5 * (output - predicted))
    predicted[3, 1] = torch.inf
    assert _moved(output, predicted, [0.5, -2.0])[3, 1] == output[3, 1]
