"""Finding out which step of which trajectory a call of the transformer belongs to, and which branch.

Nobody tells the transformer. What is always there is the timestep argument: it falls from step to step, a jump up
begins a new trajectory, and a second call at one timestep is another branch. Where the pipeline is known, its
scheduler adds what the timestep can't tell: whether these are still the same timesteps (an interrupted run
followed by one that starts lower looks like one run otherwise), which step is the last, and the position as a
number on the host, which a timestep on a GPU would have to wait for.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tap_diffusion import schedulers
from tap_diffusion.compiling import uncompiled
from tap_diffusion.timeline import Timeline

_STRANGERS = 8  # more than a trajectory's first step can have branches


@dataclass(frozen=True)
class Call:
    """Where a call stands.

    Attributes:
        step: counts from the start of the trajectory, whatever the scheduler's index.
        is_last_step: None where no scheduler tells.
        steps: of the trajectory, if a scheduler tells; may be more than will run (Wan 2.2 changes the transformer).
        timeline: the noise of these steps, likewise.
    """

    step: int
    branch: str
    starts_trajectory: bool
    is_last_step: bool | None
    steps: int | None = None
    timeline: Timeline | None = None


@dataclass
class _Branch:
    conditioning: Callable[[], Any]  # weak: the tracker must not keep embeddings alive
    position: float
    time: _Time  # read only where the position is in doubt
    steady: bool  # whether its conditioning is the same object from call to call


class StepTracker:
    """Locates calls.

    Attributes:
        schedulers: functions that return the schedulers of the pipelines which are known to use the transformer,
            read at each call since users replace them; None where the pipeline is gone.
    """

    def __init__(self) -> None:
        self.schedulers: list[Callable[[], Any]] = []
        self._guessed = False  # whether it was trusted without agreeing on the time
        self._strangers = 0  # calls in a row with a conditioning never seen before
        self._trusted: Any = None  # the scheduler whose timesteps this trajectory runs through
        self._idle: Tensor | None = None  # timesteps of a scheduler that nobody steps
        self._values: tuple[Tensor, list[float]] | None = None  # of one that does not count, and on the host
        self.reset()

    def reset(self) -> None:
        """Forget the current trajectory: the next call starts one."""
        self._timesteps: Tensor | None = None
        self._position = math.inf
        self._step = -1
        self._branches: dict[str, _Branch] = {}
        self._called: list[str] = []  # branches of this step, in their order
        self._called_before: list[str] = []  # and of the one before
        self._steps: int | None = None
        self._timeline: Timeline | None = None

    @uncompiled
    def locate(self, timestep: Any, branch: str | None, conditioning: Any, rising: bool = False) -> Call:
        """Place a call.

        Args:
            timestep: the transformer's timestep argument, a number or a tensor; where tokens have times of their own,
                the noisiest counts (the others are conditions). A tensor is read only where no scheduler tells the
                position (on a GPU, reading it waits for the device).
            branch: its name, where the pipeline set diffusers' ``cache_context``.
            conditioning: the tensor that conditions this branch, such as the prompt embeddings, or a list of them.
                With most pipelines the same object comes back at each step of a trajectory.
            rising: the argument rises from step to step, from 0 for noise to 1.
        """
        if isinstance(conditioning, list | tuple):
            conditioning = conditioning[0] if conditioning else None
        familiar = any(known.conditioning() is conditioning for known in self._branches.values())
        self._strangers = 0 if familiar else self._strangers + 1
        time = _Time(timestep, rising)
        timesteps, position, is_last = self._read(time, familiar)
        known = self._branches.get(branch or "")
        if timesteps is not None and known is not None and known.position == position and time.is_after(known.time):
            # Time passes, but not for this scheduler: the pipeline steps copies of it (SkyReels-V2 has one per frame).
            self._trusted, self._idle = None, timesteps
            self._go_by_time()
            timesteps, position, is_last = None, time.position(), None
        advances = position < self._position
        if advances:
            self._called_before, self._called = self._called, []
        name = branch if branch is not None else self._unnamed(conditioning)
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
            name, known = branch if branch is not None else "#0", None
        if position < self._position:
            self._step += 1
        self._timesteps, self._position = timesteps, position
        steady = known is not None and known.conditioning() is conditioning
        self._branches[name] = _Branch(_weak(conditioning), position, time, steady)
        self._called.append(name)
        starts = self._step == 0 and len(self._branches) == 1
        if starts and timesteps is not None:
            self._look_ahead(time)
        return Call(self._step, name, starts, is_last, self._steps, self._timeline)

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
        return f"#{len(self._branches)}"

    def _look_ahead(self, time: _Time) -> None:
        """Ask the scheduler about the steps to come."""
        scheduler = self._trusted
        first = _index(scheduler)
        if first is None:
            at = [i for i, t in enumerate(scheduler.timesteps.tolist()) if time.is_at(t)]
            first = at[0] if at else 0
        self._steps = len(scheduler.timesteps) - first
        self._timeline = schedulers.timeline(scheduler, first)

    def has_stopped_before(self, other: StepTracker) -> bool:
        """Whether the other transformer of the same run has gone on for more than a step without this one."""
        return self._timesteps is other._timesteps and self._position > other._position + 1

    def _go_by_time(self) -> None:
        for known in self._branches.values():
            known.position = known.time.position()
        self._timesteps, self._position = None, min(known.position for known in self._branches.values())

    def _read(self, time: _Time, familiar: bool) -> tuple[Tensor | None, float, bool | None]:
        """The timesteps of this trajectory if a scheduler is known, the falling position, whether it is the last."""
        if not familiar or (self._trusted is not None and self._trusted.timesteps is not self._timesteps):
            # Another run, or another pipeline that shares the transformer: see whose timestep this is.
            self._trusted = self._whose(time)
        scheduler = self._trusted
        if scheduler is None:
            return None, time.position(), None
        index = _index(scheduler)
        if index is None:
            if self._values is None or self._values[0] is not scheduler.timesteps:
                self._values = scheduler.timesteps, scheduler.timesteps.tolist()
            time.look_up(*self._values)
            return scheduler.timesteps, time.position(), time.is_at(self._values[1][-1])
        return scheduler.timesteps, -float(index), index == len(scheduler.timesteps) - 1

    def _whose(self, time: _Time) -> Any:
        known = self._known()
        for scheduler in known:
            if _agrees(scheduler, time):
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
        found = {id(scheduler): scheduler for scheduler in (get() for get in self.schedulers)}
        return [
            scheduler
            for scheduler in found.values()
            if isinstance(getattr(scheduler, "timesteps", None), Tensor) and scheduler.timesteps is not self._idle
        ]


class _Time:
    """A transformer's timestep argument."""

    def __init__(self, value: Any, rising: bool) -> None:
        self._value, self._rising = value, rising

    def look_up(self, timesteps: Tensor, values: list[float]) -> None:
        """Take the value from these of the scheduler where it is a view of its timesteps, so as not to read it."""
        given = self._value
        if not isinstance(given, Tensor) or not given.numel() or _storage(given) != _storage(timesteps):
            return
        if all(stride == 0 or size == 1 for size, stride in zip(given.shape, given.stride(), strict=True)):
            self._value = values[(given.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)]

    def __float__(self) -> float:
        if not isinstance(self._value, Tensor):
            return float(self._value)
        if not self._value.numel():
            return math.nan  # nothing is noisy (Cosmos 3, where only actions or sound are): the scheduler must tell
        return float(self._value.min() if self._rising else self._value.max())

    def position(self) -> float:
        """A number that falls from step to step."""
        return -float(self) if self._rising else float(self)

    def is_after(self, other: _Time) -> bool:
        return self.position() < other.position()

    def is_at(self, timestep: float) -> bool:
        """Whether this is a scheduler's timestep, in thousandths or not, up to rounding to bfloat16."""
        value = float(self)
        if self._rising and math.isclose(1 - value, timestep / 1000, rel_tol=1e-2, abs_tol=4e-3):
            return True  # else the scheduler's timesteps may rise as well, as Mochi's do
        return math.isclose(value, timestep, rel_tol=1e-2) or math.isclose(1000 * value, timestep, rel_tol=1e-2)


def _agrees(scheduler: Any, time: _Time) -> bool:
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


def _weak(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:  # None and the like
        return lambda: value
