"""The bench's report and ``tap bench``, on a made-up folder of results: no model runs."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from tap_bench import bench, plots
from tap_bench.methods import registry
from tap_bench.models import MODELS, fashion
from tap_bench.report import read_cells, renew_report, summary, verdict, write_report
from tap_diffusion.apps.cli import app
from tap_diffusion.core.errors import UsageError

ODD = "<b>odd</b> & $x_1$"
VOID = {"meta", "br", "img", "link", "path", "use", "hr", "input"}


def cell(method: str, family: str, psnr: float, difference: tuple[float, float, float] | None, **more: Any) -> Any:
    """One cell at 8 of 50 full evaluations."""
    found = {
        "model": "emoji", "method": method, "family": family, "source": "arXiv 2603.03792", "schedule": "even",
        "budget": 8, "full_steps": 8.0, "steps": 50, "samples": 64, "evaluations_speedup": 6.25, "flops_speedup": 6.01,
        "time_speedup": 5.43, "time_speedup_range": [5.31, 5.56], "memory_bytes": 1_500_000,
        "settings": {"orders": [1]}, "psnr_db": psnr, "psnr_ci": [psnr - 0.5, psnr + 0.5],
        "ssim": 0.9123, "latent_error": 0.0456, "scores": {"clip_score": 0.281},
    }  # fmt: skip
    if difference is not None:
        found |= {"difference_db": difference[0], "difference_ci": list(difference[1:])}
    return found | more


CELLS = [
    {
        "model": "emoji", "method": "full", "family": "full", "source": "", "schedule": "every step", "budget": 50,
        "full_steps": 50, "steps": 50, "samples": 64, "evaluations_speedup": 1.0, "flops_speedup": 1.0,
        "time_speedup": None, "time_speedup_range": None, "memory_bytes": 0, "settings": {},
        "scores": {"clip_score": 0.293},
    },
    cell("tap", "tap", 34.5, None),
    cell("stronger", "rival", 35.75, (1.25, 0.5, 2.0)),
    cell("weaker", "solver", 31.0, (-3.5, -4.0, -3.0), source="no paper"),
    cell("alike", "peer", 34.25, (-0.25, -0.75, 0.25), time_speedup=None, time_speedup_range=None, full_steps=8.6),
    cell(ODD, "rival", 30.0, (-4.5, -5.0, -4.0), scores={}, settings={"word": "</pre><script>"}),
    cell("tap", "tap", 38.0, None, budget=10, full_steps=10.0),
    cell("stronger", "rival", 37.0, (-1.0, -1.5, -0.5), budget=10, full_steps=10.0),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run of the bench leaves."""
    for name in ("tuning", "pictures"):
        (tmp_path / name).mkdir()
    run = {
        "model": "emoji", "steps": 50, "suite": {"samples": 64, "tuned_on": 16, "timed": 4, "repeats": 3},
        "versions": {"tap_diffusion": "0.1.0", "torch": "9.9.9"},
        "machine": {"processor": "Some <Processor>", "cores": 2, "threads": 1},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "results.json").write_text(json.dumps(CELLS))
    (tmp_path / "command.txt").write_text("tap bench --model emoji --out 'a <b>'\n")
    tried = [
        {"schedule": schedule, "psnr_db": psnr, "full_steps": 8.0, "settings": {}}
        for schedule, psnr in (("paper", 28.125), ("even", 33.875))
    ]
    (tmp_path / "tuning" / "stronger-8.json").write_text(json.dumps(tried))
    (tmp_path / "tuning" / "tap-8.json").write_text(json.dumps([tried[1] | {"psnr_db": None, "full_steps": None}]))
    (tmp_path / "tuning" / "ddim-8.json").write_text("[]")
    Image.new("RGB", (240, 60), "red").save(tmp_path / "pictures" / "full.png")
    Image.new("RGB", (240, 60), "blue").save(tmp_path / "pictures" / "stronger-8.png")
    Image.new("RGB", (2000, 60), "blue").save(tmp_path / "pictures" / "tap-8.png")
    rows = {"method": ["full", "full", "tap"], "seed": [0, 1, 0], "condition": ["red <apple>", "frog", "red <apple>"]}
    pq.write_table(pa.table(rows), tmp_path / "samples.parquet")
    return tmp_path


