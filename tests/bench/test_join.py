"""Cells of a later run in a report: as if all had been measured in one run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_bench import STEPS, SUITE, tiny_model

from tap_bench.bench import Bench
from tap_bench.join import join, main
from tap_bench.methods import registry
from tap_bench.report import read_cells, write_report
from tap_diffusion.core.errors import UsageError

pytestmark = pytest.mark.slow


def rewritten(
    folder: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None], file: str = "samples.parquet"
) -> None:
    """Change each row of a folder's samples, or leave it out (None)."""
    table = pq.read_table(folder / file)
    rows = [row for row in map(change, table.to_pylist()) if row is not None]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / file)


def part(run: Path, out: Path, methods: str) -> Path:
    """A folder as a run of some of the methods leaves it, without what only a run's continuation needs."""
    kept = {"full", *methods.split()}
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("cells", "*.safetensors", "calibration", "tuning"))
    cells = [cell for cell in read_cells(out) if cell["method"] in kept]
    (out / "results.json").write_text(json.dumps(cells))
    rewritten(out, lambda row: row if row["method"] in kept else None)
    for file in (out / "pictures").iterdir():
        if file.stem.rpartition("-")[0] not in {"", *kept}:
            file.unlink()
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all methods, which nothing has joined."""
    known, out = registry(), tmp_path_factory.mktemp("whole")
    methods = {name: known[name] for name in ("tap", "tap-paper", "fora", "euler")}
    Bench(tiny_model(), methods, replace(SUITE, repeats=0), (4,), out, STEPS).run()
    return out


@pytest.fixture
def later(whole: Path, tmp_path: Path) -> Path:
    return part(whole, tmp_path / "later", "tap tap-paper fora")


@pytest.fixture
def report(whole: Path, tmp_path: Path) -> Path:
    """An older run, with another TAP and another FORA, of which nothing may be left."""
    out = part(whole, tmp_path / "report", "tap fora euler")
    cells = read_cells(out)
    for cell in cells[1:]:
        cell |= {"difference_db": -9.0} if cell["method"] == "euler" else {"psnr_db": 1.0, "psnr_ci": [0.0, 2.0]}
    cells[1] |= {"time_speedup": 2.5, "time_speedup_range": [2.0, 3.0]}
    (out / "results.json").write_text(json.dumps(cells))
    rewritten(out, lambda row: row | {"psnr_db": 1.0} if row["method"] in ("tap", "fora") else row)
    return out


def told(folder: Path) -> dict[tuple[str, int], str]:
    """All that a folder tells of each cell, but for times."""
    return {
        (cell["method"], cell["budget"]): json.dumps(
            {name: value for name, value in cell.items() if not name.startswith("time")}, sort_keys=True
        )
        for cell in read_cells(folder)
    }


def test_joined_is_as_if_measured_together(whole: Path, later: Path, report: Path) -> None:
    (report / "report.html").write_text("older")
    join(later, report)
    assert "Measured later" in (report / "report.html").read_text(encoding="utf-8")
    assert told(report) == told(whole)
    assert list(told(report)) == list(told(whole))
    order = [("method", "ascending"), ("budget", "ascending"), ("seed", "ascending")]
    found, expected = (
        pq.read_table(folder / "samples.parquet").sort_by(order).to_pylist() for folder in (report, whole)
    )
    assert found == expected
    assert read_cells(report)[1]["time_speedup_range"] == [2.0, 3.0]  # which the later run didn't measure


def test_the_report_tells_what_came_later(whole: Path, later: Path, report: Path) -> None:
    join(later, report, note="Euler is older.")
    join(part(whole, later.parent / "last", "tap fora euler"), report)
    parts = json.loads((report / "run.json").read_text())["joined"]
    assert [part["cells"] for part in parts] == [["tap-paper-4"], ["euler-4", "fora-4", "tap-4"]]
    page = write_report(report).read_text(encoding="utf-8")
    assert "tap-paper-4. Euler is older.<br>" in page


def test_dropped_cells_and_pictures_of_cells_that_are_gone(later: Path, report: Path) -> None:
    (report / "pictures" / "tap-paper-4.webp").write_bytes(b"older")
    (report / "pictures" / "unknown-4.png").write_bytes(b"of nothing")
    join(later, report, drop=["euler-4", "fora"])
    assert [method for method, _ in told(report)] == ["full", "tap", "tap-paper", "fora"]  # the later run has it
    pictures = {file.name for file in (report / "pictures").iterdir()}
    assert not pictures & {"unknown-4.png", "euler-4.png", "tap-4.png", "fora-4.png"}
    assert {"full.png", "tap-4.webp", "fora-4.webp", "tap-paper-4.webp"} <= pictures
    assert (report / "pictures" / "tap-paper-4.webp").read_bytes()[:4] == b"RIFF"
    write_report(report)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("run.json", {"dtype": "bfloat16"}, "dtype bfloat16"),
        ("results.json", {"steps": 11}, "steps 11"),
        ("samples.parquet", {"condition": "another"}, "condition of seed 0: another"),
    ],
)
def test_runs_that_were_made_otherwise_are_refused(
    later: Path, report: Path, file: str, change: dict[str, Any], message: str
) -> None:
    if file.endswith("parquet"):
        rewritten(later, lambda row: row | change, file)
    else:
        content = json.loads((later / file).read_text())
        (content if file == "run.json" else content[0]).update(change)
        (later / file).write_text(json.dumps(content))
    before = {path: path.read_bytes() for path in report.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=message):
        join(later, report)
    assert {path: path.read_bytes() for path in report.rglob("*") if path.is_file()} == before


def test_what_is_not_there(later: Path, report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = later.with_name("without")
    shutil.copytree(later, without, ignore=shutil.ignore_patterns("run.json"))
    for arguments, message in (
        ([str(later), str(report), "--drop", "magcache"], "no magcache to drop"),
        ([str(later / "none"), str(report)], "holds no finished run"),
        ([str(without), str(report)], "holds no finished run of the bench: run.json"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
