"""What is said, in one line, of a trajectory that goes or went otherwise than its configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.report import Report
from tap_diffusion.core.schedule import FEWEST
from tap_diffusion.core.timeline import Timeline


def of_steps(
    report: Report, asked: TAPConfig, share: TAPConfig, steps: int | None, within: range | None,
    plan: Callable[[int], bool],
) -> str | None:  # fmt: skip
    """Why no step was predicted, or another number was full than asked for; None where all went as it should.

    Args:
        report: of the trajectory, which has ended.
        asked: the configuration.
        share: what it asks of this transformer (:func:`~tap_diffusion.core.schedule.for_the_rest`).
        steps: of the trajectory, if anybody told.
        within: as in :class:`~tap_diffusion.core.call.Call`.
        plan: which steps were to be full.
    """
    if not asked.predicts or not report.calls:
        return None
    fallbacks = "; ".join(f"{reason} ({count} calls)" for reason, count in report.fallbacks.items())
    if not report.predicted_calls:
        reason = fallbacks or _nothing_to_predict(report, asked, steps)
        return f"TAP predicted no step of this trajectory: {reason}."
    ran = f"TAP ran {report.full_steps} of {report.steps} steps in full"
    planned = sum(map(plan, {step for step, _, _ in report.calls}))
    if report.full_steps > planned:
        return f"{ran} where {planned} were planned: {fallbacks}."
    if isinstance(share.full_steps, int) and share.full_steps > report.full_steps and report.steps == steps:
        return f"{ran}, and not {share.full_steps} as full_steps asks."
    if share.full_steps is None and share.interval is None and steps is not None and within is None:
        wanted = round(steps / share.speedup)
        if wanted < FEWEST and report.full_steps > wanted:
            return (
                f"{ran}, {report.evaluations_speedup:.2f}x fewer evaluations where speedup={share.speedup:g} is asked"
                f" for: it leaves at least {FEWEST} full. For fewer give their number, full_steps=..."
            )
    return None


def _nothing_to_predict(report: Report, asked: TAPConfig, steps: int | None) -> str:
    if asked.full_steps is not None:
        return f"all of its {report.steps} steps are among full_steps={asked.full_steps}"
    if asked.interval is None and steps is not None:
        return (
            f"of its {report.steps} steps speedup={asked.speedup:g} leaves none to skip, since at least {FEWEST} are"
            " full. Use more steps, or say by full_steps how many of them are to be full"
        )
    return (
        f"it had {report.steps} steps, and with warmup={asked.warmup} the first predicted step is number"
        f" {asked.warmup + 1}. Use more steps or a smaller warmup"
    )


def of_fresh_noise(config: TAPConfig, timeline: Timeline | None, reuses: bool) -> str | None:
    """What a solver that adds fresh noise at each step keeps TAP from doing; None: nothing.

    Args:
        config: of the trajectory.
        timeline: its noise, where it is known.
        reuses: whether the last residual is reused, whatever the configuration's orders.
    """
    if timeline is None or timeline.fresh_noise is None or not config.predicts:
        return None
    if reuses and config.orders != (0,):
        effect = "TAP reuses the residual of the last full step instead of extrapolating it"
    elif config.hindsight:
        effect = "TAP's full steps do not correct the predictions before them"
    else:
        return None
    return (
        f"{timeline.fresh_noise} adds fresh noise at each step, so {effect}. A deterministic solver comes closer to"
        " what the plain model draws, in the same time."
    )
