"""Scripted sequences of calls, and where the tracker places them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from tap_diffusion.core.call import Call
from tap_diffusion.integrations.diffusers.tracking import StepTracker
from tiny import Operations


class Run:
    """A pipeline's loop as a transformer sees it."""

    def __init__(self, scheduler: Any = None, steps: int = 5, start: int = 0, known: bool = True) -> None:
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(steps)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        self.timesteps = self.scheduler.timesteps[start:]
        self.embeddings = [torch.zeros(1), torch.zeros(1)]

    def calls(
        self, tracker: StepTracker, branches: list[str | None] | None = None, stop: int = 1000, mid_step: bool = False
    ) -> list[Call]:
        """Run up to ``stop`` steps; with ``mid_step`` the last one is cut off after its first call."""
        branches = [None] if branches is None else branches
        result = []
        for i, t in enumerate(self.timesteps[:stop]):
            last = mid_step and i == min(stop, len(self.timesteps)) - 1
            for name, embedding in list(zip(branches, self.embeddings, strict=False))[: 1 if last else None]:
                result.append(tracker.locate(t.expand(2) / 1000, name, embedding))
            if not last:
                self.scheduler.step(torch.zeros(1, 4), t, torch.zeros(1, 4))
        return result


def knowing(*schedulers: Any) -> StepTracker:
    return StepTracker(lambda: schedulers)


def steps(calls: list[Call]) -> list[tuple[int, bool]]:
    return [(call.step, call.starts_trajectory) for call in calls]


FIVE = [(0, True), (1, False), (2, False), (3, False), (4, False)]


def test_one_branch_by_timesteps_alone() -> None:
    tracker = StepTracker()
    assert steps(Run().calls(tracker)) == FIVE
    assert steps(Run().calls(tracker)) == FIVE


def test_one_branch_by_the_scheduler() -> None:
    run = Run()
    calls = run.calls(knowing(run.scheduler))
    assert steps(calls) == FIVE
    assert [call.is_last_step for call in calls] == [False] * 4 + [True]


def test_two_branches_named_or_not() -> None:
    both: list[list[str | None]] = [["cond", "uncond"], [None, None]]
    for branches in both:
        for known in (True, False):
            run = Run()
            tracker = knowing(run.scheduler) if known else StepTracker()
            calls = run.calls(tracker, branches)
            assert [call.step for call in calls] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
            assert [call.starts_trajectory for call in calls] == [True] + [False] * 9
            first, second = {call.branch for call in calls[::2]}, {call.branch for call in calls[1::2]}
            assert len(first) == len(second) == 1
            assert first != second


def test_an_interrupted_run_never_reaches_the_next() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    kinds: list[list[str | None]] = [[None], ["cond", "uncond"], [None, None]]
    for tracker in (knowing(scheduler), StepTracker()):
        for branches in kinds:
            for stop in (1, 2, 3):
                for mid_step in (False, True):
                    Run(scheduler).calls(tracker, branches, stop, mid_step)
                    calls = Run(scheduler).calls(tracker, branches)
                    begun = max(i for i, call in enumerate(calls) if call.starts_trajectory)
                    # With unnamed branches and no scheduler, the new run may be noticed one step late; what matters
                    # is that a start lies before anything that could have been predicted.
                    assert begun <= (len(branches) if branches[0] is None else 0), (branches, stop, mid_step)


def test_a_run_that_starts_lower_than_the_last_one_stopped() -> None:
    # Text to image, interrupted after step 1; then image to image from step 3.
    scheduler = FlowMatchEulerDiscreteScheduler()
    for tracker in (knowing(scheduler), StepTracker()):
        Run(scheduler).calls(tracker, stop=2)
        calls = Run(scheduler, start=3).calls(tracker)
        assert steps(calls) == [(0, True), (1, False)]


