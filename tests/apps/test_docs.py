"""What the documentation says is so: blocks run, commands parse, and links, messages, names and figures hold."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import typer
from diffusers import (
    DiffusionPipeline,
    FirstBlockCacheConfig,
    FluxPipeline,
    FluxTransformer2DModel,
    WanImageToVideoPipeline,
)
from torch import nn
from typer.testing import CliRunner

import mkdocs_hooks
import tap_diffusion as tap
from tap_bench.methods import registry
from tap_diffusion.apps import cli
from tap_diffusion.apps.generate import Request
from tap_diffusion.core.predictors import FAMILIES
from tap_diffusion.core.selection import unexplained
from tap_diffusion_demo import EMOJI
from tiny import build_pipeline, build_transformer, sample
from zoo import CASES, build, denoise

ROOT = mkdocs_hooks.ROOT
PAGES = mkdocs_hooks.markdown_files()
RESULTS = sorted((ROOT / "docs" / "bench").glob("*/results.json"))
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fenced(text: str, language: str) -> Iterator[tuple[int, str]]:
    """Line and content of each fenced block."""
    for match in re.finditer(rf"(?ms)^```{language}\n(.*?)^```$", text):
        yield text.count("\n", 0, match.start(1)), match[1]


# --------------------------------------------------------------------------------------------------------------- Python


class Substitute(FluxPipeline):
    """Stands in for FLUX.1-dev on a GPU: the embedded model on the CPU, at its own size."""

    def to(self, *_: Any, **__: Any) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **{"height": 64, "width": 64, "max_sequence_length": 8} | kwargs)


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's folder, saved in bfloat16 as FLUX.1-dev is."""
    folder = tmp_path_factory.mktemp("flux") / "dev"
    FluxPipeline.from_pretrained(EMOJI, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if "```python" in text_of(name)])