class Page(HTMLParser):
    """Rows of the tables under each heading, the resources, and whether tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[tuple[str, str, list[str]]] = []  # heading, class of the row, texts of its cells
        self.links: list[tuple[str, str, str]] = []  # tag, attribute, value
        self.ids: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self._heading = ""
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.links += [(tag, name, found[name] or "") for name in ("src", "href", "xlink:href") if name in found]
        self.ids += [found["id"] or ""] if "id" in found else []
        if tag == "tr":
            self.rows.append((self._heading, found.get("class") or "", []))
        elif tag in ("td", "th") and self.rows:
            self.rows[-1][2].append("")
        elif tag in ("h2", "h3"):
            self._heading = ""
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self.rows[-1][2][-1] += data
        elif {"h2", "h3"} & set(self._open):
            self._heading += data


def results(page: Page, budget: int) -> dict[str, tuple[str, dict[str, str]]]:
    """Class and named cells of each method's row."""
    rows = [(kind, texts) for heading, kind, texts in page.rows if heading == f"{budget} full evaluations"]
    head, *rest = rows
    return {texts[0]: (kind, dict(zip(head[1], texts, strict=True))) for kind, texts in rest if len(texts) > 5}


def test_every_method_has_a_row_with_its_figures(folder: Path) -> None:
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    rows = results(page, 8)
    assert list(rows) == ["full", "stronger", "tap", "alike", "weaker", ODD]  # the full model, then by PSNR
    assert rows["stronger"][1] == {
        "method": "stronger", "PSNRdB": "35.75", "to TAPdB [95 %]": "▲ +1.25 [+0.50, +2.00]", "timefaster, ×": "5.43×",
        "FLOPsfewer, ×": "6.01×", "full steps": "8", "schedule": "even", "SSIM": "0.9123", "latent error": "0.0456",
        "clip scoreno reference": "0.281", "memoryextra": "1.5 MB",
    }  # fmt: skip
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert '<span title="[35.25, 36.25]">35.75</span>' in text
    assert '<span title="5.31 to 5.56">5.43×</span>' in text
    assert rows["alike"][1]["timefaster, ×"] == "–"
    assert rows["alike"][1]["full steps"] == "8.6"
    assert rows["full"][1]["clip scoreno reference"] == "0.293"
    assert rows[ODD][1]["clip scoreno reference"] == "–"
    assert list(results(page, 10)) == ["full", "tap", "stronger"]


def test_a_method_that_beats_tap_is_marked(folder: Path) -> None:
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    marks = {name: (kind, cells["to TAPdB [95 %]"][:1]) for name, (kind, cells) in results(page, 8).items()}
    assert marks == {
        "full": ("full", ""), "stronger": ("better", "▲"), "tap": ("baseline", "b"),
        "alike": ("not-told-apart", "≈"), "weaker": ("worse", "▼"), ODD: ("worse", "▼"),
    }  # fmt: skip
    assert results(page, 8)["tap"][1]["to TAPdB [95 %]"] == "baseline"
    assert results(page, 10)["stronger"][0] == "worse"


def words(page: str) -> str:
    """The verdict in words."""
    found = re.search(r'<section id="verdict"><h2>Verdict</h2><p>(.*?)</p>', page, flags=re.DOTALL)
    assert found
    return found[1]


def test_the_verdict_comes_first_and_says_who_is_ahead(folder: Path) -> None:
    text = write_report(folder).read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)">', text)[:3] == ["verdict", "pictures", "frontier"]
    assert words(text) == (
        "TAP is ahead of the best other method at 10 (stronger, by 1.0 dB)."
        " TAP is behind the best other method at 8 (stronger, by 1.2 dB)."
    )
    rows = [texts for heading, _, texts in Page(text).rows if heading == "Verdict"]
    assert rows[1:] == [["10", "38.0", "stronger", "37.0", "+1.00 [+0.50, +1.50]", "none"],
                        ["8", "34.5", "stronger", "35.8", "−1.25 [−2.00, −0.50]", "▲ stronger, ≈ alike"]]  # fmt: skip


def test_where_the_interval_holds_0_the_verdict_says_that_nothing_can_be_told(folder: Path) -> None:
    cells = [cell for cell in CELLS if cell["method"] not in ("stronger", ODD)]
    (folder / "results.json").write_text(json.dumps(cells))
    text = write_report(folder).read_text(encoding="utf-8")
    assert words(text) == "TAP and the best other method can't be told apart at 8 (alike, TAP +0.2 dB)."


