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


@dataclass(frozen=True)
class Call:
    """Where a call stands.

    Attributes:
        step: counts from the start of the trajectory, whatever the scheduler's index.
        is_last_step: None where no scheduler tells.
    """

    step: int
    branch: str
    starts_trajectory: bool
    is_last_step: bool | None


@dataclass
class _Branch:
    conditioning: Callable[[], Any]  # weak: the tracker must not keep embeddings alive
    position: float


class StepTracker:
    """Locates calls.

    Attributes:
        schedulers: functions that return the schedulers of the pipelines which are known to use the transformer,
            read at each call since users replace them; None where the pipeline is gone.
    """

    def __init__(self) -> None:
        self.schedulers: list[Callable[[], Any]] = []
        self._trusted: Any = None  # the scheduler whose timesteps this trajectory runs through
        self.reset()

    def reset(self) -> None:
        """Forget the current trajectory: the next call starts one."""
        self._timesteps: Tensor | None = None
        self._position = math.inf
        self._step = -1
        self._branches: dict[str, _Branch] = {}

    def locate(self, timestep: Tensor, branch: str | None, conditioning: Any) -> Call:
        """Place a call.

        Args:
            timestep: the transformer's timestep argument; its first element is read, and only where no scheduler
                tells the position (on a GPU, reading it waits for the device).
            branch: its name, where the pipeline set diffusers' ``cache_context``.
            conditioning: the tensor that conditions this branch, such as the prompt embeddings. The same object
                comes back at each step of a trajectory.
        """
        familiar = any(known.conditioning() is conditioning for known in self._branches.values())
        timesteps, position, is_last = self._read(timestep, familiar)
        advances = position < self._position
        name = branch if branch is not None else f"#{0 if advances else self._calls_at(position)}"
        known = self._branches.get(name)
        if (
            timesteps is not self._timesteps
            or position > self._position
            or (not advances and known is not None and known.position == position)
            # Without a scheduler, another conditioning is the only sign that an interrupted run was followed by one
            # that starts lower.
            or (timesteps is None and advances and (known is None or known.conditioning() is not conditioning))
        ):
            self.reset()
            name = branch if branch is not None else "#0"
        if position < self._position:
            self._step += 1
        self._timesteps, self._position = timesteps, position
        self._branches[name] = _Branch(_weak(conditioning), position)
        return Call(self._step, name, self._step == 0 and len(self._branches) == 1, is_last)

    def _calls_at(self, position: float) -> int:
        return sum(branch.position == position for branch in self._branches.values())

    def _read(self, timestep: Tensor, familiar: bool) -> tuple[Tensor | None, float, bool | None]:
        """The timesteps of this trajectory if a scheduler is known, the falling position, whether it is the last."""
        if not familiar or (self._trusted is not None and self._trusted.timesteps is not self._timesteps):
            # Another run, or another pipeline that shares the transformer: see whose timestep this is.
            self._trusted = next((s for s in self._known() if _agrees(s, timestep)), None)
        scheduler = self._trusted
        if scheduler is None:
            return None, _number(timestep), None
        index = _index(scheduler)
        if index is None:
            position = _number(timestep)
            return scheduler.timesteps, position, _close(position, float(scheduler.timesteps[-1]))
        return scheduler.timesteps, -float(index), index == len(scheduler.timesteps) - 1

    def _known(self) -> list[Any]:
        found = [scheduler() for scheduler in self.schedulers]
        return [scheduler for scheduler in found if isinstance(getattr(scheduler, "timesteps", None), Tensor)]


def _agrees(scheduler: Any, timestep: Tensor) -> bool:
    index, value = _index(scheduler), _number(timestep)
    if index is None:
        return any(_close(value, t) for t in scheduler.timesteps.tolist())
    return index < len(scheduler.timesteps) and _close(value, float(scheduler.timesteps[index]))


def _index(scheduler: Any) -> int | None:
    """The scheduler's index of the step to come; None for schedulers that don't count."""
    if not hasattr(scheduler, "step_index"):
        return None
    return scheduler.step_index if scheduler.step_index is not None else (getattr(scheduler, "begin_index", None) or 0)


def _close(value: float, timestep: float) -> bool:
    """Whether a transformer's argument is this timestep, in thousandths or not, up to rounding to bfloat16."""
    return math.isclose(value, timestep, rel_tol=1e-2) or math.isclose(1000 * value, timestep, rel_tol=1e-2)


def _number(timestep: Tensor) -> float:
    return float(timestep.flatten()[0])


def _weak(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:  # None and the like
        return lambda: value