def test_python_blocks_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_bfloat16: Path) -> None:
    """One after the other in one namespace, as a reader would run a page. Pipelines are really loaded."""
    load, load_substitute = FluxPipeline.from_pretrained, Substitute.from_pretrained
    loaded: list[str] = []

    def from_pretrained(source: str | Path, **how: Any) -> Any:
        if source == EMOJI:
            return load(source, **how)
        loaded.append(str(source))
        return load_substitute(in_bfloat16, **how)

    monkeypatch.setattr(FluxPipeline, "from_pretrained", from_pretrained)
    for function, value in {"init_process_group": None, "get_rank": 0}.items():  # several GPUs are one CPU here
        monkeypatch.setattr(torch.distributed, function, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for method in ("set_attention_backend", "enable_parallelism"):
        monkeypatch.setattr(FluxTransformer2DModel, method, lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    families, namespace = dict(FAMILIES), {"__name__": "page"}
    try:
        for line, block in fenced(text_of(name), "python"):
            exec(compile("\n" * line + block, name, "exec"), namespace)
    finally:
        for added in FAMILIES.keys() - families.keys():
            del FAMILIES[added]
    assert set(loaded) <= {"black-forest-labs/FLUX.1-dev"}, "say what else is to be substituted"


def test_a_page_that_leaves_out_the_dtype_fails(in_bfloat16: Path) -> None:
    pipe = Substitute.from_pretrained(in_bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        pipe("red apple", num_inference_steps=1)


def test_a_block_that_fails_is_told_by_page_and_line(tmp_path: Path) -> None:
    ((line, block),) = fenced("# Page\n\n```python\nx = 1\nraise KeyError(x)\n```\n", "python")
    with pytest.raises(KeyError) as raised:
        exec(compile("\n" * line + block, "page.md", "exec"), {})
    assert (raised.traceback[-1].path, raised.traceback[-1].lineno) == ("page.md", 4)  # counted from 0


# ------------------------------------------------------------------------------------------------------------- commands


_PROGRAMS = r"(?:tap [a-z]+|python -m tap_diffusion|make [a-z]+|pytest tests)"


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """What is to be typed, and whether all of it is there: in a sentence an option may be named without its value."""
    shown = "".join(block for _, block in fenced(text, "(?:sh|bash|console)")).replace("\\\n", " ")
    for where, pattern, is_whole in (
        (text, rf"(?m)^ {{4}}({_PROGRAMS}.*)$", True),
        (shown, rf"(?m)^(?:\$ )?({_PROGRAMS}.*)$", True),
        (text, rf"`({_PROGRAMS}[^`]*)`", False),
    ):
        for command in re.findall(pattern, where):
            yield re.split(r"\s+[#>]\s", command)[0], is_whole


def check(command: str, is_whole: bool = True) -> None:
    """Parse a command as far as that goes without running it."""
    program, name, *rest = shlex.split(command)
    if program == "make":
        assert name in re.findall(r"(?m)^([a-z-]+):", text_of("Makefile"))
    elif program == "python":
        assert importlib.util.find_spec(rest[0]) is not None
    elif program == "pytest":
        assert (ROOT / name).exists()
    else:
        group: Any = typer.main.get_command(cli.app)
        context = group.make_context("tap", [name, *rest])
        found = group.get_command(context, name)
        assert found is not None
        options = {option for parameter in found.params for option in parameter.opts} | {"--help"}
        assert {word for word in rest if word.startswith("-")} <= options
        if is_whole and rest != ["--help"]:
            found.make_context(name, rest, parent=context)


@pytest.mark.parametrize("name", [name for name in NAMES if any(commands(text_of(name)))])
def test_commands_parse(name: str) -> None:
    for command, is_whole in commands(text_of(name)):
        try:
            check(command, is_whole)
        except Exception as error:
            pytest.fail(f"{name}: {command}: {error}")


@pytest.mark.parametrize(
    "command",
    [
        "tap generate a --speed 5", "tap draw a", "tap bench --suite huge", "tap generate a --steps x", "make it",
        "python -m tap_diffusion.no", "pytest tests/test_no.py",
    ],
)  # fmt: skip
def test_wrong_commands_do_not_parse(command: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011
        check(command)


def test_commands_are_found() -> None:
    text = (
        "    tap tune --out x  # why\n\n`tap models --markdown > docs/models.md`, `tap.enable`\n```sh\n$ make it\n```\n"
    )
    assert list(commands(text)) == [("tap tune --out x", True), ("make it", True), ("tap models --markdown", False)]


# ---------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files(page: Path) -> None:
    """On GitHub; `mkdocs build --strict` sees to the site's pages and anchors."""
    text = re.sub(r"(?ms)^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            file = (page.parent / target.partition("#")[0]).resolve() if target[0] != "#" else page
            if file.name == "report.html":  # the documentation's build makes it of this
                file = file.with_name("results.json")
            assert file.exists(), target


def test_every_page_is_in_the_navigation_or_kept_for_it() -> None:
    configuration = text_of("mkdocs.yml")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}" in configuration, f"add {page.name} to the nav of mkdocs.yml"


# --------------------------------------------------------------------------------------------- what the site is made of


def test_sections_of_the_readme_are_included() -> None:
    readme = text_of("README.md")
    page = mkdocs_hooks.filled("# Title\n\n<!-- include README.md -->\n<!-- include README.md: Results -->")
    assert page.startswith("# Title\n\n\n**Makes diffusion transformers")
    assert "## Results\nHow near" in page
    assert "](results.md)" in page
    assert "](docs/" not in page
    assert "## Install" not in page
    assert readme.partition("## Cite\n")[2][:40] in mkdocs_hooks.filled("# Cite\n<!-- include README.md: Cite -->")
    assert "## Cite" not in mkdocs_hooks.filled("# Cite\n<!-- include README.md: Cite -->")
    with pytest.raises(StopIteration):
        mkdocs_hooks.filled("<!-- include README.md: No such section -->")


def test_links_out_of_the_documentation_lead_to_pages_of_code() -> None:
    docs = ROOT / "docs"
    text = (
        "[a](../src/tap_diffusion/core/cache.py) [b](../src/tap_diffusion/core/predictors) [c](beyond.md#x)"
        " [d](https://e.f/g.py)"
    )
    assert mkdocs_hooks.relinked(text, docs, "page.md") == (
        "[a](code/src/tap_diffusion/core/cache.py.md) [b](code/src/tap_diffusion/core/predictors/index.md)"
        " [c](beyond.md#x) [d](https://e.f/g.py)"
    )
    assert mkdocs_hooks.linked(text, docs) == {"src/tap_diffusion/core/cache.py", "src/tap_diffusion/core/predictors"}
    assert text_of("src/tap_diffusion/core/cache.py") in mkdocs_hooks.code("src/tap_diffusion/core/cache.py")
    assert "- [`newton.py`](newton.py.md)" in mkdocs_hooks.code("src/tap_diffusion/core/predictors")


def test_lists_begin_after_an_empty_line() -> None:
    text = "# Title\n- a\n- b\n  c\n- d\n\nText:\n1. e\n2. f\n\n```text\nx\n- y\n```\n"
    assert mkdocs_hooks.spaced(text) == text.replace("Text:\n", "Text:\n\n")


def test_nothing_may_be_loaded_from_elsewhere() -> None:
    plugin = pytest.importorskip("mkdocs.exceptions")
    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    mkdocs_hooks.on_post_page('<a href="https://arxiv.org/">a</a><script src="assets/a.js"></script>', page=page)
    for element in (
        '<script src="https://unpkg.com/a.js"></script>', '<link href="//fonts.example/a.css" rel="stylesheet">',
        '<img alt="" src=http://a.b/c.png>', '<pre class="mermaid">',
    ):  # fmt: skip
        with pytest.raises(plugin.PluginError, match=r"page\.md loads from elsewhere"):
            mkdocs_hooks.on_post_page(element, page=page)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "docs" / "bench").glob("*/results.json")), ids=lambda file: file.parent.name
)
def test_figures_are_those_of_the_bench(file: Path) -> None:
    cells = json.loads(file.read_text(encoding="utf-8"))
    measured = [cell for cell in cells if "psnr_db" in cell]
    rows = [row.split(" | ") for row in mkdocs_hooks.results(measured).splitlines()]
    budgets = [int(head) for head in rows[0][1:-1]]
    shown = {
        (row[0].removeprefix("| "), budget): cell.strip("*")
        for row in rows[2:]
        for budget, cell in zip(budgets, row[1:-1], strict=True)
    }
    for cell in measured:
        if cell["method"] in mkdocs_hooks.TAPS or cell["family"] != "tap":
            assert float(shown[cell["method"], cell["budget"]]) == pytest.approx(cell["psnr_db"], abs=0.051)
    timed = budgets[len(budgets) // 2]
    order = [float(cell) for (_, budget), cell in shown.items() if budget == timed and cell != "–"]
    assert order == sorted(order, reverse=True)
    table = mkdocs_hooks.budgets(measured).replace("&nbsp;", " ")
    for cell in measured:
        if cell["method"] == "tap":
            low, high = cell["psnr_ci"]
            assert f"**{cell['psnr_db']:.1f}** [{low:.1f}, {high:.1f}]" in table
    assert 'class="plot"><svg' in table


def test_the_page_of_results_is_up_to_date() -> None:
    assert text_of("docs/results.md") == mkdocs_hooks.results_page(), "run python docs/mkdocs_hooks.py"


def test_weights_are_those_of_the_families() -> None:
    table = mkdocs_hooks.weights((24.0, 16.0, 8.0), 28.0)
    assert "| `newton` | 2 | +1.875 | -1.250 | +0.375 | 1.000 |" in table  # the parabola through them, by hand
    assert "| `taylor` | 1 | +1.500 | -0.500 | +0.000 | 1.000 |" in table


# ---------------------------------------------------------------------------------------------------------------- names


def test_every_family_and_method_is_on_the_page_with_its_source() -> None:
    page = text_of("docs/methods.md")
    headings = {name for line in re.findall(r"(?m)^### (.*)$", page) for name in line.split(", ")}
    assert headings - {"The same situation", "seen by each"} == set(FAMILIES)
    rows = {
        name: row for row in re.findall(r"(?m)^\| .* \|$", page) for name in re.findall(r"`([^`]+)`", row.split("|")[1])
    }
    methods = registry()
    assert set(rows) == set(methods)
    for name, method in methods.items():
        source = rows[name].replace(r"\|", "").rsplit("|", 2)[1].strip()
        assert source == method.source or (method.source == "docs/beyond.md" and "(beyond.md)" in source), name


def test_symbols_are_where_the_table_says() -> None:
    table = text_of("docs/how-it-works.md").partition("## Symbols")[2]
    places = re.findall(r"\[`([\w.]+)`\]\(\.\./src/(\S+?)\)", table)
    assert len(places) > 25
    for name, file in places:
        parts = name.split(".")
        depth = max(i for i in range(1, len(parts)) if is_module(".".join(parts[:i])))
        found: Any = importlib.import_module("tap_diffusion." + ".".join(parts[:depth]))
        for part in parts[depth:]:
            if not hasattr(found, part):  # of instances only
                assert part in getattr(found, "__annotations__", {}) or f"self.{part}" in inspect.getsource(found), name
                break
            found = getattr(found, part)
        assert (ROOT / "src" / file).is_file()


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(f"tap_diffusion.{name}") is not None
    except ModuleNotFoundError:
        return False


def test_the_api_page_has_all_public_names() -> None:
    listed = re.findall(r"(?m)^::: (\S+)$", text_of("docs/api.md"))
    assert {f"tap_diffusion.{name}" for name in tap.__all__} <= set(listed)
    for name in listed:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute)


# ------------------------------------------------------------------------------------------------------------- messages


def told(action: Callable[[], Any]) -> str:
    """The error or TAPWarning of an action, or what it returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", tap.TAPWarning)
        warnings.filterwarnings("ignore", "TAP ran [0-9]+ of", tap.TAPWarning)
        try:
            return str(action())
        except Exception as error:
            return str(error)


def enabled_and_run(steps: int = 20, config: tap.TAPConfig | None = None) -> Any:
    pipe = build_pipeline()
    tap.enable(pipe, config)
    sample(pipe, steps=steps)
    return pipe


def an_overflow() -> str:
    pipe = build_pipeline()
    calls = [0]

    def poison(_: Any, args: Any, output: Any) -> Any:
        calls[0] += 1  # 3 full steps call the norm twice each, so the 8th call is a predicted step's
        return (output[0] * (float("nan") if calls[0] == 8 else 1), *output[1:])

    pipe.transformer.transformer_blocks[0].norm1.register_forward_hook(poison)
    tap.enable(pipe, tap.TAPConfig.paper(interval=4))
    sample(pipe, steps=8)
    return re.sub(r"^ *\d+ ", "", str(tap.report(pipe)).splitlines()[-1])


def other_latents() -> str:
    """Before step 4, which is to be predicted: 0, 1, 2 and 6 are full."""
    pipe = build_pipeline()

    def change(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {name: x.roll(5, 1) if step == 3 else x for name, x in values.items()}

    tap.enable(pipe, tap.TAPConfig.paper(interval=4))
    sample(pipe, steps=8, callback_on_step_end=change)
    return re.sub(r"^ *\d+ ", "", str(tap.report(pipe)).splitlines()[-1])


def a_loop_without_scheduler() -> None:
    transformer = build("WanTransformer3DModel")
    tap.enable(transformer, tap.TAPConfig(full_steps=8))
    denoise(transformer, CASES["WanTransformer3DModel"])


def a_loop_of_other_sigmas() -> None:
    transformer = build("WanTransformer3DModel")
    tap.apply_tap(transformer, sigmas=[0.7, 0.4, 0.2, 0.0])
    denoise(transformer, CASES["WanTransformer3DModel"])


def two_caches() -> None:
    transformer = build_transformer()
    transformer.enable_cache(FirstBlockCacheConfig())
    tap.enable(transformer)


def more_than_prompts() -> None:
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    Request(["red apple"]).check(WanImageToVideoPipeline(transformer=build("WanTransformer3DModel"), **parts))


class MyTransformer(nn.Module):
    pass


class HasUNet:
    components: ClassVar[dict[str, Any]] = {}
    unet = object()


HasUNet.__name__ = "StableDiffusionPipeline"


def a_command(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["generate", "red apple", *arguments])
    assert result.exit_code == 2
    return result.stderr.strip().splitlines()[-1].removeprefix("Error: ")


def no_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError


def no_network(*_: Any, **__: Any) -> None:
    raise OSError("no such model") from ConnectionError()


@pytest.mark.slow
def test_messages_are_quoted_as_they_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each that the page quotes is provoked, and nothing else is quoted."""
    monkeypatch.setattr("tap_diffusion.core.engine.unexplained", unexplained)  # conftest.py turns it off with the zoo
    preset = tap.TAPConfig(full_steps=(0, 9, 18), steps=50)
    out = ("--out", str(tmp_path))
    found = {
        told(lambda: enabled_and_run(steps=6)),
        told(an_overflow),
        told(other_latents),
        told(lambda: tap.enable(MyTransformer())),
        told(lambda: tap.enable(HasUNet())),
        told(two_caches),
        told(lambda: copy.deepcopy(enabled_and_run().transformer)),
        told(a_loop_without_scheduler),
        told(a_loop_of_other_sigmas),
        told(lambda: enabled_and_run(config=preset)),
        told(lambda: tap.report(build_pipeline())),
        told(more_than_prompts),
    }
    monkeypatch.setattr("tap_diffusion.apps.generate.generate", no_memory)
    found.add(a_command("green frog face", *out))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", no_network)
    found.add(a_command("--model", "somebody/something", *out))
    assert {block.strip() for _, block in fenced(text_of("docs/troubleshooting.md"), "text")} == found