def test_a_better_variant_of_tap_is_named_but_is_no_other_method(folder: Path) -> None:
    variant = cell("tap-planned", "tap", 40.0, (5.5, 5.0, 6.0))
    (folder / "results.json").write_text(json.dumps([*CELLS, variant]))
    text = write_report(folder).read_text(encoding="utf-8")
    assert words(text).endswith(
        "TAP is behind the best other method at 8 (stronger, by 1.2 dB)."
        " Of its own variants tap-planned at 8 did better."
    )
    rows = [texts for heading, _, texts in Page(text).rows if heading == "Verdict"]
    assert rows[2][-1] == "▲ tap-planned, ▲ stronger, ≈ alike"


def test_the_tenth_of_the_samples_that_is_worst_stands_beside_the_mean(folder: Path) -> None:
    cells = [cell | {"psnr_p10_db": cell["psnr_db"] - 9.25} if "psnr_db" in cell else cell for cell in CELLS]
    (folder / "results.json").write_text(json.dumps(cells))
    text = write_report(folder).read_text(encoding="utf-8")
    assert words(text).endswith("A tenth of TAP's samples is below 28.8 dB at 10 and 25.2 dB at 8.")
    page = Page(text)
    assert results(page, 8)["stronger"][1]["p10dB"] == "26.50"
    assert results(page, 8)["full"][1]["PSNRdB"] == "reference"
    rows = [texts for heading, _, texts in page.rows if heading == "Verdict"]
    assert rows[2][:4] == ["8", "34.5 (25.2)", "stronger", "35.8 (26.5)"]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((0.01, 1), "better"), ((-1, -0.01), "worse"), ((-1, 1), "not told apart"), ((0, 1), "not told apart")],
)
def test_verdict(interval: tuple[float, float], expected: str) -> None:
    assert verdict({"method": "other", "difference_ci": interval}) == expected


def test_the_page_needs_nothing_but_itself(folder: Path) -> None:
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    for tag, name, value in page.links:
        inside = value.startswith("#") or value.startswith("data:image/webp;base64,")
        assert inside or (tag == "a" and value.startswith("https://arxiv.org/abs/")), (tag, name, value)
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    for tag, _, value in page.links:
        assert tag == "a" or not value.startswith("#") or value[1:] in page.ids
    assert len(set(page.ids)) == len(page.ids)
    assert page.tags.count("script") == 1
    assert page.tags.count("svg") == 2


def test_names_and_settings_are_escaped(folder: Path) -> None:
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<b>odd</b>" not in text
    assert "</pre><script>" not in text
    assert "red <apple>" not in text
    assert "Some &lt;Processor&gt;" in text
    assert "--out &#x27;a &lt;b&gt;&#x27;" in text


def test_tuning_shows_what_was_tried(folder: Path) -> None:
    text = write_report(folder).read_text(encoding="utf-8")
    rows = [texts for heading, _, texts in Page(text).rows if heading == "What was tried in tuning"]
    assert ["stronger", "paper", "28.12", "8", ""] in rows
    assert ["", "even", "33.88", "8", "✓ measured"] in rows
    assert ["tap", "even", "–", "–", "✓ measured"] in rows
    assert "Not possible here: ddim." in text


def test_pictures_are_inside_and_small_ones_enlarged(folder: Path) -> None:
    text = write_report(folder).read_text(encoding="utf-8")
    pictures = re.findall(r"<img([^>]*) src=", text)
    assert pictures == [  # full, TAP, the best other
        ' class=pixelated alt="" width="960" height="240" loading="lazy"',
        ' alt="" width="2000" height="60" loading="lazy"',
        ' class=pixelated alt="" width="960" height="240" loading="lazy"',
    ]
    assert "No picture was kept of alike, weaker, &lt;b&gt;odd&lt;/b&gt;" in text


def test_the_frontier() -> None:
    cells = [{"cost": cost, "psnr_db": psnr} for cost, psnr in ((2, 30.0), (4, 29.0), (3, 31.0), (5, 20.0), (4, 29.0))]
    assert plots.frontier(cells, "cost", lower_is_better=True) == [cells[0], cells[2]]
    assert plots.frontier(cells, "cost", lower_is_better=False) == [cells[1], cells[2], cells[3], cells[4]]


