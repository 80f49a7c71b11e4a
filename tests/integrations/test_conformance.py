"""Every supported class keeps the promises (shared suite), and the suite notices where one would not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

import tap_diffusion as tap
from tap_diffusion.core.engine import Engine
from tap_diffusion.integrations.depth import Depth, Guise
from tap_diffusion.integrations.diffusers.tracking import StepTracker
from tap_diffusion.integrations.passes import Passes
from tap_diffusion.integrations.specs import SPECS
from zoo import CASES, checks, class_of

Fault = Callable[[pytest.MonkeyPatch], None]

CHECKS = [function for name, function in vars(checks).items() if name.startswith("check_")]


def test_every_supported_class_has_a_case() -> None:
    assert {class_of(name) for name in CASES} == set(SPECS)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", sorted(CASES))
def test_conformance(name: str, check: checks.Check) -> None:
    check(name)


def test_a_stream_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "Kandinsky6Transformer3DModel"
    case = CASES[name]
    sound = case.shape(1)[0] - 64
    silent = dataclasses.replace(
        case,
        inputs=lambda *given: {**case.inputs(*given), "audio_hidden_states": None},
        velocity=lambda output, z: torch.cat([z[:, :sound], output[0].flatten(1, 3)], dim=1),
    )
    monkeypatch.setitem(CASES, name, silent)
    checks.check_same_input(name)
    checks.check_branches(name)


def _residual_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Engine.record
    monkeypatch.setattr(Engine, "record", lambda self, call, x, y, *more: record(self, call, x, 2 * y - x, *more))


def _residual_of_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Engine.record
    monkeypatch.setattr(
        Engine, "record", lambda self, call, x, y, *more: record(self, call, x, x + (y - x).roll(1, dims=1), *more)
    )


def _one_branch_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    locate = StepTracker.locate
    monkeypatch.setattr(StepTracker, "locate", lambda *a, **k: dataclasses.replace(locate(*a, **k), branch="#0"))


def _anchors_not_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "reset", lambda self: None)


def _hooks_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Depth, "detach", lambda self: None)


def _full_steps_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Passes, "_run_in_full", torch.no_grad()(Passes._run_in_full))


def _latents_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FluxTransformer2DModel", "WanTransformer3DModel"):
        monkeypatch.setitem(SPECS, name, dataclasses.replace(SPECS[name], unread=("x_embedder", "patch_embedding")))


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (_residual_twice, checks.check_same_input),
        (_residual_twice, checks.check_recomputation),
        (_residual_of_another_place, checks.check_recomputation),
        (_one_branch_for_all, checks.check_branches),
        (_anchors_not_reset, checks.check_repeatable),
        (_hooks_left_behind, checks.check_off),
        (_full_steps_without_gradients, checks.check_full_step),
        (_latents_embedded_once, checks.check_unread),
    ],
)
def test_the_suite_notices(name: str, fault: Fault, check: checks.Check, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises((AssertionError, AttributeError, ValueError, tap.TAPWarning)):
        check(name)


def test_the_suite_notices_a_head_that_no_scale_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guise, "named_modules", lambda self, *_, **__: iter([("", self)]))
    with pytest.raises(AssertionError, match="relative error"):
        checks.check_full_step("FluxTransformer2DModel")
