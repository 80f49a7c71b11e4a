"""Several processes on one trajectory, each with a share of its tokens: what they have to agree on.

Cache, probe and choice are per token, so each rank keeps those of its own tokens and hears of no others. Two things are
not: whether a step can be predicted at all, since blocks wait for the blocks of other ranks, and a choice by losses
that are summed over tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


class Ranks:
    """The processes that share a trajectory.

    Args:
        group: their process group, whose backend takes the tensors of the model; None: this process alone.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group

    @property
    def several(self) -> bool:
        """Whether there is any rank besides this one."""
        return self._group is not None

    def total(self, part: Tensor) -> Tensor:
        """The sum of this tensor over all ranks, the same bits on each."""
        if self.several:
            part = part.contiguous()
            distributed.all_reduce(part, group=self._group)
        return part

    def any(self, flag: Tensor) -> Tensor:
        """Whether this bool tensor without dimensions is true on any rank."""
        return flag if not self.several else self.total(flag.to(torch.int32)) > 0
