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
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tap_diffusion.config import TAPConfig
from tap_diffusion.errors import TAPWarning, UnsupportedModelError
from tap_diffusion.integrations.depth import Depth, unwrapped
from tap_diffusion.integrations.models import Stream, TransformerSpec
from tap_diffusion.integrations.passes import Passes
from tap_diffusion.reporting import Report
from tap_diffusion.timeline import Timeline
from tap_diffusion.tracking import Call

KEY = "tap_diffusion"  # of wrappers, of the attachment, and of the run among a run's transformer options

_log = logging.getLogger(__name__)

# ComfyUI's classes, comfy/ldm/**/model.py and mmdit.py. Of some attentions only the parts are called: there the
# modulated input is what enters the first linear layer.
_DOUBLE_SINGLE = TransformerSpec(
    ("double_blocks", "single_blocks"), (Stream("img", "final_layer"),), outputs=("img", "txt"),
    attention="img_attn.qkv",
)  # fmt: skip
SPECS: dict[str, TransformerSpec] = {
    "Flux": _DOUBLE_SINGLE,
    "HunyuanVideo": replace(_DOUBLE_SINGLE, video=True),
    "QwenImageTransformer2DModel": TransformerSpec(
        ("transformer_blocks",), (Stream("hidden_states", "norm_out"),),
        outputs=("encoder_hidden_states", "hidden_states"), attention="attn",
    ),
    "WanModel": TransformerSpec(("blocks",), (Stream("x", "head"),), attention="self_attn", video=True),
    "OpenAISignatureMMDITWrapper": TransformerSpec(  # SD3
        ("joint_blocks",), (Stream("x", "final_layer"),), arguments=("context", "x"), outputs=("context", "x"),
        attention="x_block.attn.qkv",
    ),
}  # fmt: skip

# Functions of comfy/k_diffusion/sampling.py. All steps of these are x + (σ' - σ) F, which hindsight takes for granted.
_FIRST_ORDER = frozenset({"sample_euler"})
# These evaluate the model once per step, so that steps can be counted. Elsewhere σ is read, which waits for a GPU.
_ONE_EVALUATION = _FIRST_ORDER | {
    "sample_euler_ancestral", "sample_lms", "sample_ddpm", "sample_lcm", "sample_ipndm", "sample_ipndm_v",
    "sample_deis", "sample_dpmpp_2m", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde", "sample_res_multistep",
    "sample_gradient_estimation",
}  # fmt: skip
_OWN_STEPS = ("dpm_fast", "dpm_adaptive")  # samplers that don't keep to the sigmas they are given
_OTHER_CACHES = {"easycache": "EasyCache", "lazycache": "LazyCache"}  # by the keys of their wrappers


