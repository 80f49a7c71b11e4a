"""The hook on a transformer: observes full steps, and runs predicted ones without the depth."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from inspect import ismethod
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import BaseState, ModelHook, StateManager
from torch import Tensor, nn

from tap_diffusion.core.call import Call
from tap_diffusion.core.compiling import uncompiled, uncompiled_itself
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.distributed import Ranks
from tap_diffusion.core.errors import UnsupportedModelError, warn
from tap_diffusion.core.report import Report
from tap_diffusion.integrations.depth import Depth, NotCopied, named
from tap_diffusion.integrations.diffusers import callers
from tap_diffusion.integrations.diffusers.loops import Loop
from tap_diffusion.integrations.diffusers.tracking import ONLY, Run, Runs, Told
from tap_diffusion.integrations.passes import Passes


class TAPHook(NotCopied, Passes, ModelHook):
    """Wraps a transformer's forward in diffusers' own way, so that offloading and other hooks go on working.

    It carries out the first sampling run itself, and has others carried out beside it where several pipelines or
    threads use the transformer at once.

    Args:
        config: see :class:`TAPConfig`.
        depth: of the transformer, whose parallelism has been enabled already, if any.
        loop: that runs the transformer, where no scheduler does.

    Attributes:
        pipelines: that are known to use the transformer.
        peers: hooks on the other transformers of these pipelines.
    """

    _is_stateful = True  # makes diffusers' `cache_context` tell this hook the name of the branch

    def __init__(self, config: TAPConfig, depth: Depth, loop: Loop | None = None) -> None:
        ModelHook.__init__(self)
        self._parallelism = _parallelism(depth.module)
        Passes.__init__(self, config, depth.spec, _ranks(self._parallelism))
        self._context = _ContextOfThread()
        self._depth = depth
        self._loop = loop
        self._of_thread = threading.local()  # its ``loop``: of the trajectory that this thread says it is in
        self._lock = threading.Lock()
        self._warned_of_training = False
        self._reports: weakref.WeakKeyDictionary[Any, Report] = weakref.WeakKeyDictionary()
        self._latest: Report | None = None
        self._trajectories = 0
        self.runs: Runs[Passes] = Runs(
            self._another,
            self,
            finish=lambda passes: passes.engine.finish(),
            part=lambda passes, branch, other: other.engine.take(passes.engine, branch, ONLY),
            ends=callers.end_of,
            step_arguments=callers.step_arguments,
        )
        self.pipelines: weakref.WeakSet[Any] = weakref.WeakSet()
        self.peers: list[TAPHook] = []

    def _another(self) -> Passes:
        return Passes(self.engine.config, self.spec, _ranks(self._parallelism))

    @uncompiled_itself
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the transformer's forward."""
        if module.training and torch.is_grad_enabled():
            return self._train(*args, **kwargs)
        if _runs_again():
            return self._run_again(module, *args, **kwargs)
        arguments = named(module, args, kwargs)
        loop = self._trajectory or self._loop
        timestep, rising, told = self._when(module, arguments, loop)
        run = self._find(module, arguments, loop, timestep, rising)
        try:
            if _parallelism(module) is not self._parallelism:
                raise UnsupportedModelError(
                    f"parallelism was enabled on this {type(module).__name__} when TAP was there already;"
                    " call tap.enable(...) again, after enable_parallelism(...)"
                )
            call = run.tracker.locate(timestep, self._context.name, self._condition(arguments), rising, told)
            if loop is not None and told is not None:
                call = loop.known(call, told.step)
            if call.starts_trajectory:
                run.work.left_alone = other_cache(module)
                call = self._after_others(run, call)

            def forward(model: nn.Module, without: Sequence[str]) -> Any:
                given = {name: None if name in without else value for name, value in kwargs.items()}
                own = self.fn_ref.original_forward
                return own(*args, **given) if model is module else unbound(own, module)(model, *args, **given)

            output = run.work.run(self._depth, [call], forward, _device(arguments))
            self._take_note(run, call)
        except BaseException:  # an interrupt as well: nothing of a broken trajectory may reach the next
            self._context.set_context(None)  # which diffusers does by itself from 0.41
            for hook, other in self._of_all_transformers(run):
                other.work.engine.reset()
                hook.runs.end(other)
            raise
        finally:
            run.is_busy = False
        return output

    @uncompiled
    def _when(self, module: nn.Module, arguments: dict[str, Any], loop: Loop | None) -> tuple[Any, bool, Told | None]:
        """A call's time, whether that rises, and what is told of its step."""
        timestep = arguments.get(self.spec.timestep)
        if timestep is None:
            raise ValueError(f"{type(module).__name__} got no {self.spec.timestep}, by which TAP tells its steps")
        if loop is None:
            return timestep, self.spec.rising, self._context.told
        told = loop.told(timestep, self.spec.rising)
        return -told.step, False, told

    @uncompiled
    def _find(
        self, module: nn.Module, arguments: dict[str, Any], loop: Loop | None, timestep: Any, rising: bool
    ) -> Run[Passes]:
        """The sampling run that a call belongs to."""
        with self._lock:
            if not self._depth.is_current():
                depth = Depth(module, self.spec)
                self._depth.detach()
                self._depth = depth
                depth.attach()
        # A trajectory has a run of its own. Those of a loop are told apart by thread, step and conditioning.
        stepped = callers.schedulers() if loop is None else (loop,) if loop is self._trajectory else ()
        known = self._known_schedulers if loop is None else tuple
        return self.runs.of(stepped, known, timestep, rising, self._condition(arguments))

    @property
    def _trajectory(self) -> Loop | None:
        return getattr(self._of_thread, "loop", None)

    @contextlib.contextmanager
    def trajectory(self, loop: Loop) -> Iterator[None]:
        """Calls of this thread are one trajectory, which ends with the context."""
        outer, self._of_thread.loop = self._trajectory, loop
        try:
            yield
            run = self.runs.by(loop)
            if run is None:
                warn(f"TAP saw no call of this {type(self._depth.module).__name__} in its trajectory.")
            elif (ran := 1 - int(run.tracker.position)) < len(loop):
                warn(f"A trajectory ended with step {ran} of the {len(loop)} for which TAP's full steps were planned.")
        finally:
            self._of_thread.loop = outer
            run = self.runs.by(loop)
            if run is not None:
                self.runs.end(run)

    def _condition(self, arguments: dict[str, Any]) -> Any:
        """What conditions a call. Where ranks split it on its way in, it is another object at each call: no sign."""
        return arguments.get(self.spec.conditioning) if self._parallelism is None else None

    def _known_schedulers(self) -> list[Any]:
        """Of the pipelines that TAP was told of. Users replace them, so they are looked up anew."""
        return [scheduler for pipeline in list(self.pipelines) for scheduler in schedulers_of(pipeline)]

    def _after_others(self, run: Run[Passes], call: Call) -> Call:
        """The first call of a trajectory, with what other transformers have done of its run."""
        others = [
            other.work.engine.report
            for hook, other in self._of_all_transformers(run)
            if hook is not self and other.tracker.shares_run_of(run.tracker)
        ]
        return replace(
            call,
            steps_before=sum(report.steps for report in others),
            full_before=sum(report.full_steps for report in others),
        )

    @uncompiled
    def _take_note(self, run: Run[Passes], call: Call) -> None:
        engine = run.work.engine
        if call.starts_trajectory:
            self._trajectories += 1
            engine.report.trajectories = self._trajectories
        self._latest = engine.report
        with contextlib.suppress(TypeError):  # one that takes no weak references
            if run.scheduler is not None:
                self._reports[run.scheduler] = engine.report
        if call.is_last_step:
            run.ended = not engine.holds_anchors
            for hook, other in self._of_all_transformers(run):
                if hook is not self and other.tracker.has_stopped_before(run.tracker):
                    other.work.engine.finish()

    def _of_all_transformers(self, run: Run[Passes]) -> list[tuple[TAPHook, Run[Passes]]]:
        """The same sampling run of all transformers of a pipeline, with their hooks."""
        others = [(peer, peer.runs.by(run.scheduler)) for peer in self.peers if run.scheduler is not None]
        return [(self, run), *((peer, other) for peer, other in others if other is not None)]

    def report_of(self, schedulers: Iterable[Any]) -> Report:
        """Of the trajectory of one of these schedulers, else of the latest."""
        for scheduler in schedulers:
            with contextlib.suppress(TypeError):
                if scheduler in self._reports:
                    return self._reports[scheduler]
        return self._latest or self.engine.report

    def _train(self, *args: Any, **kwargs: Any) -> Any:
        """Run as if TAP were not there: training is no sampling run, and its blocks need gradients."""
        if not self._warned_of_training:
            self._warned_of_training = True
            warn(
                "TAP leaves this model alone while it is in training mode and gradients are on: each call runs in full."
                " To sample, call model.eval() or use torch.no_grad()."
            )
        return self.fn_ref.original_forward(*args, **kwargs)

    def _run_again(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A call within a backward pass, for which a checkpoint around the transformer runs it a second time."""
        if any(run.work.engine.report.predicted_calls for run in self.runs):
            raise RuntimeError(
                f"a checkpoint around this {type(module).__name__} runs it again in the backward pass, where TAP can't"
                " tell which step it is. Checkpoint its blocks instead, by model.enable_gradient_checkpointing()"
            )
        return self.fn_ref.original_forward(*args, **kwargs)

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """diffusers calls this as the hook is registered."""
        self._depth.attach()
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """diffusers calls this as the hook is removed, and spells it so."""
        self._depth.detach()
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget the trajectory of the pipeline that calls. diffusers does so at the end of each run of a pipeline."""
        schedulers = list(callers.schedulers())
        for run in self.runs:
            mine = run.scheduler in schedulers if schedulers else run.thread == threading.get_ident()
            if mine:
                self.runs.end(run)
        return module

    def finish(self) -> None:
        """End all trajectories."""
        for run in self.runs:
            self.runs.end(run)


class _ContextOfThread(StateManager):
    """What ``cache_context`` says, of each thread by itself."""

    def __init__(self) -> None:
        super().__init__(BaseState)
        self._of_thread = threading.local()

    def set_context(self, context: Any) -> None:
        """diffusers calls this: with a ``CacheContext``, before 0.41 with the name alone, at the end with None."""
        self._of_thread.said = context

    @property
    def name(self) -> str | None:
        """Of the branch; None where the pipeline says nothing."""
        said = self._said
        return said if said is None or isinstance(said, str) else said.name

    @property
    def told(self) -> Told | None:
        """Where the denoising loop is; None where the pipeline says nothing, as none can before diffusers 0.41."""
        step = getattr(self._said, "step_index", None)
        return None if step is None else Told(int(step), self._said.num_inference_steps)

    @property
    def _said(self) -> Any:
        return getattr(self._of_thread, "said", None)


def schedulers_of(pipeline: Any) -> list[Any]:
    """A pipeline's own."""
    names = [name for name in getattr(pipeline, "components", {}) if name.endswith("scheduler")]
    found = [getattr(pipeline, name, None) for name in names]
    return [scheduler for scheduler in found if callers.is_scheduler(scheduler)]


def _runs_again() -> bool:
    """Whether a backward pass is under way in this thread."""
    return torch._C._current_graph_task_id() != -1


def register(hook: TAPHook, module: nn.Module, name: str) -> None:
    """Put the hook next to the module's own forward, inside of all other hooks of diffusers.

    Predicted steps run that forward on a view of the module, and what others wrap is bound to the module itself.

    Raises:
        UnsupportedModelError: something else than a method of the module is its forward.
    """
    references = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", [])
    if not references:
        unbound(module.forward, module)  # before there is a registry, which would stay behind
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
        return
    registry: Any = module._diffusers_hook
    inner = references[0]
    place = "forward" if inner.original_forward is None else "original_forward"
    innermost, outermost = getattr(inner, place), module.forward
    unbound(innermost, module)
    registry.register_hook(hook, name)
    setattr(inner, place, module.forward)
    module.forward = outermost
    hook.fn_ref.original_forward = innermost
    references.insert(0, references.pop())
    registry._hook_order.insert(0, registry._hook_order.pop())


def unregister(module: Any, name: str) -> None:
    """Undo :func:`register`."""
    registry = module._diffusers_hook
    outer = registry._fn_refs[1:2] if registry._hook_order[0] == name else []
    places = {place: getattr(reference, place) for reference in outer for place in ("forward", "original_forward")}
    own = registry.hooks[name].fn_ref
    registry.remove_hook(name, recurse=False)
    for reference in outer:  # which diffusers gives another forward also where it keeps the original aside
        place = "forward" if places["original_forward"] is None else "original_forward"
        reference.forward = places["forward"]
        setattr(reference, place, own.original_forward)


def unbound(forward: Any, module: nn.Module) -> Callable[..., Any]:
    """A module's own forward as a function of the module. Raises UnsupportedModelError where it can't be had."""
    method = getattr(forward, "_torchdynamo_orig_callable", forward)  # module.forward = torch.compile(module.forward)
    if ismethod(method) and method.__self__ is module:
        return method.__func__
    if isinstance(method, partial) and method.args[:1] == (module,):
        return lambda model, *args, **kwargs: method.func(model, *method.args[1:], *args, **method.keywords | kwargs)
    raise UnsupportedModelError(
        f"the forward of this {type(module).__name__} has been replaced by {forward!r}, which is bound to it in a way"
        " that TAP can't see through; call tap.enable(...) before that is done, or replace it by a method"
    )


def refuse_other_caches(module: nn.Module) -> None:
    """Raise ValueError where another cache works on the module: each would take the other's guesses for the truth."""
    found = other_cache(module)
    if found is not None:
        raise ValueError(f"TAP can't be enabled on this {type(module).__name__}: {found}")


@uncompiled
def other_cache(module: nn.Module) -> str | None:
    """What other cache works on a module, and how to end that; None where there is none."""
    hooks = [hook for part in module.modules() for hook in _hooks(part)]
    others = [hook for hook in hooks if hook._is_stateful and not isinstance(hook, TAPHook)]
    if getattr(module, "is_cache_enabled", False):
        name, remedy = f"diffusers' {type(module._cache_config).__name__}", "call its disable_cache()"
    elif getattr(module, "_is_cached", False):
        name, remedy = "cache-dit", "call cache_dit.disable_cache(pipe)"
    elif others:  # by one of diffusers' apply_... functions, which leave nothing to undo it by
        name, remedy = f"diffusers' {type(others[0]).__name__}", "load the model anew"
    else:
        return None
    return f"{name} is at work on it; {remedy}"


def _hooks(module: nn.Module) -> list[ModelHook]:
    """diffusers' own on a module."""
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks.values())


def _parallelism(module: nn.Module) -> Any:
    """diffusers' configuration of it; None where the module runs in one process."""
    return getattr(module, "_parallel_config", None)


def _ranks(parallelism: Any) -> Ranks:
    """The processes that have the other tokens. Tensor parallelism splits weights: all tokens are everywhere."""
    context = getattr(parallelism, "context_parallel_config", None)
    return Ranks() if context is None else Ranks(context._flattened_mesh.get_group())


def _device(arguments: dict[str, Any]) -> torch.device:
    """Where the first tensor among the arguments lives."""
    values = (item for value in arguments.values() for item in (value if isinstance(value, list) else [value]))
    return next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))
