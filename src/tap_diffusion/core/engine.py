"""One model's state machine: compute or predict.

The engine knows no model. An integration tells it, call by call, where the call stands, and hands it what the
model computed at a full step, or asks it for the hidden states after the last block at a predicted one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tap_diffusion.core import doubts, kernels, outcome, selection
from tap_diffusion.core.cache import History
from tap_diffusion.core.call import Call
from tap_diffusion.core.compiling import uncompiled
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.distributed import Ranks
from tap_diffusion.core.doubts import Doubts, Fallback
from tap_diffusion.core.errors import warn
from tap_diffusion.core.predictors import Candidate, candidates, difference_matrix
from tap_diffusion.core.report import Choice, Report
from tap_diffusion.core.schedule import for_the_rest, plan
from tap_diffusion.core.selection import choose, squared_distance, unexplained
from tap_diffusion.core.timeline import Timeline


@dataclass
class _Branch:
    """What is remembered of one branch of the current trajectory.

    Attributes:
        streams: anchors, of each stream of tokens.
        unread: what stands in for the output of the model's unread submodules.
        doubts: about its last calls.
        lost: why it has no anchors.
        last_step: of its last call.
        calls: as in :class:`Report`.
    """

    doubts: Doubts
    streams: dict[str, History] = field(default_factory=dict)
    unread: dict[Any, Any] = field(default_factory=dict)
    lost: str = "the branch has only just begun"
    last_step: int | None = None
    calls: list[tuple[int, bool, Callable[[], float]]] = field(default_factory=list)

    def end(self) -> None:
        """Free what is large."""
        self.streams, self.unread = {}, {}
        self.doubts.forget()


class Engine:
    """Decides, predicts and keeps count for the trajectories of one model.

    Attributes:
        checks_past: whether a step that the past does not explain is full; not in subclasses that decide by themselves.

    Args:
        config: see :class:`TAPConfig`.
        ranks: the processes that run the same model on other tokens of the same samples, all by an engine of their own;
            they decide alike.
    """

    checks_past = True

    def __init__(self, config: TAPConfig, ranks: Ranks | None = None) -> None:
        self.config = config
        self._ranks = ranks or Ranks()
        self.report = Report()
        self._branches: dict[str, _Branch] = {}
        self._pending: list[Choice] = []  # of the call that is running
        self._timeline: Timeline | None = None
        self._planning = config  # which steps are full, of this transformer's share of the run
        self._steps: int | None = None
        self._within: range | None = None
        self._tokens: int | None = None  # of a stream, on all ranks; the first full call tells
        self._may_have_ended = False

    @property
    def needs_probe(self) -> bool:
        """Whether full steps are to record probe features."""
        return self.config.chooses and not _reuses(self.config, self._timeline)

    # ------------------------------------------------------------------------------------------------- trajectories

    def reset(self) -> None:
        """Drop all that is remembered of the current trajectory, but not the report."""
        self._branches.clear()
        self._pending.clear()
        self._may_have_ended = False

    def _branch(self, call: Call) -> _Branch:
        if call.branch not in self._branches:
            self._branches[call.branch] = _Branch(Doubts(self._ranks.several))
        return self._branches[call.branch]

    @uncompiled
    def begin(self, call: Call) -> bool:
        """Take note of a call; return whether it is to be a full one."""
        if call.starts_trajectory:
            self.finish()
            self.report = Report(trajectories=self.report.trajectories + 1)
            self._timeline, self._steps, self._within = call.timeline, call.steps, call.within
            self._planning = for_the_rest(self.config, call.steps, call.steps_before, call.full_before)
            self._tokens = None
            self._even_clock()
            if call.unread is not None and self.config.predicts:
                self.report.notes.append(f"steps count alike and nothing is made up for: {call.unread}")
            noise = outcome.of_fresh_noise(self.config, self._timeline, _reuses(self.config, self._timeline))
            if noise is not None:
                warn(noise)
        self._pending.clear()
        branch = self._branch(call)
        doubt = branch.doubts.raised()
        if doubt is not None:
            self.fall_back(call, f"{doubt}, noticed a step late")
            return True
        if self._plan(call.step):
            return True
        if not branch.streams:
            self.fall_back(call, branch.lost)
            return True
        return False

    @property
    def _plan(self) -> Callable[[int], bool]:
        """Which steps of this trajectory are full. Before its first full call has told the tokens, the first alone is
        sure."""
        return plan(self._planning, self._steps, self._timeline, self._tokens, self._within)

    def _even_clock(self) -> None:
        """Make the clock even on the full steps of the trajectory that begins."""
        if self._timeline is not None:
            self._timeline = replace(self._timeline, full=(), tokens=self._tokens)
            full = tuple(filter(self._plan, range(len(self._timeline))))
            self._timeline = replace(self._timeline, full=full)

    @uncompiled
    def _count_tokens(self, stream: Tensor) -> None:
        """Plan for as many tokens as all ranks together have of a stream (B, N, D)."""
        count = torch.tensor(stream.shape[1], device=stream.device) if self._ranks.several else None
        self._tokens = stream.shape[1] if count is None else int(self._ranks.total(count))
        self._even_clock()

    @uncompiled
    def end(self, call: Call, full: bool, milliseconds: Callable[[], float]) -> None:
        """Take note that a call has run; free its branch after the last step."""
        branch, taken = self._branch(call), (call.step, full, milliseconds)
        self.report.calls.append(taken)
        branch.calls.append(taken)
        if not full:
            self.report.choices += self._pending
            self._pending.clear()
        self._may_have_ended = call.is_last_step is None
        if any(was_full for _, was_full, _ in branch.calls[-2:]):  # the first prediction adds to an anchor, none later
            self.report.cache_bytes = max(self.report.cache_bytes, self.cache_bytes)
        branch.last_step = call.step
        if call.is_last_step:
            branch.end()
            for other in self._branches.values():
                if other.last_step is not None and other.last_step < call.step - 1:  # it has ended before
                    other.end()
            if not self.holds_anchors:
                self._say_how_it_went()

    def begin_like(self, call: Call, other: str) -> None:
        """Let a branch that begins with this call have the past of another, whose calls were much alike."""
        past = self._branches[other].streams if other in self._branches else {}
        branch = self._branch(call)
        if past and not branch.streams and all(history.times[0] < call.step for history in past.values()):
            branch.streams = {stream: copy.copy(history) for stream, history in past.items()}

    def forget(self, before: int) -> None:
        """Drop what is remembered of branches whose last call was before a step."""
        for name, branch in list(self._branches.items()):
            if branch.last_step is not None and branch.last_step < before:
                del self._branches[name]

    def take(self, other: Engine, branch: str, name: str) -> None:
        """Go on with a branch of another engine's trajectory, as a trajectory of its own with a branch of this name."""
        self.finish()
        calls = []
        if branch in other._branches:
            self._branches[name] = other._branches.pop(branch)
            calls = list(self._branches[name].calls)
        self.report = Report(trajectories=self.report.trajectories + 1, calls=calls)
        moved = set(map(id, calls))
        other.report.calls = [call for call in other.report.calls if id(call) not in moved]
        self._timeline, self._steps, self._may_have_ended = other._timeline, other._steps, True
        self._planning, self._within, self._tokens = other._planning, other._within, other._tokens

    def finish(self) -> None:
        """End the current trajectory, whether or not its last step was seen."""
        # It may also have been interrupted, and one step alone a look at images to edit, before the run (GLM-Image).
        if self._may_have_ended and self.report.steps > 1:
            self._say_how_it_went()
        self.reset()

    def fall_back(self, call: Call, reason: str) -> None:
        """Count a call that was to be predicted and has to be run in full; distrust the history that led to it."""
        self.report.fallbacks[reason] += 1
        self.lose(call, reason)
        self._branch(call).doubts.forget()

    def lose(self, call: Call, reason: str) -> None:
        """Take note that a full call left no anchor, or not one for each stream, and why."""
        branch = self._branch(call)
        branch.streams, branch.lost = {}, reason

    def _say_how_it_went(self) -> None:
        """Warn once where a trajectory had no predicted step, or another number of full steps than was asked for."""
        said = outcome.of_steps(self.report, self.config, self._planning, self._steps, self._within, self._plan)
        if said is not None:
            warn(said)

    @property
    def _histories(self) -> list[History]:
        """Those of all branches and streams."""
        return [history for branch in self._branches.values() for history in branch.streams.values()]

    @property
    def holds_anchors(self) -> bool:
        """Whether any branch has an anchor."""
        return bool(self._histories)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the histories hold now."""
        return sum(history.nbytes for history in self._histories)

    def unread(self, call: Call) -> dict[Any, Any]:
        """What stands in for the output of the model's unread submodules on this branch; for the caller to fill."""
        return self._branch(call).unread

    @uncompiled
    def park(self) -> None:
        """Before a full call: move all histories to host memory, where the configuration wants it."""
        if self.config.offload:
            for history in self._histories:
                history.park()

    # --------------------------------------------------------------------------------------------------- the two kinds

    def record(self, call: Call, before: Tensor, after: Tensor, probe: Tensor | None, stream: str = "") -> None:
        """Make a full step's features the newest anchor of its branch.

        Args:
            before: hidden states x before the first block, (B, N, D).
            after: hidden states after the last block, (B, N, D).
            probe: probe features, (B, N, D'), or None where nothing is selected.
            stream: name of the stream of tokens, where a model has several (video and sound).
        """
        if not self.config.predicts:
            return
        if self._tokens is None:
            self._count_tokens(before)
        residual = (after - before).to(before.dtype)
        if probe is not None:
            probe = self._sketched(probe)
        branch = self._branch(call)
        if not any(other.times[0] == call.step for other in branch.streams.values()):
            branch.doubts.forget()  # from before this step
        doubt = self._ranks.any(~doubts.finite(residual, probe))
        late = self._is_late(call, residual)
        history = branch.streams.get(stream)
        if history is not None and not history.fits(residual):
            history = None
        lost = self._is_unexplained_anchor(call, probe, history, late)
        if late:
            branch.doubts.note(doubt, lost)
            residual, probe = doubts.with_zeros(residual), None if probe is None else doubts.with_zeros(probe)
        elif doubt:
            # No anchor rather than a bad one. The steps up to the next full one then have none and run in full.
            self.lose(call, "non-finite values in the last full step")
            return
        if history is None or (lost is not None and not late and lost):
            # Differences to anchors of something else would spoil the next predictions.
            history = branch.streams[stream] = History(self.config.anchors, _dtype(self.config.cache_dtype))
        history.add(call.step, residual, probe)

    @uncompiled
    def hindsight(self, call: Call) -> float:
        """By how much of its surprise a full call's output is to be moved (:meth:`Timeline.hindsight`); 0: not at all.

        The surprise is the output less its prediction, for which :meth:`predict` is to be called before.
        """
        streams = self._branch(call).streams
        if not self.config.hindsight or self._timeline is None or not streams or call.step >= len(self._timeline):
            return 0.0
        times = next(iter(streams.values())).times
        # The degree of linear extrapolation, whatever the tokens took: most errors come from what they left out.
        return self.config.hindsight * self._timeline.hindsight([int(time) for time in times[:2]], call.step)

    def predict(self, call: Call, hidden_states: Tensor, probe: Callable[[], Tensor], stream: str = "") -> Tensor:
        """The hidden states after the last block, predicted (paper, token-adaptive selection).

        Args:
            hidden_states: x, before the first block, (B, N, D).
            probe: computes the probe features now, (B, N, D'); not called where nothing is ever to choose.
            stream: as in :meth:`record`.

        Returns:
            x + r̂, (B, N, D) in the dtype of x.

        Raises:
            Fallback: the shape, dtype or device changed, a value is not finite, or no candidate explains the probe
                (:func:`~tap_diffusion.core.selection.unexplained`).
        """
        history = self._anchors(call, hidden_states, stream)
        members, coefficients = self._candidates(tuple(history.times), call.step)
        late = self._is_late(call, hidden_states)
        if not self.needs_probe:
            result, doubt = kernels.combine(hidden_states, history.residual, coefficients, mend=late)
            self._trust(call, doubt, late)
            return result
        loss, h = self.config.loss, self._sketched(probe())
        if len(members) == 1:  # only so far: nothing to choose, but to check
            result, doubt = kernels.combine(hidden_states, history.residual, coefficients, mend=late)
            errors = selection.proxy_losses(h, history.probe, coefficients, "l2")[0]
            self._trust(call, doubt | ~doubts.finite(h), late, self._is_unexplained(call, h, errors, history, late))
            return result
        gram = None if loss == "l1" else history.gram
        # What a subclass makes of the losses, or what other ranks have to hear of, can't be fused with them.
        alone = self.config.granularity == "token" or not self._ranks.several
        fused = alone and type(self)._choose is Engine._choose
        result, choice, errors, doubt = kernels.predict(
            hidden_states, h, history.probe, gram, history.residual, coefficients, loss,
            self.config.granularity if fused else self._choose, mend=late,
        )  # fmt: skip
        self._trust(call, doubt, late, self._is_unexplained(call, h, errors, history, late))
        self._pending.append(Choice(call.step, call.branch, members, choice))
        return result

    def _anchors(self, call: Call, hidden_states: Tensor, stream: str) -> History:
        """The history of a branch's stream; a fallback where it has none that fits."""
        history = self._branch(call).streams.get(stream)
        if history is None:
            raise Fallback("the last full step had no such stream of tokens")
        if not history.fits(hidden_states):
            raise Fallback("the shape, dtype or device of the hidden states changed")
        return history

    def _is_unexplained(self, call: Call, h: Tensor, errors: Tensor, history: History, late: bool) -> Tensor | None:
        """Whether the past explains nothing of a sample; one of them makes the step full for the whole batch.

        A pass is either full or predicted, and what it costs the other samples is time, not quality.

        Args:
            h: probe features now, (B, N, D').
            errors: of their best candidates, (B, N).
        """
        if not self.checks_past:
            return None
        error, spread = self._ranks.total(torch.stack([errors.sum(-1), history.spread]))
        lost = (error > spread).any()
        if late or lost:  # else nobody has to know the other distance
            lost = unexplained(error, self._ranks.total(squared_distance(h, history.mean)), spread).any()
        history.judged = call.step, lost
        return lost

    def _is_unexplained_anchor(
        self, call: Call, probe: Tensor | None, history: History | None, late: bool
    ) -> Tensor | None:
        """The same of the probe of a full step, before it becomes an anchor; None where nobody can tell."""
        if probe is None or history is None or not self.needs_probe or not self.checks_past:
            return None
        if history.judged is not None and history.judged[0] == call.step:  # hindsight has asked
            return history.judged[1]
        _, coefficients = self._candidates(tuple(history.times), call.step)
        loss = self.config.loss
        gram = None if loss == "l1" else history.gram
        errors = kernels.errors(probe, history.probe, gram, coefficients, loss)
        return self._is_unexplained(call, probe, errors, history, late)

    def _sketched(self, probe: Tensor) -> Tensor:
        """The channels of probe features (B, N, D') that are looked at; a copy, so that the others are not kept."""
        stride = self.config.stride(probe.shape[-1])
        return probe if stride == 1 else probe[..., ::stride].contiguous()

    def _candidates(self, times: tuple[float, ...], t: float) -> tuple[list[Candidate], Tensor]:
        """The candidates at time ``t``, and their coefficients (K, H) of the differences at anchors of these times."""
        return _coefficients(self.config, times, t, self._timeline)

    def _choose(self, losses: Tensor) -> Tensor:
        """Each token's candidate, (B, N), by the losses, (K, B, N)."""
        return choose(losses, self.config.granularity, self._ranks.total)

    def _checked(
        self, call: Call, hidden_states: Tensor, predicted: Tensor, h: Tensor | None, history: History
    ) -> Tensor:
        """x + r̂ for subclasses that predict in their own way, checked as :meth:`predict` does."""
        result = (hidden_states + predicted).to(hidden_states.dtype)
        late = self.checks_late(result)
        self._trust(call, ~doubts.finite(result, h), late)
        if late:
            result = torch.where(result.isfinite(), result, (hidden_states + history.residual[0]).to(result.dtype))
        return result

    def _trust(self, call: Call, doubt: Tensor, late: bool, lost: Tensor | None = None) -> None:
        """Raise Fallback where something is not finite, or unexplained (``lost``).

        On a GPU one step late, so that nothing waits for it.
        """
        doubt = self._ranks.any(doubt)
        if late:
            self._branch(call).doubts.note(doubt, lost)
        else:
            doubts.check(doubt, lost)

    def _is_late(self, call: Call, tensor: Tensor) -> bool:
        """Whether doubts on this branch are read a step late."""
        return self._branch(call).doubts.are_late(self.checks_late(tensor))

    @staticmethod
    def checks_late(tensor: Tensor) -> bool:
        """Whether reading a value on the host would wait for a device."""
        return tensor.is_cuda


