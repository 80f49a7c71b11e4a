"""The two ways to run a transformer: in full and watched, or predicted, with its depth left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tap_diffusion.core.call import Call
from tap_diffusion.core.compiling import uncompiled, uncompiled_itself
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.distributed import Ranks
from tap_diffusion.core.doubts import Fallback
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.errors import UnsupportedModelError
from tap_diffusion.core.report import stopwatch
from tap_diffusion.integrations.depth import Depth, StandIns, Streams
from tap_diffusion.integrations.specs import TransformerSpec

# Runs a transformer's own forward on it or on a view of it, without the arguments of these names.
Forward = Callable[[nn.Module, Sequence[str]], Any]

LEFT_OUT = "something else left out the first block or the last, another cache perhaps: remove it"
LARGEST_MOVE = 0.7  # of an output's norm, in hindsight; chosen on calibration samples (docs/beyond.md)


class Passes:
    """Runs one transformer as its engine says. Knows neither diffusers nor ComfyUI.

    A pass may carry several calls, as many equal parts of its batch (ComfyUI runs the branches of guidance together
    or one by one, as memory allows). Each is of a branch of its own; all are full, or all predicted.

    Args:
        config: see :class:`TAPConfig`.
        spec: of the transformer's class.
        ranks: the processes that share its tokens, where there are several.

    Attributes:
        left_alone: why this trajectory's calls are to run as if TAP were not there; None: they are not.
    """

    def __init__(self, config: TAPConfig, spec: TransformerSpec, ranks: Ranks | None = None) -> None:
        self.spec = spec
        self.left_alone: str | None = None
        self.engine = Engine(config, ranks)

    @uncompiled_itself
    def run(self, depth: Depth, calls: Sequence[Call], forward: Forward, device: torch.device) -> Any:
        """One pass.

        Args:
            depth: of the transformer.
            calls: where each part of the batch stands.
            forward: the transformer's own, bound to its arguments.
            device: to take the time on.
        """
        stop = stopwatch(device)
        full = any([self.engine.begin(call) for call in calls])  # a list, since all begin
        output = None
        if not full:
            output, reason = self._predict(depth, calls, forward, {})
            if reason is not None:
                for call in calls:
                    self.engine.fall_back(call, reason)
                full = True
        if full:
            output = self._run_corrected(depth, calls, forward)
        milliseconds = _shared(stop(), len(calls))
        for call in calls:
            self.engine.end(call, full, milliseconds)
        return output

    @uncompiled_itself
    def _run_corrected(self, depth: Depth, calls: Sequence[Call], forward: Forward) -> Any:
        """Run the model in full, and make up for errors of the predicted steps before, which can be seen now."""
        shares = [self.engine.hindsight(call) for call in calls]
        if not all(shares):
            return self._run_in_full(depth, calls, forward, {})
        probes: Streams = {}  # the same in both
        predicted, reason = self._predict(depth, calls, forward, probes)
        output = self._run_in_full(depth, calls, forward, probes)
        return output if reason is not None else _moved(output, predicted, shares)

    def _run_in_full(self, depth: Depth, calls: Sequence[Call], forward: Forward, probes: Streams) -> Any:
        """Run the model's own forward and record probe features and residuals.

        Args:
            probes: the features, where they are known already.
        """
        if not self.engine.config.predicts:
            return forward(depth.module, ())
        if self.left_alone is not None:
            output = forward(depth.module, ())
            for call in calls:
                self.engine.lose(call, self.left_alone)
            return output
        self.engine.park()
        before: Streams = {}
        is_entered, lost = False, None  # why there is no anchor

        @torch.no_grad()
        def enter(arguments: dict[str, Any]) -> None:
            nonlocal is_entered
            is_entered = True
            for name, x in self._streams(depth.split(arguments)).items():
                before[name] = x.clone()  # some blocks write into their input
            if self.engine.needs_probe and self._by_modulated_input and not probes:
                probes.update(self._modulated_input(depth, arguments))

        @torch.no_grad()
        def entered(arguments: dict[str, Any], output: Any) -> None:
            if self.engine.needs_probe and not self._by_modulated_input:
                probes.update(self._change(depth, before, output))

        @torch.no_grad()
        def leave(stream: str, after: Tensor) -> None:
            nonlocal lost
            x, h = before.pop(stream, None), probes.get(stream)
            if x is None:
                return
            if after.numel() != x.numel():
                lost = "the number of tokens changed between the first block and the last"
                return
            count = len(calls)
            befores = _parts(self._tokens(x), count)
            afters = _parts(self._tokens(after.reshape(x.shape)), count)
            # Copies of parts, so that a history which is dropped doesn't live on as a part of another's.
            hs = [h] * count if h is None or count == 1 else [part.clone() for part in h.chunk(count)]
            for call, a, b, probe in zip(calls, befores, afters, hs, strict=True):
                self.engine.record(call, a, b, probe, stream)

        unread = self._unread(calls)
        unread.clear()
        with depth.watched(enter, entered, leave, unread):
            output = forward(depth.module, ())
        if lost is None and (not is_entered or before):
            lost = LEFT_OUT
        if lost is not None:
            for call in calls:
                self.engine.lose(call, lost)
        return output

    def _unread(self, calls: Sequence[Call]) -> StandIns:
        """Where stand-ins for unread submodules are kept; none are where the first block, run as probe, reads them, or
        where one pass is for several branches."""
        read = self.engine.needs_probe and not self._by_modulated_input
        return {} if read or len(calls) > 1 else self.engine.unread(calls[0])

    @property
    def _by_modulated_input(self) -> bool:
        """Whether this is the probe, and not what the first block adds."""
        return self.spec.probe and self.engine.config.probe == "modulated_input"

    def _predict(
        self, depth: Depth, calls: Sequence[Call], forward: Forward, probes: Streams
    ) -> tuple[Any, str | None]:
        """Run the model's own forward with its depth left out.

        Args:
            probes: gets the probe features, where they are asked for.

        Returns:
            the output, and the reason if it can't be used. The reason does not travel as an exception through the
            model, which may have to undo things (LoRA scales, for one) at the end of its forward.
        """
        reason: str | None = LEFT_OUT

        def predict(arguments: dict[str, Any]) -> Streams:
            nonlocal reason
            predicted: Streams = {}
            probes.clear()
            for name, x in self._streams(depth.split(arguments)).items():

                def probe(i: int, name: str = name) -> Tensor:
                    if not probes:
                        with torch.no_grad():
                            probes.update(self._probes(depth, arguments))
                    return _parts(probes[name], len(calls))[i]

                parts = _parts(self._tokens(x), len(calls))
                try:
                    after = [
                        self.engine.predict(call, parts[i], partial(probe, i), name) for i, call in enumerate(calls)
                    ]
                except Fallback as fallback:
                    reason = str(fallback)
                    return {}
                predicted[name] = self._untokens(after[0] if len(after) == 1 else torch.cat(after), x)
            reason = None
            return predicted

        with depth.left_out(predict, self._unread(calls)) as view:
            output = forward(view, self.spec.full_only)
        return output, reason

    def _probes(self, depth: Depth, arguments: dict[str, Any]) -> Streams:
        """Probe features h of each stream, (B, N, D'), computed beside the model's own pass."""
        if self._by_modulated_input:
            return self._modulated_input(depth, arguments)
        return self._change(depth, self._streams(depth.split(arguments)), depth.first_output(arguments))

    def _modulated_input(self, depth: Depth, arguments: dict[str, Any]) -> Streams:
        name = self.spec.streams[0].argument
        h, x = _flat(depth.attention_input(arguments)), self._tokens(depth.split(arguments)[name])
        if h.shape[:2] != x.shape[:2]:
            raise UnsupportedModelError(
                f"{type(depth.module).__name__}: the probe has {tuple(h.shape[:2])} tokens and the stream"
                f" {tuple(x.shape[:2])}; use TAPConfig(probe='first_block')"
            )
        return {name: h}

    def _change(self, depth: Depth, before: Streams, output: Any) -> Streams:
        """What the first block adds to each stream."""
        after = depth.streams_of(output)
        return {name: self._tokens(after[name] - x) for name, x in before.items()}

    def _streams(self, arguments: dict[str, Any]) -> Streams:
        """What enters the first block, without streams that this call leaves out (video without sound)."""
        return {s.argument: arguments[s.argument] for s in self.spec.streams if arguments.get(s.argument) is not None}

    def _tokens(self, x: Tensor) -> Tensor:
        """A stream as (B, N, D)."""
        return _flat(x.transpose(0, 1) if self.spec.tokens_first else x)

    def _untokens(self, x: Tensor, like: Tensor) -> Tensor:
        return (x.transpose(0, 1) if self.spec.tokens_first else x).reshape(like.shape)


@uncompiled
def _moved(output: Any, predicted: Any, shares: Sequence[float]) -> Any:
    """The output of a model, a structure of tensors, moved away from its prediction; where that is finite.

    A surprise as large as the output itself says that the trajectory took another way, not by how much to mend it: no
    sample (an entry of the first dimension, or of a list) is moved by more than a share of its own norm.

    Args:
        shares: by which to move, one for each part of the batch.
    """

    def moved(value: Any, prediction: Any) -> Any:
        if isinstance(value, list):
            return [moved(one[None], other[None])[0] for one, other in zip(value, prediction, strict=True)]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        surprises = (value - prediction).chunk(len(shares))
        move = torch.cat([share * surprise for share, surprise in zip(shares, surprises, strict=True)])
        allowed = LARGEST_MOVE * _norms(value) / _norms(move)
        result = value + (move * allowed.clamp(max=1)).to(value.dtype)
        return torch.where(result.isfinite(), result, value)

    return tree_map(moved, output, predicted, is_leaf=lambda node: isinstance(node, list))


def _norms(x: Tensor) -> Tensor:
    """Of each sample, kept as (B, 1, …) in float32 or better."""
    dims = tuple(range(1, x.ndim))
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


def _shared(milliseconds: Callable[[], float], count: int) -> Callable[[], float]:
    """The part of a time that falls to each of several calls."""
    return milliseconds if count == 1 else lambda: milliseconds() / count


def _parts(x: Tensor, count: int) -> Sequence[Tensor]:
    """Equal parts of a batch."""
    return [x] if count == 1 else x.chunk(count)


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim == 3 else x.reshape(1 if x.ndim == 2 else x.shape[0], -1, x.shape[-1])