@pytest.mark.parametrize("known", [True, False])
def test_branches_that_begin_and_end_in_mid_run(known: bool) -> None:
    """Guiders of modular pipelines give no names, and shift the calls of a step: skip-layer guidance has the same
    conditioning as the first branch, and guidance may end before it does, or begin after."""
    run = Run()
    tracker = knowing(run.scheduler) if known else StepTracker()
    cond, uncond = run.embeddings
    order = {0: "cu", 1: "cus", 2: "csu", 3: "cs", 4: "cs"}
    found: dict[str, list[str]] = {"c": [], "u": [], "s": []}
    for i, t in enumerate(run.timesteps):
        for kind in order[i]:
            found[kind].append(tracker.locate(t.expand(2) / 1000, None, uncond if kind == "u" else cond).branch)
        run.scheduler.step(torch.zeros(1, 4), t, torch.zeros(1, 4))
    assert [len(set(names)) for names in found.values()] == [1, 1, 1]
    assert len({names[0] for names in found.values()}) == 3


def test_a_prompt_that_changes_in_mid_run_has_a_history_of_its_own() -> None:
    run = Run(steps=6)
    tracker, prompts = knowing(run.scheduler), [torch.zeros(1), torch.zeros(1)]
    calls = []
    for i, t in enumerate(run.timesteps):
        calls.append(tracker.locate(t.expand(2) / 1000, None, prompts[i >= 3]))
        run.scheduler.step(torch.zeros(1, 4), t, torch.zeros(1, 4))
    assert [call.branch for call in calls] == ["#0"] * 3 + ["#1"] * 3
    assert [call.step for call in calls] == list(range(6))


@pytest.mark.parametrize("fresh", ["cu", "u"])
def test_embeddings_made_anew_at_each_step_go_by_their_place(fresh: str) -> None:
    run = Run()
    tracker, kept = knowing(run.scheduler), torch.zeros(1)
    found: dict[str, set[str]] = {"c": set(), "u": set()}
    for t in run.timesteps:
        for kind in "cu":
            embeddings = torch.zeros(1) if kind in fresh else kept
            found[kind].add(tracker.locate(t.expand(2) / 1000, None, embeddings).branch)
        run.scheduler.step(torch.zeros(1, 4), t, torch.zeros(1, 4))
    assert found == {"c": {"#0"}, "u": {"#1"}}


def test_the_same_embeddings_again() -> None:
    tracker = StepTracker()
    run = Run()
    run.calls(tracker)
    run.scheduler.set_timesteps(5)
    assert steps(run.calls(tracker)) == FIVE


def test_two_pipelines_share_the_transformer() -> None:
    known, foreign = Run(), Run(steps=7)
    for tracker in (knowing(known.scheduler), knowing(known.scheduler, foreign.scheduler)):
        known = Run(known.scheduler)
        assert steps(known.calls(tracker)) == FIVE
        foreign = Run(foreign.scheduler, steps=7)
        assert steps(foreign.calls(tracker))[:5] == FIVE
        known = Run(known.scheduler)
        known.calls(tracker, stop=2)
        foreign = Run(foreign.scheduler, steps=7)
        assert steps(foreign.calls(tracker))[:5] == FIVE
        known = Run(known.scheduler)
        assert steps(known.calls(tracker)) == FIVE


def test_a_scheduler_that_does_not_count() -> None:
    run = Run(DDIMScheduler())
    calls = run.calls(knowing(run.scheduler))
    assert steps(calls) == FIVE
    assert [call.is_last_step for call in calls] == [False] * 4 + [True]


def test_a_scheduler_whose_copies_are_stepped() -> None:
    """SkyReels-V2's diffusion forcing has one for each frame."""
    run = Run(steps=50)
    tracker = knowing(run.scheduler)
    for _ in range(2):
        run.scheduler.set_timesteps(50)
        embeddings = [torch.zeros(1), torch.zeros(1)]
        calls = [
            tracker.locate(t.repeat(2, 3), branch, embedding)
            for t in run.timesteps
            for branch, embedding in zip(["cond", "uncond"], embeddings, strict=True)
        ]
        assert [call.step for call in calls] == [step for step in range(50) for _ in range(2)]
        assert [call.starts_trajectory for call in calls] == [True] + 99 * [False]


