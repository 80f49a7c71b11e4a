"""What a predicted step moves: the probe's losses, the choice of a candidate, the hidden states predicted.

One operation in two forms, Triton kernels for GPUs (``fused``) and plain PyTorch (``eager``), after the reference in
:mod:`tap_diffusion.core.selection`. ``python -m tap_bench.kernels`` compares both with the copy
bandwidth.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tap_diffusion.core import selection
from tap_diffusion.core.config import Granularity, Loss
from tap_diffusion.core.errors import TAPWarning
from tap_diffusion.core.kernels import eager

MOST_ANCHORS = 8  # that the Triton kernels unroll
_DTYPES = torch.float32, torch.bfloat16, torch.float16


class Prediction(NamedTuple):
    """What :func:`predict` returns.

    Attributes:
        hidden_states: x + r̂, (B, N, D) in the dtype of x.
        choice: each token's candidate, (B, N) uint8.
        errors: least squared error of any candidate in each token's probe, (B, N) in float32 or better.
        doubt: whether a value of the prediction, or the squared distance of a token's probe from its anchor, is not
            finite; a bool tensor without dimensions.
    """

    hidden_states: Tensor
    choice: Tensor
    errors: Tensor
    doubt: Tensor


def predict(
    hidden_states: Tensor,
    probe: Tensor,
    differences: Sequence[Tensor],
    gram: Tensor | None,
    residuals: Sequence[Tensor],
    coefficients: Tensor,
    loss: Loss,
    choose: Granularity | Callable[[Tensor], Tensor] = "token",
    mend: bool = False,
) -> Prediction:
    """Losses, argmin and combination (paper, token-adaptive selection). It never waits for a GPU.

    Args:
        hidden_states: x, before the first block, (B, N, D).
        probe: h, the probe features now, (B, N, D').
        differences: H tensors (B, N, D') of the probe's history.
        gram: of ``differences``, from :func:`gram_matrix`; None with the loss ``l1``, which does without.
        residuals: H tensors (B, N, D) of the residuals' history.
        coefficients: (K, H) float64 on the CPU, K at most 255.
        loss: as for :func:`tap_diffusion.core.selection.proxy_losses`.
        choose: over what the argmin is taken, or a function of the losses (K, B, N) that gives the choice (B, N).
        mend: put x + D_0, the newest residual reused, in the place of predicted values that are not finite.
    """
    form = _form(differences, probe) if gram is not None else eager
    if choose == "token" and form is _form(residuals, hidden_states) is not eager:
        return Prediction(
            *form.predict_by_token(hidden_states, probe, differences, gram, residuals, coefficients, loss, mend)
        )
    losses, errors, doubt = form.proxy_losses(probe, differences, gram, coefficients, loss)
    choice = choose(losses) if callable(choose) else selection.choose(losses, choose)
    result, more = combine(hidden_states, residuals, coefficients, choice, mend)
    return Prediction(result, choice.to(torch.uint8), errors, doubt | more)


def errors(
    probe: Tensor, differences: Sequence[Tensor], gram: Tensor | None, coefficients: Tensor, loss: Loss
) -> Tensor:
    """The errors of a :class:`Prediction` alone, (B, N); the arguments are those of :func:`predict`."""
    form = _form(differences, probe) if gram is not None else eager
    found: Tensor = form.proxy_losses(probe, differences, gram, coefficients, loss)[1]
    return found


def combine(
    hidden_states: Tensor,
    residuals: Sequence[Tensor],
    coefficients: Tensor,
    choice: Tensor | None = None,
    mend: bool = False,
) -> tuple[Tensor, Tensor]:
    """x + r̂, and whether a value of it is not finite: the last part of :func:`predict`.

    Args:
        hidden_states, residuals, coefficients, mend: as there.
        choice: each token's candidate, (B, N); None: the first for all.
    """
    return _form(residuals, hidden_states).combine(hidden_states, residuals, coefficients, choice, mend)


def gram_matrix(differences: Sequence[Tensor]) -> Tensor:
    """G_ij = ⟨D_i, D_j⟩ of each token, (B, N, H, H), of H tensors (B, N, D')."""
    return _form(differences).gram_matrix(differences)


def uses_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels take this tensor: on a GPU that they run on, in single or half precision."""
    return tensor.is_cuda and tensor.dtype in _DTYPES and runs_triton(tensor.device)


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels can be compiled for a GPU and predict there what PyTorch does; that is tried once."""
    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        _check(device)
    except Exception as error:  # whatever is missing: a C compiler, a newer version
        warnings.warn(
            f"TAP predicts in plain PyTorch, since its Triton kernels fail on {device}: {error}",
            TAPWarning,
            stacklevel=2,
        )
        return False
    return True


def _check(device: torch.device) -> None:
    """Raise RuntimeError where the Triton kernels predict something else than PyTorch, for a few tokens."""
    x, h, *features = torch.randn(6, 1, 4, 64, generator=torch.Generator().manual_seed(0)).to(device).unbind()
    past, residuals = features[:2], features[2:]
    coefficients = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    gram = _fused().gram_matrix(past)
    result, _, errors, _ = _fused().predict_by_token(x, h, past, gram, residuals, coefficients, "cosine", False)
    losses, known, _ = eager.proxy_losses(h, past, eager.gram_matrix(past), coefficients, "cosine")
    expected, _ = eager.combine(x, residuals, coefficients, selection.choose(losses, "token"), False)
    same = (torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in ((result, expected), (errors, known)))
    if not all(same):
        raise RuntimeError("they predict something else than PyTorch")


def _form(history: Sequence[Tensor], *others: Tensor) -> Any:
    """The module that does it for a history and what goes with it."""
    return _fused() if len(history) <= MOST_ANCHORS and all(map(uses_triton, (*history, *others))) else eager


def _fused() -> Any:
    from tap_diffusion.core.kernels import fused  # only now: it takes triton, which not every system has

    return fused
