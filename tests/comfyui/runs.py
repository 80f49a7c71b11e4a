"""Sampling runs of tiny models, as ComfyUI's KSampler node makes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import real  # noqa: F401 - finds ComfyUI

# isort: split
import torch
from comfy import sample as comfy_sample
from comfy import samplers
from tiny_comfy import MODELS, Conditioning, noise
from torch import Tensor

STEPS = 12


def sample(
    patcher: Any,
    name: str,
    sampler: str = "euler",
    *,
    steps: int = STEPS,
    cfg: float = 3.0,
    denoise: float = 1.0,
    batch: int = 1,
    size: tuple[int, ...] | None = None,
    positive: Conditioning | None = None,
    negative: Conditioning | None = None,
    seed: int = 3,
    **more: Any,
) -> Tensor:
    """What a run makes of noise, or of a latent where ``denoise`` is below 1.

    Args:
        size: of the latent, without the batch, where it is not the model's usual one.
        more: for ``comfy.sample.sample``.
    """
    x = noise(batch, *(size or MODELS[name].latent), seed=seed)
    latent = None if denoise == 1 else noise(*x.shape, seed=seed + 1)
    return sample_from(
        patcher, name, x, sampler, steps=steps, cfg=cfg, denoise=denoise, positive=positive, negative=negative,
        latent=latent, **more,
    )  # fmt: skip


def sample_from(
    patcher: Any,
    name: str,
    x: Tensor,
    sampler: str = "euler",
    *,
    steps: int = STEPS,
    cfg: float = 3.0,
    positive: Conditioning | None = None,
    negative: Conditioning | None = None,
    latent: Tensor | None = None,
    **more: Any,
) -> Tensor:
    """What a run makes of this noise."""
    tiny = MODELS[name]
    positive, negative = positive or tiny.condition(1), negative or tiny.condition(2)
    latent = torch.zeros_like(x) if latent is None else latent
    result: Tensor = comfy_sample.sample(
        patcher, x, steps, cfg, sampler, "simple", positive, negative, latent, disable_pbar=True, seed=0, **more
    )
    assert result.isfinite().all()
    return result


def sample_with(
    patcher: Any, name: str, sampler: Any, sigmas: Tensor, *, cfg: float = 3.0, callback: Any = None
) -> Tensor:
    """A run with a sampler and sigmas of one's own, as the node SamplerCustom makes it."""
    tiny = MODELS[name]
    x = noise(1, *tiny.latent, seed=3)
    if isinstance(sampler, str):
        sampler = samplers.sampler_object(sampler)
    elif callable(sampler):
        sampler = samplers.KSAMPLER(sampler)
    result: Tensor = comfy_sample.sample_custom(
        patcher, x, cfg, sampler, sigmas, tiny.condition(1), tiny.condition(2), torch.zeros_like(x), callback=callback,
        disable_pbar=True, seed=0,
    )  # fmt: skip
    return result


def distance(one: Tensor, other: Tensor) -> float:
    """Relative to the norm of the other."""
    return float((one.double() - other.double()).norm() / other.double().norm())


@dataclass
class Call:
    """One call of the transformer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    modules: set[str] = field(default_factory=set)  # those without children that ran in it


@contextmanager
def watched(patcher: Any, standing_still: bool = False) -> Iterator[list[Call]]:
    """What the transformer gets and gives, call by call.

    Args:
        standing_still: the transformer gets the noisy latent and the time of its first call, again and again. The
            sampler goes on as always, and so does TAP: only the transformer stands still. So each of its outputs is to
            be the same, and what a predicted step gives can be held against what a full one does.
    """
    model, calls = patcher.model.diffusion_model, list[Call]()

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if standing_still and calls:
            first = calls[0]
            args = (first.args[0], first.args[1], *args[2:])
            # Some models look up their time in these.
            time = {key: first.kwargs["transformer_options"][key] for key in ("sigmas", "sample_sigmas")}
            kwargs = kwargs | {"transformer_options": kwargs["transformer_options"] | time}
        calls.append(Call(tuple(_copied(arg) for arg in args), {k: _copied(v) for k, v in kwargs.items()}))
        return tuple(_copied(arg) for arg in args), kwargs

    def leave(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls[-1].output = output.clone()

    def note(name: str) -> Any:
        return lambda *_: calls[-1].modules.add(name)

    handles = [
        model.register_forward_pre_hook(enter, with_kwargs=True),
        model.register_forward_hook(leave, with_kwargs=True),
        *(part.register_forward_hook(note(n)) for n, part in model.named_modules() if not list(part.children())),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def full_passes(report: Any, branches: int = 2) -> list[bool]:
    """Of each pass of a run, whether it was full; each had so many branches in its batch."""
    flags = [full for _, full, _ in report.calls]
    return flags[::branches]
