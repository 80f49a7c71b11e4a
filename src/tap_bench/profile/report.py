"""Tables and pictures of profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from tap_bench.profile import machine, profile, scaling
from tap_bench.profile.loops import Loops
from tap_bench.profile.subjects import Subject
from tap_diffusion.apps.files import write_json
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.errors import UsageError

_STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
_BLUE, _ORANGE, _GREY = "#3b76af", "#e08a3c", "#b5b5b5"


def profile_picture(result: dict[str, Any], file: Path) -> None:
    """Floor and measured time of each part of a predicted call, and the whole loop, as a PNG."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3), layout="constrained")
        parts, loop = figure.subplots(1, 2, width_ratios=(3, 2))
        names = list(result["floor_ms"])
        rows = range(len(names))
        parts.barh([row - 0.2 for row in rows], result["floor_ms"].values(), 0.4, label="floor", color=_GREY)
        measured = [result["parts_ms"][name] for name in names]
        parts.barh([row + 0.2 for row in rows], measured, 0.4, label="measured", color=_BLUE)
        parts.set_yticks(rows, names)
        parts.invert_yaxis()
        parts.set_xlabel("ms")
        parts.set_title(f"a predicted call of {result['name']}: {result['predicted_over_plain']:.2%} of a plain one")
        parts.legend(frameon=False)
        whole = result["loop"]
        seconds = {"plain": whole["plain_ms"], "TAP": whole["tap_ms"], "limit": whole["plain_ms"] / whole["limit"]}
        loop.barh(list(seconds), [ms / 1000 for ms in seconds.values()], color=[_GREY, _BLUE, _ORANGE])
        loop.invert_yaxis()
        loop.set_xlabel("s")
        loop.set_title(f"{result['steps']} steps: {whole['speedup']:.2f}x, {whole['share_of_limit']:.0%} of the limit")
        _save(figure, file)


