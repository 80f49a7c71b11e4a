"""Timing cells of the bench, as ratios to the plain pipeline in the same process."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from tap_bench.calibration import run
from tap_bench.models import BenchModel
from tap_bench.variant import Variant
from tap_diffusion.apps.files import write_json

GROUP = 6  # cells between two runs of the plain pipeline


def cell_name(method: str, budget: int) -> str:
    """Under which a cell is kept."""
    return f"{method}-{budget}"


def read_times(file: Path) -> dict[str, list[float]]:
    """What has been timed: each cell's ratios to the plain pipeline, one for each repeat."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def speedup(ratios: Sequence[float]) -> dict[str, Any]:
    """What a cell of the results says of its time; None where it was not timed."""
    return {
        "time_speedup": median(ratios) if ratios else None,
        "time_speedup_range": [min(ratios), max(ratios)] if ratios else None,
    }


def time_cells(
    chosen: Mapping[str, Variant], seconds: Callable[[Variant | None], float], repeats: int, file: Path
) -> None:
    """Time every cell, a few at a time between two runs of the plain pipeline, in another order each time.

    Args:
        chosen: the variant that runs in each cell.
        seconds: runs a variant, None for the plain pipeline, and returns how long it took.
        repeats: timed runs of each cell.
        file: where the ratios are kept, as :func:`read_times` has them; what is there is not timed again.
    """
    times = read_times(file)
    todo = []
    for repeat in range(repeats):
        cells = sorted(chosen)
        random.Random(repeat).shuffle(cells)
        todo.append([cell for cell in cells if len(times.get(cell, [])) <= repeat])
    if not any(todo):
        return
    seconds(None)  # warm up
    with tqdm(total=sum(map(len, todo)), desc="timing", unit="run") as progress:
        for cells in todo:
            before = seconds(None)
            for first in range(0, len(cells), GROUP):
                group = cells[first : first + GROUP]
                taken = {}
                for cell in group:
                    taken[cell] = seconds(chosen[cell])
                    progress.update()
                after = seconds(None)
                for cell in group:
                    times.setdefault(cell, []).append((before + after) / 2 / taken[cell])
                before = after
                write_json(file, times)


def stopwatch(pipe: Any, model: BenchModel, samples: int, steps: int) -> Callable[[Variant | None], float]:
    """How long a variant takes for the first measured samples, seconds, as :func:`time_cells` asks for it."""
    conditions = model.measured[:samples]

    def seconds(variant: Variant | None) -> float:
        start = time.perf_counter()
        run(pipe, model, variant, conditions, 0, steps)  # ends with a copy to the host
        return time.perf_counter() - start

    return seconds
