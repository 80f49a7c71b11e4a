"""Where a call of the transformer stands in its trajectory."""

from __future__ import annotations

from dataclasses import dataclass

from tap_diffusion.core.timeline import Timeline


@dataclass(frozen=True)
class Call:
    """Where a call stands.

    Attributes:
        step: counts from the start of the trajectory, whatever the scheduler's index.
        is_last_step: None where no scheduler tells.
        steps: of the trajectory, if a scheduler tells; may be more than will run (Wan 2.2 changes the transformer).
        timeline: the noise of these steps, likewise.
        unread: why there is no timeline though there is a scheduler, as one sentence.
        within: steps that may be predicted, where the user wants others full; None: all.
        steps_before, full_before: steps, and full ones, that another transformer has made in the same run (Wan 2.2).
    """

    step: int
    branch: str
    starts_trajectory: bool
    is_last_step: bool | None
    steps: int | None = None
    timeline: Timeline | None = None
    unread: str | None = None
    within: range | None = None
    steps_before: int = 0
    full_before: int = 0
