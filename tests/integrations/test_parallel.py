"""Context parallelism: two processes with half of the tokens each give what one gives, and never wait in vain.

Both processes run all cases, one after the other, and leave what they got in files. Here it is compared with what this
process gets without parallelism. diffusers' plans split tokens in one of two places, on entering the transformer (FLUX)
or its first block (Qwen-Image, Wan); they are on CPUs here, which diffusers does not expect.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import ContextParallelConfig
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

import tap_diffusion as tap
from tap_diffusion.core import engine
from tap_diffusion.core.errors import UnsupportedModelError
from tap_diffusion.integrations.diffusers.api import hooks
from tiny import build_pipeline, build_transformer, interrupt_at, sample
from zoo import CASES, build, denoise
from zoo.checks import CONFIG

pytestmark = pytest.mark.slow

RANKS = 2
PATIENCE = 300  # seconds; for a machine with much else to do
GRANULARITIES = "token", "sample", "batch"
ZOO = "QwenImageTransformer2DModel", "WanTransformer3DModel", "Flux2Transformer2DModel"

Split = Callable[[Any], None]  # shares a transformer's tokens among the ranks
Result = dict[str, Any]


def on_pipeline(split: Split, config: tap.TAPConfig, spoil: Callable[[Any], None] = lambda _: None) -> Result:
    pipe = build_pipeline()
    split(pipe.transformer)
    with tap.enabled(pipe, config):
        spoil(hooks(pipe)[0].engine)
        latents = sample(pipe, ["red apple", "blue book"], steps=12)
        return outcome(pipe, latents)


def on_transformer(split: Split, name: str, config: tap.TAPConfig) -> Result:
    model = build(name)
    split(model)
    never = patch.object(engine, "unexplained", lambda error, *_: torch.zeros_like(error, dtype=torch.bool))
    with never, tap.enabled(model, config):  # as conftest.py has it, which the other ranks don't read
        return outcome(model, denoise(model, CASES[name], batch=2)[0])


def outcome(target: Any, latents: Tensor) -> Result:
    report = tap.report(target)
    return {
        "latents": latents,
        "choices": [choice.index for choice in report.choices],
        "steps": [(step, full) for step, full, _ in report.calls],
        "fallbacks": dict(report.fallbacks),
        "cache": report.cache_bytes,
    }


def spoiled(method: str, step: int, token: int | None) -> Callable[[Any], None]:
    """Puts a NaN into a token of what the engine gets at a step; ``record`` or ``predict``. None: nowhere."""

    def spoil(engine: Any) -> None:
        original = getattr(engine, method)

        def nan(features: Tensor) -> Tensor:
            features = features.clone()
            features[:, token] = torch.nan
            return features

        def record(call: Any, before: Tensor, after: Tensor, *more: Any) -> None:
            original(call, before, nan(after) if call.step == step else after, *more)

        def predict(call: Any, x: Tensor, probe: Any, *more: Any) -> Any:
            return original(call, x, (lambda: nan(probe())) if call.step == step else probe, *more)

        if token is not None:
            setattr(engine, method, record if method == "record" else predict)

    return spoil


def interrupted(split: Split) -> Result:
    """A run after one that was interrupted, at the same step on all ranks."""
    pipe = build_pipeline()
    split(pipe.transformer)
    with tap.enabled(pipe, tap.TAPConfig(full_steps=6)):
        with pytest.raises(KeyboardInterrupt):
            sample(pipe, "green frog face", steps=12, callback_on_step_end=interrupt_at(4))
        return outcome(pipe, sample(pipe, ["red apple", "blue book"], steps=12))


def all_cases(ulysses: Split, ring: Split, rank: int | None) -> Iterator[tuple[str, Result]]:
    """``rank`` is None where there is one process; a broken token is one of the second rank's."""
    config = tap.TAPConfig(full_steps=(0, 1, 4, 6, 8, 10))
    many = replace(config, orders=(0, 1, 2), horizon_span=4.0)  # candidates, so that ranks alone would choose others
    for name in GRANULARITIES:
        yield name, on_pipeline(ulysses, replace(many, granularity=name))  # type: ignore[arg-type]
    yield "ring", on_pipeline(ring, config)
    for name in ZOO:
        yield name, on_transformer(ulysses, name, CONFIG)
    for name in ZOO[:2]:
        by_sample = replace(CONFIG, granularity="sample", probe="first_block")
        yield f"{name} by sample", on_transformer(ulysses, name, by_sample)
    token = {None: 64 // RANKS, 0: None, 1: 0}[rank]
    yield "bad residual", on_pipeline(ulysses, config, spoiled("record", 1, token))
    yield "bad probe", on_pipeline(ulysses, config, spoiled("predict", 5, token))
    yield "interrupted", interrupted(ulysses)


CASE_NAMES = [*GRANULARITIES, "ring", *ZOO, *(f"{name} by sample" for name in ZOO[:2])]
CASE_NAMES += ["bad residual", "bad probe", "interrupted"]

# ------------------------------------------------------------------------------------------------------------ the ranks


def splitting(**degrees: int) -> Split:
    shape = degrees.get("ring_degree", 1), degrees.get("ulysses_degree", 1)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses"))

    def split(transformer: Any) -> None:
        transformer.enable_parallelism(config=ContextParallelConfig(**degrees, mesh=mesh))

    return split


def attention_with_lse(
    ctx: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, return_lse: bool = False, **more: Any
) -> Any:
    """Attention of (B, S, H, D), with the logarithm of its denominator, which diffusers has for GPUs only."""
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key) / query.shape[-1] ** 0.5
    lse = scores.logsumexp(-1)
    return torch.einsum("bqhk,bkhd->bqhd", (scores - lse[..., None]).exp(), value), lse


