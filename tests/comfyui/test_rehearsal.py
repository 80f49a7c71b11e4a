"""What a rehearsal says of a sampler is what a real run of it does."""

from __future__ import annotations

from typing import Any

import pytest
import real  # noqa: F401 - finds ComfyUI

# isort: split
import comfy.model_sampling as model_sampling
import torch
from comfy import samplers
from comfy.patcher_extension import WrappersMP
from runs import sample_with
from tiny_comfy import build
from torch import Tensor

from tap_diffusion.integrations.comfyui.rehearsal import NotPlannedError, Rehearsal, rehearse, step_at

STEPS = 8
OWN_STEPS = "dpm_adaptive"
NAMES = [name for name in samplers.SAMPLER_NAMES if name != OWN_STEPS]
EULER = {"euler", "ddim"}  # ddim is Euler's, by another name
FRESH = {  # noise of their own is what makes these what they are
    "euler_ancestral", "euler_ancestral_cfg_pp", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu",
    "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp",
    "er_sde", "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece",
}  # fmt: skip


@pytest.fixture(scope="module")
def flux() -> Any:
    return build("Flux")


class Flow(model_sampling.ModelSamplingDiscreteFlow, model_sampling.CONST):
    """As ComfyUI puts it together for SD3."""


class Noise(model_sampling.ModelSamplingDiscrete, model_sampling.EPS):
    """As for PixArt."""


def rehearsed(name: str, sampling: Any) -> tuple[Rehearsal, Tensor]:
    sigmas = samplers.calculate_sigmas(sampling, "simple", STEPS)
    found = rehearse(samplers.sampler_object(name), sigmas, sampling)
    assert found is not None
    return found, sigmas


@pytest.mark.parametrize("name", NAMES)
def test_the_real_run_evaluates_the_model_where_the_rehearsal_did(flux: Any, name: str) -> None:
    sampling = flux.get_model_object("model_sampling")
    found, sigmas = rehearsed(name, sampling)
    evaluated: list[float] = []

    def note(executor: Any, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Any:
        evaluated.append(float(sigma.max()))
        return executor(x, sigma, *args, **kwargs)

    watched = flux.clone()
    watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "note", note)
    with torch.inference_mode():
        sample_with(watched, "Flux", name, sigmas)
    assert found.evaluations == pytest.approx(evaluated, rel=1e-5)


@pytest.mark.parametrize("sampling", [Flow, Noise])
@pytest.mark.parametrize("name", NAMES)
def test_fresh_noise_and_steps_of_euler(name: str, sampling: Any) -> None:
    found, sigmas = rehearsed(name, sampling())
    assert found.fresh_noise == (name in FRESH)
    assert (found.kept < 1) == found.fresh_noise
    assert found.is_euler == (name in EULER)
    if name != "dpm_fast":
        assert found.levels == pytest.approx(sigmas[:-1].tolist())
    steps = [step_at(found.levels, sigma) for sigma in found.evaluations]
    assert set(steps) == set(range(len(found.levels)))


def test_noise_that_is_kept() -> None:
    """LCM's latents are noised anew at each step; ancestral steps in part, by their eta."""
    assert rehearsed("lcm", Flow())[0].kept < 0.1
    kept = []
    for eta in (0.2, 0.6, 1.0):
        sampler = samplers.ksampler("euler_ancestral", {"eta": eta})
        found = rehearse(sampler, samplers.calculate_sigmas(Flow(), "simple", STEPS), Flow())
        assert found is not None
        kept.append(found.kept)
    assert 1 > kept[0] > kept[1] > kept[2] > 0.5


@pytest.mark.parametrize("churn", [0.0, 5.0])
def test_what_a_sampler_is_set_to_counts(churn: float) -> None:
    sampler = samplers.ksampler("euler", {"s_churn": churn})
    found = rehearse(sampler, samplers.calculate_sigmas(Flow(), "simple", STEPS), Flow())
    assert found is not None
    assert (found.is_euler, found.fresh_noise) == (churn == 0, churn > 0)


def test_a_sampler_that_looks_at_what_the_model_says() -> None:
    with pytest.raises(NotPlannedError, match="other noise levels"):
        rehearsed(OWN_STEPS, Flow())


def test_a_sampler_that_fails_or_never_ends_is_not_known() -> None:
    def fails(model: Any, x: Tensor, sigmas: Tensor, **_: Any) -> Tensor:
        return model.inner_model.what_only_a_real_model_has(x)

    def goes_on(model: Any, x: Tensor, sigmas: Tensor, **_: Any) -> Tensor:
        while True:
            x = model(x, sigmas[:1])

    for function in (fails, goes_on, None):
        assert rehearse(samplers.KSAMPLER(function), torch.linspace(1, 0, 9), Flow()) is None


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "euler"])
def test_random_states_stay_as_they_are(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    rehearsed(name, Flow())
    assert torch.equal(torch.get_rng_state(), before)
