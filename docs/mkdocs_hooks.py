"""What mkdocs can't do by itself: text that is kept elsewhere, figures from files, and pages for the code linked to.

A page includes by HTML comments, which are all that GitHub's view of the file lacks:

    <!-- include README.md -->                  its introduction, under the page's own title if it has one
    <!-- include README.md: Results -->         one section; without its heading where the page's title is the same
    <!-- bench: budgets --> <!-- weights --> <!-- gpu -->

Run as a script it writes the page of results, which GitHub shows as well.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tap_bench import BASELINE
from tap_diffusion.core.predictors import FAMILIES

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")  # targets of Markdown's links that have no scheme
_PICTURES = {".jpg", ".png", ".svg"}
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")
_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_FOREIGN = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=["']?(?:https?:)?//[^>]*>""")
_ROLE = re.compile(r":[a-z]+:<code>([^<&]*?)(?: ?&lt;([\w.]+)&gt;)?</code>")

Cell = dict[str, Any]
TAPS = (BASELINE, "tap-planned", "tap-paper")  # of TAP's variants, those that the results show
RESULTS = """# Results of the bench

Made from `docs/bench/*/results.json`, which [`tap bench`](bench.md) wrote, by `python docs/mkdocs_hooks.py`. PSNR in dB
to the full model's result with the same seed, each method on the schedule or with the threshold that suited it best on
calibration samples; in bold the best. What the names stand for: [methods](methods.md). The reports also have TAP's
other variants, intervals, times, memory, pictures, and what was tried in tuning; `make docs` makes them, one HTML file
each.

TAP has [today's rule for full steps](schedule.md), and so had every method without a schedule of its own among those
that it was tuned on. On `sprites` this holds for HiCache, L2P, cache-dit with TaylorSeer 1 and the paper's TAP alone
(with 28 steps for the paper's alone), on `fashion` with 28 steps for the nearest seven. The others there, and methods
with a schedule of their own, are as measured before. Each report says which.

"""


# --------------------------------------------------------------------------------------------------------------- mkdocs


