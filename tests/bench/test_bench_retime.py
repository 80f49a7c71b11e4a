"""Timing a report's cells again: each runs as it was measured, nothing is searched for, and only times are new."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_bench import STEPS, SUITE, tiny_model

from tap_bench import metrics, retime
from tap_bench.bench import Bench
from tap_bench.calibration import Calibration, run
from tap_bench.methods import registry
from tap_bench.report import read_cells, write_report
from tap_bench.retime import Told, main, rebuilt
from tap_diffusion.core.errors import UsageError
from tiny import WORDS, build_pipeline

NAMES = (
    "tap", "tap-planned", "hicache", "spectrum", "teacache", "magcache", "dpcache", "l2p", "diffusers-magcache",
    "cache-dit-dynamic", "euler",
)  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, as docs/bench keeps it."""
    made, kept = (tmp_path_factory.mktemp(name) for name in ("made", "kept"))
    known = registry()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tap_bench.methods.planned.EVALUATIONS", 8)
        Bench(tiny_model(), {name: known[name] for name in NAMES}, SUITE, (4,), made, STEPS).run()
    write_report(made)
    for name in ("results.json", "run.json", "samples.parquet", "report.html"):
        shutil.copy(made / name, kept)
    return kept


@pytest.fixture(autouse=True)
def on_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retime, "MODELS", {"tiny": tiny_model})


def test_every_cell_runs_as_it_was_measured(report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(*_: Any) -> None:
        raise AssertionError("this has been tuned")

    monkeypatch.setattr(Calibration, "run", searched)
    pipe, model = build_pipeline(), tiny_model()
    full = run(pipe, model, None, WORDS[:2], 0, STEPS)
    samples = pq.read_table(report / "samples.parquet").to_pylist()
    told = Told(pipe, model, STEPS, tmp_path)
    cells = read_cells(report)[1:]
    assert [cell["method"] for cell in cells] == list(NAMES)
    for cell in cells:
        variant = rebuilt(cell, registry()[cell["method"]], pipe, told)
        psnr = metrics.psnr(run(pipe, model, variant, WORDS[:2], 0, STEPS).pictures, full.pictures).tolist()
        rows = [row["psnr_db"] for row in samples if row["method"] == cell["method"]]
        assert psnr == pytest.approx(rows[:2], abs=1e-3), cell["method"]


def test_only_times_are_new(report: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in report.iterdir()}
    arguments = [str(report), "--out", str(tmp_path), "--samples", "2", "--repeats", "2"]
    main(arguments)
    assert {file.name: file.read_bytes() for file in report.iterdir()} == before
    times = json.loads((tmp_path / "times.json").read_text())
    for old, new in zip(read_cells(report), read_cells(tmp_path), strict=True):
        if new["method"] != "full":
            ratios = times[f"{new['method']}-4"]
            assert len(ratios) == 2
            assert new["time_speedup"] == pytest.approx(sum(ratios) / 2)
            assert new["time_speedup_range"] == sorted(ratios)
        kept = old.keys() - {"time_speedup", "time_speedup_range"}
        assert {name: old[name] for name in kept} == {name: new[name] for name in kept}
    page, renewed = (folder.joinpath("report.html").read_text(encoding="utf-8") for folder in (report, tmp_path))
    assert "median and range of 2 runs of 2 samples. They were taken by themselves on 20" in renewed
    assert renewed[renewed.index('<section id="tuning">') :] == page[page.index('<section id="tuning">') :]

    # Once more: nothing is left to do. Otherwise: not in the same folder.
    main(arguments)
    assert json.loads((tmp_path / "times.json").read_text()) == times
    with pytest.raises(SystemExit):
        main([*arguments[:-4], "--samples", "1", "--repeats", "2"])


def test_another_report_does_not_go_into_the_same_folder(report: Path, tmp_path: Path) -> None:
    one, other = (shutil.copytree(report, tmp_path / name) for name in ("one", "other"))
    for folder in (one, other):
        (folder / "results.json").write_text(json.dumps(read_cells(report)[:2]))
    facts = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(facts | {"model": "emoji"}))
    retime.retime(one, tmp_path / "out", samples=1, repeats=1)
    kept = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(UsageError, match="holds another report, or one timed otherwise"):
        retime.retime(other, tmp_path / "out", samples=1, repeats=1)
    assert (tmp_path / "out" / "results.json").read_bytes() == kept


def test_cells_that_are_left_out_have_no_time(report: Path, tmp_path: Path) -> None:
    retime.write_times(shutil.copytree(report, tmp_path / "copy"), {"tap-4": [3.0, 1.0, 2.5]})
    times = {cell["method"]: cell["time_speedup"] for cell in read_cells(tmp_path / "copy")}
    assert {method: time for method, time in times.items() if time is not None} == {"tap": 2.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "never"}, "tap at 4 has no schedule 'never' any more"),
        ({"settings": {"orders": [7]}}, "tap at 4 is no longer what the report has: orders"),
        ({"settings": {"gone": None}}, "tap at 4 is no longer what the report has: gone"),
        (
            {"full_steps": 9.5},
            "tap at 4 takes 4 full steps where the report has 9.5: it no longer does what was measured",
        ),
        ({"method": "mine"}, "has a method that the bench has not: mine"),
        ({"model": "other"}, "only reports of tiny can be timed again, not of other"),
        ({"budget": 5}, "has no budget of 4"),
    ],
)
def test_what_can_no_longer_be_run_is_named(report: Path, tmp_path: Path, changes: Any, message: str) -> None:
    full, tap, *_ = read_cells(report)
    folder = shutil.copytree(report, tmp_path / "report")
    full |= {name: value for name, value in changes.items() if name == "model"}
    (folder / "results.json").write_text(json.dumps([full, tap | changes]))
    with pytest.raises(UsageError, match=message):
        retime.retime(folder, tmp_path / "out", budgets=[4])
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_folder_without_page_is_named_before_anything_is_timed(report: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(report, tmp_path / "report")
    (folder / "results.json").write_text(json.dumps(read_cells(report)[:2]))
    (folder / "report.html").unlink()
    with pytest.raises(UsageError, match=r"no finished run of the bench: .*report\.html"):
        retime.retime(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "times.json").exists()