@lru_cache(maxsize=1024)
def _coefficients(
    config: TAPConfig, times: tuple[float, ...], t: float, timeline: Timeline | None
) -> tuple[list[Candidate], Tensor]:
    """The candidates, and their weights over anchors as coefficients (K, H) of the differences that a history keeps.

    Times alone decide them, so all branches and later trajectories share them: callers must not write to them.
    """
    at = [*times, t]
    if timeline is not None and config.clock == "noise" and max(at) < len(timeline):
        at = [timeline.clock[int(time)] for time in at]
    members, weights = candidates(
        config.family, config.orders, config.horizon_span, config.horizon_step, at[:-1], at[-1]
    )
    slopes = config.slopes
    if _reuses(config, timeline):
        members, weights, slopes = members[:1], weights[:1], 0.0
    elif slopes is None:
        slopes = 1.0 if timeline is None else timeline.slopes
    weights *= slopes
    weights[:, 0] += 1 - slopes
    return members, torch.from_numpy(np.linalg.solve(difference_matrix(times).T, weights.T).T)


def _reuses(config: TAPConfig, timeline: Timeline | None) -> bool:
    """Whether the newest residual is reused as it is, whatever orders there are."""
    return config.slopes is None and timeline is not None and timeline.reuses


def _dtype(name: str) -> torch.dtype | None:
    return None if name == "model" else getattr(torch, name)
