"""Doubts about a call's tensors: flags that on a GPU are read a step late, so that nothing waits for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tap_diffusion.core.selection import all_finite

NOT_FINITE = "non-finite values"
UNEXPLAINED = "the features match nothing seen before"
DOUBTS = NOT_FINITE, UNEXPLAINED  # reasons, in the order in which flags are kept


class Fallback(Exception):
    """A predicted step can't be trusted and must be run in full. The argument is the reason."""


class LateFlag:
    """Flags on a GPU that are read without waiting: until they have arrived, they count as not raised.

    Args:
        flag: one for each of :data:`DOUBTS`.
        awaited: wait for them after all, since they arrive sooner on some ranks than on others.
    """

    def __init__(self, flag: Tensor, awaited: bool = False) -> None:
        self.flag = flag
        self._awaited = awaited
        self._arrived: Any = None
        if flag.is_cuda:
            self._value = torch.empty(flag.shape, dtype=torch.bool, pin_memory=True)
            self._value.copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._value = flag

    def is_raised(self) -> bool:
        """Whether any flag is raised and has arrived."""
        if self._awaited and self._arrived is not None:
            self._arrived.synchronize()
        return (self._arrived is None or self._arrived.query()) and bool(self._value.any())

    @property
    def reason(self) -> str:
        """The first that is raised."""
        return DOUBTS[self._value.tolist().index(True)]


class Doubts:
    """Those about one branch.

    Args:
        several: whether several ranks run the model, which must all hear of a doubt at the same step.
    """

    def __init__(self, several: bool = False) -> None:
        self._several = several
        self._flag: LateFlag | None = None
        self._awaited = False

    def forget(self) -> None:
        """Drop what has not been read."""
        self._flag = None

    def raised(self) -> str | None:
        """Why the next step is to be full; None: it need not be, or nobody knows yet."""
        if self._flag is None or not self._flag.is_raised():
            return None
        if self._flag.reason == UNEXPLAINED:
            # Where latents are moved at every step, each other step would be predicted from features of another.
            self._awaited = True
        return self._flag.reason

    def are_late(self, reading_waits: bool) -> bool:
        """Whether flags are read a step late, where reading them at once would wait for a device."""
        return reading_waits and not self._awaited

    def note(self, not_finite: Tensor, unexplained: Tensor | None = None) -> None:
        """Keep flags (scalars) until they can be read without waiting."""
        if unexplained is None:
            unexplained = torch.zeros_like(not_finite)
        flags = torch.stack([not_finite, unexplained.to(not_finite.device)])
        if self._flag is not None:  # not arrived yet
            flags = flags | self._flag.flag
        self._flag = LateFlag(flags, awaited=self._several)


def check(not_finite: Tensor, unexplained: Tensor | None = None) -> None:
    """Raise Fallback where a flag is raised; waits for it."""
    if not_finite:
        raise Fallback(NOT_FINITE)
    if unexplained is not None and unexplained:
        raise Fallback(UNEXPLAINED)


def finite(*tensors: Tensor | None) -> Tensor:
    """Whether all values of the tensors that there are, are finite; a scalar on their device."""
    return all_finite(*(tensor for tensor in tensors if tensor is not None))


def with_zeros(features: Tensor) -> Tensor:
    """Zeros in place of what is not finite."""
    return features.nan_to_num(0.0, 0.0, 0.0)
