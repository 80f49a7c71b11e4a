"""The page of `tap ui`: what is behind it, and itself in a real browser where chromium and playwright are there."""

# ruff: noqa: E402
from __future__ import annotations

import base64
import io
import re
import shutil
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

gr = pytest.importorskip("gradio", reason="the extra `ui` is not installed")

from test_generate import dit, sd3
from test_sprites import build as build_sprites

from tap_diffusion import TAPConfig, enabled, report
from tap_diffusion.apps.cli import app
from tap_diffusion.apps.generate import Request, psnr, run
from tap_diffusion.apps.sheets import colour, to_image
from tap_diffusion.apps.ui.page import FASTER, FULL, METHODS, Page, RecordingEngine, full_steps, serve
from tap_diffusion.apps.ui.parts import maps
from tap_diffusion.core.errors import UsageError
from tap_diffusion.core.predictors import Candidate
from tap_diffusion.core.report import Choice, Report
from tap_diffusion.core.schedule import paper_steps, plan
from tap_diffusion.integrations.diffusers.api import hooks
from tiny import build_pipeline, count_calls

RECOMMENDED, PAPER = list(METHODS)[:2]
INPUTS: dict[str, Any] = {
    "prompt": "red apple", "seed": 3, "steps": 12, "kind": FULL, "budget": 4, "method": RECOMMENDED
}  # fmt: skip
FASHION = Path(__file__).parents[2] / "docs" / "bench" / "fashion"


@pytest.fixture
def page(pipe: Any) -> Page:
    return Page(pipe, "emoji")  # whose words are those that the tiny pipeline knows


def of(session: str) -> Any:
    return SimpleNamespace(session_hash=session)


def generated(page: Page, session: str = "a", progress: Any = lambda *_, **__: None, **changes: Any) -> Any:
    return page.generate(**INPUTS | changes, request=of(session), progress=progress)


@cache
def expected(config: TAPConfig | None, prompt: str = "red apple", seed: int = 3, steps: int = 12) -> torch.Tensor:
    """The picture (1, 3, H, W) from another pipeline of the same weights, without the page."""
    other, request = build_pipeline(), Request([prompt], steps, seed, 2.0)
    if config is None:
        return run(other, request, "")[0]
    with enabled(other, config):
        return run(other, request, "")[0]


def shrunk(image: Image.Image, size: int = 32) -> np.ndarray:
    """One pixel of each square that a pixel was enlarged to."""
    pixels = np.asarray(image.convert("RGB"))
    step = pixels.shape[0] // size
    return pixels[::step, ::step]


# ------------------------------------------------------------------------------------------------------- what is behind


@pytest.mark.parametrize("method", METHODS)
def test_pictures_are_those_of_generate(page: Page, method: str) -> None:
    (full, accelerated), table, *_ = generated(page, method=method)
    config = METHODS[method](12, 4)
    plain, picture = expected(None), expected(config)
    np.testing.assert_array_equal(shrunk(full), np.asarray(to_image(plain[0])))
    np.testing.assert_array_equal(shrunk(accelerated), np.asarray(to_image(picture[0])))
    assert f"{psnr(picture, plain)[0]:.1f} dB" in table
    assert hooks(page.pipe) == []


def test_methods_are_what_they_say() -> None:
    assert METHODS[RECOMMENDED](50, 10) == TAPConfig(full_steps=10)
    assert METHODS[PAPER](50, 8) == TAPConfig.paper(full_steps=paper_steps(50, 8))
    assert [METHODS[name](50, 8).orders for name in list(METHODS)[2:]] == [(1,), (2,), (0,)]
    assert not any(METHODS[name](50, 8).chooses for name in list(METHODS)[2:])


@pytest.mark.parametrize("steps", [8, 20, 50])
@pytest.mark.parametrize("speedup", [1.5, 3.0, 5.0, 20.0])
def test_times_faster_means_what_the_configuration_means(steps: int, speedup: float) -> None:
    is_full = plan(TAPConfig(speedup=speedup), steps, None)
    assert full_steps(steps, FASTER, speedup) == sum(is_full(step) for step in range(steps))