@contextmanager
def parallelism_on_cpus() -> Iterator[None]:
    """What diffusers asks about accelerators."""
    with (
        patch("torch._C._get_accelerator", lambda *_: torch.device("cpu")),
        patch("torch.accelerator.device_count", lambda: 1),
    ):
        yield


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder / 'meeting'}", timedelta(seconds=PATIENCE), world_size=RANKS, rank=rank
    )
    ulysses, ring = splitting(ulysses_degree=RANKS), splitting(ring_degree=RANKS)

    def split_in_ring(transformer: Any) -> None:
        ring(transformer)
        patch("diffusers.models.attention_dispatch._native_attention_forward_op", attention_with_lse).start()

    results: dict[str, Any] = {}
    with parallelism_on_cpus():
        for name, result in all_cases(ulysses, split_in_ring, rank):
            patch.stopall()
            results[name] = result
        results["late"] = enabled_too_early(ulysses)
        torch.save(results, folder / f"{rank}.pt")
        distributed.barrier()
        pipe = build_pipeline()
        ulysses(pipe.transformer)
    with tap.enabled(pipe, tap.TAPConfig(full_steps=6)):
        if rank == 1:
            sample(pipe, steps=12, callback_on_step_end=interrupt_at(3))  # which ends the process
        try:
            sample(pipe, steps=12)
        except Exception as error:
            left = {"error": repr(error), "cache": hooks(pipe)[0].engine.cache_bytes}
            torch.save(left, folder / "left alone.pt")


def enabled_too_early(split: Split) -> str:
    model = build("FluxTransformer2DModel")
    with tap.enabled(model):
        split(model)
        with pytest.raises(UnsupportedModelError) as raised:
            denoise(model, CASES["FluxTransformer2DModel"])
        tap.enable(model, CONFIG)
        denoise(model, CASES["FluxTransformer2DModel"])
        assert tap.report(model).predicted_steps > 0
    return str(raised.value)


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    waiting = [process for process in processes if process.is_alive()]
    for process in waiting:
        process.kill()
    assert not waiting, "a rank waits for the other"
    return folder


@pytest.fixture(scope="module")
def by_rank(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Result]:
    return dict(all_cases(lambda _: None, lambda _: None, None))


def test_all_cases_are_run(by_rank: list[dict[str, Any]], alone: dict[str, Result]) -> None:
    assert list(alone) == CASE_NAMES
    assert all(list(results) == [*CASE_NAMES, "late"] for results in by_rank)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_two_ranks_give_what_one_gives(by_rank: list[dict[str, Any]], alone: dict[str, Result], name: str) -> None:
    expected = alone[name]
    found = [results[name] for results in by_rank]
    assert any(not full for _, full in expected["steps"])
    for result in found:
        assert (result["steps"], result["fallbacks"]) == (expected["steps"], expected["fallbacks"])
    assert torch.equal(found[0]["latents"], found[1]["latents"])
    scale = float(expected["latents"].abs().max())
    torch.testing.assert_close(found[0]["latents"], expected["latents"], rtol=0, atol=1e-4 * scale)
    for whole, *parts in zip(expected["choices"], *(result["choices"] for result in found), strict=True):
        assert torch.equal(torch.cat(parts, dim=1), whole)
    if name in GRANULARITIES:
        shared = 2 * (32 + 1) * 4  # each rank has a mean token of its own, and a spread, for both branches
        assert found[0]["cache"] == found[1]["cache"] == (expected["cache"] - shared) // RANKS + shared


def test_a_value_that_is_not_finite_makes_the_step_full_on_all_ranks(alone: dict[str, Result]) -> None:
    # The test before has compared the ranks with this.
    assert alone["bad residual"]["fallbacks"].keys() == {"non-finite values in the last full step"}
    assert alone["bad probe"]["fallbacks"]["non-finite values"] == 1


def test_a_rank_left_alone_fails_and_forgets(folder: Path, by_rank: list[dict[str, Any]]) -> None:
    left = torch.load(folder / "left alone.pt")
    assert "RuntimeError" in left["error"] or "DistBackendError" in left["error"], left["error"]
    assert left["cache"] == 0


def test_parallelism_enabled_after_tap_is_refused(by_rank: list[dict[str, Any]]) -> None:
    assert "call tap.enable(...) again, after enable_parallelism(...)" in by_rank[0]["late"]


def test_one_process_has_nobody_to_ask() -> None:
    transformer = build_transformer()
    with tap.enabled(transformer):
        assert not hooks(transformer)[0].engine._ranks.several
