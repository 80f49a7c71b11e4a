"""Turning TAP on and off for a pipeline or a transformer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.errors import ConfigError, UnsupportedModelError
from tap_diffusion.core.report import Report
from tap_diffusion.core.timeline import Prediction
from tap_diffusion.integrations.depth import Depth, parameters, unwrapped
from tap_diffusion.integrations.diffusers.hook import TAPHook, refuse_other_caches, register, schedulers_of, unregister
from tap_diffusion.integrations.diffusers.loops import Loop, Numbers
from tap_diffusion.integrations.specs import REFUSED, SPECS, Stream, TransformerSpec

_NAME = "tap_diffusion"


def apply_tap(
    module: nn.Module,
    config: TAPConfig | None = None,
    *,
    blocks: str | Sequence[str] | None = None,
    probe: str | None = None,
    timestep: str | None = None,
    conditioning: str | None = None,
    spec: TransformerSpec | None = None,
    sigmas: Numbers | None = None,
    alphas_cumprod: Numbers | None = None,
    times: Numbers | None = None,
    prediction: Prediction | None = "flow",
    fresh_noise: bool = False,
) -> None:
    """Accelerate a transformer, in the manner of diffusers' ``apply_*`` hooks.

    Applying TAP again replaces the configuration. Whatever pipelines use the transformer are accelerated; tell
    TAP of each one by :func:`enable` on the pipeline, for the reasons given there.

    A class of diffusers is known, see :data:`SPECS`. Of any other module say where its blocks are, as long as they
    run one after the other and each takes and returns the stream of tokens, (B, N, D), as first argument and only
    result; the rest is found by itself. For anything else write a spec.

    Where no scheduler of diffusers runs the transformer, but a loop of your own, say what its noise is. Then full
    steps, clock and hindsight are what they are in a pipeline (docs/your-own-loop.md).

    Args:
        module: the transformer.
        config: defaults to ``TAPConfig()``.
        blocks: names of the lists of blocks, in the order in which they run.
        probe: child of the first block whose input is the probe; by default the first that looks like attention.
        timestep: argument of the transformer that tells the time, if not ``timestep``, ``timesteps``, ``t``, ``sigma``
            or what is known of its class.
        conditioning: argument that tells the branches of guidance apart, and new prompts, if not
            ``encoder_hidden_states``, ``y``, ``context``, ``class_labels`` or what is known of its class.
        spec: a ``TransformerSpec`` (of :mod:`tap_diffusion.integrations.specs`) that tells everything, instead of
            ``blocks`` and ``probe``.
        sigmas, alphas_cumprod, times, prediction, fresh_noise: of the loop, as for :func:`trajectory`; for loops that
            differ, say it there.

    Raises:
        UnsupportedModelError: the class is not known and no blocks are named, or it can't be accelerated.
        ValueError: another cache is enabled on it, diffusers' or cache-dit's.
        TypeError: ``config`` is something else than a ``TAPConfig``.
        ConfigError: what is said of the loop can't be.
    """
    config = TAPConfig() if config is None else config
    if not isinstance(config, TAPConfig):
        raise TypeError(f"config is {config!r}; give a TAPConfig, such as TAPConfig(speedup=5)")
    loop = None
    if fresh_noise or any(levels is not None for levels in (sigmas, alphas_cumprod, times)):
        loop = Loop(sigmas, alphas_cumprod, times, prediction, fresh_noise)
    module = inmost(module)
    if spec is None:
        spec = _spec(module) if blocks is None else _inferred_spec(module, blocks, probe, timestep)
    spec = _with_arguments(module, spec, timestep, conditioning)
    depth = Depth(module, spec)  # raises where this one lacks what its class should have
    refuse_other_caches(module)
    previous = _hook(module)
    hook = TAPHook(config, depth, loop)
    if previous is not None:
        hook.pipelines, hook.peers = previous.pipelines, previous.peers
        previous.finish()
        _remove(module)
    with _beneath_accelerate(module):
        register(hook, module, _NAME)


@contextmanager
def trajectory(
    module: nn.Module,
    *,
    sigmas: Numbers | None = None,
    alphas_cumprod: Numbers | None = None,
    times: Numbers | None = None,
    prediction: Prediction | None = "flow",
    fresh_noise: bool = False,
) -> Iterator[None]:
    """One run of a loop of your own: within this, this thread's calls of the transformer are one trajectory.

    It goes before all else that TAP knows of the noise, and the cache is freed at its end. Needed where sigmas differ
    from run to run, as in inversion and edit.

    Args:
        module: the transformer, on which TAP is enabled.
        sigmas: noise where each step starts and, last, where the last step ends: (S + 1,), falling, or rising
            (inversion). With ``prediction="flow"`` σ of the latent (1 - σ) x₀ + σ ε; else σ/α of α x₀ + σ ε, which is
            what k-diffusion calls sigma, or that over σ_data for networks with Karras et al.'s preconditioning, which
            predict ``v_prediction``.
        alphas_cumprod: instead of sigmas: ᾱ = α² of the latent α x₀ + σ ε with α² + σ² = 1, likewise (S + 1,).
        times: what the transformer's timestep argument is at each step, (S,). Without, the first call tells whether it
            is σ, 1 - σ or a thousand times that; σ alone, where no flow is predicted.
        prediction: what the model predicts: ``flow`` (ε - x₀, or the negative), ``epsilon``, ``v_prediction`` or
            ``sample``. Hindsight makes up for errors as if steps were of first order (Euler, DDIM). None: something
            else is predicted, or steps are of another kind, and nothing is made up for.
        fresh_noise: steps add random noise (ancestral, DDPM, SDE).

    Raises:
        ConfigError: a value is out of its domain, or two contradict each other.
        ValueError: TAP is not enabled on the transformer. Also raised by its calls: the timestep is none of the loop's,
            or steps are left out.
    """
    loop = Loop(sigmas, alphas_cumprod, times, prediction, fresh_noise)
    hook = _hook(inmost(module))
    if hook is None:
        raise ValueError(f"TAP is not enabled on this {type(module).__name__}; call tap.apply_tap(...) first")
    with hook.trajectory(loop):
        yield


def enable(target: DiffusionPipeline | nn.Module, config: TAPConfig | None = None, **fields: Any) -> None:
    """Accelerate a pipeline, or a transformer by itself.

    Prefer the pipeline: its scheduler tells TAP where a run begins and ends. By its timesteps alone a transformer
    can tell a new run too, as long as that starts higher than the last one stopped or has other prompt embeddings,
    but it keeps the cache until the next run or :func:`disable`, and on a GPU it waits for the timestep. In a loop of
    your own, :func:`apply_tap` takes its noise.

    All transformers of a pipeline are accelerated, each with a cache and warm-up of its own (Wan 2.2 has two).

    Args:
        target: the pipeline or the transformer.
        config: defaults to ``TAPConfig()``, the recommended settings.
        fields: of :class:`TAPConfig`, in place of one, such as ``speedup=6``.

    Raises:
        ConfigError: there is no such field, its value is not allowed, or there is a ``config`` too.
        UnsupportedModelError: the message names the class and the reason.
        ValueError, TypeError: see :func:`apply_tap`.
    """
    if fields:
        if config is not None:
            raise ConfigError(f"give a TAPConfig or fields of one ({', '.join(fields)}), not both")
        config = TAPConfig.from_dict(fields)
    for transformer in supported(target):  # all or none
        apply_tap(transformer, config)
    if not isinstance(target, nn.Module):
        applied = hooks(target)
        for hook in applied:
            hook.peers = [other for other in applied if other is not hook]
            hook.pipelines.add(target)


def disable(target: DiffusionPipeline | nn.Module) -> None:
    """Undo :func:`enable` without a trace. Does nothing where TAP is not enabled."""
    for transformer in transformers(target):
        hook = _hook(transformer)
        if hook is not None:
            hook.finish()
            _remove(transformer)


@contextmanager
def enabled(target: DiffusionPipeline | nn.Module, config: TAPConfig | None = None, **fields: Any) -> Iterator[None]:
    """:func:`enable` within a ``with`` block; :func:`disable` at its end, also after an exception."""
    enable(target, config, **fields)
    try:
        yield
    finally:
        disable(target)


def report(target: DiffusionPipeline | nn.Module) -> Report:
    """What the current or last trajectory did. Raises ValueError where TAP is not enabled.

    With several transformers their steps are listed one transformer after the other.
    """
    schedulers = [] if isinstance(target, nn.Module) else schedulers_of(target)
    reports = [hook.report_of(schedulers) for hook in hooks(target)]
    if not reports:
        raise ValueError(f"TAP is not enabled on this {type(target).__name__}; call tap.enable(...) first")
    return reports[0] if len(reports) == 1 else Report.joined(reports)


def hooks(target: DiffusionPipeline | nn.Module) -> list[TAPHook]:
    """TAP's hooks on the transformers of a pipeline, or on one transformer; none where TAP is not enabled."""
    return [hook for hook in map(_hook, transformers(target)) if hook is not None]