def test_the_engine_keeps_the_loss_of_what_was_taken(pipe: Any) -> None:
    class Watched(RecordingEngine):
        losses: dict[tuple[int, str], torch.Tensor] = {}  # noqa: RUF012

        def predict(self, call: Any, *arguments: Any) -> torch.Tensor:
            self.at = call.step, call.branch
            return super().predict(call, *arguments)

        def _choose(self, losses: torch.Tensor) -> torch.Tensor:
            self.losses[self.at] = losses.clone()
            return super()._choose(losses)

    config = TAPConfig(full_steps=4)  # whose hindsight predicts at full steps too
    with enabled(pipe, config):
        for hook in hooks(pipe):
            hook.engine = Watched(config)
        run(pipe, Request(["red apple", "blue book"], 12, guidance=2.0), "")
        choices = report(pipe).choices
    assert len(Watched.losses) > len(choices) > 0
    for choice in choices:
        least = Watched.losses[choice.step, choice.branch].min(0)
        assert choice.loss is not None
        torch.testing.assert_close(choice.loss, least.values, rtol=0, atol=0)
        torch.testing.assert_close(choice.index.long(), least.indices)
        assert choice.of(slice(1, 2)).loss.shape == (1, 64)  # type: ignore[union-attr]


def test_sessions_share_nothing(page: Page) -> None:
    calls = count_calls(page.pipe.transformer)
    first = generated(page, "a")
    per_run = calls[0]
    other = generated(page, "b", prompt="blue book")
    assert calls[0] == 2 * per_run
    again = generated(page, "a")  # the plain picture of this session is still there
    assert calls[0] == 2.5 * per_run
    for one, two in zip(first[0], again[0], strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    np.testing.assert_array_equal(shrunk(other[0][0]), np.asarray(to_image(expected(None, "blue book")[0])))
    assert set(page.sessions) == {"a", "b"}
    page.leave(of("a"))
    assert set(page.sessions) == {"b"}


@pytest.mark.parametrize("title", ["Every step full", RECOMMENDED])
def test_stop_stops_between_steps_and_leaves_all_usable(page: Page, title: str) -> None:
    seen: list[tuple[str, int]] = []

    def progress(at: tuple[int, int], desc: str) -> None:
        seen.append((desc, at[0]))
        if (desc, at[0]) == (title, 5):
            page.stop(of("a"))

    outcome = generated(page, progress=progress)
    assert outcome == (gr.skip(),) * 6
    assert seen[-1] == (title, 5)
    assert hooks(page.pipe) == []
    (full, accelerated), *_ = generated(page)
    np.testing.assert_array_equal(shrunk(full), np.asarray(to_image(expected(None)[0])))
    np.testing.assert_array_equal(shrunk(accelerated), np.asarray(to_image(expected(TAPConfig(full_steps=4))[0])))


def test_a_closed_tab_stops_its_run_and_no_other(page: Page) -> None:
    seen: list[tuple[str, int]] = []

    def progress(at: tuple[int, int], desc: str) -> None:
        seen.append((desc, at[0]))
        page.stop(of("b"))
        page.leave(of("b"))
        if desc == RECOMMENDED:
            page.leave(of("a"))

    assert generated(page, "a", progress) == (gr.skip(),) * 6
    assert seen[-2:] == [("Every step full", 12), (RECOMMENDED, 1)]


def test_an_error_in_a_run_leaves_all_usable(page: Page) -> None:
    def progress(at: tuple[int, int], desc: str) -> None:
        if desc == RECOMMENDED and at[0] == 7:
            raise torch.OutOfMemoryError

    with pytest.raises(gr.Error, match="Out of memory: start `tap ui`"):
        generated(page, progress=progress)
    assert hooks(page.pipe) == []
    (_, accelerated), *_ = generated(page)
    np.testing.assert_array_equal(shrunk(accelerated), np.asarray(to_image(expected(TAPConfig(full_steps=4))[0])))


@pytest.mark.parametrize(
    ("changes", "place", "words"),
    [
        ({"prompt": " "}, 0, "Say what to draw"),
        ({"prompt": "red applle"}, 0, "never saw the word “applle”. It knows, for example: apple"),
        ({"prompt": "red qqq"}, 0, "It knows, for example: red"),
        ({"prompt": "red " * 9}, 0, "The model reads 8 tokens, and this has 10"),
        ({"seed": -1}, 1, "a whole number from 0"),
        ({"seed": 1.5}, 1, "a whole number from 0"),
        ({"seed": None}, 1, "a whole number from 0"),
        ({"steps": 1}, 2, "from 2 to 1000"),
        ({"steps": None}, 2, "from 2 to 1000"),
        ({"budget": None}, 4, "a whole number of at least 1"),
        ({"budget": 0}, 4, "a whole number of at least 1"),
        ({"budget": 2.5}, 4, "a whole number of at least 1"),
        ({"budget": 12}, 4, "leaves none of 12 steps to predict. Give at most 11, or take more steps"),
        ({"kind": FASTER, "budget": 5, "steps": 6}, 4, "At least 6 are full: say how many, or take more steps"),
        ({"kind": FASTER, "budget": 0.5}, 4, "a number of at least 1"),
        ({"budget": 2, "method": PAPER}, 4, "3 warm-up steps are more than the 2 full steps wanted. Give more"),
        ({"prompt": "Red APPLE"}, None, ""),
        ({"kind": FASTER, "budget": 1.5}, None, ""),
    ],
)
def test_bad_input_is_explained_at_its_place(
    page: Page, changes: dict[str, Any], place: int | None, words: str
) -> None:
    problems = page.problems(**INPUTS | changes)
    assert [i for i, problem in enumerate(problems) if problem] == ([] if place is None else [place])
    assert words in problems[place or 0]
    checks = page.validate(*(INPUTS | changes).values())
    assert [check["is_valid"] for check in checks] == [not problem for problem in problems]


def test_words_are_asked_of_the_embedded_model_alone(pipe: Any) -> None:
    assert not any(Page(pipe, "some/model").problems("a dog", 0, 12, FULL, 4, PAPER))


@pytest.mark.parametrize("make", [dit, build_sprites])
def test_pipelines_that_draw_something_else_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match=r"(DiT|PixelWan)Pipeline draws something else"):
        Page(make(), "x")