def test_a_scheduler_whose_timesteps_rise() -> None:
    run, other = Run(FlowMatchEulerDiscreteScheduler(invert_sigmas=True)), Run()
    tracker = knowing(run.scheduler, other.scheduler)
    calls = []
    for t in run.timesteps:
        calls.append(tracker.locate(t.expand(2), "cond_uncond", run.embeddings[0], rising=True))
        run.scheduler.step(torch.zeros(1, 4), t, torch.zeros(1, 4))
    assert steps(calls) == FIVE
    assert [call.is_last_step for call in calls] == [False] * 4 + [True]


def test_no_tokens_that_have_a_time() -> None:
    """Cosmos 3 passes none where only actions or sound are noisy."""
    run = Run()
    tracker = knowing(run.scheduler)
    calls = []
    for t in run.timesteps:
        calls.append(tracker.locate(torch.empty(0), "cond", run.embeddings[0]))
        run.scheduler.step(torch.zeros(1, 4), t, torch.zeros(1, 4))
    assert steps(calls) == FIVE


def test_a_scheduler_that_evaluates_twice_per_step() -> None:
    run = Run(FlowMatchHeunDiscreteScheduler())
    calls = run.calls(knowing(run.scheduler))
    assert [call.step for call in calls] == list(range(9))
    assert {call.branch for call in calls} == {calls[0].branch}


def test_the_scheduler_spares_reading_the_timestep() -> None:
    """On a GPU that would wait for the device; here a timestep that may be read twice at most stands for one."""

    class Costly(torch.Tensor):
        reads = 0

        def __float__(self) -> float:
            Costly.reads += 1
            return float(self.as_subclass(torch.Tensor))

    run = Run(steps=20)
    tracker = knowing(run.scheduler)
    for t in run.timesteps:
        tracker.locate((t.expand(1) / 1000).as_subclass(Costly), "cond", run.embeddings[0])
        run.scheduler.step(torch.zeros(1, 4), t, torch.zeros(1, 4))
    assert Costly.reads == 1


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("kind", ["view", "copy"])
def test_timesteps_of_a_scheduler_that_does_not_count_are_looked_up(kind: str, start: int) -> None:
    """Pipelines pass views of the scheduler's timesteps, whose place tells the value; a copy has to be read."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(7)
    tracker, embeddings = knowing(scheduler), torch.zeros(1)
    read, calls = [], []
    for t in scheduler.timesteps[start:]:
        given = t[None].expand(2) if kind == "view" else t[None].repeat(2)
        with Operations() as operations:
            calls.append(tracker.locate(given, None, embeddings))
        read.append(len(operations.reads))
    assert [call.step for call in calls] == list(range(7 - start))
    assert [call.is_last_step for call in calls] == [False] * (6 - start) + [True]
    assert (sum(read[1:]) == 0) == (kind == "view")


def test_keeps_no_embeddings_alive() -> None:
    import gc
    import weakref

    tracker = StepTracker()
    embedding = torch.zeros(1)
    alive = weakref.ref(embedding)
    tracker.locate(torch.tensor([0.5]), None, embedding)
    del embedding
    gc.collect()
    assert alive() is None


def test_a_scheduler_known_twice_counts_once() -> None:
    """As after enabling a pipeline again: what is trusted for being the only scheduler stays so."""
    run = Run()
    tracker = knowing(run.scheduler, run.scheduler)
    calls = []
    for t in run.timesteps:
        sigma = t / 1000
        calls.append(tracker.locate(7 + sigma.log(), None, run.embeddings[0]))  # a time of the pipeline's own making
        run.scheduler.step(torch.zeros(1, 4), t, torch.zeros(1, 4))
    assert steps(calls) == FIVE
    assert [call.is_last_step for call in calls] == [False] * 4 + [True]
