"""Solvers that add fresh noise at each step: what TAP does about it, and that it is no worse than plain reuse."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from torch import Tensor

import tap_diffusion as tap
from tap_diffusion import TAPConfig, TAPWarning
from tap_diffusion.apps.generate import load_pipeline
from tap_diffusion.core.timeline import Timeline
from tiny import sample

NOISE = tuple(20.0 / 2**i for i in range(12))


def stochastic(pipe: Any, **config: Any) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipe.scheduler.config, stochastic_sampling=True, **config
    )


def run(pipe: Any, config: TAPConfig) -> tuple[Tensor, list[str]]:
    """The output, and what TAP warned of."""
    with tap.enabled(pipe, config), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.manual_seed(0)  # pipelines of flows pass no generator to their solver
        result = sample(pipe, steps=16)
    return result, [str(warning.message) for warning in said if warning.category is TAPWarning]


def test_a_flow_with_fresh_noise_is_reused_and_says_so(pipe: Any) -> None:
    stochastic(pipe)
    drawn, said = run(pipe, TAPConfig(full_steps=5))
    assert said == [
        "FlowMatchEulerDiscreteScheduler adds fresh noise at each step, so TAP reuses the residual of the last full"
        " step instead of extrapolating it. A deterministic solver comes closer to what the plain model draws, in the"
        " same time."
    ]
    reused, said = run(pipe, TAPConfig(full_steps=5, orders=(0,), hindsight=0.0))
    assert said == []  # as asked for
    assert torch.equal(drawn, reused)
    extrapolated, said = run(pipe, TAPConfig(full_steps=5, slopes=1.0, hindsight=0.0))
    assert said == []
    assert not torch.allclose(drawn, extrapolated, atol=1e-4)


def test_each_run_says_so_once(pipe: Any) -> None:
    stochastic(pipe)
    with tap.enabled(pipe, TAPConfig(full_steps=5)):
        for _ in range(2):
            with pytest.warns(TAPWarning, match="adds fresh noise") as said:
                sample(pipe, steps=16)
            assert len(said.list) == 1


def test_a_deterministic_solver_and_the_plain_model_hear_nothing(pipe: Any) -> None:
    assert run(pipe, TAPConfig(full_steps=5))[1] == []
    stochastic(pipe)
    assert run(pipe, TAPConfig(interval=1))[1] == []
    assert run(pipe, TAPConfig.paper(interval=4))[1] == []  # which says itself what it does


@pytest.mark.parametrize(
    ("prediction", "kept", "reuses"),
    [("flow", 0.9, True), ("v_prediction", 0.9, True), ("sample", 0.9, True), ("epsilon", 0.9, False),
     ("epsilon", 0.1, True)],
)  # fmt: skip
def test_who_reuses(prediction: Any, kept: float, reuses: bool) -> None:
    assert Timeline(NOISE, prediction, fresh_noise="Some", kept=kept).reuses == reuses
    assert not Timeline(NOISE, prediction).reuses


def test_fresh_noise_leaves_no_hindsight() -> None:
    assert Timeline(NOISE, "flow").hindsight([3, 0], 7) > 0
    assert Timeline(NOISE, "flow", fresh_noise="Some").hindsight([3, 0], 7) == 0


def quality(pipe: Any, configs: dict[str, TAPConfig], **arguments: Any) -> dict[str, float]:
    """PSNR to the plain pipeline, dB, the random numbers being the same."""

    def draw() -> Tensor:
        torch.manual_seed(7)
        result: Tensor = pipe(
            generator=torch.Generator().manual_seed(7), num_inference_steps=50, output_type="latent", **arguments
        ).images
        return result.double()

    pipe.set_progress_bar_config(disable=True)
    full, found = draw(), {}
    for name, config in configs.items():
        with tap.enabled(pipe, config), warnings.catch_warnings():
            warnings.simplefilter("ignore", TAPWarning)
            found[name] = float(10 * (4 / (draw() - full).square().flatten(1).mean(1)).log10().mean())
    print(found)
    return found


CONFIGS = {
    "default": TAPConfig(full_steps=8),
    "reuse": TAPConfig(full_steps=8, orders=(0,), hindsight=0.0),
    "extrapolated": TAPConfig(full_steps=8, slopes=1.0, hindsight=0.0),
}


@pytest.mark.slow
def test_the_default_is_not_behind_reuse_on_a_flow() -> None:
    pipe: Any = load_pipeline("emoji", torch.float32, "cpu")
    stochastic(pipe)
    prompts = ["watermelon", "elephant", "hamburger", "crown", "octopus", "pizza", "violin", "green apple"]
    found = quality(pipe, CONFIGS, prompt=prompts, negative_prompt=[""] * 8, true_cfg_scale=2.0, height=32, width=32)
    assert found["default"] == found["reuse"] > found["extrapolated"] + 3


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "gain"), [(DDPMScheduler, 3.0), (LCMScheduler, 0.0)])
def test_the_default_is_not_behind_reuse_where_noise_is_predicted(kind: Any, gain: float) -> None:
    """Where most of the noise is kept it is ahead, by extrapolation; where none is (LCM), it is reuse."""
    pipe: Any = load_pipeline("fashion", torch.float32, "cpu")
    config = {"original_inference_steps": 1000} if kind is LCMScheduler else {}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **config)
    found = quality(pipe, CONFIGS, class_labels=list(range(10)))
    assert found["default"] >= found["reuse"] + gain
    assert found["default"] >= found["extrapolated"]
