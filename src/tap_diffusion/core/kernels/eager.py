"""The operation in plain PyTorch.

On a CPU it runs over chunks of tokens whose temporaries stay in the caches: at the size of FLUX.1-dev six times as fast
as over whole tensors. torch.compile would be faster still, but would need a C++ compiler and keep the first predicted
step waiting for seconds (``python -m tap_bench.kernels``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tap_diffusion.core import selection
from tap_diffusion.core.config import Loss

CHUNK = 2**18  # elements of each tensor that a thread works on at a time


def proxy_losses(
    probe: Tensor, differences: Sequence[Tensor], gram: Tensor | None, coefficients: Tensor, loss: Loss
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of all candidates, (K, B, N); least errors; whether the probe's distance from its anchor is not finite.

    Args:
        probe, differences, coefficients, loss: as for :func:`tap_diffusion.core.kernels.predict`.
        gram: likewise; None with ``l1``.

    Returns:
        the errors as :class:`tap_diffusion.core.kernels.Prediction` has them.
    """
    if gram is None:
        losses = selection.proxy_losses(probe, differences, coefficients, loss)
        squared = selection.proxy_losses(probe, differences, coefficients, "l2")
        return losses, squared.amin(0), ~selection.all_finite(probe)
    products = [
        selection.inner_products(probe[:, tokens], [difference[:, tokens] for difference in differences])
        for tokens in _chunks(probe)
    ]
    d_squared, g = (torch.cat(parts, dim=1) for parts in zip(*products, strict=True))
    losses, squared = selection.losses_and_errors(d_squared, g, gram, coefficients, loss)
    return losses, squared.amin(0), ~selection.all_finite(d_squared)


def combine(
    hidden_states: Tensor, residuals: Sequence[Tensor], coefficients: Tensor, choice: Tensor | None, mend: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`tap_diffusion.core.kernels.combine`."""
    result, finite = torch.empty_like(hidden_states), []
    for tokens in _chunks(hidden_states):
        x, past = hidden_states[:, tokens], [residual[:, tokens] for residual in residuals]
        if choice is None:
            predicted = selection.combine(past, coefficients[0].tolist())
        else:
            predicted = selection.combine_chosen(past, coefficients, choice[:, tokens])
        result[:, tokens] = x + predicted
        finite.append(selection.all_finite(result[:, tokens]))
    if mend:
        result = torch.where(result.isfinite(), result, (hidden_states + residuals[0]).to(result.dtype))
    return result, ~torch.stack(finite).all()


def gram_matrix(differences: Sequence[Tensor]) -> Tensor:
    """As :func:`tap_diffusion.core.selection.gram_matrix`."""
    chunks = _chunks(differences[0])
    return torch.cat([selection.gram_matrix([d[:, tokens] for d in differences]) for tokens in chunks], dim=1)


def _chunks(features: Tensor) -> Iterator[slice]:
    """Ranges of tokens. Elsewhere than on a CPU one: what costs there are launches."""
    batch, tokens, width = features.shape
    size = tokens
    if features.device.type == "cpu":
        size = max(1, CHUNK * torch.get_num_threads() // (batch * width))
    for first in range(0, tokens, size):
        yield slice(first, first + size)