def on_pre_build(**_: Any) -> None:
    """Make the reports of the committed bench runs: they are large, and made from what is kept of a run."""
    from tap_bench.report import write_report

    for results in sorted((ROOT / "docs" / "bench").glob("*/results.json")):
        write_report(results.parent)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add a page for every file of code that a page links to, and a list for every folder."""
    from mkdocs.structure.files import File

    wanted = {path for page in markdown_files() for path in linked(page.read_text("utf-8"), page.parent)}
    for path in sorted(wanted):
        wanted |= {file.relative_to(ROOT).as_posix() for file in (ROOT / path).glob("*.py")}
        if path.endswith(".md"):
            wanted |= linked((ROOT / path).read_text("utf-8"), (ROOT / path).parent)
    for path in sorted(wanted):
        if Path(path).suffix in _PICTURES:
            files.append(File.generated(config, code_page(path), abs_src_path=str(ROOT / path)))
            continue
        content = f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n{code(path)}"
        files.append(File.generated(config, code_page(path), content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Fill in what a page includes, and turn links out of the documentation into links to pages."""
    if not page.file.generated_by:
        markdown = relinked(filled(markdown), (ROOT / "docs" / page.file.src_uri).parent, page.file.src_uri)
    return spaced(markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Sphinx's roles, as docstrings have them, become links where the API's pages have the name."""

    def link(match: re.Match[str]) -> str:
        title, target = match[1].strip().lstrip("~"), match[2] or f"tap_diffusion.{match[1].strip().lstrip('~')}"
        return f'<autoref optional identifier="{target}"><code>{title}</code></autoref>'

    return _ROLE.sub(link, html)


def on_post_page(output: str, *, page: Page, **_: Any) -> None:
    """Refuse a page that would load something from elsewhere, now or when a script sees it."""
    from mkdocs.exceptions import PluginError

    for element in [*_FOREIGN.findall(output), *re.findall(r'<pre class="mermaid">', output)]:
        raise PluginError(f"{page.file.src_uri} loads from elsewhere: {element}")


# ----------------------------------------------------------------------------------------------------------------- text


def markdown_files() -> list[Path]:
    """What documentation there is, apart from packages' own."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def filled(markdown: str) -> str:
    """A page with all that it includes."""

    def include(match: re.Match[str]) -> str:
        text = section(ROOT / match[1], match[2])
        if f"# {match[2]}\n" in markdown:  # the page's own title says it
            text = text.partition("\n")[2]
        return relinked(text, (ROOT / match[1]).parent, "index.md")

    markdown = re.sub(r"<!-- include (\S+?)(?:: (.+))? -->", include, markdown)
    made: dict[str, Callable[[], str]] = {"bench: budgets": lambda: per_model(budgets), "weights": weights, "gpu": gpu}
    return re.sub(r"<!-- (bench: \w+|weights|gpu) -->", lambda match: made[match[1]](), markdown)


def section(file: Path, heading: str | None) -> str:
    """The section of a file under a heading of the second level, heading included.

    Without heading: of README.md what stands above the first one, without its title; any other file as a whole.
    """
    text = file.read_text("utf-8")
    parts = re.split(r"(?m)^(?=## )", text)
    if heading is not None:
        return next(part for part in parts if part.startswith(f"## {heading}\n"))
    return parts[0].partition("\n")[2] if file.name == "README.md" else text


def spaced(text: str) -> str:
    """A text with an empty line before each list, which GitHub does without and Markdown does not."""
    lines: list[str] = []
    fence = ""
    for line in text.splitlines():
        if mark := re.match(r"`{3,}", line):
            fence = "" if line == fence else fence or mark[0]
        is_item = _ITEM.match(line) and not fence
        if is_item and lines and lines[-1] and not _ITEM.match(lines[-1]) and lines[-1][0] not in " #":
            lines.append("")
        lines.append(line)
    return "\n".join(lines) + "\n"


def linked(text: str, folder: Path) -> set[str]:
    """Files and folders outside the documentation, from the repository's root, that a text in ``folder`` links to."""
    return {path for path in (_path(target, folder) for target in _LINK.findall(text)) if _is_code(path)}


def relinked(text: str, folder: Path, page: str) -> str:
    """A text that is kept in ``folder``, with links that work from ``page`` of the documentation."""

    def link(match: re.Match[str]) -> str:
        path = _path(match[1], folder)
        if _is_code(path):
            path = f"docs/{code_page(path)}"
        path = f"docs/{_PAGES[path]}" if path in _PAGES else path
        return posixpath.relpath(path, posixpath.dirname(f"docs/{page}"))

    return _LINK.sub(link, text)


def _path(target: str, folder: Path) -> str:
    return posixpath.normpath(posixpath.join(folder.relative_to(ROOT).as_posix(), target))


def _is_code(path: str) -> bool:
    return path not in _PAGES and not path.startswith("docs/") and (ROOT / path).exists()


def code_page(path: str) -> str:
    """The page that shows a file or lists a folder; a picture is its own."""
    if Path(path).suffix in _PICTURES:
        return f"code/{path}"
    return f"code/{path}/index.md" if (ROOT / path).is_dir() else f"code/{path}.md"


def code(path: str) -> str:
    """What :func:`code_page` holds."""
    place = ROOT / path
    if place.is_dir():
        page = code_page(path)
        here = posixpath.dirname(page)
        files = [file.relative_to(ROOT).as_posix() for file in sorted(place.glob("*.py"))]
        items = [f"- [`{Path(file).name}`]({posixpath.relpath(code_page(file), here)})" for file in files]
        return "\n".join([f"# `{path}`", "", *items, ""])
    text = place.read_text("utf-8")
    if place.suffix == ".md":
        text = re.sub(r"(?s)\A---.*?^---\n", "", text, flags=re.MULTILINE)  # a model card's front matter
        return relinked(text, place.parent, code_page(path))
    if place.suffix == ".ipynb":
        return notebook(json.loads(text))
    return f"# `{path}`\n\n``````{place.suffix.lstrip('.') or 'text'}\n{text}\n``````\n"


def notebook(content: dict[str, Any]) -> str:
    """A notebook with its outputs, as Markdown."""
    parts = []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if output.get("name") == "stdout":
                parts.append(f"```text\n{''.join(output['text'])}```")
            elif "image/png" in output.get("data", {}):
                picture = "".join(output["data"]["image/png"].split())
                parts.append(f'<img alt="output" src="data:image/png;base64,{picture}">')
    return "\n\n".join(parts) + "\n"


# -------------------------------------------------------------------------------------------------------------- figures


def per_model(show: Callable[[list[Cell]], str]) -> str:
    """A section for each run of the bench that is kept in docs/bench."""
    parts = []
    for file in sorted((ROOT / "docs" / "bench").glob("*/results.json")):
        cells = json.loads(file.read_text("utf-8"))
        full = next(cell for cell in cells if cell["method"] == "full")
        dtype = json.loads((file.parent / "run.json").read_text("utf-8")).get("dtype", "float32")
        title = f"### {full['model']}, {full['steps']} steps"
        parts += [
            title if dtype == "float32" else f"{title}, {dtype}",
            f"{full['samples']} samples ([report](bench/{file.parent.name}/report.html)).",
            show([cell for cell in cells if "psnr_db" in cell]),
        ]
    return "\n\n".join(parts)


def budgets(cells: list[Cell]) -> str:
    """For each budget what TAP costs and gives, beside the best of what is not TAP; and the plot."""
    from tap_bench.plots import evaluations_plot, one_line

    rows = []
    for budget in _budgets(cells):
        at = [cell for cell in cells if cell["budget"] == budget]
        ours = next(cell for cell in at if cell["method"] == BASELINE)
        solver = _best([cell for cell in at if cell["family"] == "solver"])
        other = _best([cell for cell in at if cell["family"] in ("rival", "peer")])
        low, high = ours["psnr_ci"]
        quality = f"**{ours['psnr_db']:.1f}** [{low:.1f},&nbsp;{high:.1f}]"
        rows.append([f"{ours['full_steps']:g}", _times(ours), quality, _named(other), _named(solver)])
    head = ["full steps", "less time", "TAP, dB [95 %]", "best other", "best solver"]
    svg = evaluations_plot(cells, BASELINE)
    return f'{_table(head, rows)}\n\n<div class="plot">{one_line(svg)}</div>'


def results(cells: list[Cell]) -> str:
    """PSNR of all methods but most of TAP's variants, and the ratio of times at the middle budget; best first there."""
    columns = _budgets(cells)
    timed = columns[len(columns) // 2]
    shown = [cell for cell in cells if cell["family"] != "tap" or cell["method"] in TAPS]
    found = {(cell["method"], cell["budget"]): cell for cell in shown}
    best = [max(cell["psnr_db"] for cell in shown if cell["budget"] == budget) for budget in columns]

    def figure(cell: Cell | None, best: float) -> str:
        if cell is None:
            return "–"
        return f"**{cell['psnr_db']:.1f}**" if cell["psnr_db"] == best else f"{cell['psnr_db']:.1f}"

    def rank(method: str) -> tuple[float, str]:
        return -found[method, timed]["psnr_db"] if (method, timed) in found else 0.0, method

    rows = [
        [method, *(figure(found.get((method, budget)), top) for budget, top in zip(columns, best, strict=True)),
         _times(found.get((method, timed)))]
        for method in sorted({cell["method"] for cell in shown}, key=rank)
    ]  # fmt: skip
    return _table(["full evaluations", *map(str, columns), f"less time at {timed}"], rows)


def weights(anchors: tuple[float, ...] = (24.0, 16.0, 8.0), t: float = 28.0) -> str:
    """Each family's weights in one situation."""
    rows = [
        [f"`{name}`", str(order), *(f"{weight:+.3f}" for weight in row), f"{row.sum():.3f}"]
        for name, family in FAMILIES.items()
        for order in (1, 2)
        for row in [family(order)(anchors, t)]
    ]
    return _table(["family", "order", *(f"step {anchor:g}" for anchor in anchors), "sum"], rows)


def gpu() -> str:
    """What was measured on a GPU, or that nothing was."""
    from tap_bench.gpu_page import shown

    return relinked(shown(ROOT / "docs" / "performance" / "gpu"), ROOT / "docs", "performance.md")


def _budgets(cells: list[Cell]) -> list[int]:
    return sorted({cell["budget"] for cell in cells}, reverse=True)


def _best(cells: list[Cell]) -> Cell | None:
    return max(cells, key=lambda cell: cell["psnr_db"], default=None)


def _named(cell: Cell | None) -> str:
    return "–" if cell is None else f"{cell['psnr_db']:.1f} ({cell['method']})"


def _times(cell: Cell | None) -> str:
    return "–" if cell is None or cell["time_speedup"] is None else f"{cell['time_speedup']:.1f}x"


def _table(head: list[str], rows: list[list[str]]) -> str:
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, marks, *rows])


def results_page() -> str:
    """The page docs/results.md."""
    return RESULTS + per_model(results) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "results.md").write_text(results_page(), encoding="utf-8")
