"""Choosing a predictor for each token: proxy losses, argmin, combination.

Candidates come as coefficients (K, H) over finite differences D_i = Δ^iF at the newest anchor, so candidate k
predicts F̂_k = Σ_i c_ki D_i. All functions are pure; low-precision inputs are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce

import numpy as np
import torch
from torch import Tensor

from tap_diffusion.core.config import Granularity, Loss


def proxy_losses(probe: Tensor, differences: Sequence[Tensor], coefficients: Tensor, loss: Loss) -> Tensor:
    """Reference form of the proxy losses: predict the probe with each candidate and compare (paper, proxy loss).

    Args:
        probe: h, the probe features now, (B, N, D).
        differences: H tensors (B, N, D) of the probe's history.
        coefficients: (K, H), on the CPU: its values are read, for which a device would have to be waited for.
        loss: ``cosine`` is 1 - cos(ĥ, h), and 1 where either vanishes; ``l2`` is ‖ĥ - h‖²; ``relative_l2`` is
            ‖ĥ - h‖² / ‖h‖²; ``l1`` is Σ|ĥ - h|.

    Returns:
        (K, B, N), float32 or better.
    """
    h = _wide(probe)
    losses = []
    for row in coefficients.tolist():
        predicted = combine(differences, row)
        error = predicted - h
        if loss == "cosine":
            losses.append(1 - torch.cosine_similarity(predicted, h, dim=-1))
        elif loss == "l2":
            losses.append(error.square().sum(-1))
        elif loss == "relative_l2":
            losses.append(error.square().sum(-1) / _positive(h.square().sum(-1)))
        else:
            losses.append(error.abs().sum(-1))
    return torch.stack(losses)


def gram_matrix(differences: Sequence[Tensor]) -> Tensor:
    """G_ij = ⟨D_i, D_j⟩ of each token: (B, N, H, H)."""
    wide = [_wide(difference) for difference in differences]
    size = len(wide)
    gram = wide[0].new_empty(*wide[0].shape[:-1], size, size)
    for i in range(size):
        for j in range(i, size):
            gram[..., i, j] = gram[..., j, i] = (wide[i] * wide[j]).sum(-1)
    return gram


def proxy_losses_onepass(
    probe: Tensor, differences: Sequence[Tensor], gram: Tensor, coefficients: Tensor, loss: Loss
) -> Tensor:
    """The same losses from inner products alone: one read of the probe and its history, however many candidates.

    Args:
        probe, differences, coefficients, loss: as for :func:`proxy_losses`; ``l1`` is no function of inner
            products and raises ValueError.
        gram: of ``differences``, from :func:`gram_matrix`.

    Returns:
        (K, B, N), float32 or better.
    """
    return losses_and_errors(inner_products(probe, differences), gram, coefficients, loss)[0]


def inner_products(probe: Tensor, differences: Sequence[Tensor]) -> Tensor:
    """‖d‖² and g_i = ⟨d, D_i⟩ of d = h - D_0, one after the other: (1 + H, B, N)."""
    d = _wide(probe) - differences[0]
    return torch.stack([(d * other).sum(-1) for other in (d, *differences)])


def losses_and_errors(products: Tensor, gram: Tensor, coefficients: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Proxy losses (K, B, N), and ‖e‖², the squared errors that they are made of.

    With c' = c - (1, 0, …), the error is e = Σ c'_i D_i - d, hence ‖e‖² = ‖d‖² - 2 c'·g + c'ᵀGc'. Cosine distance
    follows without cancellation from 1 - cos = (‖e‖² - (‖ĥ‖ - ‖h‖)²) / (2 ‖ĥ‖ ‖h‖), where ‖ĥ‖ - ‖h‖ is
    (‖ĥ‖² - ‖h‖²) / (‖ĥ‖ + ‖h‖). All that is squared is linear in the inner products, so one weighted sum gives it.

    Args:
        products: from :func:`inner_products`.
        gram: from :func:`gram_matrix`.
        coefficients, loss: as for :func:`proxy_losses_onepass`.
    """
    if loss == "l1":
        raise ValueError("the L1 loss does not follow from inner products; use proxy_losses")
    rows = _rows_of_products(tuple(map(tuple, coefficients.tolist()))).to(products, non_blocking=True)
    products = torch.cat([products, gram.flatten(2).movedim(-1, 0)])  # (1 + H + H², B, N)
    # No product of matrices: it may round equal rows differently, and users may have it done in fewer bits.
    values = (rows[:, :, None, None] * products).sum(1)
    count = len(coefficients)
    error, gain = values[:count].clamp_min(0), values[count : 2 * count]
    if loss == "l2":
        return error, error
    squares = values[2 * count :].clamp_min(0)
    if loss == "relative_l2":
        return error / _positive(squares[-1]), error
    norms = squares.sqrt()
    predicted_norm, h_norm = norms[:-1], norms[-1]
    shortfall = gain / _positive(predicted_norm + h_norm)
    product = predicted_norm * h_norm
    distance = torch.addcmul(error, shortfall, shortfall, value=-1) / _positive(2 * product)
    return torch.where(product > 0, distance, 1.0), error