def accelerate(model: Any, config: TAPConfig | None = None, spec: TransformerSpec | None = None) -> Any:
    """A clone of a model patcher that is accelerated. The one given, and the model that both share, stay as they are.

    Accelerating an accelerated one replaces the configuration.

    Args:
        model: ComfyUI's ``ModelPatcher``, a node's MODEL.
        config: defaults to ``TAPConfig()``. ``steps`` may be left out: ComfyUI's sigmas tell.
        spec: of the diffusion model, where its class is not one of :data:`SPECS`.

    Raises:
        UnsupportedModelError: the message names the class and the reason.
        RuntimeError: ComfyUI is too old.
    """
    from comfy.patcher_extension import WrappersMP

    if not hasattr(WrappersMP, "PREDICT_NOISE"):
        raise RuntimeError("this ComfyUI is too old for TAP: it has no WrappersMP.PREDICT_NOISE; update ComfyUI")
    module = unwrapped(model.get_model_object("diffusion_model"))
    accelerator = _Accelerator(config or TAPConfig(), spec or _spec(module))
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
    """What the last run of an accelerated model patcher, or of a clone of it, did. None: there was none.

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

    def __init__(self, config: TAPConfig, spec: TransformerSpec) -> None:
        self.config, self.spec = config, spec
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

    def sample(
        self, executor: Any, noise: Any, latent: Any, sampler: Any, sigmas: Tensor, *args: Any, **kw: Any
    ) -> Any:
        """Around a whole sampling run."""
        guider = executor.class_obj
        options = guider.model_options
        transformer_options = options.get("transformer_options", {})
        _refuse_other_caches(transformer_options)
        levels = sigmas.tolist()[:-1]
        why_not = _why_not(sampler, levels)
        if why_not is not None:
            warnings.warn(f"TAP leaves this run alone: {why_not}.", TAPWarning, stacklevel=2)
            return executor(noise, latent, sampler, sigmas, *args, **kw)
        run = _Run(self, sampler, levels, guider.model_patcher.get_model_object("model_sampling"))
        guider.model_options = options | {"transformer_options": transformer_options | {KEY: run}}
        try:
            output = executor(noise, latent, sampler, sigmas, *args, **kw)
        finally:
            guider.model_options = options
            run.detach()
        self.report = run.finish()
        _log.info("%s", self.report)
        return output

    def evaluate(self, executor: Any, x: Any, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around each evaluation that the sampler asks for."""
        run = executor.class_obj.model_options.get("transformer_options", {}).get(KEY)
        if run is not None:
            run.advance(timestep)
        return executor(x, timestep, *args, **kwargs)

    def call(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around each call of the model."""
        options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[4]
        run = options.get(KEY)
        if run is None or not run.has_begun:  # not within a sampling run, or by a guider that tells no evaluations
            return executor(x, *args, **kwargs)
        module = unwrapped(executor.class_obj.diffusion_model)
        return run.call(module, options, partial(executor, x, *args, **kwargs), x)


class _Run:
    """One sampling run."""

    def __init__(self, accelerator: _Accelerator, sampler: Any, levels: list[float], model_sampling: Any) -> None:
        self._accelerator = accelerator
        self._position = _Position(levels, counts=_name(sampler) in _ONE_EVALUATION)
        self._timeline = _timeline(sampler, levels, model_sampling)
        self._steps = len(levels)
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
        self._position.advance(sigma)
        for lane in self._lanes.values():
            if self._position.step < before:  # noise was added, and what follows doesn't continue what was before
                lane.engine.reset()
            elif self._position.step > before:  # conditions come and go, and windows of frames may move at each step
                lane.engine.forget(before)

    def call(self, module: nn.Module, options: dict[str, Any], forward: partial[Any], x: Tensor) -> Any:
        """One call of a diffusion model, for one condition or several."""
        lane = self._lanes.get(id(module))
        if lane is None:
            lane = self._lanes[id(module)] = _Lane(self._accelerator, module)
        first = not lane.has_begun
        calls = [
            Call(self._position.step, branch, first and i == 0, None, self._steps, self._timeline)
            for i, branch in enumerate(self._branches(options, len(x)))
        ]
        return lane.run_on(calls, forward, x.device)

    def _branches(self, options: dict[str, Any], batch: int) -> list[str]:
        """The branch of each part of a batch.

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
            kind = "cond" if condition == 0 else "uncond"
            branches.append(self._named((*part, self._seen[part], self._position.turn), kind))
        return branches

    def _named(self, branch: Hashable, kind: str) -> str:
        if branch not in self._names:
            count = sum(name.split()[0] == kind for name in self._names.values())
            self._names[branch] = kind if count == 0 else f"{kind} {count + 1}"
        return self._names[branch]

    def detach(self) -> None:
        """Leave the models as they were."""
        for lane in self._lanes.values():
            lane.detach()

    def finish(self) -> Report:
        """Free all; return what was done."""
        if not self._lanes:
            warnings.warn(
                "TAP did not see this run: its guider does not tell extensions of its evaluations (PREDICT_NOISE).",
                TAPWarning,
                stacklevel=3,
            )
            return Report()
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

        def run(model: nn.Module, _: Sequence[str]) -> Any:
            with nullcontext() if model is self._module else depth.lent(model):
                return forward()

        return self.run(depth, calls, run, device)


class _Position:
    """Which step an evaluation belongs to, and which one of the step's evaluations it is.

    Heun's trial evaluation is at the noise of the next step, and counts as that one's first. So each history holds
    evaluations of one kind.

    Attributes:
        step: counts from the start of the run.
        turn: counts from 0 within the step.
    """

    def __init__(self, levels: list[float], counts: bool) -> None:
        self._levels, self._counts = levels, counts
        self.step, self.turn = -1, 0

    def advance(self, sigma: Tensor) -> None:
        """Take note of another evaluation. Where it is noisier than the last, the step falls."""
        if self._counts and self.step + 1 < len(self._levels):
            self.step += 1
            return
        value = float(sigma.max()) * (1 - 1e-4)  # rounding
        step = max((i for i, level in enumerate(self._levels) if level >= value), default=0)
        self.turn = self.turn + 1 if step == self.step else 0
        self.step = step


def _timeline(sampler: Any, levels: list[float], model_sampling: Any) -> Timeline | None:
    """The noise of a run's steps, σ/α, and whether hindsight is possible."""
    if any(base.__name__ == "CONST" for base in type(model_sampling).__mro__):  # flow matching: α = 1 - σ
        noise = [level / (1 - level) if level < 1 else math.inf for level in levels]
        exact = _name(sampler) in _FIRST_ORDER and not getattr(sampler, "extra_options", {}).get("s_churn")
        return Timeline(tuple(noise), "flow" if exact else None)
    return Timeline(tuple(levels), None)  # elsewhere ComfyUI's σ is that of x₀ + σ ε


def _why_not(sampler: Any, levels: list[float]) -> str | None:
    if any(name in _name(sampler) for name in _OWN_STEPS):
        return f"{_name(sampler)} chooses its own steps, by errors that predicted ones would distort"
    if not levels or levels[-1] <= 0 or not all(a > b for a, b in pairwise(levels)):
        return "its sigmas do not fall from step to step"
    return None


def _name(sampler: Any) -> str:
    name: str = getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)
    return name


def _refuse_other_caches(transformer_options: dict[str, Any]) -> None:
    keys = {key for wrappers in transformer_options.get("wrappers", {}).values() for key in wrappers}
    found = [title for key, title in _OTHER_CACHES.items() if key in keys]
    if "rel_l1_thresh" in transformer_options:
        found.append("TeaCache")
    if found:
        raise ValueError(
            f"{found[0]} and TAP are both on this model, and each would mislead the other: remove one node"
        )


def _spec(module: nn.Module) -> TransformerSpec:
    name = type(module).__name__
    if name not in SPECS:
        raise UnsupportedModelError(
            f"TAP does not know this model's class, {name}; of ComfyUI's it knows {', '.join(sorted(SPECS))}"
        )
    return SPECS[name]
