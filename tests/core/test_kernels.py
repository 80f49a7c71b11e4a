"""The operation of a predicted step in all its forms against float64, token by token from the definitions.

The Triton kernels run in Triton's interpreter on the CPU, and on a GPU itself where there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import Driver, call, features
from torch import Tensor

from tap_diffusion import TAPConfig, TAPWarning
from tap_diffusion.core import kernels
from tap_diffusion.core.config import Granularity, Loss
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.kernels import Prediction, eager

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter's, of NumPy

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

TORCH, TRITON = "torch", "triton" if HAS_GPU else "triton, interpreted"
ONLY_TRITON = pytest.param(TRITON, marks=needs_triton)
FORMS = [TORCH, ONLY_TRITON]
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")  # where the Triton kernels run
LOSSES: list[Loss] = ["cosine", "l2", "relative_l2"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def using(form: str) -> Iterator[None]:
    """All that is computed within a ``with`` block takes this form."""
    with mock.patch.object(kernels, "uses_triton", return_value=form != TORCH):
        yield


@dataclass(frozen=True)
class Scene:
    """The arguments of :func:`kernels.predict`."""

    x: Tensor
    h: Tensor
    differences: list[Tensor]
    residuals: list[Tensor]
    coefficients: Tensor

    def predict(self, form: str, loss: Loss = "cosine", choose: Any = "token", mend: bool = False) -> Prediction:
        of = self if form == TORCH else self.with_views(lambda t: t.to(DEVICE))
        x, h, past, residuals = of.x, of.h, of.differences, of.residuals
        with using(form):
            gram = None if loss == "l1" else kernels.gram_matrix(past)
            found = kernels.predict(x, h, past, gram, residuals, self.coefficients, loss, choose, mend)
        return Prediction(*(tensor.cpu() for tensor in found))

    def with_views(self, view: Callable[[Tensor], Tensor]) -> Scene:
        """The same values elsewhere."""
        return Scene(
            view(self.x),
            view(self.h),
            [view(d) for d in self.differences],
            [view(r) for r in self.residuals],
            self.coefficients,
        )


def scene(
    seed: int = 0, batch: int = 2, tokens: int = 3, width: int = 7, probe_width: int | None = None, anchors: int = 3,
    candidates: int = 5, dtype: torch.dtype = torch.float32,
) -> Scene:  # fmt: skip
    """A history whose differences shrink with their order, and a probe that has moved on by about the first."""
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(batch, tokens, width, generator=generator)).to(dtype)

    probe_width = probe_width or width
    differences = [draw(probe_width, 0.3**i) for i in range(anchors)]
    h = (sum(d.float() * 1.1 for d in differences[1:]) + differences[0].float() + draw(probe_width, 0.1)).to(dtype)
    coefficients = torch.randn(candidates, anchors, generator=generator, dtype=torch.float64)
    coefficients[:, 0] = 1
    return Scene(draw(width), h, differences, [draw(width, 0.3**i) for i in range(anchors)], coefficients.flip(0))


def exact_losses(of: Scene, loss: Loss) -> Tensor:
    """(K, B, N), by the definitions."""
    h = of.h.double()
    losses = []
    for row in of.coefficients:
        predicted = sum((c * d.double() for c, d in zip(row, of.differences, strict=True)), torch.zeros_like(h))
        error = (predicted - h).square().sum(-1)
        if loss == "cosine":
            norms = predicted.norm(dim=-1) * h.norm(dim=-1)
            error = torch.where(norms > 0, 1 - (predicted * h).sum(-1) / norms, 1.0)
        elif loss == "relative_l2":
            error = error / h.square().sum(-1)
        elif loss == "l1":
            error = (predicted - h).abs().sum(-1)
        losses.append(error)
    return torch.stack(losses)


def exact_prediction(of: Scene, choice: Tensor) -> Tensor:
    """x + r̂ for a choice (B, N)."""
    result = of.x.double().clone()
    for b, n in product(*map(range, choice.shape)):
        for c, residual in zip(of.coefficients[int(choice[b, n])], of.residuals, strict=True):
            result[b, n] += c * residual[b, n].double()
    return result


def tolerance(dtype: torch.dtype) -> float:
    """Relative: one step of rounding for half precision, a few for single. (The interpreter rounds towards 0.)"""
    return 5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps


def check(of: Scene, found: Prediction, loss: Loss, granularity: Granularity = "token") -> None:
    """The candidate taken is the best but for rounding, and what comes out is its prediction."""
    losses = exact_losses(of, loss)
    if granularity != "token":
        losses = losses.mean((1, 2) if granularity == "batch" else 2, keepdim=True).expand_as(losses)
    best = losses.min(0).values
    regret = losses.gather(0, found.choice.long()[None])[0] - best
    assert (regret <= 1e-5 * (1 + best)).all()
    assert found.choice.dtype == torch.uint8
    assert found.hidden_states.dtype == of.x.dtype
    precision = tolerance(of.x.dtype)
    torch.testing.assert_close(
        found.hidden_states.double(), exact_prediction(of, found.choice), rtol=precision, atol=precision
    )
    torch.testing.assert_close(found.errors.double(), exact_losses(of, "l2").amin(0), rtol=1e-4, atol=1e-4)
    assert found.doubt.dtype == torch.bool
    assert not found.doubt


# ---------------------------------------------------------------------------------------------------- against float64


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)),
    anchors=st.integers(1, 8),
    candidates=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    loss=st.sampled_from(LOSSES),
    granularity=st.sampled_from(["token", "sample", "batch"]),
)
def test_the_best_candidate_is_taken_and_its_prediction_comes_out(
    form: str,
    seed: int,
    shape: tuple[int, int, int, int],
    anchors: int,
    candidates: int,
    dtype: torch.dtype,
    loss: Loss,
    granularity: Granularity,
) -> None:
    of = scene(seed, *shape, anchors, candidates, dtype)
    check(of, of.predict(form, loss, granularity), loss, granularity)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape",
    [
        dict(batch=1, tokens=1, width=1),
        dict(batch=1, tokens=1, width=8192, anchors=8, candidates=255),
        dict(tokens=1, width=1152, probe_width=640, anchors=2, candidates=2),
        dict(batch=3, tokens=1, width=65, anchors=1, candidates=3),
    ],
)
def test_extreme_shapes(form: str, shape: dict[str, int]) -> None:
    for dtype in DTYPES:
        of = scene(**shape, dtype=dtype)
        check(of, of.predict(form), "cosine")


@pytest.mark.parametrize("form", FORMS)
def test_dtypes_may_differ(form: str) -> None:
    """A cache in float32 or bfloat16 whatever the model computes in."""
    of = scene(dtype=torch.bfloat16)
    of = replace(of, h=of.h.half(), differences=[d.float() for d in of.differences[:1]] + of.differences[1:])
    check(of, of.predict(form), "cosine")
    of = replace(of, residuals=[d.float() for d in of.residuals])
    check(of, of.predict(form, "l2", "sample"), "l2", "sample")


@pytest.mark.parametrize("form", FORMS)
def test_l1_and_a_choice_of_ones_own(form: str) -> None:
    of = scene(candidates=4)
    check(of, of.predict(form, "l1"), "l1")
    given: list[Tensor] = []

    def worst(losses: Tensor) -> Tensor:
        given.append(losses.cpu())
        return losses.argmax(0)

    losses: tuple[Loss, ...] = ("cosine", "l1")
    for loss in losses:
        found, exact = of.predict(form, loss, worst), exact_losses(of, loss)
        torch.testing.assert_close(given.pop().double(), exact, rtol=1e-4, atol=1e-6)
        assert torch.equal(found.choice.long(), exact.argmax(0))
        torch.testing.assert_close(found.hidden_states.double(), exact_prediction(of, found.choice))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_matrix(form: str, dtype: torch.dtype) -> None:
    differences = scene(width=33, anchors=4, dtype=dtype).differences
    with using(form):
        gram = kernels.gram_matrix([d if form == TORCH else d.to(DEVICE) for d in differences])
    exact = torch.einsum("ibnd,jbnd->bnij", *2 * [torch.stack(differences).double()])
    torch.testing.assert_close(gram.cpu().double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", [*LOSSES, "l1"])
@pytest.mark.parametrize("form", FORMS)
def test_errors_alone(form: str, loss: Loss) -> None:
    of = scene(width=33, candidates=4)
    there = of if form == TORCH else of.with_views(lambda t: t.to(DEVICE))
    with using(form):
        gram = None if loss == "l1" else kernels.gram_matrix(there.differences)
        errors = kernels.errors(there.h, there.differences, gram, of.coefficients, loss)
    torch.testing.assert_close(errors.cpu(), of.predict(form, loss).errors, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_one_candidate_needs_no_probe(form: str) -> None:
    of = scene(candidates=1)
    there = of if form == TORCH else of.with_views(lambda t: t.to(DEVICE))
    with using(form):
        result, doubt = kernels.combine(there.x, there.residuals, of.coefficients)
    torch.testing.assert_close(result.cpu().double(), exact_prediction(of, torch.zeros(2, 3)))
    assert not doubt


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", FORMS)
def test_precision_is_kept_where_changes_are_small(form: str, loss: Loss) -> None:
    """Features of norm 100 whose changes are a ten-thousandth of that: 1 - cos taken naively would drown."""
    of = scene(width=64, candidates=3)
    of = replace(
        of,
        differences=[100 * of.differences[0] / 8, *(1e-2 * d for d in of.differences[1:])],
        coefficients=torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.float64),
    )
    of = replace(of, h=of.differences[0] + 1.1 * of.differences[1] + 0.9 * of.differences[2])
    found = of.predict(form, loss)
    assert torch.equal(found.choice.long(), exact_losses(of, loss).argmin(0))


# ------------------------------------------------------------------------------------------------------------- strides


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "features first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every other feature": lambda t: t.repeat_interleave(2, dim=2)[..., ::2],
    "behind text": lambda t: torch.cat([torch.full_like(t, torch.nan), t], dim=1)[:, t.shape[1] :],
    "off the alignment": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("form", FORMS)
def test_views_give_what_copies_give(form: str, view: str, granularity: Granularity) -> None:
    of = scene(width=16)
    copies, views = of.predict(form, "l2", granularity), of.with_views(VIEWS[view]).predict(form, "l2", granularity)
    assert torch.equal(copies.choice, views.choice)
    torch.testing.assert_close(copies.hidden_states, views.hidden_states, rtol=1e-6, atol=1e-6)
    check(of, views, "l2", granularity)


@pytest.mark.parametrize("form", FORMS)
def test_one_sample_for_all(form: str) -> None:
    of = scene(batch=1).with_views(lambda t: t.expand(2, -1, -1))
    check(of, of.predict(form), "cosine")


# --------------------------------------------------------------------------------------- ties, zeros, non-finite values


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", FORMS)
def test_ties_go_to_the_first(form: str, loss: Loss) -> None:
    of = scene(candidates=6)
    stands_still = replace(of, differences=[of.differences[0], *(torch.zeros_like(d) for d in of.differences[1:])])
    assert not stands_still.predict(form, loss).choice.any()
    twice = replace(of, coefficients=of.coefficients.repeat(2, 1))
    assert torch.equal(twice.predict(form, loss).choice, of.predict(form, loss).choice)


@pytest.mark.parametrize("form", FORMS)
def test_vanishing_features_divide_nothing_by_zero(form: str) -> None:
    of = scene(candidates=2)
    zeros = [torch.zeros_like(d) for d in of.differences]
    seen: list[Tensor] = []

    def look(losses: Tensor) -> Tensor:
        seen.append(losses.cpu())
        return losses.argmin(0)

    for changed in (replace(of, differences=zeros), replace(of, h=torch.zeros_like(of.h))):
        changed.predict(form, "cosine", look)
        assert torch.equal(seen.pop(), torch.ones(2, 2, 3))
        for loss in LOSSES:
            found = changed.predict(form, loss)
            assert not found.doubt
            assert found.hidden_states.isfinite().all()
    replace(of, differences=zeros, h=torch.zeros_like(of.h)).predict(form, "relative_l2", look)
    assert not seen.pop().any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", FORMS)
def test_nan_never_wins(form: str, loss: Loss) -> None:
    """Of a candidate, not of the features. An infinite loss is worse than any other and better than NaN."""
    of = scene(candidates=3)
    nan, fine, huge = [torch.nan] * 3, [1.0, 0.5, 0.0], [1e30, 0.0, 0.0]
    for rows, winner in (([nan, fine, huge], 1), ([fine, nan, huge], 0), ([nan, nan, fine], 2), ([huge, nan, fine], 2)):
        choice = replace(of, coefficients=torch.tensor(rows, dtype=torch.float64)).predict(form, loss).choice
        assert (choice == winner).all()
    if loss != "cosine":  # whose norms overflow to a distance of 1 in the reference, too
        coefficients = torch.tensor([nan, huge], dtype=torch.float64)
        assert (replace(of, coefficients=coefficients).predict(form, loss).choice == 1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("granularity", ["token", "sample"])
@pytest.mark.parametrize("form", FORMS)
def test_a_bad_probe_raises_doubt_and_spoils_no_other_token(form: str, granularity: Granularity, value: float) -> None:
    of = scene()
    h = of.h.clone()
    h[1, 2, 3] = value
    clean, bad = of.predict(form, "l2", granularity), replace(of, h=h).predict(form, "l2", granularity)
    assert bad.doubt
    assert bad.hidden_states.isfinite().all()
    spoiled = (slice(1, 2), slice(2, 3)) if granularity == "token" else (slice(1, 2),)
    for one, other in ((clean.choice, bad.choice), (clean.hidden_states, bad.hidden_states)):
        same = one == other
        same[spoiled] = True
        assert same.all()


@pytest.mark.parametrize("form", FORMS)
def test_l1_notices_a_bad_probe(form: str) -> None:
    of = scene()
    of.h[0, 0, 0] = torch.inf
    assert of.predict(form, "l1").doubt


@pytest.mark.parametrize("granularity", ["token", "batch"])
@pytest.mark.parametrize("form", FORMS)
def test_the_newest_residual_mends_what_is_not_finite(form: str, granularity: Granularity) -> None:
    of = scene()
    residuals = [r.clone() for r in of.residuals]
    residuals[1][0, 1, 2], residuals[2][1, 0, 4] = torch.nan, torch.inf
    clean = of.predict(form, "l2", granularity).hidden_states
    spoiled = torch.zeros_like(of.x, dtype=torch.bool)
    spoiled[0, 1, 2] = spoiled[1, 0, 4] = True
    for mend in (False, True):
        found = replace(of, residuals=residuals).predict(form, "l2", granularity, mend)
        assert found.doubt
        assert torch.equal(found.hidden_states[~spoiled], clean[~spoiled])
        if mend:
            assert torch.equal(found.hidden_states[spoiled], (of.x + of.residuals[0])[spoiled])
        else:
            assert not found.hidden_states[spoiled].isfinite().any()


@pytest.mark.parametrize("form", FORMS)
def test_an_overflow_of_half_precision_is_noticed_and_mended(form: str) -> None:
    of = scene(dtype=torch.float16, candidates=2)
    big = torch.full_like(of.x, 3e4)
    of = replace(of, x=big, residuals=[big, big, big], coefficients=torch.ones(2, 3, dtype=torch.float64))
    assert of.predict(form).hidden_states.isinf().all()
    found = of.predict(form, mend=True)
    assert found.doubt
    assert torch.equal(found.hidden_states, big + big)


# ------------------------------------------------------------------------------------------------- forms and the engine


def test_chunks_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for loss, granularity in product(LOSSES, ("token", "sample")):
        of = scene(tokens=11)
        monkeypatch.setattr(eager, "CHUNK", 2**18)
        whole = of.predict(TORCH, loss, granularity)
        for chunk in (1, 30, 100):
            monkeypatch.setattr(eager, "CHUNK", chunk)
            assert all(
                torch.equal(one, other) for one, other in zip(whole, of.predict(TORCH, loss, granularity), strict=True)
            )


def test_gradients_do_not_stand_in_the_way() -> None:
    of = scene()
    x = of.x.clone().requires_grad_()
    replace(of, x=x).predict(TORCH).hidden_states.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("form", [ONLY_TRITON])
@pytest.mark.parametrize(
    "changes",
    [{}, {"granularity": "batch", "loss": "relative_l2"}, {"orders": (1,), "horizon_span": 0.0}, {"loss": "l1"}],
)
def test_the_engine_predicts_the_same_in_both_forms(form: str, changes: dict[str, Any]) -> None:
    config = TAPConfig.paper(interval=4, **{"loss": "l2", **changes})
    with using(TORCH):
        plain = Driver(config).run(8)
    with using(form):
        fused = Driver(config).run(8)
    assert plain.full == fused.full
    assert len(plain.outputs) == 4
    for step, output in plain.outputs.items():
        torch.testing.assert_close(fused.outputs[step], output, rtol=1e-5, atol=1e-5)
    for one, other in zip(plain.engine.report.choices, fused.engine.report.choices, strict=True):
        assert torch.equal(one.index, other.index)


@pytest.mark.parametrize("form", [ONLY_TRITON])
def test_late_checks_reuse_at_once_and_run_the_next_step_in_full(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "checks_late", staticmethod(lambda _: True))
    bad = features(4).clone()
    bad[1, 2, 0] = torch.nan
    with using(form):
        driver = Driver().run(8, probe={4: bad})
    assert driver.full == [0, 1, 2, 5, 6]
    assert driver.outputs[4].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_an_engine_that_chooses_in_its_own_way_sees_the_losses(form: str) -> None:
    shapes: list[tuple[int, ...]] = []

    class Last(Engine):
        def _choose(self, losses: Tensor) -> Tensor:
            shapes.append(tuple(losses.shape))
            return torch.full(losses.shape[1:], len(losses) - 1)

    engine = Last(TAPConfig.paper(interval=4))
    with using(form):
        for step in range(4):
            if engine.begin(call(step)):
                engine.record(call(step), torch.zeros(2, 4, 3), features(step), features(step))
            else:
                found = engine.predict(call(step), torch.zeros(2, 4, 3), lambda: features(3))
            engine.end(call(step), step < 3, lambda: 0.0)
    assert shapes == [(11, 2, 4)]
    assert (engine.report.choices[0].index == 10).all()
    slope, curve = features(2) - features(1), features(2) - 2 * features(1) + features(0)
    torch.testing.assert_close(found, features(2) - 3 * slope + 4.5 * curve)  # order 2 at the horizon k - 4 = -3


# ------------------------------------------------------------------------------------------------------------ dispatch


def test_what_triton_does_not_take_is_left_to_torch() -> None:
    of = scene()
    assert kernels._form(of.differences, of.h) is eager  # not on a GPU
    with mock.patch.object(kernels, "runs_triton", return_value=True):
        on_gpu = mock.Mock(is_cuda=True, dtype=torch.bfloat16)
        assert kernels.uses_triton(on_gpu)
        assert not kernels.uses_triton(mock.Mock(is_cuda=True, dtype=torch.float64))
    with using(TRITON):
        assert kernels._form([of.h] * 9) is eager


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_kernels_that_fail_are_left_alone_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = kernels.runs_triton.__wrapped__
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    assert not runs(torch.device("cuda"))
    monkeypatch.setattr(kernels, "find_spec", lambda _: "there")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not runs(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.warns(TAPWarning, match="predicts in plain PyTorch, since its Triton kernels fail on cuda"):
        assert not runs(torch.device("cuda"))


@needs_triton
@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_kernels_that_predict_something_else_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    runs = kernels.runs_triton.__wrapped__
    assert runs(torch.device("cpu"))
    fused = kernels._fused()
    predict = fused.predict_by_token

    def slightly_wrong(*args: Any) -> Any:
        result, *others = predict(*args)
        result[0, 2, 5] *= 1.01
        return result, *others

    monkeypatch.setattr(fused, "predict_by_token", slightly_wrong)
    with pytest.warns(TAPWarning, match="they predict something else than PyTorch"):
        assert not runs(torch.device("cpu"))


COMPILES = """
import sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[1]), 32)
    get_current_device = get_current_stream = lambda self, *_: 0