@lru_cache(maxsize=1024)
def _rows_of_products(coefficients: tuple[tuple[float, ...], ...]) -> Tensor:
    """What ‖d‖², g and G contribute to ‖e‖², ‖ĥ‖² - ‖h‖² and ‖ĥ‖² of each candidate, and last to ‖h‖².

    ‖ĥ‖² - ‖h‖² = c'ᵀGc' + 2 c'·G_0 - ‖d‖² - 2 g_0 has no large terms to cancel where changes are small.

    Returns:
        (3K + 1, 1 + H + H²), float64 on the CPU.
    """
    c = np.array(coefficients)
    c[:, 0] -= 1
    count, size = c.shape
    rows = np.zeros((3 * count + 1, 1 + size + size**2))
    error, gain, predicted, h = rows[:count], rows[count : 2 * count], rows[2 * count : -1], rows[-1]
    error[:, 0], error[:, 1 : 1 + size] = 1, -2 * c
    error[:, 1 + size :] = (c[:, :, None] * c[:, None]).reshape(count, -1)
    h[[0, 1, 1 + size]] = 1, 2, 1  # ‖d‖² + 2 g_0 + G_00
    gain[:, 0], gain[:, 1], gain[:, 1 + size :] = -1, -2, error[:, 1 + size :]
    gain[:, 1 + size : 1 + 2 * size] += 2 * c
    predicted[:] = gain + h
    return torch.from_numpy(rows)


def mean_and_spread(anchor: Tensor) -> tuple[Tensor, Tensor]:
    """The mean token h̄_a of an anchor's probe, (B, D), and Σ_n ‖h_a[n] - h̄_a‖², (B,); see :func:`unexplained`.

    Args:
        anchor: probe features at the anchor, (B, N, D).
    """
    wide = _wide(anchor)
    mean = wide.mean(1)
    return mean, squared_distance(anchor, mean)


def squared_distance(probe: Tensor, mean: Tensor) -> Tensor:
    """Σ_n ‖h[n] - h̄_a‖², (B,), of a probe (B, N, D) from a mean token (B, D)."""
    return (_wide(probe) - mean.unsqueeze(1)).square().sum((1, 2))


def unexplained(error: Tensor, by_mean: Tensor, spread: Tensor) -> Tensor:
    """Whether the past explains nothing of the probe now.

    To take the mean token of the newest anchor for every token is to know no token from another. It errs by ``by_mean``
    now, and erred by ``spread`` at the anchor. A prediction whose tokens have nothing to do with those that are there
    errs by the spreads of both together, which is more than either. So where even the best candidates err by more than
    the mean token did at either time, they tell no token from another: tokens moved, or others are in their places.

    One of the two is not enough. As noise goes tokens become alike, and a prediction of what they were is worse than
    the mean and yet good for something (``sprites`` with 6 full steps). Where the model scales features up with time,
    reuse errs by more than the spread. Features that are only shifted, scaled up, or down to no less than a half, all
    alike, are explained by reuse.

    Args:
        error: squared error of each sample's tokens together, each by its best candidate: (B,).
        by_mean: squared distance of the same from the mean token, :func:`squared_distance`.
        spread: of the anchor, from :func:`mean_and_spread`.

    Returns:
        (B,) bool; false where something is not finite.
    """
    return error > torch.maximum(by_mean, spread)


def choose(losses: Tensor, granularity: Granularity, total: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
    """Index of the candidate with the smallest loss; of equal losses the first, and NaN never wins.

    Args:
        losses: (K, B, N).
        granularity: ``token``, or the loss summed over each ``sample`` or the whole ``batch`` first.
        total: sums over the processes that hold the other tokens, where there are any.

    Returns:
        (B, N) int64.
    """
    tokens = losses.shape[1:]
    losses = losses.nan_to_num(nan=torch.inf)
    if granularity == "sample":
        losses = total(losses.sum(2, keepdim=True))
    elif granularity == "batch":
        losses = total(losses.sum((1, 2), keepdim=True))
    return losses.min(0).indices.expand(tokens)  # on a CPU much faster than argmin, and the first of equals as well


def combine(differences: Sequence[Tensor], coefficients: Sequence[float | Tensor]) -> Tensor:
    """Σ_i c_i D_i in float32 or better; each c_i is a number or a tensor that broadcasts over (B, N, D)."""
    result = _wide(differences[0]) * coefficients[0]
    for difference, coefficient in zip(differences[1:], coefficients[1:], strict=True):
        if isinstance(coefficient, Tensor):
            result.addcmul_(_wide(difference), coefficient)
        else:
            result.add_(difference, alpha=coefficient)
    return result


def combine_chosen(differences: Sequence[Tensor], coefficients: Tensor, choice: Tensor) -> Tensor:
    """Prediction of each token by its own candidate: F̂[n] = Σ_i c_{p*[n], i} D_i[n].

    Args:
        differences: H tensors (B, N, D).
        coefficients: (K, H).
        choice: (B, N), indices into K.

    Returns:
        (B, N, D), float32 or better.
    """
    wide = torch.promote_types(differences[0].dtype, torch.float32)
    columns = coefficients.T.to(choice.device, wide, non_blocking=True)[:, choice]  # (H, B, N)
    return combine(differences, columns.unsqueeze(-1).unbind())


def all_finite(*tensors: Tensor) -> Tensor:
    """Whether all values of all tensors are finite: a bool tensor without dimensions, where the tensors are."""
    # A sum takes one read, where isfinite takes several passes. One that overflows is of values that nobody can use.
    sums = (tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)
    return reduce(torch.add, sums).isfinite()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _positive(tensor: Tensor) -> Tensor:
    return tensor.clamp_min(torch.finfo(tensor.dtype).tiny)
