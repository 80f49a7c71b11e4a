"""The operation in plain PyTorch.

On a CPU it runs over chunks of tokens whose temporaries stay in the caches: at the size of FLUX.1-dev six times as fast
as over whole tensors. torch.compile would be faster still, but would need a C++ compiler and keep the first predicted
step waiting for seconds (``python -m tap_bench.kernels``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

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
    parts = [selection.inner_products(h, past) for h, *past in _in_chunks(probe, *differences)]
    products = torch.cat(parts, dim=2)
    losses, squared = selection.losses_and_errors(products, gram, coefficients, loss)
    return losses, squared.amin(0), ~selection.all_finite(products[0])


def combine(
    hidden_states: Tensor, residuals: Sequence[Tensor], coefficients: Tensor, choice: Tensor | None, mend: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`tap_diffusion.core.kernels.combine`."""
    result, finite = torch.empty_like(hidden_states), []
    chosen = [] if choice is None else [choice]
    for part, x, *past in _in_chunks(result, hidden_states, *residuals, *chosen):
        if choice is None:
            predicted = selection.combine(past, coefficients[0].tolist())
        else:
            predicted = selection.combine_chosen(past[:-1], coefficients, past[-1])
        part.copy_(x + predicted)
        finite.append(selection.all_finite(part))
    if mend:
        result = torch.where(result.isfinite(), result, (hidden_states + residuals[0]).to(result.dtype))
    return result, ~reduce(torch.logical_and, finite)


def gram_matrix(differences: Sequence[Tensor]) -> Tensor:
    """As :func:`tap_diffusion.core.selection.gram_matrix`."""
    return torch.cat([selection.gram_matrix(chunk) for chunk in _in_chunks(*differences)], dim=1)


def _in_chunks(*tensors: Tensor) -> Iterator[Sequence[Tensor]]:
    """The same tokens of all tensors (B, N, ...), of which the first has as many features as any.

    Elsewhere than on a CPU all at once: what costs there are launches.
    """
    batch, tokens, width = tensors[0].shape
    size = max(1, CHUNK * torch.get_num_threads() // (batch * width))
    if size >= tokens or tensors[0].device.type != "cpu":
        return iter([tensors])
    # Slices, since autograd lets no part of a split be written into.
    return ([tensor[:, first : first + size] for tensor in tensors] for first in range(0, tokens, size))