def transformers(target: DiffusionPipeline | nn.Module) -> list[nn.Module]:
    """The transformers that denoise."""
    if isinstance(target, nn.Module):
        return [inmost(target)]
    components = getattr(target, "components", {})
    found = [inmost(part) for part in components.values() if isinstance(part, nn.Module)]
    known = [part for part in found if _class_of(part) in SPECS]
    if known:
        return known
    transformer = getattr(target, "transformer", None)
    if isinstance(transformer, nn.Module):
        return [inmost(transformer)]
    if getattr(target, "unet", None) is not None:
        raise UnsupportedModelError(
            f"{type(target).__name__} has a UNet; TAP needs a transformer, whose blocks share one residual stream"
        )
    raise UnsupportedModelError(f"{type(target).__name__} has no transformer that TAP could accelerate")


def supported(target: DiffusionPipeline | nn.Module) -> list[nn.Module]:
    """:func:`transformers`, if TAP knows them all. Raises UnsupportedModelError where it doesn't."""
    found = transformers(target)
    for transformer in found:
        _spec(transformer)
    return found


def _spec(module: nn.Module) -> TransformerSpec:
    name = _class_of(module)
    if name in REFUSED:
        raise UnsupportedModelError(f"{name} can't be accelerated: {REFUSED[name]}")
    if name not in SPECS:
        raise UnsupportedModelError(
            f"{name} is not known to TAP (`tap models` lists what is). If its blocks run one after the other,"
            " name them: tap.apply_tap(module, config, blocks=...)"
        )
    return SPECS[name]


