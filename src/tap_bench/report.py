"""What a run of the bench found: a page that needs nothing but itself, and tables for the terminal.

Both are made from the files that the run left, so that a report can be made again without running anything.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from PIL import Image
from rich.markup import escape as escape_markup
from rich.table import Table

from tap_bench import BASELINE, plots
from tap_diffusion.core.errors import UsageError

Cell = dict[str, Any]
Verdict = Literal["baseline", "better", "worse", "not told apart", "not compared"]

_MARKS: dict[Verdict, str] = {
    "baseline": "baseline", "better": "▲ better", "worse": "▼ worse", "not told apart": "≈ not told apart",
    "not compared": "–",
}  # fmt: skip
_OWN = "tap"  # the family of TAP and its variants
_PAGE_WIDTH = 1000  # pixels to which small sheets are enlarged
_FEW = 30  # samples, under which percentile intervals cover the mean clearly less often than they say


def read_cells(out: Path) -> list[Cell]:
    """The cells that a run left in its folder; the first is the full model's.

    Raises:
        UsageError: there are none.
    """
    return list(read_json(out, "results.json"))


def write_report(out: Path) -> Path:
    """Write ``report.html`` into the folder of a run.

    Args:
        out: the folder.

    Returns:
        The file.

    Raises:
        UsageError: the folder holds no results.
    """
    run, full, measured = _read(out)
    sections = [
        ("verdict", "Verdict", _verdict(measured)),
        ("pictures", "Pictures", _pictures(out, measured, full)),
        ("frontier", "Quality against cost", _frontier(measured, run)),
        ("results", "All methods", _results(measured, full)),
        ("tuning", "What was tried in tuning", _tuning(out, measured)),
        ("run", "How it was run", _run(out, run, measured, full)),
        ("settings", "Exact settings", _settings(measured)),
    ]
    here = Path(__file__).parent
    title = f"TAP bench: {full['model']}, {full['steps']} steps"
    page = out / "report.html"
    page.write_text(
        f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{(here / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p>{_scope(measured, full)}</p>
<nav>{" ".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)}</nav>
</header>
<main>
{"".join(f'<section id="{name}"><h2>{heading}</h2>{body}</section>' for name, heading, body in sections)}
</main>
<script>
{(here / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
""",
        encoding="utf-8",
    )
    return page


def renew_report(out: Path) -> Path:
    """Make the parts of a page anew that tell times; the others are kept, as what they show may not be in the folder.

    Args:
        out: folder with the page and results.

    Returns:
        The file.

    Raises:
        UsageError: the folder holds no results, or no page with these parts.
    """
    page = out / "report.html"
    run, full, measured = _read(out)
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    for name, body in (("frontier", _frontier(measured, run)), ("results", _results(measured, full))):
        parts = re.split(rf'(?<=<section id="{name}">)(<h2>[^<]*</h2>).*?(?=</section>)', text, flags=re.DOTALL)
        if len(parts) != 3:
            raise UsageError(f"{page} has no section '{name}' as this version writes it")
        text = parts[0] + parts[1] + body + parts[2]
    page.write_text(text, encoding="utf-8")
    return page


