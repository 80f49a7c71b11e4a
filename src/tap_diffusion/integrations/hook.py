"""The hook on a transformer: observes full steps, and runs predicted ones without the depth."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, ModelHook, StateManager
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tap_diffusion.compiling import uncompiled, uncompiled_itself
from tap_diffusion.config import TAPConfig
from tap_diffusion.engine import Engine, Fallback
from tap_diffusion.errors import UnsupportedModelError
from tap_diffusion.integrations.depth import Depth, Streams, named
from tap_diffusion.ranks import Ranks
from tap_diffusion.reporting import stopwatch
from tap_diffusion.tracking import Call, StepTracker


class TAPHook(ModelHook):
    """Wraps a transformer's forward in diffusers' own way, so that offloading and other hooks go on working.

    Args:
        config: see :class:`TAPConfig`.
        depth: of the transformer, whose parallelism has been enabled already, if any.
    """

    _is_stateful = True  # makes diffusers' `cache_context` tell this hook the name of the branch

    def __init__(self, config: TAPConfig, depth: Depth) -> None:
        super().__init__()
        self.spec = depth.spec
        self._parallelism = _parallelism(depth.module)
        self.engine = Engine(config, _ranks(self._parallelism))
        self.tracker = StepTracker()
        self._context = StateManager(BaseState)
        self._depth = depth
        self.peers: list[TAPHook] = []  # of the pipeline's other transformers

    @uncompiled_itself
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the transformer's forward."""
        arguments = named(module, args, kwargs)
        if not self._depth.is_current():
            self._depth = Depth(module, self.spec)
        try:
            if _parallelism(module) is not self._parallelism:
                raise UnsupportedModelError(
                    f"parallelism was enabled on this {type(module).__name__} when TAP was there already;"
                    " call tap.enable(...) again, after enable_parallelism(...)"
                )
            timestep = arguments.get(self.spec.timestep)
            if timestep is None:
                raise ValueError(f"{type(module).__name__} got no {self.spec.timestep}, by which TAP tells its steps")
            call = self.tracker.locate(
                timestep, self._branch(), arguments.get(self.spec.conditioning), rising=self.spec.rising
            )
            stop = stopwatch(_device(arguments))
            full = self.engine.begin(call)
            if not full:
                output, reason = self._predict(self._depth, call, args, kwargs)
                if reason is not None:
                    self.engine.fall_back(call, reason)
                    full = True
            if full:
                output = self._run_corrected(call, args, kwargs)
            self.engine.end(call, full, stop())
            if call.is_last_step:
                for peer in self.peers:
                    if peer.tracker.has_stopped_before(self.tracker):
                        peer.engine.finish()
        except BaseException:  # an interrupt as well: nothing of a broken trajectory may reach the next
            for hook in (self, *self.peers):
                hook.engine.reset()
                hook.tracker.reset()
            raise
        return output

    def _branch(self) -> str | None:
        try:
            return self._context.context.name
        except ValueError:  # the pipeline set none
            return None

    def __deepcopy__(self, memo: Any) -> Any:
        # diffusers' patched forward would go on calling the original module.
        raise RuntimeError("a model can't be copied while TAP is enabled on it; call tap.disable(...) first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a model can't be pickled while TAP is enabled on it; call tap.disable(...) first")

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget the current trajectory. diffusers calls this at the end of each run of a pipeline."""
        self.engine.finish()
        self.tracker.reset()
        return module

    @uncompiled_itself
    def _run_corrected(self, call: Call, args: Any, kwargs: Any) -> Any:
        """Run the model in full, and make up for errors of the predicted steps before, which can be seen now."""
        share = self.engine.hindsight(call)
        if not share:
            return self._run_in_full(self._depth, call, args, kwargs)
        predicted, reason = self._predict(self._depth, call, args, kwargs)
        output = self._run_in_full(self._depth, call, args, kwargs)
        return output if reason is not None else _moved(output, predicted, share)

    def _run_in_full(self, depth: Depth, call: Call, args: Any, kwargs: Any) -> Any:
        """Run the model's own forward and record probe features and residuals."""
        if not self.engine.config.predicts:
            return self.fn_ref.original_forward(*args, **kwargs)
        self.engine.park()
        before: dict[str, tuple[Tensor, Tensor | None]] = {}

        def enter(arguments: dict[str, Any], output: Any) -> None:
            probes = self._probes(depth, arguments, output) if self.engine.needs_probe else {}
            for name, x in self._streams(arguments).items():
                before[name] = x, probes.get(name)

        def leave(stream: str, after: Tensor) -> None:
            x, h = before.pop(stream, (None, None))
            if x is not None and after.numel() == x.numel():  # else there is no anchor, and what follows runs in full
                self.engine.record(call, self._tokens(x), self._tokens(after.reshape(x.shape)), h, stream)

        with depth.watched(enter, leave):
            return self.fn_ref.original_forward(*args, **kwargs)

    def _predict(self, depth: Depth, call: Call, args: Any, kwargs: Any) -> tuple[Any, str | None]:
        """Run the model's own forward with its depth left out.

        Returns:
            the output, and the reason if it can't be used. The reason does not travel as an exception through the
            model, which may have to undo things (LoRA scales, for one) at the end of its forward.
        """
        reason: str | None = "the model did not call its first block"

        def predict(arguments: dict[str, Any]) -> Streams:
            nonlocal reason
            predicted: Streams = {}
            probes: Streams = {}
            for name, x in self._streams(arguments).items():

                def probe(name: str = name) -> Tensor:
                    if not probes:
                        probes.update(self._probes(depth, arguments))
                    return probes[name]

                try:
                    after = self.engine.predict(call, self._tokens(x), probe, name)
                except Fallback as fallback:
                    reason = str(fallback)
                    return {}
                predicted[name] = self._untokens(after, x)
            reason = None
            return predicted

        kwargs = kwargs | {name: None for name in self.spec.full_only if name in kwargs}
        with depth.left_out(predict):
            output = self.fn_ref.original_forward(*args, **kwargs)
        return output, reason

    def _probes(self, depth: Depth, arguments: dict[str, Any], output: Any = None) -> Streams:
        """Probe features h of each stream, (B, N, D'); the first block's output is computed where it is not given."""
        if self.spec.probe and self.engine.config.probe == "modulated_input":
            name = self.spec.streams[0].argument
            h, x = _flat(depth.attention_input(arguments)), self._tokens(self._streams(arguments)[name])
            if h.shape[:2] != x.shape[:2]:
                raise UnsupportedModelError(
                    f"{type(depth.module).__name__}: the probe has {tuple(h.shape[:2])} tokens and the stream"
                    f" {tuple(x.shape[:2])}; use TAPConfig(probe='first_block')"
                )
            return {name: h}
        after = depth.streams_of(depth.first(**arguments) if output is None else output)
        return {name: self._tokens(after[name] - x) for name, x in self._streams(arguments).items()}

    def _streams(self, arguments: dict[str, Any]) -> Streams:
        """What enters the first block, without streams that this call leaves out (video without sound)."""
        arguments = self._depth.split(arguments)
        return {s.argument: arguments[s.argument] for s in self.spec.streams if arguments.get(s.argument) is not None}

    def _tokens(self, x: Tensor) -> Tensor:
        """A stream as (B, N, D)."""
        return _flat(x.transpose(0, 1) if self.spec.tokens_first else x)

    def _untokens(self, x: Tensor, like: Tensor) -> Tensor:
        return (x.transpose(0, 1) if self.spec.tokens_first else x).reshape(like.shape)


@uncompiled
def _moved(output: Any, predicted: Any, share: float) -> Any:
    """The output of a model, a structure of tensors, moved away from its prediction; where that is finite."""

    def moved(value: Any, prediction: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        result = value + share * (value - prediction)
        return torch.where(result.isfinite(), result, value)

    return tree_map(moved, output, predicted)


def _parallelism(module: nn.Module) -> Any:
    """diffusers' configuration of it; None where the module runs in one process."""
    return getattr(module, "_parallel_config", None)


def _ranks(parallelism: Any) -> Ranks:
    """The processes that have the other tokens. Tensor parallelism splits weights: all tokens are everywhere."""
    context = getattr(parallelism, "context_parallel_config", None)
    return Ranks() if context is None else Ranks(context._flattened_mesh.get_group())


def _flat(x: Tensor) -> Tensor:
    return x.reshape(1 if x.ndim == 2 else x.shape[0], -1, x.shape[-1])


def _device(arguments: dict[str, Any]) -> torch.device:
    """Where the first tensor among the arguments lives."""
    values = (item for value in arguments.values() for item in (value if isinstance(value, list) else [value]))
    return next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))