def test_plots_name_the_best_and_follow_the_colour_scheme(folder: Path) -> None:
    measured = CELLS[1:]
    svg = plots.evaluations_plot(measured, "tap")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"tap", "stronger", "weaker", "alike"} <= set(texts)  # TAP, frontier, the best of each family
    assert "&lt;b&gt;odd&lt;/b&gt; &amp; $x_1$" not in texts
    assert set(re.findall(r"#0[0-9]0[0-9]0[0-9]\b", svg)) == set()
    assert "var(--tap)" in svg
    assert "alike" not in plots.time_plot(measured, "tap")  # it has no time


def test_at_most_eight_curves_have_a_name() -> None:
    better_and_dearer = [cell(f"m{i}", "rival", 30.0 + i, None, full_steps=5.0 + i) for i in range(12)]
    svg = plots.evaluations_plot([*CELLS[1:], *better_and_dearer], "tap")
    texts = set(re.findall(r"<text[^>]*>([^<]*)</text>", svg))
    named = texts & {found["method"] for found in [*CELLS, *better_and_dearer]}
    assert len(named) == 8
    assert {"tap", "weaker", "alike"} <= named  # TAP, and the best solver and peer, though others beat them


def test_without_tap_nothing_is_compared(folder: Path) -> None:
    cells = [CELLS[0], *(c | {} for c in CELLS[1:] if c["method"] not in ("tap",))]
    for found in cells:
        found.pop("difference_ci", None)
        found.pop("difference_db", None)
    (folder / "results.json").write_text(json.dumps(cells))
    text = write_report(folder).read_text(encoding="utf-8")
    assert "The method tap was not run" in text
    assert "to TAPdB [95 %]" not in results(Page(text), 8)["stronger"][1]


@pytest.mark.parametrize(("samples", "warned"), [(8, True), (64, False)])
def test_few_samples_are_named(folder: Path, samples: int, warned: bool) -> None:
    (folder / "results.json").write_text(json.dumps([{**found, "samples": samples} for found in CELLS]))
    text = write_report(folder).read_text(encoding="utf-8")
    assert ("With so few samples they are too narrow." in text) == warned
    assert "Of 5, about 0.2 would" in text  # 5 % of the comparisons to TAP, 0.25


def test_times_are_told_where_they_were_taken(folder: Path) -> None:
    page = write_report(folder).read_text(encoding="utf-8")
    assert "median and range of 3 runs of 4 samples. 1 of 7 cells have none" in page
    run = json.loads((folder / "run.json").read_text())
    timed = {"on": "2026-11-26", "repeats": 5, "samples": 1, "versions": {"torch": "10"}, "machine": run["machine"]}
    (folder / "run.json").write_text(json.dumps(run | {"timed": timed}))
    page = renew_report(folder).read_text(encoding="utf-8")
    assert (
        "median and range of 5 runs of 1 samples. They were taken by themselves on 2026-11-26, with torch 10 on"
        " Some &lt;Processor&gt;, 2 cores, 1 torch threads. 1 of 7 cells" in page
    )


def test_a_run_that_was_not_timed_says_so(folder: Path) -> None:
    untimed = {"time_speedup": None, "time_speedup_range": None}
    (folder / "results.json").write_text(json.dumps([cell | untimed for cell in CELLS]))
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Nothing was timed." in page
    assert "timed runs" not in page
    assert page.count("<figure><svg") == 1


def test_a_page_is_renewed_in_what_tells_times_alone(folder: Path) -> None:
    page = write_report(folder).read_text(encoding="utf-8")
    assert renew_report(folder).read_text(encoding="utf-8") == page
    shutil.rmtree(folder / "tuning")
    shutil.rmtree(folder / "pictures")
    (folder / "command.txt").unlink()
    cells = [cell | {"time_speedup": 4.44, "time_speedup_range": [4.4, 4.5]} for cell in CELLS]
    (folder / "results.json").write_text(json.dumps(cells))
    renewed = renew_report(folder).read_text(encoding="utf-8")
    assert results(Page(renewed), 8)["tap"][1]["timefaster, ×"] == "4.44×"
    for start, end in (("<header>", '<section id="frontier">'), ('<section id="tuning">', "</main>")):
        assert renewed[renewed.index(start) : renewed.index(end)] == page[page.index(start) : page.index(end)]