def summary(cells: Sequence[Cell]) -> list[Table]:
    """One table for each budget, the best PSNR first."""
    tables = []
    styles: dict[Verdict, str] = {"baseline": "bold", "better": "bold green", "worse": "", "not told apart": ""}
    measured = [cell for cell in cells if "psnr_db" in cell]
    for budget in _budgets(measured):
        table = Table(title=f"{budget} full evaluations", title_justify="left", title_style="bold")
        for head in ("method", "schedule"):
            table.add_column(head, overflow="fold")
        for head in ("full", "time", "PSNR", "p10", f"to {BASELINE} [95 %], dB"):
            table.add_column(head, justify="right", no_wrap=True)
        for cell in ranking(measured, budget):
            found = verdict(cell)
            compared = "difference_db" in cell
            table.add_row(
                escape_markup(cell["method"]),
                escape_markup(cell["schedule"]),
                f"{cell['full_steps']:.4g}",
                _times(cell["time_speedup"]),
                f"{cell['psnr_db']:.2f}",
                _maybe(cell.get("psnr_p10_db"), ".2f"),
                f"{signed(cell['difference_db'])} {_interval(cell['difference_ci'], signed)} {_MARKS[found][0]}"
                if compared
                else _MARKS[found],
                style=styles.get(found, ""),
            )
        tables.append(table)
    if tables:
        tables[-1].caption = (
            "▲ better, ▼ worse, ≈ not told apart, by the 95 % interval of the difference;"
            " p10: a tenth of the samples is below"
        )
        tables[-1].caption_justify = "left"
    return tables


def verdict(cell: Cell) -> Verdict:
    """Whether a method differs from TAP: whether the interval of the paired difference leaves 0 out."""
    if cell["method"] == BASELINE:
        return "baseline"
    if "difference_ci" not in cell:
        return "not compared"
    low, high = cell["difference_ci"]
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"


# ------------------------------------------------------------------------------------------------------- the sections


def _scope(measured: Sequence[Cell], full: Cell) -> str:
    """What was compared, in one line."""
    methods = len({cell["method"] for cell in measured})
    return (
        f"{methods} methods at {_listed(map(str, _budgets(measured)))} full evaluations of {full['steps']}, on"
        f" {full['samples']} samples. PSNR is to what the same pipeline draws from the same noise with all steps full."
    )


def _verdict(measured: Sequence[Cell]) -> str:
    """How TAP compares with the best other method at each budget, and with its own variants."""
    if not any("difference_ci" in cell for cell in measured):
        return f'<p class="note">The method {BASELINE} was not run, so nothing is compared to it.</p>'
    tenth = any("psnr_p10_db" in cell for cell in measured)
    means = ", mean (p10), dB" if tenth else ", dB"
    rows = []
    for budget in _budgets(measured):
        cells = ranking(measured, budget)
        ours = next((cell for cell in cells if cell["method"] == BASELINE), None)
        if ours is None:
            continue
        other = best_other(cells)
        names = [
            f'<span class="{_class(cell)}">{_MARKS[verdict(cell)][0]} {escape(cell["method"])}</span>'
            for cell in cells
            if verdict(cell) in ("better", "not told apart")
        ]
        columns = {
            f"TAP{means}": _mean_and_tenth(ours),
            "best other method": escape(other["method"]) if other else "–",
            f"its PSNR{means}": _mean_and_tenth(other) if other else "–",
            "TAP is ahead by, dB [95 %]": _ahead(other) if other else "–",
            "not worse than TAP": ", ".join(names) or "none",
        }
        tds = "".join(f'<td data-head="{head}"><div>{text}</div></td>' for head, text in columns.items())
        rows.append(f"<tr><th>{budget}</th>{tds}</tr>")
    heads = "".join(f"<th>{head}</th>" for head in columns)
    small = " p10: a tenth of the samples is below." if tenth else ""
    return f"""<p>{" ".join(_sentences(measured))}</p>
<table class="verdict"><thead><tr><th>full evaluations</th>{heads}</tr></thead>
<tbody>{"".join(rows)}</tbody></table>
<p class="note">PSNR at equal numbers of full evaluations, mean over samples.{small} “Other” leaves out TAP's own
variants; the last column has them too. There ▲ is better than TAP, and ≈ can't be told apart from it: the 95 % interval
of the difference holds 0.</p>"""


