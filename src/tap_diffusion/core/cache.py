"""What one branch remembers: finite differences of probe features and residuals at its newest anchor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tap_diffusion.core.kernels import gram_matrix
from tap_diffusion.core.selection import mean_and_spread


class History:
    """Differences Δ⁰ … Δ^{H-1} of the probe features h and the residuals r, and the times of the anchors.

    The differences of a new anchor follow from those of the last one alone, so ``capacity`` tensors of each kind
    hold everything that weights over ``capacity`` anchors can ask for. They are formed in float32 or better.

    Attributes:
        times: of the anchors, newest first.
        probe, residual: differences at the newest anchor, on the device of the features.

    Args:
        capacity: anchors to remember, at least the largest order plus one.
        dtype: to keep the differences in; None keeps that of the features.
    """

    def __init__(self, capacity: int, dtype: torch.dtype | None = None) -> None:
        self.capacity = capacity
        self.dtype = dtype
        self.times: list[float] = []
        self._probe: list[Tensor] = []
        self._residual: list[Tensor] = []
        self._parked: tuple[list[Tensor], list[Tensor]] | None = None  # copies of both in host memory
        self._gram: Tensor | None = None
        self._mean_and_spread: tuple[Tensor, Tensor] | None = None
        self._kind: tuple[object, ...] = ()
        self.judged: tuple[float, Tensor] | None = None  # whether the probe at a time after the anchors is unexplained

    def add(self, time: float, residual: Tensor, probe: Tensor | None) -> None:
        """Make the features at ``time`` the newest anchor.

        Args:
            time: of the anchor, after that of the last one.
            residual: r, shape (B, N, D).
            probe: h, shape (B, N, D'), or None where nothing is selected.
        """
        span = time - self.times[0] if self.times else 0.0
        self._kind = _kind(residual)
        advanced = self._advance(self.residual, residual, span)
        if probe is not None:
            self._probe = self._advance(self.probe, probe, span)
        self._residual, self._parked = advanced, None
        self.times = [time, *self.times][: self.capacity]
        self._gram = self._mean_and_spread = self.judged = None

    @property
    def probe(self) -> list[Tensor]:
        """Differences of the probe features."""
        self._fetch()
        return self._probe

    @property
    def residual(self) -> list[Tensor]:
        """Differences of the residuals."""
        self._fetch()
        return self._residual

    def park(self) -> None:
        """Hold the differences in host memory alone, until they are asked for."""
        if self._parked is None:
            self._parked = [_to_host(d) for d in self._probe], [_to_host(d) for d in self._residual]
        self._probe, self._residual, self._gram, self._mean_and_spread = [], [], None, None

    def _fetch(self) -> None:
        if self._parked is not None and not self._residual:
            device: Any = self._kind[-1]
            self._probe, self._residual = ([d.to(device, non_blocking=True) for d in kind] for kind in self._parked)

    def _advance(self, old: list[Tensor], newest: Tensor, span: float) -> list[Tensor]:
        precision = torch.promote_types(newest.dtype, torch.float32)
        dtype = self.dtype or newest.dtype
        difference = newest.detach().to(precision)
        new = [newest.detach().to(dtype)]
        for last in old[: self.capacity - 1]:
            difference = (difference - last).div_(span)
            new.append(difference.to(dtype))
        return new

    @property
    def gram(self) -> Tensor:
        """Inner products of the probe's differences per token, (B, N, H, H); computed once per anchor."""
        if self._gram is None:
            self._gram = gram_matrix(self.probe)
        return self._gram

    @property
    def mean(self) -> Tensor:
        """Mean token of the newest anchor's probe, (B, D'); computed once per anchor, as the spread is."""
        return self._about_mean()[0]

    @property
    def spread(self) -> Tensor:
        """Sum of the squared distances of its tokens from the mean token, (B,)."""
        return self._about_mean()[1]

    def _about_mean(self) -> tuple[Tensor, Tensor]:
        if self._mean_and_spread is None:
            self._mean_and_spread = mean_and_spread(self.probe[0])
        return self._mean_and_spread

    def fits(self, hidden_states: Tensor) -> bool:
        """Whether there is an anchor, of the shape, dtype and device of ``hidden_states``."""
        return bool(self.times) and self._kind == _kind(hidden_states)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, but for those in host memory alone."""
        tensors = [*self._probe, *self._residual, *([] if self._gram is None else [self._gram])]
        tensors += self._mean_and_spread or ()
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned where that lets it be made without waiting for the device."""
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def _kind(features: Tensor) -> tuple[object, ...]:
    return features.shape, features.dtype, features.device