def scaling_picture(points: Sequence[dict[str, Any]], file: Path) -> None:
    """Time of a predicted call and bytes of the cache against tokens and against blocks, as a PNG."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        for row, against in zip(figure.subplots(2, 2), ("tokens", "depth"), strict=True):
            some = [point for point in points if point["against"] == against]
            x = [point["tokens" if against == "tokens" else "blocks"] for point in some]
            label = "tokens in the batch" if against == "tokens" else "blocks"
            time, memory = row
            _lines(time, x, {kind: [point[f"{kind}_ms"] for point in some] for kind in ("full", "predicted")}, label)
            time.set_ylabel("ms per call")
            time.set_yscale("log")
            _lines(memory, x, {"cache": [point["cache_bytes"] / 1e6 for point in some]}, label)
            memory.set_ylabel("MB")
            memory.set_ylim(bottom=0)
        _save(figure, file)


def _lines(axes: Axes, x: Sequence[int], lines: dict[str, Sequence[float]], label: str) -> None:
    for (name, y), colour in zip(lines.items(), (_GREY, _BLUE) if len(lines) > 1 else (_ORANGE,), strict=True):
        axes.plot(x, y, "o-", label=name, color=colour)
    axes.set_xlabel(label)
    axes.set_xticks(x, map(str, x))
    axes.legend(frameon=False)


def _save(figure: Figure, file: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(file, dpi=150)


def write_profile(
    out: Path, subject: Subject, config: TAPConfig, steps: int, repeats: int, show: Callable[[Any], None]
) -> None:
    """Profile; write ``profile.json`` and ``profile.png`` to a folder, and show tables."""
    result = profile(subject, config, steps, repeats, lambda known: show(_floor_table(known)))
    show(_parts_table(result))
    show(_summary(result))
    write_json(out / "profile.json", result)
    profile_picture(result, out / "profile.png")


def write_scaling(out: Path, *args: Any, show: Callable[[Any], None], **kwargs: Any) -> None:
    """Run :func:`scaling`; write ``scaling.json`` and ``scaling.png`` to a folder, and show a table."""
    points = scaling(*args, **kwargs)
    table = Table("against", "tokens", "blocks", "full, ms", "predicted, ms", "cache, MB")
    for point in points:
        table.add_row(
            point["against"], str(point["tokens"]), str(point["blocks"]), f"{point['full_ms']:.1f}",
            f"{point['predicted_ms']:.2f}", f"{point['cache_bytes'] / 1e6:.2f}",
        )  # fmt: skip
    show(table)
    write_json(out / "scaling.json", points)
    scaling_picture(points, out / "scaling.png")


def write_loops(
    out: Path, subject: Subject, steps: int, full_steps: int, repeats: int, show: Callable[[Any], None]
) -> None:
    """Run :class:`Loops`; write ``peers.json`` to a folder, and show a table."""
    rows = Loops(subject, steps, full_steps, repeats).methods()
    about = {"name": subject.name, "steps": steps, "full_steps": full_steps, "limit": steps / full_steps}
    write_json(
        out / "peers.json",
        about | {"processor_time": subject.processor_time, "machine": machine(subject.device), "loops": rows},
    )
    title = f"{steps} steps of {subject.name}, {full_steps} full: at most {steps / full_steps:.2f}x"
    table = Table("method", "full steps", "s", "speed-up", title=title, title_justify="left")
    for name, row in rows.items():
        if row is None:
            table.add_row(name, "", "", "does not take this model")
        elif "error" in row:
            table.add_row(name, "", "", row["error"])
        else:
            table.add_row(name, str(row["full_steps"]), f"{row['seconds']:.2f}", f"{row['speedup']:.2f}x")
    show(table)


def _floor_table(known: dict[str, Any]) -> Table:
    rates, floors = known["rates"], known["floor_ms"]
    title = (
        f"the floor of a predicted call, by {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s of copies"
        f" and {rates['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s"
    )
    table = Table("part", "moved, MB", "weights, MB", "GFLOP", "floor, ms", title=title, title_justify="left")
    for part, least in floors.items():
        moved = f"{known['moved_bytes'] / 1e6:.2f}" if part == "selection" else ""
        weights, work = known["weight_bytes"][part] / 1e6, known["flops"][part] / 1e9
        table.add_row(part, moved, f"{weights:.2f}", f"{work:.3f}", f"{least:.3f}")
    return table


def _parts_table(result: dict[str, Any]) -> Table:
    title = f"a predicted call, {result['predicted_over_plain']:.2%} of a plain one"
    table = Table("part", "floor, ms", "measured, ms", "ratio", title=title, title_justify="left")
    for part, least in result["floor_ms"].items():
        spent = result["parts_ms"][part]
        table.add_row(part, f"{least:.3f}", f"{spent:.3f}", f"{spent / least:.1f}" if least else "")
    least, spent = sum(result["floor_ms"].values()), result["predicted_ms"]
    table.add_row("all", f"{least:.3f}", f"{spent:.3f}", f"{spent / least:.1f}")
    return table


def _summary(result: dict[str, Any]) -> Table:
    loop, cache, peak = result["loop"], result["cache"], result["peak_bytes"]
    table = Table(show_header=False)
    table.add_row("call", f"plain {result['plain_ms']:.1f} ms, full {result['full_ms']:.1f} ms")
    table.add_row(
        "loop", f"{result['steps']} steps, {result['full_steps']} full: {loop['speedup']:.2f}x,"
        f" {loop['share_of_limit']:.1%} of the limit {loop['limit']:.2f}x",
    )  # fmt: skip
    table.add_row(
        "cache", f"{cache['measured_bytes'] / 1e6:.2f} MB, of tensors {cache['computed_bytes'] / 1e6:.2f} MB;"
        f" TaylorSeer's of every layer {cache['taylorseer_per_layer_bytes'] / 1e6:.1f} MB",
    )  # fmt: skip
    if peak["plain"] is not None:
        table.add_row("peak memory", f"plain {peak['plain'] / 1e9:.2f} GB, TAP {peak['tap'] / 1e9:.2f} GB")
    for reason, calls in result["fallbacks"].items():
        table.add_row("fell back to full", f"{calls} calls: {reason}")
    return table


@contextmanager
def enough_memory() -> Iterator[None]:
    """Raise UsageError where a ``with`` block runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError("out of memory; give fewer --blocks, a smaller --resolution or --batch") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise UsageError("out of memory; give fewer --blocks, a smaller --resolution or --batch") from error