driver.set_active(Driver())
from tap_diffusion.core.kernels import fused

for name in ("_predict_kernel", "_losses_kernel", "_combine_kernel", "_gram_kernel"):
    kernel = getattr(fused, name)
    def run(*args, kernel=kernel, run=kernel.run, warmup, **options):
        code = run(*args, warmup=True, **options)
        assert ".local" not in code.asm["ptx"]
        print(code.metadata.name, "ld.global.v4" in code.asm["ptx"])
    kernel.run = run
for dtype, H, K, loss in ((torch.bfloat16, 3, 3, "cosine"), (torch.float32, 8, 255, "relative_l2")):
    x = torch.zeros(2, 16, 1152, dtype=dtype)
    gram, coefficients = torch.zeros(2, 16, H, H), torch.zeros(K, H, dtype=torch.float64)
    fused.predict_by_token(x, x, [x] * H, gram, [x] * H, coefficients, loss, True)
    fused.proxy_losses(x, [x] * H, gram, coefficients, loss)
    fused.combine(x, [x] * H, coefficients, torch.zeros(2, 1, dtype=torch.int64).expand(2, 16), False)
    fused.combine(x.transpose(1, 2), [x.transpose(1, 2)] * H, coefficients, None, True)
    fused.gram_matrix([x] * H)
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_kernels_compile_for_gpus_without_one(capability: str, tmp_path: Path) -> None:
    """The interpreter takes much that the compiler doesn't. No register spills, and whole vectors are loaded."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILES, capability], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    contiguous, transposed = "_combine_kernel True", "_combine_kernel False"
    once = ["_predict_kernel True", "_losses_kernel True", contiguous, transposed, "_gram_kernel True"]
    assert done.stdout.splitlines() == 2 * once


# ------------------------------------------------------------------------------------------------------------ on a GPU


@needs_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("choose", ["token", "sample", "batch"])
def test_nothing_waits_for_a_gpu(form: str, choose: Granularity) -> None:
    of = scene(width=1152).with_views(lambda t: t.to(DEVICE))
    x, h, past, residuals = of.x, of.h, of.differences, of.residuals
    with using(form):
        for mode in ("default", "error"):  # the first time kernels are compiled
            torch.cuda.set_sync_debug_mode(mode)
            try:
                gram = kernels.gram_matrix(past)
                kernels.predict(x, h, past, gram, residuals, of.coefficients, "cosine", choose, mend=True)
                kernels.combine(x, residuals, of.coefficients, mend=True)
            finally:
                torch.cuda.set_sync_debug_mode("default")