def _sentences(measured: Sequence[Cell]) -> Iterator[str]:
    """The verdict in words."""
    found: dict[Verdict, list[str]] = {}
    for budget in _budgets(measured):
        other = best_other(ranking(measured, budget))
        if other is not None:
            kind, ahead = verdict(other), -other["difference_db"]
            size = f"TAP {signed(ahead, 1)}" if kind == "not told apart" else f"by {abs(ahead):.1f}"
            found.setdefault(kind, []).append(f"at {budget} ({escape(other['method'])}, {size} dB)")
    words: dict[Verdict, str] = {
        "worse": "TAP is ahead of the best other method",
        "not told apart": "TAP and the best other method can't be told apart",
        "better": "TAP is behind the best other method",
    }
    for kind, text in words.items():
        if kind in found:
            yield f"{text} {_enumerated(found[kind])}."
    variants = [
        f"{escape(cell['method'])} at {cell['budget']}"
        for budget in _budgets(measured)
        for cell in ranking(measured, budget)
        if cell["family"] == _OWN and verdict(cell) == "better"
    ]
    if variants:
        yield f"Of its own variants {_enumerated(variants)} did better."
    tenths = [
        f"{cell['psnr_p10_db']:.1f} dB at {cell['budget']}"
        for budget in _budgets(measured)
        for cell in ranking(measured, budget)
        if cell["method"] == BASELINE and "psnr_p10_db" in cell
    ]
    if tenths:
        yield f"A tenth of TAP's samples is below {_enumerated(tenths)}."


def best_other(ranked: Iterable[Cell]) -> Cell | None:
    """The best cell that is neither TAP nor one of its variants."""
    return next((cell for cell in ranked if cell["family"] != _OWN and "difference_ci" in cell), None)


def _ahead(other: Cell) -> str:
    """By how much TAP is ahead of another, with the interval."""
    low, high = other["difference_ci"]
    return f'{signed(-other["difference_db"])} <span class="range">{_interval([-high, -low], signed)}</span>'


def _mean_and_tenth(cell: Cell) -> str:
    tenth = f" ({cell['psnr_p10_db']:.1f})" if "psnr_p10_db" in cell else ""
    return f"{cell['psnr_db']:.1f}{tenth}"


def _run(out: Path, run: Mapping[str, Any], measured: Sequence[Cell], full: Cell) -> str:
    """How methods were compared, and what is needed to repeat it."""
    suite = run["suite"]
    command = out / "command.txt"
    again = command.read_text(encoding="utf-8").strip() if command.exists() else None
    facts = {
        "Model": escape(full["model"]),
        "To repeat": f"<pre>{escape(again)}</pre>" if again else "started from Python, not by the command",
        "Arithmetic": escape(run.get("dtype", "float32")),
        "Versions": escape(_versions(run)),
        "Machine": escape(_machine(run["machine"])),
        "Files from": f"{_date(out / 'run.json')} (begun), {_date(out / 'results.json')} (results)",
    } | _joined(run)
    few = " With so few samples they are too narrow." if full["samples"] < _FEW else ""
    compared = sum("difference_ci" in cell for cell in measured)
    by_chance = (
        f" Of {compared}, about {0.05 * compared:.1f} would leave 0 out by chance if no method differed from TAP."
        if compared
        else ""
    )
    return f"""<ul>
<li>Each method is tuned by itself. At each budget all its variants (schedules, or thresholds fitted to the budget) are
tried on {suite["tuned_on"]} calibration samples. The one with the highest mean PSNR is measured on {full["samples"]}
others.</li>
<li>Brackets are 95 % percentile bootstrap intervals of the mean.{few}</li>
<li>Differences to TAP are paired by seed.{by_chance}</li>
<li>A budget counts full evaluations. Methods with a threshold meet it only about, so see their full steps.</li>
</ul>
<dl>{"".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())}</dl>"""


