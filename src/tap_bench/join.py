"""Joining the cells of a newer run into a report that is kept.

    tap bench --model scenes --suite standard --repeats 0 --budgets 10,8 --methods tap,hicache --out out/scenes
    python -m tap_bench.join out/scenes docs/bench/scenes --drop fora,taylorseer-1-8

A standard run of all methods takes a day on two cores. Where one method changes, its cells need be measured again, and
those of methods that are tuned on what changed; the rest stays. The report tells which cells came later.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Sequence, Set
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tap_bench import BASELINE, metrics
from tap_bench.methods import registry
from tap_bench.report import Cell, best_other, ranking, read_cells, read_json, write_report
from tap_bench.timing import cell_name
from tap_diffusion.apps.files import write_json, write_whole
from tap_diffusion.core.errors import UsageError

TIMES = ("time_speedup", "time_speedup_range")
QUALITY = 80  # of the sheets, which a report shows small


def join(run: Path, report: Path, drop: Collection[str] = (), note: str = "") -> None:
    """Put the cells of a finished run into a report, in place of those that it has.

    Cells without times of their own keep the times that the report has of them. Differences to TAP are worked out
    anew. Pictures are taken for TAP, for the best other method, and for cells that had one. The page is written anew.

    Args:
        run: folder of a run with the same model, steps, arithmetic and samples.
        report: folder that is changed.
        drop: methods, or cells (``fora-8``), of the report that no longer hold.
        note: what a reader should know of the cells that stay.

    Raises:
        UsageError: a folder holds no finished run, the two were made otherwise, or ``drop`` names what is not there.
    """
    new, old = read_cells(run), read_cells(report)
    facts, told = _check(run, report, new[0], old[0])
    later = {_name(cell): cell for cell in new[1:]}
    gone = {_name(cell) for cell in old[1:] if not {_name(cell), cell["method"]}.isdisjoint(drop)}
    unknown = set(drop) - gone - {cell["method"] for cell in old[1:] if _name(cell) in gone}
    if unknown:
        raise UsageError(f"{report} has no {', '.join(sorted(unknown))} to drop")
    stay = {_name(cell): cell for cell in old[1:] if _name(cell) not in later.keys() | gone}
    for cell in old[1:]:
        if _name(cell) in later and later[_name(cell)].get(TIMES[0]) is None:
            later[_name(cell)] |= {name: cell[name] for name in TIMES if name in cell}
    parts = [_rows(report, {_name(old[0]), *stay}), _rows(run, later)]
    samples = pa.concat_tables(parts, promote_options="default")
    psnr: dict[str, list[float]] = {}
    for row in samples.select(["method", "budget", "seed", "psnr_db"]).sort_by("seed").to_pylist():
        psnr.setdefault(cell_name(row["method"], row["budget"]), []).append(row["psnr_db"])
    cells = sorted((stay | later).values(), key=_place)
    for cell in cells:
        baseline = cell_name(BASELINE, cell["budget"])
        if baseline in psnr and _name(cell) != baseline:
            cell |= metrics.difference(psnr[_name(cell)], psnr[baseline])
    _pictures(run, report, cells, later.keys())
    joined = [part | {"cells": [name for name in part["cells"] if name in stay]} for part in told.get("joined", [])]
    part = {"on": _date(run), "versions": facts["versions"], "machine": facts["machine"], "cells": sorted(later)}
    if note:
        part["note"] = note
    write_json(report / "run.json", told | {"joined": [*(part for part in joined if part["cells"]), part]})
    write_whole(report / "samples.parquet", lambda partial: pq.write_table(samples, partial))
    write_json(report / "results.json", [old[0], *cells])
    write_report(report)


def _name(cell: Cell) -> str:
    return cell_name(cell["method"], cell["budget"])


def _place(cell: Cell) -> tuple[int, int]:
    """As the bench orders cells; methods that it no longer has come last."""
    methods = list(registry())
    return -cell["budget"], methods.index(cell["method"]) if cell["method"] in methods else len(methods)


def _check(run: Path, report: Path, new: Cell, old: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the two were made.

    Raises:
        UsageError: otherwise than each other.
    """
    made = [read_json(folder, "run.json") for folder in (run, report)]
    for what, one, other in (
        *((name, new[name], old[name]) for name in ("model", "steps", "samples")),
        ("dtype", *(facts.get("dtype", "float32") for facts in made)),
        ("tuned_on", *(facts["suite"]["tuned_on"] for facts in made)),
    ):
        if one != other:
            raise UsageError(f"{run} has {what} {one}, {report} has {other}: they can't be joined")
    plain = [_rows(folder, {cell_name("full", old["budget"])}).to_pylist() for folder in (run, report)]
    for one, other in zip(*plain, strict=True):
        for name in one.keys() & other.keys():
            if not _same(one[name], other[name]):
                raise UsageError(
                    f"the full model's results differ in {name} of seed {other['seed']}: {one[name]} in {run},"
                    f" {other[name]} in {report}; they can't be joined"
                )
    return made[0], made[1]


def _same(one: Any, other: Any) -> bool:
    """But for rounding, which differs between machines; None: not asked for in that run."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-3)
    return one is None or other is None or bool(one == other)


def _rows(folder: Path, names: Collection[str]) -> pa.Table:
    """A folder's samples of some cells."""
    table = pq.read_table(folder / "samples.parquet").replace_schema_metadata(None)
    cells = zip(table["method"].to_pylist(), table["budget"].to_pylist(), strict=True)
    return table.filter(pa.array([cell_name(*cell) in names for cell in cells]))


def _pictures(run: Path, report: Path, cells: Sequence[Cell], later: Set[str]) -> None:
    folder = report / "pictures"
    had = {file.stem: file for file in folder.glob("*")}
    shown = {_name(cell) for cell in cells if cell["method"] == BASELINE}
    for budget in {cell["budget"] for cell in cells}:
        other = best_other(ranking(cells, budget))
        shown |= {_name(other)} if other is not None else set()
    names = {_name(cell) for cell in cells}
    for name, file in had.items():
        if name in later or name not in names | {"full"}:
            file.unlink()
    for name in later & (shown | had.keys()):
        file = run / "pictures" / f"{name}.png"
        if file.exists():
            folder.mkdir(exist_ok=True)
            with Image.open(file) as sheet:
                sheet.save(folder / f"{name}.webp", quality=QUALITY)


def _date(run: Path) -> str:
    return datetime.fromtimestamp((run / "results.json").stat().st_mtime, UTC).strftime("%Y-%m-%d")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tap_bench.join", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run of the bench")
    parser.add_argument("report", type=Path, help="folder of the report that is changed")
    parser.add_argument(
        "--drop", type=lambda text: text.split(","), default=[], help="methods or cells: fora,newton-2-8"
    )
    parser.add_argument("--note", default="", help="what a reader should know of the cells that stay")
    given = parser.parse_args(arguments)
    try:
        join(given.run, given.report, given.drop, given.note)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
