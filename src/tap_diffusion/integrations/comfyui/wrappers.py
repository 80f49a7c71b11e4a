"""TAP for ComfyUI: a model patcher that is accelerated while it samples, and leaves the model under it as it is.

Of ComfyUI this needs what its ``comfy.patcher_extension`` offers to all extensions: wrappers around a sampling run
(``OUTER_SAMPLE``), around each evaluation that a sampler asks for (``PREDICT_NOISE``), and around each call of the
model (``APPLY_MODEL``), of which one evaluation makes as many as memory and conditions require. So nothing has to be
guessed: all state belongs to one run and is gone with it, and every part of a batch says which condition it is for.
Diffusers is not needed.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.errors import ConfigError, UnsupportedModelError, told_by, warn
from tap_diffusion.core.report import Report
from tap_diffusion.core.timeline import Timeline
from tap_diffusion.integrations.comfyui.rehearsal import NotPlannedError, Rehearsal, rehearse, step_at
from tap_diffusion.integrations.comfyui.specs import spec_of
from tap_diffusion.integrations.depth import Depth, unwrapped
from tap_diffusion.integrations.passes import Passes
from tap_diffusion.integrations.specs import TransformerSpec

KEY = "tap_diffusion"  # of wrappers, of the attachment, and of the run among a run's transformer options

# Of the arguments of BaseModel.apply_model, those that ComfyUI passes on by position.
_BY_POSITION = ("x", "t", "c_concat", "c_crossattn", "control", "transformer_options")

_log = logging.getLogger(__name__)

_OTHER_CACHES = {  # by keys of their wrappers and of a run's transformer options; LazyCache has both of these
    "lazycache": "LazyCache", "easycache": "EasyCache", "rel_l1_thresh": "TeaCache", "cache_dit_turbo": "CacheDiT",
    "wan_cache": "CacheDiT", "ltx2_cache": "CacheDiT",
}  # fmt: skip


def accelerate(
    model: Any,
    config: TAPConfig | None = None,
    spec: TransformerSpec | None = None,
    *,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> Any:
    """A clone of a model patcher that is accelerated. The one given, and the model that both share, stay as they are.

    Accelerating an accelerated one replaces the configuration.

    Args:
        model: ComfyUI's ``ModelPatcher``, a node's MODEL.
        config: defaults to ``TAPConfig()``. ``steps`` may be left out: ComfyUI's sigmas tell.
        spec: of the diffusion model, where its class is not one of
            :data:`~tap_diffusion.integrations.comfyui.specs.SPECS`.
        start_percent, end_percent: part of the sampling, from 0 to 1 as ComfyUI counts it, in which steps may be
            predicted; ``config`` divides the steps there, and those outside are full.

    Raises:
        ConfigError: there is no such part.
        UnsupportedModelError: the message names the class and the reason.
        RuntimeError: ComfyUI is too old.
    """
    from comfy.patcher_extension import WrappersMP

    if not hasattr(WrappersMP, "PREDICT_NOISE"):
        raise RuntimeError("this ComfyUI is too old for TAP: it has no WrappersMP.PREDICT_NOISE; update ComfyUI")
    if not 0 <= start_percent < end_percent <= 1:
        raise ConfigError(
            f"start_percent={start_percent:g} and end_percent={end_percent:g}: give 0 ≤ start_percent < end_percent ≤ 1"
        )
    module = unwrapped(model.get_model_object("diffusion_model"))
    accelerator = _Accelerator(config or TAPConfig(), spec or spec_of(module), (start_percent, end_percent))
    accelerator.depth(module)  # raises where this one lacks what its class should have
    clone = model.clone()
    for place, wrapper in (
        (WrappersMP.OUTER_SAMPLE, accelerator.sample),
        (WrappersMP.PREDICT_NOISE, accelerator.evaluate),
        (WrappersMP.APPLY_MODEL, accelerator.call),
    ):
        clone.remove_wrappers_with_key(place, KEY)
        clone.add_wrapper_with_key(place, KEY, wrapper)
    clone.set_attachments(KEY, accelerator)
    return clone


def report(model: Any) -> Report | None:
    """What the last run of an accelerated model patcher, or of a clone of it, did.

    None: there was none, or TAP left it alone, or it did not come to its end.

    Raises:
        ValueError: it is not accelerated.
    """
    accelerator = model.get_attachment(KEY)
    if accelerator is None:
        raise ValueError("this model is not accelerated by TAP; call accelerate(model) first")
    found: Report | None = accelerator.report
    return found


class _Accelerator:
    """The wrappers of one accelerated model patcher and its clones. Keeps nothing of a run but its report."""

    def __init__(self, config: TAPConfig, spec: TransformerSpec, part: tuple[float, float]) -> None:
        self.config, self.spec, self.part = config, spec, part
        self.report: Report | None = None

    def depth(self, module: nn.Module) -> Depth:
        """Where a diffusion model's blocks are. Raises UnsupportedModelError where they are not as they should be."""
        depth = Depth(module, self.spec)
        try:
            places = [stream.head for stream in self.spec.streams if stream.head is not None]
            for place in (*places, *self.spec.blocks):
                module.get_submodule(place)
            if self.spec.attention is not None:
                unwrapped(depth.first).get_submodule(self.spec.attention)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{type(module).__name__} of this ComfyUI is not built as TAP knows it: {error}"
            ) from error
        return depth

    def sample(self, executor: Any, noise: Any, latent: Any, sampler: Any, sigmas: Any, *args: Any, **kw: Any) -> Any:
        """Around a whole sampling run."""
        self.report = None
        guider = executor.class_obj
        options = guider.model_options
        transformer_options = options.get("transformer_options", {})
        _refuse_other_caches(transformer_options)
        with told_by(_log.warning):
            try:
                run = _Run(self, sampler, sigmas, guider.model_patcher.get_model_object("model_sampling"))
            except NotPlannedError as error:
                warn(f"TAP leaves this run alone: {error}.")
                return executor(noise, latent, sampler, sigmas, *args, **kw)
            guider.model_options = options | {"transformer_options": transformer_options | {KEY: run}}
            try:
                output = executor(noise, latent, sampler, sigmas, *args, **kw)
            finally:
                guider.model_options = options
                run.detach()
            self.report = run.finish()
        if self.report is not None:
            done = self.report
            _log.info(
                f"TAP: {done.full_steps} of {done.steps} steps full, {done.times_faster:.1f}x faster, cache"
                f" {done.cache_bytes / 1e6:.3g} MB"
            )
        return output

    def evaluate(self, executor: Any, x: Any, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around each evaluation that the sampler asks for."""
        run = executor.class_obj.model_options.get("transformer_options", {}).get(KEY)
        if run is not None:
            run.advance(timestep)
        return executor(x, timestep, *args, **kwargs)

    def call(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around each call of the model."""
        behind = executor.wrappers[executor.idx + 1 :]
        if behind:  # others first: what they put into the model (compiled blocks) is to meet it as it is
            wrappers = [*executor.wrappers[: executor.idx], *behind, self.call]
            inmost = type(executor)(executor.original, executor.class_obj, wrappers, executor.idx)
            return inmost.execute(x, *args, **kwargs)
        options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[4]
        run = options.get(KEY)
        if run is None or not run.has_begun:  # not within a sampling run, or by a guider that tells no evaluations
            return executor(x, *args, **kwargs)
        module = unwrapped(executor.class_obj.diffusion_model)
        return run.call(module, options, partial(executor, x, *args, **kwargs), x)


class _Run:
    """One sampling run.

    Raises:
        NotPlannedError: its steps can't be told beforehand.
    """

    def __init__(self, accelerator: _Accelerator, sampler: Any, sigmas: Tensor, model_sampling: Any) -> None:
        given = sigmas.tolist()[:-1]
        if not given or given[-1] <= 0 or not all(a > b for a, b in pairwise(given)):
            raise NotPlannedError("its sigmas do not fall from step to step")
        try:
            rehearsal = rehearse(sampler, sigmas, model_sampling)
        except NotPlannedError as error:
            raise NotPlannedError(f"{_name(sampler)} chooses its own steps, since {error}") from error
        levels = tuple(given) if rehearsal is None else rehearsal.levels
        self._accelerator = accelerator
        self._position = _Position(levels, rehearsal)
        self._steps = len(levels)
        self._timeline = _timeline(levels, model_sampling, sampler, rehearsal)
        self._within: range | None = None
        if accelerator.part != (0, 1):
            start, end = (float(model_sampling.percent_to_sigma(percent)) for percent in accelerator.part)
            self._within = _within(levels, start, end)
        self._lanes: dict[int, _Lane] = {}  # by id of the diffusion model: there are several with several GPUs
        self._names: dict[Hashable, str] = {}  # of branches
        self._seen: Counter[Hashable] = Counter()  # branches in this evaluation

    def __deepcopy__(self, memo: Any) -> _Run:
        return self  # extensions copy the options in which it travels

    @property
    def has_begun(self) -> bool:
        """Whether the sampler has asked for an evaluation."""
        return self._position.step >= 0

    def advance(self, sigma: Tensor) -> None:
        """The sampler asks for another evaluation."""
        self._seen.clear()
        before = self._position.step
        goes_on = self._position.advance(sigma)
        for lane in self._lanes.values():
            if not goes_on:
                lane.engine.reset()
            elif self._position.step > before:  # conditions come and go, and windows of frames may move at each step
                lane.engine.forget(before - self._position.reach)

    def call(self, module: nn.Module, options: dict[str, Any], forward: partial[Any], x: Tensor) -> Any:
        """One call of a diffusion model, for one condition or several."""
        lane = self._lanes.get(id(module))
        if lane is None:
            lane = self._lanes[id(module)] = _Lane(self._accelerator, module)
        first = not lane.has_begun
        branches = self._branches(options, len(x))
        step, known = self._position.step, (self._steps, self._timeline)
        calls = [
            Call(step, self._named(branch), first and i == 0, None, *known, within=self._within)
            for i, branch in enumerate(branches)
        ]
        for call, (*part, turn) in zip(calls, branches, strict=True):
            if turn > 0:  # the first of its kind
                lane.engine.begin_like(call, self._named((*part, turn - 1)))
        return lane.run_on(calls, forward, x.device)

    def _branches(self, options: dict[str, Any], batch: int) -> list[tuple[Any, ...]]:
        """The branch of each part of a batch, with the turn at the end.

        A part is known by its condition. A condition may come again within one evaluation (skip-layer guidance), at a
        step's second evaluation (Heun), and for one window of frames after the other.
        """
        conditions = options.get("cond_or_uncond") or [0]
        uuids = options.get("uuids") or [None] * len(conditions)
        parts = list(zip(conditions, uuids, strict=True))
        if batch % len(parts):  # an extension has divided the batch in its own way
            parts = [(conditions[0], None)]
        window = getattr(options.get("context_window"), "index_list", None)
        branches = []
        for condition, uuid in parts:
            part = condition, uuid, None if window is None else tuple(window)
            self._seen[part] += 1
            branches.append((*part, self._seen[part], self._position.turn))
        return branches

    def _named(self, branch: tuple[Any, ...]) -> str:
        if branch not in self._names:
            kind = "cond" if branch[0] == 0 else "uncond"
            count = sum(name.split()[0] == kind for name in self._names.values())
            self._names[branch] = kind if count == 0 else f"{kind} {count + 1}"
        return self._names[branch]

    def detach(self) -> None:
        """Leave the models as they were."""
        for lane in self._lanes.values():
            lane.detach()

    def finish(self) -> Report | None:
        """Free all; return what was done, if anything was."""
        if not self._lanes:
            warn("TAP did not see this run: its guider does not tell extensions of its evaluations (PREDICT_NOISE).")
            return None
        for lane in self._lanes.values():
            lane.engine.finish()
        reports = [lane.engine.report for lane in self._lanes.values()]
        return reports[0] if len(reports) == 1 else Report.joined(reports)


class _Lane(Passes):
    """One diffusion model within a run."""

    def __init__(self, accelerator: _Accelerator, module: nn.Module) -> None:
        super().__init__(accelerator.config, accelerator.spec)
        self._module = module
        self._depth_of: Callable[[nn.Module], Depth] = accelerator.depth
        self._depth = accelerator.depth(module)
        self._depth.attach()
        self.has_begun = False

    def detach(self) -> None:
        """Leave the model as it was."""
        self._depth.detach()

    def run_on(self, calls: list[Call], forward: partial[Any], device: torch.device) -> Any:
        """One call of the diffusion model, whose blocks may have been replaced since the last one."""
        self.has_begun = True
        if not self._depth.is_current():
            self._depth.detach()
            self._depth = self._depth_of(self._module)
            self._depth.attach()
        depth = self._depth

        def run(model: nn.Module, without: Sequence[str]) -> Any:
            names = dict(enumerate(_BY_POSITION))
            args = [None if names.get(i) in without else value for i, value in enumerate(forward.args)]
            given = {name: value for name, value in forward.keywords.items() if name not in without}
            with nullcontext() if model is self._module else depth.lent(model):
                return forward.func(*args, **given)

        return self.run(depth, calls, run, device)


class _Position:
    """Which step an evaluation belongs to, and which one of the step's evaluations it is.

    Heun's trial evaluation is at the noise of the next step, and counts as that one's first. So each history holds
    evaluations of one kind.

    Args:
        levels: noise that the steps start from.
        rehearsal: how often the sampler evaluates the model; None: the noise tells, and reading it waits for a GPU.

    Attributes:
        step: counts from the start of the run.
        turn: counts from 0 within the step.
        reach: by how many steps a sampler goes back that doesn't add noise (Heun++).
    """

    def __init__(self, levels: tuple[float, ...], rehearsal: Rehearsal | None) -> None:
        self._levels = levels
        self._planned = () if rehearsal is None else rehearsal.evaluations
        steps = [step_at(levels, noise) for noise in self._planned]
        self._goes_back = rehearsal is not None and not rehearsal.fresh_noise
        self.reach = max((0, *(a - b for a, b in pairwise(steps)))) if self._goes_back else 0
        self._count = 0
        self._visits: Counter[int] = Counter()
        self.step, self.turn = -1, 0

    def advance(self, sigma: Tensor) -> bool:
        """Take note of another evaluation; return whether it goes on from the last. If noise was added, it doesn't."""
        noise = self._planned[self._count] if self._count < len(self._planned) else float(sigma.max())
        self._count += 1
        if not sigma.is_cuda and not math.isclose(noise, actual := float(sigma.max()), rel_tol=1e-3):
            self._planned, noise = (), actual  # something else has evaluated the model in between
        step = step_at(self._levels, noise)
        goes_on = step >= self.step or self._goes_back
        if not goes_on:
            self._visits.clear()
        self.step, self.turn = step, self._visits[step]
        self._visits[step] += 1
        return goes_on


def _timeline(
    levels: tuple[float, ...], model_sampling: Any, sampler: Any, rehearsal: Rehearsal | None
) -> Timeline | None:
    """The noise of a run's steps, σ/α, what the model predicts, and what noise the sampler adds."""
    sigma = torch.tensor(levels)
    alpha = model_sampling.noise_scaling(sigma, torch.zeros_like(sigma), torch.ones_like(sigma)).tolist()
    is_flow = all(math.isclose(a + level, 1, abs_tol=1e-4) for a, level in zip(alpha, levels, strict=True))
    noise = tuple(level / a if a > 0 else math.inf for a, level in zip(alpha, levels, strict=True))
    if not all(a > b for a, b in pairwise(noise)):
        return None
    fresh = rehearsal is not None and rehearsal.fresh_noise
    # Hindsight takes for granted that a flow's steps are Euler's.
    known = is_flow and rehearsal is not None and (fresh or rehearsal.is_euler)
    return Timeline(
        noise,
        "flow" if known else None,
        fresh_noise=_name(sampler) if fresh else None,
        kept=1.0 if rehearsal is None else rehearsal.kept,
    )


def _within(levels: tuple[float, ...], start: float, end: float) -> range:
    """The steps of a run that start between two noise levels, the larger first."""
    inside = [step for step, level in enumerate(levels) if end <= level <= start]
    return range(inside[0], inside[-1] + 1) if inside else range(0)


def _name(sampler: Any) -> str:
    name: str = getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)
    return name


def _refuse_other_caches(transformer_options: dict[str, Any]) -> None:
    wrappers = transformer_options.get("wrappers", {}).values()
    keys = {key for by_key in wrappers for key, found in by_key.items() if found} | set(transformer_options)
    found = [title for key, title in _OTHER_CACHES.items() if key in keys]
    if found:
        raise ValueError(
            f"{found[0]} and TAP are both on this model, and each would mislead the other: remove one node"
        )
