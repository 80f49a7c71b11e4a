from __future__ import annotations

import weakref

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tap_diffusion.core.cache import History
from tap_diffusion.core.predictors import difference_matrix


@given(gaps=st.lists(st.integers(1, 9), min_size=1, max_size=7), capacity=st.integers(1, 4))
def test_differences_follow_from_those_of_the_last_anchor(gaps: list[int], capacity: int) -> None:
    times = np.cumsum(gaps).astype(float).tolist()
    generator = torch.Generator().manual_seed(sum(gaps))
    features = [torch.randn(1, 3, 2, generator=generator, dtype=torch.float64) for _ in times]
    history = History(capacity)
    for time, feature in zip(times, features, strict=True):
        history.add(time, feature, -feature)
    kept = list(reversed(times))[:capacity]
    assert history.times == kept
    matrix = torch.from_numpy(difference_matrix(kept))
    expected = torch.einsum("ij,jbnd->ibnd", matrix, torch.stack(list(reversed(features))[:capacity]))
    torch.testing.assert_close(torch.stack(history.residual), expected)
    torch.testing.assert_close(torch.stack(history.probe), -expected)


def test_memory_is_two_tensors_for_each_anchor() -> None:
    history = History(capacity=3)
    feature = torch.zeros(2, 64, 32)
    for time in range(10):
        history.add(time, feature.clone(), feature.clone())
        assert len(history.residual) == len(history.probe) == min(time + 1, 3)
    assert history.nbytes == 2 * 3 * feature.nbytes


def test_gram_is_that_of_the_newest_anchor() -> None:
    history = History(capacity=2)
    for time in range(3):
        feature = torch.randn(1, 2, 5, dtype=torch.float64)
        history.add(time, feature, feature)
        stacked = torch.stack(history.probe)
        torch.testing.assert_close(history.gram, torch.einsum("ibnd,jbnd->bnij", stacked, stacked))


def test_keeps_no_graph() -> None:
    history = History(capacity=2)
    history.add(0, torch.ones(1, 1, 1, requires_grad=True) * 2, None)
    assert not history.residual[0].requires_grad


def test_fits_only_its_own_kind() -> None:
    history = History(capacity=2)
    x = torch.zeros(2, 4, 3)
    assert not history.fits(x)
    history.add(0, x, None)
    assert history.fits(x)
    assert not history.fits(x[:1])
    assert not history.fits(x.double())
    assert not history.fits(x.to("meta"))


def test_differences_are_formed_before_they_are_rounded() -> None:
    """Nearly equal anchors in bfloat16 storage: the differences would drown if taken of rounded features."""
    history = History(capacity=2, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    feature, change = (torch.randn(1, 8, 4, generator=generator) for _ in range(2))
    history.add(0, feature.bfloat16().float(), None)
    history.add(2, feature.bfloat16().float() + 1e-4 * change, None)
    assert {difference.dtype for difference in history.residual} == {torch.bfloat16}
    torch.testing.assert_close(history.residual[1].float(), 0.5e-4 * change, rtol=1e-2, atol=1e-7)
    assert history.nbytes == 2 * feature.numel() * 2
    assert history.fits(feature)


def test_parked_differences_are_on_the_host_alone_and_come_back_as_they_were() -> None:
    history = History(capacity=3)
    for time in range(3):
        history.add(time, torch.randn(1, 4, 2), torch.randn(1, 4, 3))
    kept = [d.clone() for d in (*history.residual, *history.probe)]
    held = [weakref.ref(d) for d in (*history.residual, *history.probe)]
    gram = history.gram.clone()
    history.park()
    assert history.nbytes == 0
    assert not any(reference() for reference in held)
    history.park()
    assert all(torch.equal(one, other) for one, other in zip((*history.residual, *history.probe), kept, strict=True))
    assert torch.equal(history.gram, gram)
    assert history.nbytes == sum(d.nbytes for d in kept) + gram.nbytes


def test_an_anchor_that_comes_while_others_are_parked() -> None:
    features = [torch.randn(1, 4, 2) for _ in range(4)]
    histories = [History(capacity=3), History(capacity=3)]
    for time, feature in enumerate(features):
        for history, parks in zip(histories, (False, True), strict=True):
            if parks:
                history.park()
            history.add(time, feature, -feature)
    for kind in ("residual", "probe"):
        assert torch.equal(*(torch.stack(getattr(history, kind)) for history in histories))
