"""Adams-Bashforth predictors, as AB-Cache defines them (arXiv 2504.10540), for unevenly spaced anchors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tap_diffusion.core.predictors.newton import newton


def adams_bashforth(order: int) -> Callable[[Sequence[float], float], NDArray[np.float64]]:
    """The ``order + 1``-th difference over t and the newest ``order + 1`` anchors vanishes (arXiv 2504.10540).

    From the Adams-Bashforth method the paper derives that the outputs of k + 1 consecutive steps nearly satisfy
    F̂ = Σ_{j=1..k} (-1)^{j+1} C(k, j) F(a_{j-1}): 2F(a_0) - F(a_1) for k = 2. Its k is ``order`` + 1.

    Deviation: the paper gives these weights for steps that are evenly spaced only, t being the next. Elsewhere the
    divided difference vanishes instead, which makes the family the Newton one, whether it is applied to t at once or
    step by step with predictions among the anchors.
    """
    return newton(order)
