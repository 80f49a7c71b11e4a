"""HiCache++: exponentials fitted to evenly spaced full steps, and HiCache's polynomials where there are too few."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, takewhile
from typing import Literal

import torch
from torch import Tensor

from tap_bench.method import Method, Setting, schedules
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.predictors import difference_matrix
from tap_diffusion.core.schedule import paper_steps

WINDOW, FEWEST = 5, 4  # anchors that are fitted at most and at least, as in the package
SMALLEST, RIDGE = 1e-4, 1e-8  # singular values that count, as a share of the largest; added to each

Backend = Literal["dmd", "auto"]


def exponential(products: Tensor, k: float) -> Tensor:
    """Weights of features from which dynamic mode decomposition predicts k spacings beyond the newest (hicache-pp 1.3).

    Features F_0 … F_n are taken to follow F_{i+1} = A F_i. Their coordinates in their own span, which the inner
    products tell, are all that the fit needs.

    Args:
        products: of the features with each other, oldest first, (n + 1, n + 1) float64.
        k: any number.

    Returns:
        (n + 1,) float64.
    """
    values, vectors = torch.linalg.eigh(products)
    coordinates = (vectors * values.clamp(min=0).sqrt()).T
    before, after = coordinates[:, :-1], coordinates[:, 1:]
    left, sizes, right = torch.linalg.svd(before, full_matrices=False)
    rank = max(1, int((sizes > SMALLEST * sizes[0]).sum()))
    scaled = right[:rank].T / (sizes[:rank] + RIDGE)
    poles, modes = torch.linalg.eig(left[:, :rank].T @ after @ scaled)
    combined = scaled.to(modes.dtype) @ modes  # the modes as sums over `after`
    shares = torch.linalg.lstsq(after.to(modes.dtype) @ combined, coordinates[:, -1:].to(modes.dtype)).solution
    weights = (combined @ (poles**k * shares.squeeze(1))).real
    return torch.cat([weights.new_zeros(1), weights])


def parabola(count: int) -> Tensor:
    """Weights of the newest three of so many features for one spacing beyond them."""
    return torch.tensor([0.0] * (count - 3) + [1.0, -3.0, 3.0], dtype=torch.float64)


class HiCachePPEngine(Engine):
    """Dynamic mode decomposition over the newest anchors of one spacing, or HiCache of order 1 with fewer than four.

    ``auto`` takes the former only where it would have predicted the newest anchor better than a parabola. Each sample
    has its own fit. The package forecasts the guided velocity, and reuses it where the forecast is not finite, which
    here makes the step a full one.

    Args:
        config: with HiCache's family, and a history of :data:`WINDOW`.
        backend: as the package calls it.
    """

    def __init__(self, config: TAPConfig, backend: Backend) -> None:
        super().__init__(config)
        self._backend = backend

    def predict(self, call: Call, hidden_states: Tensor, probe: Callable[[], Tensor], stream: str = "") -> Tensor:
        """As the base class where there are too few anchors of one spacing."""
        history = self._anchors(call, hidden_states, stream)
        times = tuple(history.times)
        even = _even(times)
        if even < FEWEST + (self._backend == "auto"):
            return super().predict(call, hidden_states, probe, stream)
        differences = torch.stack(history.residual)
        back = torch.linalg.inv(torch.from_numpy(difference_matrix(times)))[:even].flip(0)  # to features, oldest first
        flat = differences.flatten(2).double()
        products = back @ torch.einsum("hbe,gbe->bhg", flat, flat).cpu() @ back.T
        polynomial, horizon = self._candidates(times, call.step)[1][0], (call.step - times[0]) / (times[0] - times[1])
        rows = [
            exponential(of_sample, horizon) @ back if self._backend == "dmd" or foretold(of_sample) else polynomial
            for of_sample in products
        ]
        residual = torch.einsum("bh,hbnd->bnd", torch.stack(rows).to(differences), differences)
        return self._checked(call, hidden_states, residual, None, history)


def foretold(products: Tensor) -> bool:
    """Whether, without the newest of the features, exponentials would have predicted it better than a parabola."""
    newest = torch.zeros(len(products), dtype=torch.float64)
    newest[-1] = 1.0

    def error(weights: Tensor) -> float:
        difference = torch.cat([weights, weights.new_zeros(1)]) - newest
        return float(difference @ products @ difference)

    return error(exponential(products[:-1, :-1], 1.0)) <= error(parabola(len(products) - 1))


def _even(times: Sequence[float]) -> int:
    """How many of the newest anchors have one spacing."""
    gaps = [newer - older for newer, older in pairwise(times)]
    return 1 + sum(1 for _ in takewhile(lambda gap: gap == gaps[0], gaps))


def variants(setting: Setting) -> Iterator[Variant]:
    """Both on the package's schedule, one full step in N, and on those of all."""
    own = {"one in N": paper_steps(setting.steps, setting.budget, warmup=1)}
    backends: tuple[Backend, ...] = ("dmd", "auto")
    for title, full in (own | schedules(setting)).items():
        for backend in backends:
            config = TAPConfig.paper(
                full_steps=full, family="hermite", orders=(1,), horizon_span=0.0, history=WINDOW, cache_dtype="float32"
            )
            variant = on_engine(f"{title}, {backend}", config, partial(HiCachePPEngine, backend=backend))
            yield replace(variant, settings=variant.settings | {"backend": backend})


METHODS = [Method("hicache-pp", "rival", "HiCache++, hicache-pp on PyPI", variants)]