def test_a_page_of_another_kind_is_not_renewed(folder: Path) -> None:
    (folder / "report.html").write_text("<p>mine</p>")
    with pytest.raises(UsageError, match="has no section 'frontier'"):
        renew_report(folder)
    assert (folder / "report.html").read_text() == "<p>mine</p>"


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no finished run of the bench: results\.json"):
        write_report(tmp_path)


def test_summary() -> None:
    console = Console(file=io.StringIO(), width=120)
    tables = summary(CELLS)
    for table in tables:
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = [[part.strip() for part in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()]
    assert [str(table.title) for table in tables] == ["10 full evaluations", "8 full evaluations"]
    assert ["stronger", "even", "8", "5.43×", "35.75", "–", "+1.25 [+0.50, +2.00] ▲"] in lines
    assert ["alike", "even", "8.6", "–", "34.25", "–", "−0.25 [−0.75, +0.25] ≈"] in lines
    assert ["tap", "even", "10", "5.43×", "38.00", "–", "baseline"] in lines
    assert [ODD, "even", "8", "5.43×", "30.00", "–", "−4.50 [−5.00, −4.00] ▼"] in lines


# ---------------------------------------------------------------------------------------------------------- the command


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "120"})


class FakeBench:
    """Keeps what it is asked for; running it does nothing."""

    asked: ClassVar[list[Any]] = []
    error: ClassVar[BaseException | None] = None

    def __init__(self, *arguments: Any) -> None:
        FakeBench.asked = list(arguments)

    def run(self) -> None:
        if FakeBench.error is not None:
            raise FakeBench.error


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeBench]:
    monkeypatch.setattr(bench, "Bench", FakeBench)
    monkeypatch.setitem(MODELS, "emoji", lambda: "the model")
    monkeypatch.setattr(FakeBench, "error", None)
    return FakeBench