def test_a_pipeline_of_another_kind() -> None:
    """Both branches of guidance in one batch, of which the maps show the one with the prompt."""
    pipe = sd3()
    (full, accelerated), *_, html, slider, _ = generated(Page(pipe, "some/model"))
    request = Request(["red apple"], 12, 3)
    plain = run(pipe, request, "")[0]
    with enabled(pipe, METHODS[RECOMMENDED](12, 4)):
        picture, _ = run(pipe, request, "")
        choices = report(pipe).choices
    for shown, expected_picture in ((full, plain), (accelerated, picture)):
        np.testing.assert_array_equal(shrunk(shown, picture.shape[-1]), np.asarray(to_image(expected_picture[0])))
    assert slider.maximum == len(choices) > 2
    assert choices[0].index.shape[0] == 2
    for choice in choices:
        share = (choice.index[-1] == 0).float().mean()
        assert f"Step {choice.step + 1} of 12.</strong>" in html
        assert f"order 1 {100 * share:.0f} %" in html or share == 0


def test_maps_colour_each_token_by_what_it_took_and_its_loss() -> None:
    members = [Candidate(0, 3.0), Candidate(1, 3.0)]
    index = torch.tensor([[0, 1, 1, 1, 0, 1]], dtype=torch.uint8)
    loss = torch.tensor([[1e-4, 1e-4, 1e-4, 1e-2, 1e-4, 1e-4]])
    choices = [Choice(3, "a", members, index, loss), Choice(3, "b", members, index, loss)]
    choices.append(Choice(4, "a", members, 1 - index, loss))
    count, html = maps(Report(choices=choices), 9, Image.new("RGB", (12, 8)))
    assert count == 2
    found = re.findall(r'base64,([^"]*)" alt="step (\d)" data-frame="(\d)"( hidden)?', html)
    assert [item[1:] for item in found] == [("4", "1", ""), ("5", "2", " hidden")] * 2
    taken, _, heat, _ = (np.asarray(Image.open(io.BytesIO(base64.b64decode(item[0])))) for item in found)
    hues = np.array([[round(255 * part) for part in colour(member)] for member in members])
    np.testing.assert_array_equal(taken, hues[index.reshape(2, 3).numpy()])
    assert [tuple(heat[1, 0]), tuple(heat[0, 0])] == [(253, 231, 37), (68, 1, 84)]
    assert "Step 4 of 9.</strong> Tokens took order 1 67 %, order 0 33 %" in html
    assert "median 1.0e-04, largest 1.0e-02" in html


