"""Choosing a predictor for each token: proxy losses, argmin, combination.

Candidates come as coefficients (K, H) over finite differences D_i = Δ^iF at the newest anchor, so candidate k
predicts F̂_k = Σ_i c_ki D_i. All functions are pure; low-precision inputs are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    return losses_of_products(*inner_products(probe, differences), gram, coefficients, loss)


def inner_products(probe: Tensor, differences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """‖d‖² (B, N) and g_i = ⟨d, D_i⟩ (B, N, H) of d = h - D_0."""
    d = _wide(probe) - differences[0]
    return (d * d).sum(-1), torch.stack([(d * difference).sum(-1) for difference in differences], dim=-1)


def losses_of_products(d_squared: Tensor, g: Tensor, gram: Tensor, coefficients: Tensor, loss: Loss) -> Tensor:
    """Proxy losses (K, B, N) from :func:`inner_products` and :func:`gram_matrix`."""
    return losses_and_errors(d_squared, g, gram, coefficients, loss)[0]


def losses_and_errors(
    d_squared: Tensor, g: Tensor, gram: Tensor, coefficients: Tensor, loss: Loss
) -> tuple[Tensor, Tensor]:
    """Proxy losses (K, B, N), and ‖e‖², the squared errors that they are made of.

    With c' = c - (1, 0, …), the error is e = Σ c'_i D_i - d, hence ‖e‖² = ‖d‖² - 2 c'·g + c'ᵀGc'. Cosine distance
    follows without cancellation from 1 - cos = (‖e‖² - (‖ĥ‖ - ‖h‖)²) / (2 ‖ĥ‖ ‖h‖), where
    ‖ĥ‖² - ‖h‖² = ‖e‖² + 2⟨h, e⟩.
    """
    if loss == "l1":
        raise ValueError("the L1 loss does not follow from inner products; use proxy_losses")
    c = torch.cat([coefficients[:, :1] - 1, coefficients[:, 1:]], dim=1).to(gram, non_blocking=True)
    pairs = (c.unsqueeze(2) * c.unsqueeze(1)).flatten(1)
    quadratic = torch.einsum("kp,bnp->kbn", pairs, gram.flatten(2))
    error = (d_squared - 2 * torch.einsum("kh,bnh->kbn", c, g) + quadratic).clamp_min(0)
    if loss == "l2":
        return error, error
    h_squared = (d_squared + 2 * g[..., 0] + gram[..., 0, 0]).clamp_min(0)
    if loss == "relative_l2":
        return error / _positive(h_squared), error
    h_dot_e = torch.einsum("kh,bnh->kbn", c, g + gram[..., 0, :]) - (d_squared + g[..., 0])
    gain = error + 2 * h_dot_e  # ‖ĥ‖² - ‖h‖²
    h_norm = h_squared.sqrt()
    predicted_norm = (h_squared + gain).clamp_min(0).sqrt()
    shortfall = gain / _positive(predicted_norm + h_norm)
    product = predicted_norm * h_norm
    distance = (error - shortfall.square()) / _positive(2 * product)
    return torch.where(product > 0, distance, 1.0), error


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
            result = torch.addcmul(result, _wide(difference), coefficient)
        else:
            result = torch.add(result, difference, alpha=coefficient)
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
    rows = coefficients.to(choice.device, wide, non_blocking=True)[choice]  # (B, N, H)
    return combine(differences, [row.unsqueeze(-1) for row in rows.unbind(-1)])


def all_finite(*tensors: Tensor) -> Tensor:
    """Whether all values of all tensors are finite: a bool tensor without dimensions, where the tensors are."""
    # The extremes, which are NaN where a value is, take one read; isfinite takes several passes over the tensor.
    return torch.stack([torch.stack(tensor.aminmax()).isfinite().all() for tensor in tensors]).all()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _positive(tensor: Tensor) -> Tensor:
    return tensor.clamp_min(torch.finfo(tensor.dtype).tiny)