def _frontier(measured: Sequence[Cell], run: Mapping[str, Any]) -> str:
    timed = [cell for cell in measured if cell["time_speedup"] is not None]
    figures = [plots.evaluations_plot(measured, BASELINE), *([plots.time_plot(measured, BASELINE)] if timed else [])]
    ranges = ", horizontal ones the range of the timed runs" if timed else ""
    return f"""<div class="plots">{"".join(f"<figure>{figure}</figure>" for figure in figures)}</div>
<p class="note">At most {plots.MOST} methods are in colour: TAP, the best of each family at the smallest budget, and
those that most often no other beats in both PSNR and cost. Vertical bars are 95 % intervals of the mean PSNR{ranges}.
By evaluations coloured points stand a little aside of each other.</p>
<p><b>Times.</b> {_timing(run, len(timed), len(measured))}</p>"""


def _timing(run: Mapping[str, Any], timed: int, cells: int) -> str:
    if not timed:
        return "Nothing was timed."
    suite, again = run["suite"], run.get("timed")
    repeats, samples = (again["repeats"], again["samples"]) if again else (suite["repeats"], suite["timed"])
    apart = ""
    if again:
        apart = (
            f" They were taken by themselves on {again['on']}, with {_versions(again)} on {_machine(again['machine'])}."
        )
    missing = f" {cells - timed} of {cells} cells have none and are not in the plot of times." if timed < cells else ""
    return (
        "Speed-ups in time are ratios to the plain pipeline, run before and after every few methods in the same"
        f" process, in another order each time: median and range of {repeats} runs of {samples} samples."
        f"{escape(apart)}{missing}"
    )