def test_one_predictor_has_no_maps(page: Page) -> None:
    *_, html, slider, play = generated(page, method=list(METHODS)[-1])
    assert "nothing to choose" in html
    assert not slider.visible
    assert not play.visible


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--results", "MISSING"], "MISSING"),
        (["--results", "MISSING/results.json"], "MISSING"),
        (["--model", "nonsense"], "unknown model 'nonsense'"),
        (["--device", "toaster"], "device 'toaster' is not available"),
    ],
)
def test_the_command_explains_what_is_wrong(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["ui", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr.replace("\n", "")


def test_the_command_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "gradio"] + ["tap_diffusion.apps.ui.page"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["ui"])
    assert result.exit_code == 2
    assert "the page needs gradio: pip install 'tap-diffusion[ui]'" in result.stderr.replace("\n", " ")


# -------------------------------------------------------------------------------------------------------------- serving


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Page, str]]:
    """A page and its address, on a free port."""
    from tap_bench.report import frontier

    page = Page(build_pipeline(), "emoji")
    blocks = page.blocks(frontier(FASHION))
    yield page, serve(blocks, "127.0.0.1", None)
    blocks.close()


@pytest.mark.slow
def test_it_listens_at_localhost_and_asks_nobody(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    asked: set[str] = set()
    original = socket.getaddrinfo

    def getaddrinfo(host: Any, *more: Any, **options: Any) -> Any:
        asked.add(host if isinstance(host, str) else str(host))
        return original(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    blocks = Page(pipe, "emoji").blocks()
    try:
        address = serve(blocks, "127.0.0.1", None)
        listening = blocks.server.servers[0].sockets
        assert {each.getsockname()[0] for each in listening} == {"127.0.0.1"}
        with urllib.request.urlopen(address) as answer:
            text = answer.read().decode()
        taken = int(address.rsplit(":", 1)[1].strip("/"))
        with pytest.raises(UsageError, match=f"can't listen at 127.0.0.1, port {taken}"):
            serve(Page(pipe, "emoji").blocks(), "127.0.0.1", taken)
    finally:
        blocks.close()
    assert asked <= {"127.0.0.1", "localhost"}
    assert not blocks.analytics_enabled
    assert not re.search(r'(<script[^>]* src|<link[^>]* href)="https?://(?!127\.0\.0\.1)', text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def tab(browser: Any, served: tuple[Page, str]) -> Iterator[Callable[[], Any]]:
    """Opens a tab with the page in it, which may ask no other host and raise no error."""
    _, address = served
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(120_000)
    hosts: set[str] = set()
    errors: list[str] = []

    def opened() -> Any:
        tab = context.new_page()
        tab.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(address)
        tab.locator("#go").wait_for()
        return tab

    yield opened
    context.close()
    assert {host for host in hosts if host} <= {address.split("/")[2]}, hosts
    assert errors == []


def fill(tab: Any, **values: Any) -> None:
    for name, value in values.items():
        tab.locator(f"#{name} :is(input, textarea)").first.fill(str(value))


def shown(tab: Any) -> list[np.ndarray]:
    """Both pictures as they are on the page."""
    images = tab.locator("#pictures img").evaluate_all("images => images.map(image => image.src)")
    return [shrunk(Image.open(io.BytesIO(urllib.request.urlopen(src).read()))) for src in images]


def table(tab: Any) -> dict[str, list[str]]:
    rows = tab.locator("#result tbody tr")
    rows.first.wait_for()
    return {cells[0]: cells[1:] for cells in (row.locator("th, td").all_inner_texts() for row in rows.all())}


@pytest.mark.slow
class TestInABrowser:
    def test_generates_and_shows_each_step(self, tab: Callable[[], Any], tmp_path: Path) -> None:
        page = tab()
        page.get_by_label("full steps").check()
        page.locator("#budget label", has_text="How many are full").wait_for()
        assert page.locator("#budget input").input_value() == "10"  # 5 times faster, of 50
        fill(page, prompt="green frog face", seed=7, steps=12, budget=4)
        page.locator("#go").click()
        rows = table(page)
        assert rows["Full steps"] == ["12", "4, 3.00× fewer"]
        assert rows["Predicted steps"] == ["0", "8"]
        assert re.fullmatch(r"[\d.]+ s, [\d.]+× faster", rows["Time"][1])
        wanted = [expected(config, "green frog face", 7) for config in (None, TAPConfig(full_steps=4))]
        for picture, pixels in zip(wanted, shown(page), strict=True):
            np.testing.assert_array_equal(pixels, np.asarray(to_image(picture[0])))

        words = page.locator("#maps .words")
        first = words.inner_text()
        page.locator("#at input[type=range]").focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("words => document.querySelector('#maps .words').innerText != words", arg=first)
        assert page.locator("#maps .taken img:visible").count() == 1
        assert page.locator("#maps .loss img:visible").count() == 1
        page.locator("#play").click()
        second = words.inner_text()
        page.wait_for_function("words => document.querySelector('#maps .words').innerText != words", arg=second)
        page.locator("#play", has_text="Pause").click()
        page.locator("#play", has_text="Play").wait_for()

        pictures = page.locator("#pictures")
        pictures.scroll_into_view_if_needed()
        before, box = pictures.screenshot(), pictures.bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] / 2, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 4, middle, steps=5)
        page.mouse.up()
        assert pictures.screenshot() != before

        assert page.locator("#frontier svg").count() == 2
        for width in (1280, 420):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot(path=tmp_path / f"{width}.png", full_page=True)

    def test_explains_bad_input_in_place(self, tab: Callable[[], Any]) -> None:
        page = tab()
        fill(page, prompt="red applle", seed=-1, steps=6)
        page.locator("#go").click()
        page.locator("#prompt", has_text="never saw the word “applle”").wait_for()
        page.locator("#seed", has_text="a whole number from 0").wait_for()
        page.locator("#budget", has_text="leaves none of 6 steps").wait_for()
        fill(page, prompt="red apple", seed=1, steps=12, budget=2)
        page.locator("#go").click()
        assert table(page)["Full steps"][0] == "12"

    def test_stops_and_goes_on(self, tab: Callable[[], Any], served: tuple[Page, str]) -> None:
        page = tab()
        calls = count_calls(served[0].pipe.transformer)
        fill(page, steps=1000, budget=2)
        page.locator("#go").click()
        page.locator("#pictures", has_text="/1000 steps").wait_for()
        page.locator("#stop").click()
        page.locator("#result", has_text="Stopped.").wait_for()
        page.locator("#pictures", has_text="/1000 steps").wait_for(state="detached")
        assert 0 < calls[0] < 2 * 1000
        fill(page, seed=3, steps=12)
        page.locator("#go").click()
        assert table(page)["Full steps"] == ["12", "6, 2.00× fewer"]
        np.testing.assert_array_equal(shown(page)[0], np.asarray(to_image(expected(None)[0])))

    def test_two_tabs_do_not_disturb_each_other(self, tab: Callable[[], Any]) -> None:
        one, two = tab(), tab()
        fill(one, prompt="blue book", steps=24)
        fill(two, prompt="red apple", seed=3, steps=12, budget=2)
        one.locator("#go").click()
        one.locator("#pictures", has_text="/24 steps").wait_for()
        two.locator("#stop").click()  # nothing runs there, and so nothing stops
        two.locator("#go").click()
        assert table(two)["Full steps"] == ["12", "6, 2.00× fewer"]
        assert table(one)["Full steps"] == ["24", "6, 4.00× fewer"]
        np.testing.assert_array_equal(shown(one)[0], np.asarray(to_image(expected(None, "blue book", 0, 24)[0])))
        np.testing.assert_array_equal(shown(two)[0], np.asarray(to_image(expected(None)[0])))

    def test_a_run_that_waits_can_be_stopped_and_a_closed_tab_stops(
        self, tab: Callable[[], Any], served: tuple[Page, str]
    ) -> None:
        one, two = tab(), tab()
        for each in (one, two):
            fill(each, steps=1000, budget=2)
            each.locator("#go").click()
        one.locator("#pictures", has_text="/1000 steps").wait_for()
        two.locator("#pictures", has_text="queue").wait_for()
        two.locator("#stop").click()
        two.locator("#result", has_text="Stopped.").wait_for()
        two.locator("#pictures", has_text="queue").wait_for(state="detached")
        one.close()
        free = threading.Event()

        def wait() -> None:
            with served[0]._lock:
                free.set()

        threading.Thread(target=wait, daemon=True).start()
        for _ in range(240):  # that many half seconds, for the server to see that the tab is gone
            two.wait_for_timeout(500)
            if free.is_set():
                break
        assert free.is_set()