def _class_of(module: nn.Module) -> str:
    """Its class, or the first that TAP knows of those that it is made from (fully_shard makes a subclass, users do)."""
    names = [kind.__name__ for kind in type(module).__mro__]
    return next((name for name in names if name in SPECS or name in REFUSED), names[0])


def inmost(module: nn.Module) -> nn.Module:
    """The transformer within what torch.compile, PEFT or a parallel wrapper puts around it."""
    while _class_of(module) not in SPECS:
        if type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
            inner = module.module
        elif callable(unwrap := getattr(module, "get_base_model", None)):  # PeftModel
            inner = unwrap()
        else:
            inner = unwrapped(module)
        if inner is module or not isinstance(inner, nn.Module):
            break
        module = inner
    return module


def _with_arguments(
    module: nn.Module, spec: TransformerSpec, timestep: str | None, conditioning: str | None
) -> TransformerSpec:
    """A spec with the arguments of the transformer that its user names."""
    known = inspect.signature(type(module).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for name in (timestep, conditioning):
        if name is not None and name not in known and not takes_any:
            others = ", ".join(list(known)[1:])
            raise UnsupportedModelError(f"{type(module).__name__}.forward has no argument {name!r}, but {others}")
    return replace(spec, timestep=timestep or spec.timestep, conditioning=conditioning or spec.conditioning)


def _inferred_spec(
    module: nn.Module, blocks: str | Sequence[str], probe: str | None, timestep: str | None
) -> TransformerSpec:
    names = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    title = type(module).__name__
    for name in names:
        if not isinstance(getattr(module, name, None), nn.ModuleList):
            raise UnsupportedModelError(f"{title} has no nn.ModuleList named {name!r}")
    first = next(iter(getattr(module, names[0])), None)
    if first is None:
        raise UnsupportedModelError(f"{names[0]} of this {title} is empty")
    if probe is not None and not hasattr(first, probe):
        raise UnsupportedModelError(f"the first block of this {title} has no child named {probe!r}")
    known = parameters(type(module).forward)
    times = [timestep] if timestep else [name for name in ("timestep", "timesteps", "t", "sigma") if name in known]
    if not times:
        raise UnsupportedModelError(
            f"{title}.forward has no argument that tells the time, by a name that TAP knows: name it, timestep=..., one"
            f" of {', '.join(known)}"
        )
    conditions = [name for name in ("encoder_hidden_states", "y", "context", "class_labels") if name in known]
    return TransformerSpec(
        blocks=names,
        streams=(Stream(parameters(type(first).forward)[0]),),
        attention=probe,
        timestep=times[0],
        conditioning=conditions[0] if conditions else "",
    )


def _hook(module: nn.Module) -> TAPHook | None:
    registry = getattr(module, "_diffusers_hook", None)
    return registry.get_hook(_NAME) if registry is not None else None


def _remove(module: nn.Module) -> None:
    registry: Any = module._diffusers_hook
    with _beneath_accelerate(module):
        unregister(module, _NAME)
        if not registry.hooks:
            # diffusers leaves the original forward behind as an attribute of the instance, and the empty registry.
            if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
                del module.__dict__["forward"]
            del module._diffusers_hook


@contextmanager
def _beneath_accelerate(module: Any) -> Iterator[None]:
    """Change the forward that accelerate's hook wraps, rather than wrap it in turn.

    Pipelines with model offloading remove accelerate's hook after each run and add it anew, and with it goes whatever
    has been put around it.
    """
    offloaded = module.__dict__.get("forward") if "_hf_hook" in module.__dict__ else None
    if offloaded is None:
        yield
        return
    module.forward = module._old_forward
    try:
        yield
    finally:
        module._old_forward = module.forward
        module.forward = offloaded
