"""The operation in Triton: a program for each token, which reads each tensor once and holds its rows in registers.

The formulae are those of :mod:`tap_diffusion.core.selection`, in float32 whatever the tensors are stored in. Where the
argmin is taken over a token, losses, argmin and combination are one kernel; over a sample or the batch, the losses
(B, N, K) go through memory between two. Strides are passed, so that views need no copies, and the tensors of a history
stay apart. Nothing waits for the device.

This has been tested in Triton's interpreter and compiled for GPUs of compute capability 8.0 and 9.0; it has not yet
run on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tap_diffusion.core.config import Loss

_INF = tl.constexpr(float("inf"))
_MAX = tl.constexpr(torch.finfo(torch.float32).max)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _row(tensor, strides, sample, token, column, D: tl.constexpr):
    """The features of a token in float32, 0 beyond D."""
    at = tensor + sample * strides[0] + token * strides[1] + column * strides[2]
    return tl.load(at, mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < _INF


@triton.jit
def _not_negative(x):
    """At least 0, or NaN: tl.maximum would make 0 of it."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _losses(
    errors, probe, probe_strides, differences, difference_strides, gram, coefficients, doubt, program, sample, token,
    column, K, H: tl.constexpr, D: tl.constexpr, LOSS: tl.constexpr, KS: tl.constexpr,
):  # fmt: skip
    """Losses of all candidates, (KS,): :func:`selection.proxy_losses_onepass`, and writes the least error."""
    candidate = tl.arange(0, KS)
    rows = coefficients + candidate * H
    gram += program * H * H

    h = _row(probe, probe_strides, sample, token, column, D)
    newest = _row(differences[0], difference_strides[0], sample, token, column, D)
    d = h - newest
    d_squared = tl.sum(d * d, 0)
    tl.store(doubt, True, mask=_is_finite(d_squared) == 0)
    g_0 = tl.sum(d * newest, 0)

    linear = tl.zeros((KS,), tl.float32)  # c'·g
    forward = tl.zeros((KS,), tl.float32)  # c'·⟨D_0, D⟩
    quadratic = tl.zeros((KS,), tl.float32)  # c'ᵀGc'
    for i in tl.static_range(H):
        g = g_0 if i == 0 else tl.sum(d * _row(differences[i], difference_strides[i], sample, token, column, D), 0)
        c = tl.load(rows + i, mask=candidate < K, other=0.0)
        linear += c * g
        forward += c * tl.load(gram + i)
        for j in tl.static_range(H):
            quadratic += c * tl.load(rows + j, mask=candidate < K, other=0.0) * tl.load(gram + i * H + j)

    error = _not_negative(d_squared - 2 * linear + quadratic)
    tl.store(errors + program, tl.min(tl.where(candidate < K, error, _INF), 0))
    h_squared = _not_negative(d_squared + 2 * g_0 + tl.load(gram))
    if LOSS == "cosine":
        gain = error + 2 * (linear + forward - (d_squared + g_0))
        h_norm = tl.sqrt(h_squared)
        predicted_norm = tl.sqrt(_not_negative(h_squared + gain))
        shortfall = gain / tl.maximum(predicted_norm + h_norm, _TINY)
        product = predicted_norm * h_norm
        losses = tl.where(product > 0, (error - shortfall * shortfall) / tl.maximum(2 * product, _TINY), 1.0)
    elif LOSS == "relative_l2":
        losses = error / tl.maximum(h_squared, _TINY)
    else:
        losses = error
    return losses


@triton.jit
def _combine(
    result, hidden_states, hidden_strides, residuals, residual_strides, row, doubt, program, sample, token, column,
    H: tl.constexpr, D: tl.constexpr, MEND: tl.constexpr,
):  # fmt: skip
    """Write x + r̂ of one token: :func:`selection.combine_chosen`."""
    x = _row(hidden_states, hidden_strides, sample, token, column, D)
    newest = _row(residuals[0], residual_strides[0], sample, token, column, D)
    predicted = newest * (1 + tl.load(row))
    for i in tl.static_range(1, H):
        predicted += _row(residuals[i], residual_strides[i], sample, token, column, D) * tl.load(row + i)
    stored = (x + predicted).to(result.dtype.element_ty)
    finite = _is_finite(stored.to(tl.float32))
    tl.store(doubt, True, mask=tl.min(finite.to(tl.int32), 0) == 0)
    if MEND:
        stored = tl.where(finite, stored, (x + newest).to(result.dtype.element_ty))
    tl.store(result + program * D + column, stored, mask=column < D)


