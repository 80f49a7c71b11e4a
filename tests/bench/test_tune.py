"""Planning full steps: the search by brute force, and a run on a tiny model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tap_diffusion as tap
from tap_bench.calibration import Calibration
from tap_bench.models import BenchModel
from tap_bench.tune import Tuning, search
from tap_diffusion import ConfigError, TAPConfig
from tap_diffusion.core.errors import UsageError
from tiny import TOKENS, WORDS, build_pipeline, sample

STEPS = 12


def model() -> BenchModel:
    arguments = {"height": 32, "width": 32, "max_sequence_length": TOKENS}
    return BenchModel("tiny", build_pipeline, WORDS[1:], WORDS, lambda prompts: {"prompt": list(prompts)} | arguments)


# With a step between the peaks, so that there is room for both: pressed together, moving one at a time gets stuck.
@given(st.tuples(st.floats(-5, 5), st.floats(-5, 5)).filter(lambda peak: 15 + peak[1] - (6 + peak[0]) >= 1))
@settings(max_examples=25)
def test_the_search_finds_the_best_where_there_is_one_hill(peak: tuple[float, float]) -> None:
    """Each full step has its own best place."""

    def quality(full: tuple[int, ...]) -> float:
        assert full[0] == 0
        assert list(full) == sorted(set(full))
        return -sum((step - best) ** 2 for step, best in zip(full[1:], (6 + peak[0], 15 + peak[1], 25), strict=True))

    found = search(quality, [(0, 10, 16, 22)], 30, 10_000)
    best = max(itertools.combinations(range(1, 30), 3), key=lambda later: quality((0, *later)))
    assert quality(found) == pytest.approx(quality((0, *best)))


def test_the_search_asks_no_more_than_it_may_and_never_twice() -> None:
    asked: list[tuple[int, ...]] = []

    def quality(full: tuple[int, ...]) -> float:
        asked.append(full)
        return float(sum(full))

    found = search(quality, [(0, 3, 6)], 40, 9)
    assert len(asked) == len(set(asked)) == 9
    assert quality(found) == max(map(sum, asked))


def test_the_search_goes_on_from_the_best_start() -> None:
    """Each start is on a hill of its own."""

    def quality(full: tuple[int, ...]) -> float:
        return max(2 - abs(full[1] - 4), 9 - abs(full[1] - 30), 1 - abs(full[1] - 60))

    assert search(quality, [(0, 3), (0, 27), (0, 60)], 80, 100) == (0, 30)


@pytest.mark.slow
def test_a_run_writes_presets_that_keep_their_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tuning(evaluations: int) -> Tuning:
        return Tuning(model(), STEPS, (4,), tmp_path, samples=2, verified=2, evaluations=evaluations)

    (row,) = tuning(8).run()
    tried = json.loads((tmp_path / "tried-4.json").read_text())
    assert len(tried) == 8
    assert ",".join(map(str, row["recommended"])) in tried
    assert tried[",".join(map(str, row["planned"]))] == max(tried.values())
    preset = TAPConfig.load(tmp_path / "4.json")
    assert list(preset.full_steps or ()) == row[row["kept"]]  # type: ignore[arg-type]
    if row["planned"] != row["recommended"]:
        assert row["gain_db"] == pytest.approx(row["planned_db"] - row["recommended_db"])
        assert row["kept"] == ("planned" if row["gain_db"] > 0 else "recommended")
    assert json.loads((tmp_path / "report.json").read_text())[0]["planned"] == row["planned"]

    # Taken up again, nothing is tried twice.
    quality: Any = Calibration.quality
    calls = []

    def counted(self: Calibration, variant: Any) -> Any:
        calls.append(variant.settings["full_steps"])
        return quality(self, variant)

    monkeypatch.setattr(Calibration, "quality", counted)
    tuning(20).run()
    assert 0 < len(calls) <= 12
    assert len(json.loads((tmp_path / "tried-4.json").read_text())) == 8 + len(calls)

    # The preset is for this number of steps alone.
    pipe = build_pipeline()
    with tap.enabled(pipe, preset):
        sample(pipe, steps=STEPS)
        assert tap.report(pipe).full_steps == 4
        with pytest.raises(ConfigError, match=r"for trajectories of 12 steps, and this one has 20.*tap tune"):
            sample(pipe, steps=20)
    with pytest.raises(UsageError, match="another model or with other settings"):
        Tuning(model(), STEPS + 1, (4,), tmp_path, samples=2).run()