def _results(measured: Sequence[Cell], full: Cell) -> str:
    scores = list(full["scores"])
    scores += sorted({name for cell in measured for name in cell["scores"]} - set(scores))
    compared = any("difference_ci" in cell for cell in measured)
    tenth = any("psnr_p10_db" in cell for cell in measured)
    heads = [
        ("method", ""), ("PSNR", "dB"), *([("p10", "dB")] if tenth else []),
        *([("to TAP", "dB [95 %]")] if compared else []), ("time", "faster, ×"), ("FLOPs", "fewer, ×"),
        ("full steps", ""), ("schedule", ""), ("SSIM", ""), ("latent error", ""),
        *((name.replace("_", " "), "no reference" if name in full["scores"] else "to full") for name in scores),
        ("memory", "extra"),
    ]  # fmt: skip
    head = "".join(
        f"<th{' class=text' if name in ('method', 'schedule') else ''}>{escape(name)}"
        + (f'<br><span class="range">{note}</span></th>' if note else "</th>")
        for name, note in heads
    )
    reference = [
        "reference", *([""] if tenth else []), *([""] if compared else []), "1×", "1×", f"{full['full_steps']:.4g}",
        full["schedule"], "", "", *(_maybe(full["scores"].get(name), ".4g") for name in scores), "",
    ]  # fmt: skip
    kinds = " ".join(f"{_family(name)}{words}," for name, words in plots.FAMILIES.items())
    first = "".join(
        f"<td{' class=text' if name == 'schedule' else ''}>{value}</td>"
        for (name, _), value in zip(heads[1:], reference, strict=True)
    )
    parts = [
        f"<ul class=note><li>Sorted by PSNR; click on a head to sort by it. Point at PSNR or time for its interval or"
        f" range.</li>{'<li>p10: a tenth of the samples is below.</li>' if tenth else ''}"
        "<li>▲ better than TAP, ▼ worse, ≈ not told apart: whether the interval of the difference leaves 0 out.</li>"
        "<li>FLOPs and time count all that is run, full steps only full evaluations. A number of full steps that misses"
        " the budget by over 2 % is bold.</li>"
        "<li>Scores need no reference, where nothing else is said; the first row has the full model's.</li>"
        "<li>Memory is the most that tensors were seen to take beyond the plain pipeline's, for one sample.</li>"
        f"<li>{kinds.removesuffix(',')}.</li></ul>"
    ]
    for budget in _budgets(measured):
        rows = "".join(_row(cell, scores, compared, tenth) for cell in ranking(measured, budget))
        parts.append(
            f'<h3 id="budget-{budget}">{budget} full evaluations</h3><div class="wide"><table class="sortable">'
            f'<thead><tr>{head}</tr></thead><tbody><tr class="full"><th>full</th>{first}</tr></tbody>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    return "".join(parts)


def _row(cell: Cell, scores: Iterable[str], compared: bool, tenth: bool) -> str:
    found = verdict(cell)
    off = abs(cell["full_steps"] - cell["budget"]) > 0.02 * cell["budget"]
    low, high = cell["time_speedup_range"] or (0.0, 0.0)
    time = _times(cell["time_speedup"])
    columns: list[tuple[str, float | None, str]] = [  # what is shown, what it is sorted by, class
        (_titled(f"{cell['psnr_db']:.2f}", _interval(cell["psnr_ci"], "{:.2f}".format)), cell["psnr_db"], "")
    ]
    if tenth:
        columns.append((_maybe(cell.get("psnr_p10_db"), ".2f"), cell.get("psnr_p10_db"), ""))
    if compared:
        difference = _MARKS[found]
        if "difference_ci" in cell:
            interval = _interval(cell["difference_ci"], signed)
            difference = (
                f'<span class="verdict">{_MARKS[found][0]}</span> {signed(cell["difference_db"])}'
                f' <span class="range">{interval}</span>'
            )
        columns.append((difference, cell.get("difference_db"), ""))
    columns += [
        (_titled(time, f"{low:.2f} to {high:.2f}") if low != high else time, cell["time_speedup"], ""),
        (_times(cell["flops_speedup"]), cell["flops_speedup"], ""),
        (f"{cell['full_steps']:.4g}", cell["full_steps"], "off" if off else ""),
        (escape(cell["schedule"]), None, "text names"),
        (f"{cell['ssim']:.4f}", cell["ssim"], ""),
        (f"{cell['latent_error']:.4f}", cell["latent_error"], ""),
        *((_maybe(cell["scores"].get(name), ".4g"), cell["scores"].get(name), "") for name in scores),
        (_bytes(cell["memory_bytes"]), cell["memory_bytes"], ""),
    ]
    tds = "".join(_td(*column) for column in columns)
    return f'<tr class="{_class(cell)}"><th>{_family(cell["family"])}{_name(cell)}</th>{tds}</tr>'


def _tuning(out: Path, measured: Sequence[Cell]) -> str:
    parts = [
        '<p class="note">Mean PSNR of each schedule on the calibration samples. In bold what was then measured. A'
        " method with one schedule only is not tuned.</p>"
    ]
    for budget in _budgets(measured):
        rows = []
        for cell in ranking(measured, budget):
            file = out / "tuning" / f"{cell['method']}-{budget}.json"
            for i, tried in enumerate(json.loads(file.read_text(encoding="utf-8")) if file.exists() else []):
                chosen = tried["schedule"] == cell["schedule"]
                rows.append(
                    f"<tr{' class=chosen' if chosen else ''}><th>{_name(cell) if i == 0 else ''}</th>"
                    f'<td class="text">{escape(tried["schedule"])}</td>'
                    f"<td>{_maybe(tried['psnr_db'], '.2f')}</td><td>{_maybe(tried['full_steps'], '.4g')}</td>"
                    f'<td class="text">{"✓ measured" if chosen else ""}</td></tr>'
                )
        table = (
            '<div class="wide"><table><thead><tr><th class="text">method</th><th class="text">schedule</th>'
            "<th>PSNR (dB)</th><th>full steps</th><th></th></tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )
        parts.append(_folded(f"{budget} full evaluations", table + _not_applicable(out, budget)))
    return "".join(parts)


def _joined(run: Mapping[str, Any]) -> dict[str, str]:
    """Cells that other runs brought (``tap_bench.join``)."""
    parts = []
    for part in run.get("joined", []):
        note = f" {part['note']}" if "note" in part else ""
        parts.append(f"{part['on']}, with {_versions(part)}: {', '.join(part['cells'])}.{note}")
    return {"Measured later": "<br>".join(map(escape, parts))} if parts else {}


def _not_applicable(out: Path, budget: int) -> str:
    """Methods that were asked for and had nothing to try."""
    files = sorted((out / "tuning").glob(f"*-{budget}.json"))
    names = [file.stem.removesuffix(f"-{budget}") for file in files if json.loads(file.read_text("utf-8")) == []]
    return f'<p class="note">Not possible here: {_listed(map(escape, names))}.</p>' if names else ""


def _pictures(out: Path, measured: Sequence[Cell], full: Cell) -> str:
    if not (out / "pictures").is_dir():
        return '<p class="note">The folder holds no pictures.</p>'
    drawn = ""
    if (out / "samples.parquet").exists():
        samples = pq.read_table(out / "samples.parquet", columns=["method", "seed", "condition"]).to_pylist()
        items = "".join(f"<li>{escape(s['condition'])}</li>" for s in samples if s["method"] == full["method"])
        drawn = _folded("What was drawn, by seed", f'<ol start="0">{items}</ol>')
    budgets = _budgets(measured)
    at = budgets[len(budgets) // 2]
    ranked = ranking(measured, at)
    ours = next((cell for cell in ranked if cell["method"] == BASELINE), None)
    shown = [cell for cell in (ours, best_other(ranked)) if cell is not None]
    first = f", then TAP and the best other method at {at} full evaluations" if shown else ""
    parts = [
        f'<p class="note">Samples of the first seeds, the same on every sheet: the full result{first}. All others are'
        f" folded away below, the best PSNR first.</p>{drawn}",
        f'<div class="reference">{_sheet(out / "pictures" / "full.png", "<b>full result</b>")}</div>',
        *_sheets(out, shown),
    ]
    for budget in budgets:
        others = [cell for cell in ranking(measured, budget) if cell not in shown]
        parts.append(_folded(f"{budget} full evaluations", "".join(_sheets(out, others))))
    return "".join(parts)


def _sheets(out: Path, cells: Iterable[Cell]) -> Iterator[str]:
    """The sheets of samples of some cells, then the names of those that have none."""
    missing = []
    for cell in cells:
        file = out / "pictures" / f"{cell['method']}-{cell['budget']}.png"
        if not _kept(file).exists():
            missing.append(escape(cell["method"]))
            continue
        yield _sheet(
            file,
            f"{_family(cell['family'])}<b>{escape(cell['method'])}</b>, {cell['full_steps']:.4g} full steps,"
            f" {cell['psnr_db']:.2f} dB, {_MARKS[verdict(cell)]}",
        )
    if missing:
        yield f'<p class="note">No picture was kept of {_listed(missing)}.</p>'


def _sheet(file: Path, caption: str) -> str:
    """A sheet of samples, drawn by this run (PNG) or kept from another's page (WebP, as it is there)."""
    file = _kept(file)
    if not file.exists():
        return f"<p>{caption}: no picture</p>"
    content = io.BytesIO()
    with Image.open(file) as picture:
        width, height = picture.size
        scale = max(1, _PAGE_WIDTH // width)
        if file.suffix == ".webp":
            content.write(file.read_bytes())
        else:  # PNGs of a standard run take 10 MB; losses would be seen only where pixels are enlarged
            picture.save(content, "webp", lossless=scale > 1, quality=90)
    return (
        f'<figure class="sheet"><figcaption>{caption}</figcaption><img{" class=pixelated" if scale > 1 else ""} alt=""'
        f' width="{width * scale}" height="{height * scale}" loading="lazy"'
        f' src="data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"></figure>'
    )


def _kept(file: Path) -> Path:
    """The sheet's file, or its WebP where that is all there is."""
    return file if file.exists() else file.with_suffix(".webp")


def _settings(measured: Sequence[Cell]) -> str:
    parts = []
    for budget in _budgets(measured):
        cells = (
            _folded(
                f"{escape(cell['method'])}, {escape(cell['schedule'])}",
                f"<pre>{escape(json.dumps(cell['settings'], ensure_ascii=False, indent=2))}</pre>",
            )
            for cell in ranking(measured, budget)
        )
        parts.append(_folded(f"{budget} full evaluations", "".join(cells)))
    return "".join(parts)


# ----------------------------------------------------------------------------------------------------------- the parts


def _read(out: Path) -> tuple[dict[str, Any], Cell, list[Cell]]:
    """How a run was made, the full model's cell, and those that were measured against it."""
    cells = read_cells(out)
    full = next(cell for cell in cells if "psnr_db" not in cell)
    return read_json(out, "run.json"), full, [cell for cell in cells if "psnr_db" in cell]


def read_json(out: Path, name: str) -> Any:
    """A JSON file that a finished run leaves in its folder.

    Raises:
        UsageError: it is not there, or broken.
    """
    try:
        return json.loads((out / name).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"the folder {out} holds no finished run of the bench: {name}: {error}") from error


def _budgets(cells: Iterable[Cell]) -> list[int]:
    return sorted({cell["budget"] for cell in cells}, reverse=True)


def ranking(cells: Iterable[Cell], budget: int) -> list[Cell]:
    """The cells of a budget, the best PSNR first."""
    return sorted((cell for cell in cells if cell["budget"] == budget), key=lambda cell: -cell["psnr_db"])


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>"


def _name(cell: Cell) -> str:
    """The method's name, linked to its paper where it has one."""
    source, name = cell["source"], escape(cell["method"])
    paper = re.search(r"\b\d{4}\.\d{4,5}\b", source)
    if paper:
        return f'<a href="https://arxiv.org/abs/{paper[0]}" title="{escape(source)}">{name}</a>'
    return f'<span title="{escape(source)}">{name}</span>'


def _family(name: str) -> str:
    """The family's mark, in its colour."""
    return f'<span class="family {escape(name)}" title="{escape(plots.FAMILIES.get(name, name))}"></span>'


def _class(cell: Cell) -> str:
    """The verdict, as the style sheet names it."""
    return verdict(cell).replace(" ", "-")


def _titled(shown: str, title: str) -> str:
    return f'<span title="{title}">{shown}</span>'


def _interval(ends: Sequence[float], form: Callable[[float], str]) -> str:
    return f"[{form(ends[0])}, {form(ends[1])}]"


def signed(value: float, digits: int = 2) -> str:
    """With its sign, and a minus that is one."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _maybe(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _td(shown: str, value: float | None, kind: str) -> str:
    """A cell of a table; a number is sorted by its value, not by what is shown."""
    by = "" if value is None else value
    return f'<td class="{kind}">{shown}</td>' if "text" in kind else f'<td class="{kind}" data-v="{by}">{shown}</td>'


def _versions(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in facts["versions"].items())


def _machine(facts: Mapping[str, Any]) -> str:
    return f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} torch threads"


def _enumerated(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1])] * (len(items) > 1) + [items[-1]])


def _listed(items: Iterable[str]) -> str:
    return ", ".join(items)


def _date(file: Path) -> str:
    return datetime.fromtimestamp(file.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")


def frontier(results: Path) -> str:
    """The bench's plots of a saved run, as HTML.

    Raises:
        UsageError: the folder holds no results.
    """
    cells = [cell for cell in read_cells(results) if "psnr_db" in cell]
    both = plots.evaluations_plot(cells, BASELINE), plots.time_plot(cells, BASELINE)
    what = f"{cells[0]['model']}, {cells[0]['steps']} steps: each method at its best, as tap bench measured it."
    return f"<p>{escape(what)}</p><div class='frontier'>{''.join(both)}</div>"