@triton.jit
def _predict_kernel(
    result, choice, errors, doubt, hidden_states, hidden_strides, probe, probe_strides, differences,
    difference_strides, gram, residuals, residual_strides, coefficients, N, K,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, LOSS: tl.constexpr, MEND: tl.constexpr, KS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_PROBE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, token = program // N, program % N
    losses = _losses(
        errors, probe, probe_strides, differences, difference_strides, gram, coefficients, doubt, program, sample,
        token, tl.arange(0, BLOCK_PROBE), K, H, WIDTH, LOSS, KS,
    )  # fmt: skip
    # As selection.choose has it: NaN behind everything, of equals the first.
    losses = tl.where(losses == losses, tl.minimum(losses, _MAX), _INF)
    chosen = tl.argmin(tl.where(tl.arange(0, KS) < K, losses, _INF), 0)
    tl.store(choice + program, chosen.to(tl.uint8))
    _combine(
        result, hidden_states, hidden_strides, residuals, residual_strides, coefficients + chosen * H, doubt, program,
        sample, token, tl.arange(0, BLOCK), H, D, MEND,
    )  # fmt: skip


@triton.jit
def _losses_kernel(
    losses, errors, doubt, probe, probe_strides, differences, difference_strides, gram, coefficients, N, K,
    H: tl.constexpr, D: tl.constexpr, LOSS: tl.constexpr, KS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, KS)
    values = _losses(
        errors, probe, probe_strides, differences, difference_strides, gram, coefficients, doubt, program,
        program // N, program % N, tl.arange(0, BLOCK), K, H, D, LOSS, KS,
    )  # fmt: skip
    tl.store(losses + program * K + candidate, values, mask=candidate < K)


@triton.jit
def _combine_kernel(
    result, doubt, hidden_states, hidden_strides, residuals, residual_strides, coefficients, choice, choice_strides, N,
    H: tl.constexpr, D: tl.constexpr, CHOSEN: tl.constexpr, MEND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, token = program // N, program % N
    row = coefficients
    if CHOSEN:
        row += tl.load(choice + sample * choice_strides[0] + token * choice_strides[1]).to(tl.int64) * H
    _combine(
        result, hidden_states, hidden_strides, residuals, residual_strides, row, doubt, program, sample, token,
        tl.arange(0, BLOCK), H, D, MEND,
    )  # fmt: skip


@triton.jit
def _gram_kernel(gram, differences, strides, N, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    sample, token, column = program // N, program % N, tl.arange(0, BLOCK)
    gram += program * H * H
    for i in tl.static_range(H):
        row = _row(differences[i], strides[i], sample, token, column, D)
        for j in tl.static_range(i, H):
            # Again from the L1 cache: all H rows at once would be too many registers.
            product = tl.sum(row * _row(differences[j], strides[j], sample, token, column, D), 0)
            tl.store(gram + i * H + j, product)
            tl.store(gram + j * H + i, product)


def predict_by_token(
    hidden_states: Tensor,
    probe: Tensor,
    differences: Sequence[Tensor],
    gram: Tensor,
    residuals: Sequence[Tensor],
    coefficients: Tensor,
    loss: Loss,
    mend: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`tap_diffusion.core.kernels.predict`, with the argmin over each token; ``loss`` is not ``l1``."""
    (batch, tokens, features), width = hidden_states.shape, probe.shape[-1]
    result = _like(hidden_states)
    choice = torch.empty((batch, tokens), dtype=torch.uint8, device=result.device)
    errors, doubt = _errors(probe), _no_doubt(result)
    with torch.cuda.device_of(result):
        _predict_kernel[(batch * tokens,)](
            result, choice, errors, doubt, hidden_states, hidden_states.stride(), probe, probe.stride(),
            *_apart(differences), gram.contiguous(), *_apart(residuals), _changes(coefficients, result), tokens,
            len(coefficients), H=len(differences), D=features, WIDTH=width, LOSS=loss, MEND=mend,
            KS=_candidates(coefficients), BLOCK=triton.next_power_of_2(features),
            BLOCK_PROBE=triton.next_power_of_2(width), num_warps=_warps(max(features, width)),
        )  # fmt: skip
    return result, choice, errors, doubt


def proxy_losses(
    probe: Tensor, differences: Sequence[Tensor], gram: Tensor, coefficients: Tensor, loss: Loss
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`tap_diffusion.core.kernels.eager.proxy_losses`; ``loss`` is not ``l1``."""
    batch, tokens, width = probe.shape
    losses = torch.empty((batch, tokens, len(coefficients)), device=probe.device)
    errors, doubt = _errors(probe), _no_doubt(probe)
    with torch.cuda.device_of(probe):
        _losses_kernel[(batch * tokens,)](
            losses, errors, doubt, probe, probe.stride(), *_apart(differences), gram.contiguous(),
            _changes(coefficients, probe), tokens, len(coefficients), H=len(differences), D=width, LOSS=loss,
            KS=_candidates(coefficients), BLOCK=triton.next_power_of_2(width), num_warps=_warps(width),
        )  # fmt: skip
    return losses.permute(2, 0, 1), errors, doubt


def combine(
    hidden_states: Tensor, residuals: Sequence[Tensor], coefficients: Tensor, choice: Tensor | None, mend: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`tap_diffusion.core.kernels.combine`."""
    batch, tokens, features = hidden_states.shape
    result, doubt = _like(hidden_states), _no_doubt(hidden_states)
    with torch.cuda.device_of(result):
        _combine_kernel[(batch * tokens,)](
            result, doubt, hidden_states, hidden_states.stride(), *_apart(residuals), _changes(coefficients, result),
            doubt if choice is None else choice, (0, 0) if choice is None else choice.stride(), tokens,
            H=len(residuals), D=features, CHOSEN=choice is not None, MEND=mend,
            BLOCK=triton.next_power_of_2(features), num_warps=_warps(features),
        )  # fmt: skip
    return result, doubt


def gram_matrix(differences: Sequence[Tensor]) -> Tensor:
    """As :func:`tap_diffusion.core.selection.gram_matrix`."""
    batch, tokens, width = differences[0].shape
    gram = torch.empty((batch, tokens, len(differences), len(differences)), device=differences[0].device)
    with torch.cuda.device_of(gram):
        _gram_kernel[(batch * tokens,)](
            gram, *_apart(differences), tokens, H=len(differences), D=width, BLOCK=triton.next_power_of_2(width),
            num_warps=_warps(width),
        )  # fmt: skip
    return gram


def _apart(tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[tuple[int, ...], ...]]:
    """A history as the kernels take it: pointers, and strides of each."""
    return tuple(tensors), tuple(tensor.stride() for tensor in tensors)


def _changes(coefficients: Tensor, like: Tensor) -> Tensor:
    """c' = c - (1, 0, …), in which small changes keep their precision, on the device, without waiting for it."""
    changes = coefficients.clone(memory_format=torch.contiguous_format)
    changes[:, 0] -= 1
    return changes.float().to(like.device, non_blocking=True)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _errors(probe: Tensor) -> Tensor:
    return torch.empty(probe.shape[:2], device=probe.device)


def _no_doubt(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.bool, device=like.device)


def _candidates(coefficients: Tensor) -> Any:
    # At least 16, since at the start of a trajectory candidates grow in number, and each size is compiled.
    return max(16, triton.next_power_of_2(len(coefficients)))


def _warps(width: int) -> int:
    """Warps for a row: 16 of its features for each thread."""
    return min(max(triton.next_power_of_2(width) // 512, 1), 32)
