"""Losses, argmin and combination against loops over single tokens in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tap_diffusion.core.config import Granularity, Loss
from tap_diffusion.core.predictors import candidates, difference_matrix
from tap_diffusion.core.selection import (
    choose,
    combine_chosen,
    gram_matrix,
    proxy_losses,
    proxy_losses_onepass,
)

LOSSES: list[Loss] = ["cosine", "l2", "relative_l2", "l1"]
ONEPASS: list[Loss] = ["cosine", "l2", "relative_l2"]
TIMES = [10.0, 2.0, 1.0]


def distance(predicted: Tensor, actual: Tensor, loss: Loss) -> float:
    """Of two vectors, by the textbook."""
    if loss == "cosine":
        norms = float(predicted.norm() * actual.norm())
        return 1 - float(predicted @ actual) / norms if norms else 1.0
    if loss == "l1":
        return float((predicted - actual).abs().sum())
    squared = float((predicted - actual).square().sum())
    return squared / float(actual.square().sum()) if loss == "relative_l2" else squared


def brute_force(anchors: Sequence[Tensor], weights: Tensor, h: Tensor, loss: Loss) -> Tensor:
    """Losses (K, B, N): every candidate evaluated for every token from the raw anchors."""
    result = torch.empty(len(weights), *h.shape[:2], dtype=torch.float64)
    for k, b, n in itertools.product(*map(range, result.shape)):
        predicted = sum((w * a[b, n] for w, a in zip(weights[k], anchors, strict=True)), torch.zeros_like(h[b, n]))
        result[k, b, n] = distance(predicted, h[b, n], loss)
    return result


def scene(seed: int, batch: int = 2, tokens: int = 5, width: int = 7) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Anchors of a smooth trajectory, their differences, and the features at the next step; float64."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64) for _ in range(4)]

    def at(t: float) -> Tensor:
        return parts[0] + 0.1 * t * parts[1] + 0.02 * t * t * parts[2] + 0.1 * torch.sin(t * parts[3])

    anchors = [at(t) for t in TIMES]
    matrix = torch.from_numpy(difference_matrix(TIMES))
    return anchors, list(torch.einsum("ij,jbnd->ibnd", matrix, torch.stack(anchors))), at(15.0)


def coefficients_and_weights(span: float = 4.0) -> tuple[Tensor, Tensor]:
    _, rows = candidates("taylor", (0, 1, 2), span, 1, TIMES, 15.0)
    weights = torch.from_numpy(rows)
    return weights @ torch.from_numpy(difference_matrix(TIMES)).inverse(), weights


@pytest.mark.parametrize("loss", LOSSES)
@given(seed=st.integers(0, 2**31))
def test_reference_equals_brute_force(loss: Loss, seed: int) -> None:
    anchors, differences, h = scene(seed)
    coefficients, weights = coefficients_and_weights()
    expected = brute_force(anchors, weights, h, loss)
    torch.testing.assert_close(proxy_losses(h, differences, coefficients, loss), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ONEPASS)
@given(seed=st.integers(0, 2**31))
def test_one_pass_equals_reference(loss: Loss, seed: int) -> None:
    _, differences, h = scene(seed)
    coefficients, _ = coefficients_and_weights()
    untouched = coefficients.clone()
    actual = proxy_losses_onepass(h, differences, gram_matrix(differences), coefficients, loss)
    torch.testing.assert_close(actual, proxy_losses(h, differences, coefficients, loss), rtol=1e-8, atol=1e-12)
    assert torch.equal(coefficients, untouched)


@pytest.mark.parametrize("loss", ONEPASS)
def test_one_pass_takes_weights_that_do_not_sum_to_one(loss: Loss) -> None:
    _, differences, h = scene(3)
    coefficients = torch.tensor([[0.7, 0.1, -0.2], [1.3, 0.0, 0.4]], dtype=torch.float64)
    actual = proxy_losses_onepass(h, differences, gram_matrix(differences), coefficients, loss)
    torch.testing.assert_close(actual, proxy_losses(h, differences, coefficients, loss), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ONEPASS)
def test_one_pass_keeps_precision_where_changes_are_small(loss: Loss) -> None:
    # Features of norm 100 whose changes from anchor to anchor are a ten-thousandth of that, in float32.
    anchors, _, h = scene(5, width=64)
    base = 100 * anchors[0] / anchors[0].norm(dim=-1, keepdim=True)
    anchors, h = [base + 1e-2 * a for a in anchors], base + 1e-2 * h
    matrix = torch.from_numpy(difference_matrix(TIMES))
    differences = [d.float() for d in torch.einsum("ij,jbnd->ibnd", matrix, torch.stack(anchors))]
    coefficients, weights = coefficients_and_weights()
    exact = brute_force(anchors, weights, h, loss)
    actual = proxy_losses_onepass(h.float(), differences, gram_matrix(differences), coefficients, loss).double()
    # 1 - cos computed naively in float32 would be off by more than the loss itself.
    torch.testing.assert_close(actual, exact, rtol=2e-2, atol=0)
    assert (choose(actual, "token") == choose(exact, "token")).float().mean() == 1


@pytest.mark.parametrize("loss", ONEPASS)
def test_autocast_rounds_nothing(loss: Loss) -> None:
    anchors, differences, h = scene(11)
    coefficients, weights = coefficients_and_weights()
    single = [d.float() for d in differences]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = proxy_losses_onepass(h.float(), single, gram_matrix(single), coefficients, loss)
    torch.testing.assert_close(actual.double(), brute_force(anchors, weights, h, loss), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ONEPASS)
@pytest.mark.parametrize("form", ["reference", "one pass"])
def test_vanishing_features_give_no_nan(loss: Loss, form: str) -> None:
    differences = [torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)]
    h = torch.stack([torch.zeros(4), torch.ones(4)]).unsqueeze(0)
    coefficients = torch.tensor([[1.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    if form == "reference":
        losses = proxy_losses(h, differences, coefficients, loss)
    else:
        losses = proxy_losses_onepass(h, differences, gram_matrix(differences), coefficients, loss)
    assert losses.isfinite().all()
    if loss == "cosine":
        assert torch.equal(losses, torch.ones(2, 1, 2))


@pytest.mark.parametrize("loss", ONEPASS)
def test_ties_go_to_the_first_in_both_forms(loss: Loss) -> None:
    # A history that stands still: every candidate predicts the same.
    _, differences, h = scene(7)
    differences = [differences[0], torch.zeros_like(h), torch.zeros_like(h)]
    coefficients, _ = coefficients_and_weights()
    reference = proxy_losses(h, differences, coefficients, loss)
    onepass = proxy_losses_onepass(h, differences, gram_matrix(differences), coefficients, loss)
    assert torch.equal(choose(reference, "token"), torch.zeros(2, 5, dtype=torch.int64))
    assert torch.equal(choose(onepass, "token"), torch.zeros(2, 5, dtype=torch.int64))


@pytest.mark.parametrize("loss", ONEPASS)
@given(seed=st.integers(0, 2**31), gap=st.sampled_from([1e-3, 1e-5, 1e-7]))
def test_near_ties_cost_no_more_than_rounding(loss: Loss, seed: int, gap: float) -> None:
    """Candidates a hair apart may be confused in float32, but the loss of the one taken is the least but a hair."""
    _, differences, h = scene(seed)
    coefficients, _ = coefficients_and_weights(0.0)
    coefficients = torch.cat([coefficients, coefficients * torch.tensor([1, 1 + gap, 1 + gap])])
    exact = proxy_losses(h, differences, coefficients, loss)
    single = [d.float() for d in differences]
    taken = choose(proxy_losses_onepass(h.float(), single, gram_matrix(single), coefficients, loss), "token")
    regret = exact.gather(0, taken.unsqueeze(0))[0] - exact.min(0).values
    assert (regret <= 1e-5 * (1 + exact.min(0).values)).all()


@pytest.mark.parametrize("granularity", ["token", "sample", "batch"])
def test_choice_is_the_least_mean_loss(granularity: Granularity) -> None:
    losses = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = choose(losses, granularity)
    for b, n in itertools.product(range(3), range(4)):
        pools = {"token": losses[:, b, n], "sample": losses[:, b].mean(1), "batch": losses.mean((1, 2))}
        assert chosen[b, n] == min(range(6), key=lambda k: float(pools[granularity][k]))


def test_nan_never_wins() -> None:
    losses = torch.tensor([[[float("nan"), float("nan")]], [[2.0, float("nan")]]])
    assert choose(losses, "token").tolist() == [[1, 0]]


@given(seed=st.integers(0, 2**31))
def test_each_token_gets_its_own_candidate(seed: int) -> None:
    anchors, differences, _ = scene(seed)
    coefficients, weights = coefficients_and_weights()
    choice = torch.randint(len(weights), (2, 5), generator=torch.Generator().manual_seed(seed))
    actual = combine_chosen(differences, coefficients, choice)
    for b, n in itertools.product(range(2), range(5)):
        row = weights[choice[b, n]]
        expected = sum((w * a[b, n] for w, a in zip(row, anchors, strict=True)), torch.zeros(7, dtype=torch.float64))
        torch.testing.assert_close(actual[b, n], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    _, differences, h = scene(1)
    low = [d.to(dtype) for d in differences]
    coefficients, _ = coefficients_and_weights()
    losses = proxy_losses_onepass(h.to(dtype), low, gram_matrix(low), coefficients, "cosine")
    combined = combine_chosen(low, coefficients, torch.zeros(2, 5, dtype=torch.int64))
    assert losses.dtype == combined.dtype == torch.float32
    exact = proxy_losses(h.to(dtype).double(), [d.double() for d in low], coefficients, "cosine")
    torch.testing.assert_close(losses.double(), exact, rtol=1e-4, atol=1e-6)


def test_l1_has_no_one_pass_form() -> None:
    _, differences, h = scene(0)
    with pytest.raises(ValueError, match="L1"):
        proxy_losses_onepass(h, differences, gram_matrix(differences), coefficients_and_weights()[0], "l1")