def test_options_reach_the_bench(folder: Path, fake: type[FakeBench]) -> None:
    own = folder / "own.py"
    own.write_text("from tap_bench.method import Method\nMETHODS = [Method('mine', 'rival', '', lambda s: [])]\n")
    result = run(
        "--suite", "standard", "--methods", "tap,fora", "--methods", own, "--budgets", "9,4,9", "--steps", 20,
        "--out", folder,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    model, methods, suite, budgets, out, steps, keep = fake.asked
    assert (model, suite, budgets, out, steps) == ("the model", bench.SUITES["standard"], [9, 4], folder, 20)
    assert not keep
    assert list(methods) == ["tap", "fora", "mine"]
    assert (folder / "command.txt").read_text() == (
        f"tap bench --model emoji --suite standard --methods tap,fora,{own} --budgets 9,4 --steps 20 --out {folder}\n"
    )
    assert "+1.25 [+0.50, +2.00] ▲" in result.output
    assert f"report.html, results.json, samples.parquet in {folder}" in result.output
    assert (folder / "report.html").exists()


def test_the_suite_can_be_changed_in_samples_and_repeats(
    folder: Path, fake: type[FakeBench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "emoji", lambda: SimpleNamespace(name="emoji", measured=["a cat"] * 5))
    assert run("--samples", 5, "--repeats", 0, "--out", folder).exit_code == 0
    assert fake.asked[2] == replace(bench.SUITES["quick"], samples=5, repeats=0)
    assert "--suite quick --samples 5 --repeats 0 --budgets 8" in (folder / "command.txt").read_text()
    result = run("--samples", 6, "--out", folder)
    assert result.exit_code == 2
    assert "emoji has 5 samples to be measured on, not 6; give that or less" in result.stderr


def test_own_models_in_another_dtype(folder: Path, fake: type[FakeBench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "fashion", fashion)
    assert run("--model", "fashion", "--dtype", "bfloat16", "--out", folder).exit_code == 0
    model = fake.asked[0]
    assert model.dtype == "bfloat16"
    assert {weight.dtype for weight in model.load().transformer.parameters()} == {torch.bfloat16}
    assert "--model fashion --dtype bfloat16" in (folder / "command.txt").read_text()


def test_scores_and_kept_samples_reach_the_bench(
    folder: Path, fake: type[FakeBench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "emoji", lambda: SimpleNamespace(judged_by=lambda names: ("judged by", *names)))
    result = run("--scores", "lpips,clip_score", "--keep", "--out", folder)
    assert result.exit_code == 0, result.output
    assert fake.asked[0] == ("judged by", "lpips", "clip_score")
    assert fake.asked[-1] is True
    assert "--scores lpips,clip_score --keep --budgets 8" in (folder / "command.txt").read_text()


def test_the_suite_gives_methods_and_budgets(folder: Path, fake: type[FakeBench]) -> None:
    assert run("--out", folder).exit_code == 0
    assert tuple(fake.asked[1]) == bench.SUITES["quick"].methods
    assert fake.asked[3] == [8]
    assert run("--suite", "standard", "--out", folder).exit_code == 0
    assert list(fake.asked[1]) == [name for name, method in registry().items() if not method.only_by_name]
    assert fake.asked[3] == [14, 10, 8, 6]


def test_a_folder_without_recipe_takes_the_budgets_of_the_suite(folder: Path, fake: type[FakeBench]) -> None:
    prompts = folder / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    assert run("--model", folder, "--prompts", prompts, "--out", folder).exit_code == 0
    assert fake.asked[3] == [8]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "bfloat16", "--device", "cuda:77"], "device 'cuda:77' is not available"),
        (["--prompts", "TAKEN.py"], "--prompts is for a folder or hub id; emoji has its own"),
        (["--model", "nonsense"], "unknown model 'nonsense': give one of emoji, fashion, sprites"),
        (["--methods", "tap,nonsense"], "unknown method 'nonsense': give a FILE.py or some of tap, "),
        (["--methods", "MISSING.py"], "MISSING.py is no Python file"),
        (["--methods", "TAKEN.py"], "TAKEN.py has a method 'tap', as the bench has"),
        (["--budgets", "8,x"], "--budgets '8,x' is not a list of whole numbers"),
        (["--budgets", ""], "--budgets '' is not a list of whole numbers"),
        (["--budgets", "8,1"], "budget 1 is not between 2 and 49"),
        (["--budgets", "50"], "budget 50 is not between 2 and 49"),
        (["--steps", 8], "budget 8 is not between 2 and 7"),
        (["--report-only"], "holds no finished run of the bench: results.json"),
        (["--out", "TAKEN.py/out"], "can't write to the folder"),
    ],
)
def test_a_bad_value_gives_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakeBench], arguments: list[Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("TAKEN.py").write_text(
        "from tap_bench.method import Method\nMETHODS = [Method('tap', 'rival', '', lambda s: [])]\n"
    )
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert words in lines[0]
    assert not Path("bench").exists()


def test_an_interrupt_says_how_to_go_on(folder: Path, fake: type[FakeBench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBench, "error", KeyboardInterrupt())
    result = run("--out", folder)
    assert result.exit_code == 130
    assert "the same call goes on there" in " ".join(result.stderr.split())


def test_another_run_in_the_folder(folder: Path, fake: type[FakeBench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBench, "error", UsageError("the folder holds a run with [other] settings"))
    result = run("--out", folder)
    assert result.exit_code == 2
    assert "the folder holds a run with [other] settings" in result.stderr


def test_report_only_runs_nothing(folder: Path, fake: type[FakeBench]) -> None:
    fake.asked = []
    result = run("--report-only", "--out", folder)
    assert result.exit_code == 0, result.output
    assert fake.asked == []
    assert (folder / "report.html").exists()
    assert read_cells(folder) == CELLS


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.delitem(sys.modules, "tap_bench.report")
    result = run("--report-only", "--out", tmp_path)
    assert result.exit_code == 2
    assert "the bench needs pyarrow.parquet: pip install 'tap-diffusion[bench]'" in result.stderr


def test_help_names_every_option() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for option in ("model", "suite", "methods", "budgets", "steps", "samples", "repeats", "report-only", "out"):
        assert f"--{option}" in result.output


def test_the_files_dates_are_shown(folder: Path) -> None:
    os.utime(folder / "results.json", (86_400, 86_400))
    assert "1970-01-02 00:00 UTC (results)" in write_report(folder).read_text(encoding="utf-8")
