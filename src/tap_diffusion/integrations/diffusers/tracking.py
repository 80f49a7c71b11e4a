"""Finding out which step of which trajectory a call of the transformer belongs to, and which branch.

Nobody tells the transformer. What is always there is the timestep argument: it falls from step to step, a jump up
begins a new trajectory, and a second call at one timestep is another branch. Where a scheduler is known, it adds what
the timestep can't tell: whether these are still the same timesteps (an interrupted run followed by one that starts
lower looks like one run otherwise), which step is the last, and the position as a number on the host, which a timestep
on a GPU would have to wait for. Where the pipeline says by diffusers' ``cache_context`` which step it is, that is
believed first.

One transformer may be in several trajectories at once, of several pipelines or threads: :class:`Runs` keeps them apart.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from tap_diffusion.core.call import Call
from tap_diffusion.core.compiling import uncompiled
from tap_diffusion.core.timeline import Timeline

_TOLD = object()  # in the place of a scheduler's timesteps, where the pipeline tells the step
ONLY = "#0"  # the branch of a trajectory that has one, to which the pipeline gives no name
_STRANGERS = 8  # more than a trajectory's first step can have branches
_MOST_RUNS = 16  # of loops that tell no scheduler, which nobody says when they have ended


@dataclass
class _Branch:
    conditioning: Callable[[], Any]  # weak: the tracker must not keep embeddings alive
    position: float
    time: _Time  # read only where the position is in doubt
    steady: bool  # whether its conditioning is the same object from call to call
    step: int

    def changes_to(self, conditioning: Any) -> bool:
        """Whether this is another conditioning, and not the same one made anew."""
        before = self.conditioning()
        if not self.steady or before is conditioning:
            return False
        if not isinstance(before, Tensor) or not isinstance(conditioning, Tensor):
            return True
        return before.shape != conditioning.shape or not torch.equal(before, conditioning)


@dataclass(frozen=True)
class Told:
    """Where a pipeline says that it is: ``step`` of ``steps`` (None: it doesn't say of how many)."""

    step: int
    steps: int | None


class StepTracker:
    """Locates the calls of one trajectory after the other.

    Args:
        schedulers: gives those that may be the one that is stepped, at each call anew since users replace them.
        ends: index of the last of a scheduler's timesteps that its caller runs through, where it leaves some out at the
            end; None where that can't be told.
        step_arguments: gives what the caller passes to the scheduler's ``step`` beside output, timestep and sample.
    """

    def __init__(
        self,
        schedulers: Callable[[], Iterable[Any]] = tuple,
        ends: Callable[[Tensor], int | None] = lambda _: None,
        step_arguments: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.schedulers, self._ends, self._step_arguments = schedulers, ends, step_arguments
        self._guessed = False  # whether it was trusted without agreeing on the time
        self._strangers = 0  # calls in a row with a conditioning never seen before
        self._trusted: Any = None  # the scheduler whose timesteps this trajectory runs through
        self._idle: Any = None  # timesteps of a scheduler that nobody steps
        self._values: tuple[Any, list[float]] | None = None  # of one that does not count, and on the host
        self._inverse = False  # time runs the other way than the model's pipelines let it
        self._against = 0  # calls in a row for which it did
        self.reset()

    def reset(self) -> None:
        """Forget the current trajectory: the next call starts one."""
        self._timesteps: Any = None  # of the scheduler; None where steps are told by time alone
        self._position = math.inf
        self._stride = math.inf  # of the last step
        self._step = -1
        self._branches: dict[str, _Branch] = {}
        self._called: list[str] = []  # branches of this step, in their order
        self._called_before: list[str] = []  # and of the one before
        self._steps: int | None = None
        self._timeline: Timeline | None = None
        self._unread: str | None = None
        self._end: int | None = None

    @uncompiled
    def locate(
        self, timestep: Any, branch: str | None, conditioning: Any, rising: bool = False, told: Told | None = None
    ) -> Call:
        """Place a call.

        Args:
            timestep: the transformer's timestep argument, a number or a tensor; where tokens have times of their own,
                the noisiest counts (the others are conditions). A tensor is read only where no scheduler tells the
                position (on a GPU, reading it waits for the device).
            branch: its name, where the pipeline set diffusers' ``cache_context``.
            conditioning: the tensor that conditions this branch, such as the prompt embeddings, or a list of them.
                With most pipelines the same object comes back at each step of a trajectory.
            rising: the argument rises from step to step, from 0 for noise to 1.
            told: where the pipeline says that it is.
        """
        conditioning = _first(conditioning)
        familiar = self.knows(conditioning)
        self._strangers = 0 if familiar else self._strangers + 1
        time = _Time(timestep, rising != self._inverse)
        timesteps, position, is_last = self._read(time, familiar) if told is None else _told(told)
        if told is None and timesteps is not None and self._passes_by(branch, conditioning, position, time):
            # Time passes, but not for this scheduler: the pipeline steps copies of it (SkyReels-V2 has one per frame),
            # or a loop of the user's own steps none.
            self._trusted, self._idle = None, timesteps
            self._go_by_time(timesteps)
            timesteps, position, is_last = self._read(time, familiar)
        if timesteps is None and self._turns(conditioning, time):
            time = _Time(timestep, rising != self._inverse)
            position = time.position()
        advances = position < self._position
        if advances:
            self._called_before, self._called = self._called, []
        name = branch if branch is not None else self._unnamed(conditioning)
        known = self._branches.get(name)
        if branch is not None and known is not None and known.changes_to(conditioning):
            # Under the old name is another prompt now: with the old one's anchors it would be predicted wrongly.
            name = self._renamed(branch, conditioning)
            known = self._branches.get(name)
        first = self._branches[self._called_before[0]] if branch is None and self._called_before else known
        if (
            timesteps is not self._timesteps
            or position > self._position
            or (not advances and known is not None and known.position == position)
            # Without a scheduler, another conditioning is the only sign that an interrupted run was followed by one
            # that starts lower. Where it is another one at each call, it is no sign.
            or (
                timesteps is None
                and advances
                and (first is None or first.conditioning() is not conditioning)
                and self._strangers <= _STRANGERS
            )
        ):
            self.reset()
            name, known = branch if branch is not None else ONLY, None
        if position < self._position:
            self._step += 1
            self._stride = self._position - position
        self._timesteps, self._position = timesteps, position
        steady = known is not None and known.conditioning() is conditioning
        self._branches[name] = _Branch(weak(conditioning), position, time, steady, self._step)
        self._called.append(name)
        starts = self._step == 0 and len(self._branches) == 1
        if starts and timesteps is not None:
            self._look_ahead(time, told)
        return Call(self._step, name, starts, is_last, self._steps, self._timeline, self._unread)

    @property
    def position(self) -> float:
        """Of the current step, falling from one to the next; infinite before the first."""
        return self._position

    def knows(self, conditioning: Any) -> bool:
        """Whether a branch of the current trajectory has it."""
        conditioning = _first(conditioning)
        return any(known.conditioning() is conditioning for known in self._branches.values())

    def _passes_by(self, branch: str | None, conditioning: Any, position: float, time: _Time) -> bool:
        """Whether time has passed since this branch, or the first of this step, was called at the same position."""
        if position != self._position:
            return False
        known = self._branches.get(branch or "")
        if known is None and branch is None:
            same = [b for b in self._branches.values() if b.conditioning() is conditioning]
            known = next(iter(same or self._branches.values()), None)
        return known is not None and known.position == position and time.is_after(known.time)

    def _turns(self, conditioning: Any, time: _Time) -> bool:
        """Whether time, by which alone steps are told here, runs the other way than was thought.

        It does where it has run against it twice in a row (inversion): the first time may be another run that begins.
        """
        known = next((b for b in self._branches.values() if b.conditioning() is conditioning), None)
        if self._timesteps is not None or (known is not None and time.is_after(known.time)):
            self._against = 0
        if self._timesteps is not None or known is None or not known.time.is_after(time):
            return False
        self._against += 1
        if self._against < 2:
            return False
        self._inverse, self._against = not self._inverse, 0
        self._branches = {name: replace(known, time=known.time.turned()) for name, known in self._branches.items()}
        self._go_by_time(None)
        return True

    def _renamed(self, branch: str, conditioning: Any) -> str:
        """The name for what comes under a branch's name with another conditioning."""
        again = [f"{branch} ({number})" for number in range(2, len(self._branches) + 3)]
        for name in again:
            known = self._branches.get(name)
            if known is None or known.conditioning() is conditioning:
                return name
        raise AssertionError("there are more names than branches")

    def _unnamed(self, conditioning: Any) -> str:
        """The branch of a call to which the pipeline gives no name: the one of the same conditioning that has not been
        called in this step, else the one at the same place among the calls of the step before."""
        for name, known in self._branches.items():
            if known.conditioning() is conditioning and name not in self._called and name.startswith("#"):
                return name
        place = len(self._called)
        if place < len(self._called_before):
            name = self._called_before[place]
            # Guidance may begin or end in mid-run, and then places shift.
            if name not in self._called and not self._branches[name].steady:
                return name
        return next(name for i in range(len(self._branches) + 1) if (name := f"#{i}") not in self._branches)

    def _look_ahead(self, time: _Time, told: Told | None) -> None:
        """Ask the scheduler about the steps to come."""
        from tap_diffusion.integrations.diffusers import (
            schedulers,  # only now: it takes diffusers, which not every host has
        )

        if told is not None:
            self._steps = None if told.steps is None else told.steps - told.step
            self._trusted = self._whose(time)
        idle = self._trusted is None
        scheduler = self._idle_one() if idle else self._trusted
        if scheduler is None:
            return
        self._end = self._ends(scheduler.timesteps)
        first = None if idle else _index(scheduler)
        if first is None:
            at = [i for i, t in enumerate(scheduler.timesteps.tolist()) if time.is_at(t)]
            first = at[0] if at else 0
        if told is None:
            self._steps = len(scheduler.timesteps) - first
        reading = schedulers.read(scheduler, first, self._step_arguments())
        self._timeline, self._unread = reading.timeline, reading.unread
        if self._timeline is not None and len(self._timeline) != self._steps:
            self._timeline = None

    def shares_run_of(self, other: StepTracker) -> bool:
        """Whether both run through the same timesteps of one scheduler."""
        return self._timesteps is not None and self._timesteps is other._timesteps

    def has_stopped_before(self, other: StepTracker) -> bool:
        """Whether the other transformer of the same run has gone on for more than a step without this one."""
        return self._timesteps is other._timesteps and self._position > other._position + 1

    @property
    def seems_over(self) -> bool:
        """Whether, by time alone, another step like the last would lead to the end or beyond."""
        if self._timesteps is not None or self._step < 1:
            return False
        ending = 0.0 if self._position > 0 else -1.0 if self._position >= -1 else -1000.0
        return self._position - self._stride <= ending + 1e-6

    @property
    def is_known_to_someone(self) -> bool:
        """Whether any conditioning of the trajectory still exists, so that it may go on."""
        return any(branch.conditioning() is not None for branch in self._branches.values())

    def leaves(self, conditioning: Any, time: _Time) -> str | None:
        """The branch of this conditioning if time tells that it is another trajectory, in turns with this one.

        It goes on from where it was itself, but differs from where the others are.
        """
        if len(self._branches) < 2:
            return None
        for name, known in self._branches.items():
            if known.conditioning() is _first(conditioning) and time.is_after(known.time):
                if self._timesteps is not None:  # steps are told: one that is ahead is of a branch that has paused
                    return name if time.position() > self._position else None
                begins = known.position == self._position and name == self._called[0]
                return None if begins or time.position() == self._position else name
        return None

    def take(self, other: StepTracker, name: str) -> None:
        """Go on with a branch of another tracker, which forgets it."""
        known = other._branches.pop(name)
        other._called = [one for one in other._called if one != name]
        other._called_before = [one for one in other._called_before if one != name]
        self._branches, self._called, self._called_before = {ONLY: known}, [ONLY], [ONLY]
        self._position, self._step, self._inverse = known.position, known.step, other._inverse
        self._timesteps, self._steps = other._timesteps, other._steps

    def _go_by_time(self, timesteps: Tensor | None) -> None:
        for known in self._branches.values():
            known.position = known.time.position()
        self._timesteps, self._position = timesteps, min(known.position for known in self._branches.values())

    def _read(self, time: _Time, familiar: bool) -> tuple[Tensor | None, float, bool | None]:
        """The timesteps of this trajectory if a scheduler is known, the falling position, whether it is the last."""
        if not familiar or (self._trusted is not None and self._trusted.timesteps is not self._timesteps):
            # Another run, or another pipeline that shares the transformer: see whose timestep this is.
            self._trusted = self._whose(time)
        scheduler = self._trusted
        if scheduler is None:
            if self._runs_through(time):
                self._idle = self._timesteps
                self._go_by_time(self._idle)
            if self._idle_one() is not None:
                # Not stepped, but its timesteps are run through as long as they are the same ones.
                return self._idle, time.position(), self._is_at_last_of(self._idle, time)
            return None, time.position(), None
        index = _index(scheduler)
        if index is None:
            time.look_up(scheduler.timesteps, self._on_host(scheduler.timesteps))
            return scheduler.timesteps, time.position(), self._is_at_last_of(scheduler.timesteps, time)
        last = len(scheduler.timesteps) - 1 if self._end is None else self._end
        return scheduler.timesteps, -float(index), index == last

    def _is_at_last_of(self, timesteps: Any, time: _Time) -> bool:
        values = self._on_host(timesteps)
        # A time of 1 may be the first, 1000 in thousandths, or a last timestep of 1.
        last = values[-1 if self._end is None else self._end]
        return time.is_at(last) and (len(values) == 1 or not time.is_at(values[0]))

    def _idle_one(self) -> Any:
        """The scheduler that is not stepped, though its timesteps are run through."""
        return next((s for s in self.schedulers() if self._idle is not None and s.timesteps is self._idle), None)

    def _runs_through(self, time: _Time) -> bool:
        """Whether this is a later one of the current trajectory's timesteps, on which its scheduler does not stand."""
        for scheduler in self.schedulers():
            if scheduler.timesteps is self._timesteps and scheduler.timesteps is not self._idle:
                later = self._on_host(self._timesteps)[(_index(scheduler) or 0) + 1 :]
                return any(map(time.is_at, later))
        return False

    def _on_host(self, timesteps: Any) -> list[float]:
        if self._values is None or self._values[0] is not timesteps:
            self._values = timesteps, timesteps.tolist()
        return self._values[1]

    def _whose(self, time: _Time) -> Any:
        known = self._known()
        for scheduler in known:
            if agrees(scheduler, time):
                self._guessed = False
                return scheduler
        # Some pipelines pass a time of their own making, such as a function of sigma. Then the only scheduler that is
        # known counts if it stands at the start of a run, or goes on from there.
        if len(known) != 1 or (index := _index(known[0])) is None or index >= len(known[0].timesteps):
            return None
        if known[0].timesteps is self._timesteps:
            return known[0] if self._guessed and -index <= self._position else None
        self._guessed = index == (getattr(known[0], "begin_index", None) or 0)
        return known[0] if self._guessed else None

    def _known(self) -> list[Any]:
        # One scheduler may be known more than once: by pipelines that share it, or by one that was enabled again.
        found = {id(scheduler): scheduler for scheduler in self.schedulers()}
        return [
            scheduler
            for scheduler in found.values()
            if isinstance(getattr(scheduler, "timesteps", None), Tensor) and scheduler.timesteps is not self._idle
        ]


W = TypeVar("W")


class Run(Generic[W]):
    """One sampling run that a transformer is in.

    Attributes:
        work: whatever carries it out, and is used by no other run.
        tracker: of its trajectory.
        ended: its last step has run.
        is_busy: a call of it is under way.
    """

    def __init__(self, work: W, schedulers: Iterable[Any], *asked: Callable[..., Any]) -> None:
        self.work = work
        self.candidates = [weak(scheduler) for scheduler in schedulers]
        self.tracker = StepTracker(
            lambda: (s for s in (candidate() for candidate in self.candidates) if s is not None), *asked
        )
        self.thread = threading.get_ident()
        self.ended = False
        self.is_busy = False

    @property
    def scheduler(self) -> Any:
        """By which it is known; None where there is none."""
        return self.candidates[0]() if self.candidates else None

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody will go on with it, as far as can be told."""
        if self.is_busy:
            return False
        if self.ended:
            return True
        if self.candidates:
            return self.scheduler is None
        return self.tracker.seems_over or not self.tracker.is_known_to_someone


class Runs(Generic[W]):
    """The sampling runs that one transformer is in, in turns or at once in several threads.

    A run is known by the scheduler that is stepped; where there is none, by its thread and its conditioning.

    Args:
        make: what carries out one more run.
        first: what carries out the first, and later ones that are alone.
        finish: is called with what carried out a run that is over.
        part: is called with what has carried out two runs that were thought to be one until now, the branch that is
            the second, and what is to go on with that, as the branch :data:`ONLY`.
        ends, step_arguments: as for :class:`StepTracker`.
    """

    def __init__(
        self,
        make: Callable[[], W],
        first: W,
        finish: Callable[[W], None],
        part: Callable[[W, str, W], None],
        ends: Callable[[Tensor], int | None],
        step_arguments: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._make, self._first, self._finish, self._part = make, first, finish, part
        self._asked = ends, step_arguments
        self._runs: list[Run[W]] = []  # the one that was used last at the end
        self._lock = threading.RLock()

    @uncompiled
    def of(
        self, candidates: Iterable[Any], known: Callable[[], Iterable[Any]], timestep: Any, rising: bool, condition: Any
    ) -> Run[W]:
        """The run that a call belongs to.

        Args:
            candidates: schedulers that its callers hold, the nearest first.
            known: gives those of the pipelines that TAP knows of, for calls that come from elsewhere.
            timestep, rising, condition: as for :meth:`StepTracker.locate`.
        """
        with self._lock:
            run = self._found(candidates, known, _Time(timestep, rising), condition)
            if run in self._runs:
                self._runs.remove(run)
            self._runs.append(run)
            run.ended, run.is_busy = False, True
            return run

    def _found(
        self, candidates: Iterable[Any], known: Callable[[], Iterable[Any]], time: _Time, condition: Any
    ) -> Run[W]:
        seen: list[Any] = []
        for get in (lambda: candidates, known):
            for scheduler in () if seen else get():
                run = self.by(scheduler)
                if run is not None and run.tracker.knows(condition):
                    return run
                seen.append(scheduler)
        if not seen:
            return self._by_time(time, condition)
        stepped = seen[0] if len(seen) == 1 else next((s for s in seen if agrees(s, time)), seen[0])
        return self.by(stepped) or self._new([stepped, *(other for other in seen if other is not stepped)])

    def _by_time(self, time: _Time, condition: Any) -> Run[W]:
        """Of a loop that tells no scheduler."""
        mine = [run for run in reversed(self._runs) if not run.candidates and run.thread == threading.get_ident()]
        for run in mine:
            if run.tracker.knows(condition):
                branch = run.tracker.leaves(condition, time)
                if branch is None:
                    return run
                new = self._new([])
                new.tracker.take(run.tracker, branch)
                self._part(run.work, branch, new.work)
                return new
        if not mine:
            return self._new([])
        latest = mine[0]
        goes_back = time.position() > latest.tracker.position
        return self._new([]) if goes_back and not latest.is_abandoned else latest

    def _new(self, schedulers: Iterable[Any]) -> Run[W]:
        threads = {thread.ident for thread in threading.enumerate()}
        for run in list(self._runs):
            if run.is_abandoned or (not run.candidates and run.thread not in threads):
                self.end(run)
        without = [run for run in self._runs if not run.candidates]
        if len(without) >= _MOST_RUNS:
            self.end(without[0])
        used = any(run.work is self._first for run in self._runs)
        return Run(self._make() if used else self._first, schedulers, *self._asked)

    def by(self, scheduler: Any) -> Run[W] | None:
        """The run of a scheduler."""
        return next((run for run in self._runs if run.scheduler is scheduler), None)

    def end(self, run: Run[W]) -> None:
        """Forget a run, whether or not its last step was seen."""
        with self._lock:
            if run in self._runs:
                self._runs.remove(run)
            run.tracker.reset()
            self._finish(run.work)

    def __iter__(self) -> Iterator[Run[W]]:
        return iter(list(self._runs))


class _Time:
    """A transformer's timestep argument."""

    def __init__(self, value: Any, rising: bool) -> None:
        self._value, self._rising = value, rising
        self._number: float | None = None

    def look_up(self, timesteps: Tensor, values: list[float]) -> None:
        """Take the value from these of the scheduler where it is a view of its timesteps, so as not to read it."""
        given = self._value
        if not isinstance(given, Tensor) or not given.numel() or _storage(given) != _storage(timesteps):
            return
        if all(stride == 0 or size == 1 for size, stride in zip(given.shape, given.stride(), strict=True)):
            self._value = values[(given.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)]

    def __float__(self) -> float:
        if self._number is None:
            self._number = self._read()
        return self._number

    def _read(self) -> float:
        if not isinstance(self._value, Tensor):
            return float(self._value)
        if not self._value.numel():
            return math.nan  # nothing is noisy (Cosmos 3, where only actions or sound are): the scheduler must tell
        return float(self._value.min() if self._rising else self._value.max())

    def position(self) -> float:
        """A number that falls from step to step."""
        return -float(self) if self._rising else float(self)

    def turned(self) -> _Time:
        """The same time, where it runs the other way."""
        return _Time(self._value, not self._rising)

    def is_after(self, other: _Time) -> bool:
        return self.position() < other.position()

    def is_at(self, timestep: float) -> bool:
        """Whether this is a scheduler's timestep, in thousandths or not, up to rounding to bfloat16."""
        value = float(self)
        if self._rising and math.isclose(1 - value, timestep / 1000, rel_tol=1e-2, abs_tol=4e-3):
            return True  # else the scheduler's timesteps may rise as well, as Mochi's do
        return math.isclose(value, timestep, rel_tol=1e-2) or math.isclose(1000 * value, timestep, rel_tol=1e-2)


def number(timestep: Any, rising: bool) -> float:
    """A transformer's timestep argument as one number, read on the host."""
    return float(_Time(timestep, rising))


def _first(conditioning: Any) -> Any:
    """The tensor, of a list of them the first."""
    if isinstance(conditioning, list | tuple):
        return conditioning[0] if conditioning else None
    return conditioning


def _told(told: Told) -> tuple[Any, float, bool | None]:
    """As :meth:`StepTracker._read` says it."""
    return _TOLD, -float(told.step), None if told.steps is None else told.step == told.steps - 1


def agrees(scheduler: Any, time: _Time) -> bool:
    """Whether the scheduler stands at this time."""
    index = _index(scheduler)
    if index is None:
        return any(time.is_at(t) for t in scheduler.timesteps.tolist())
    return index < len(scheduler.timesteps) and time.is_at(float(scheduler.timesteps[index]))


def _index(scheduler: Any) -> int | None:
    """The scheduler's index of the step to come; None for schedulers that don't count."""
    if not hasattr(scheduler, "step_index"):
        return None
    return scheduler.step_index if scheduler.step_index is not None else (getattr(scheduler, "begin_index", None) or 0)


def _storage(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor's numbers are, and of what type."""
    return tensor.device, tensor.dtype, tensor.untyped_storage().data_ptr()


def weak(value: Any) -> Callable[[], Any]:
    """A function that gives the value as long as it exists; always, where it takes no weak references."""
    try:
        return weakref.ref(value)
    except TypeError:  # None and the like
        return lambda: value
