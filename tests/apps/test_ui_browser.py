"""`tap ui` as a process, with the embedded models, in a real browser; skipped where that or playwright is missing."""

# ruff: noqa: E402
from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="the extra `ui` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the extra `test-ui`")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("there is no chromium: apt-get install chromium", allow_module_level=True)

from tap_diffusion import TAPConfig, enabled
from tap_diffusion.apps.generate import Request, load_pipeline, run
from tap_diffusion.apps.sheets import to_image

pytestmark = pytest.mark.slow
FASHION = Path(__file__).parents[2] / "docs" / "bench" / "fashion"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
    "OMP_NUM_THREADS": str(torch.get_num_threads())  # by which the last bits of a result may differ
}
PATIENCE = 120  # seconds after which something will never come


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the page, which a process of its own serves."""
    command = "import sys; from tap_diffusion.apps.cli import app; sys.argv[0] = 'tap'; app()"
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as stderr:
        server = subprocess.Popen(
            [sys.executable, "-c", command, "ui", "--device", "cpu", "--results", str(FASHION)],
            env=ENVIRONMENT | {"COLUMNS": "200"}, stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip
    assert server.stdout is not None
    try:
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found is not None, log.read_text()
        yield found[0]
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Callable[[], Any]]:
    """Opens a tab with the page in it, which may ask no other host and raise no error."""
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(1000 * PATIENCE)
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


@cache
def pipeline(model: str) -> Any:
    return load_pipeline(model, torch.float32, "cpu")


@cache
def expected(config: TAPConfig | None, prompt: str, model: str = "emoji", **settings: Any) -> torch.Tensor:
    """A picture (3, H, W), or a video (F, 3, H, W), drawn in this process."""
    request = Request([prompt], **settings)
    if config is None:
        return run(pipeline(model), request, "")[0][0]
    with enabled(pipeline(model), config):
        return run(pipeline(model), request, "")[0][0]


def both(prompt: str, full: int, **settings: Any) -> list[torch.Tensor]:
    """What the page is to show of ``emoji``."""
    return [expected(config, prompt, guidance=2.0, **settings) for config in (None, TAPConfig(full_steps=full))]


def fill(tab: Any, **values: Any) -> None:
    for name, value in values.items():
        tab.locator(f"#{name} :is(input, textarea)").first.fill(str(value))


def choose(tab: Any, name: str, option: str) -> None:
    tab.locator(f"#{name} input").click()
    tab.get_by_role("option", name=option, exact=True).click()


def generate(tab: Any, **values: Any) -> dict[str, list[str]]:
    """Fill, click, and wait. Returns the table."""
    fill(tab, **values)
    before = tab.locator("#runs li").count()
    tab.locator("#go").click()
    tab.locator("#runs li").nth(before).wait_for()
    return table(tab)


def table(tab: Any) -> dict[str, list[str]]:
    rows = tab.locator("#result tbody tr")
    rows.first.wait_for()
    return {cells[0]: cells[1:] for cells in (row.locator("th, td").all_inner_texts() for row in rows.all())}


def shown(tab: Any, size: int = 64) -> list[np.ndarray]:
    """Both pictures as they are on the page, one pixel of each square that a pixel was enlarged to."""
    images = tab.locator("#pictures img").evaluate_all("images => images.map(image => image.src)")
    files = [Image.open(io.BytesIO(urllib.request.urlopen(source).read())) for source in images]
    return [np.asarray(file.convert("RGB"))[:: file.width // size, :: file.width // size] for file in files]


def assert_shows(tab: Any, wanted: list[torch.Tensor]) -> None:
    for pixels, picture in zip(shown(tab), wanted, strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(to_image(picture)))


def assert_shows_nothing(tab: Any, words: str) -> None:
    tab.locator("#python").wait_for(state="hidden")
    tab.wait_for_function("words => document.querySelector('#result').innerText == words", arg=words)
    assert tab.locator("#result table").count() == 0
    assert tab.locator(":is(#pictures img, #video video, #maps img):visible").count() == 0
    assert tab.locator("#runs [aria-current=true]").count() == 0


def copied(tab: Any) -> str:
    """The script, as its button copies it."""
    tab.locator("#python button", has_text="Copy as Python").click()
    tab.locator("#code button").first.click()
    text: str = tab.evaluate("navigator.clipboard.readText()")
    return text


def executed(script: str, folder: Path) -> None:
    (folder / "script.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_generates_and_shows_each_step(tab: Callable[[], Any], tmp_path: Path) -> None:
    page = tab()
    page.get_by_role("radio", name="number of full steps").check()
    page.locator("#budget", has_text="Full steps").wait_for()
    assert page.locator("#budget input").input_value() == "10"  # 5 times faster, of 50
    rows = generate(page, prompt="green frog face", seed=7, steps=12, budget=4)
    assert rows["Full steps"] == ["12", "4, 3.00× fewer"]
    assert rows["Predicted steps"] == ["0", "8"]
    assert re.match(r"[\d.]+ s, [\d.]+× faster", rows["Time"][1])
    assert re.fullmatch(r"[\d.]+ dB, [\w ]+", rows["PSNR"][0])
    page.locator("#result", has_text="40 dB is a typical difference of 1 %").wait_for()
    assert_shows(page, both("green frog face", 4, seed=7, steps=12))

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
    for width in (1300, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=tmp_path / f"{width}.png", full_page=True)


def test_explains_bad_input_in_place(tab: Callable[[], Any]) -> None:
    page = tab()
    fill(page, prompt="red applle", seed=-1, steps=6)
    page.locator("#go").click()
    page.locator("#prompt", has_text="never saw the word “applle”").wait_for()
    page.locator("#seed", has_text="a whole number from 0").wait_for()
    page.locator("#budget", has_text="leaves none of 6 steps").wait_for()
    assert generate(page, prompt="red apple", seed=1, steps=12, budget=2)["Full steps"][0] == "12"


def test_stop_leaves_nothing_stale_and_goes_on(tab: Callable[[], Any]) -> None:
    page = tab()
    generate(page, prompt="popcorn", steps=12, budget=2)
    fill(page, prompt="red apple", steps=1000)
    page.locator("#go").click()
    page.locator("#pictures", has_text="/1000 steps").wait_for()
    assert page.locator("#result table").count() == 0
    page.locator("#stop").click()
    assert_shows_nothing(page, "Stopped.")
    page.locator("#pictures", has_text="/1000 steps").wait_for(state="detached")
    rows = generate(page, seed=3, steps=12, budget=2)
    assert rows["Full steps"] == ["12", "6, 2.00× fewer"]
    assert_shows(page, both("red apple", 6, seed=3, steps=12))
    assert page.locator("#runs li").count() == 2


def test_another_model_has_other_controls_and_its_videos_play(tab: Callable[[], Any], tmp_path: Path) -> None:
    page = tab()
    generate(page, steps=12, budget=2)
    choose(page, "model", "sprites")
    page.locator("#examples", has_text="fox face spins over bricks").wait_for()
    assert_shows_nothing(page, "")
    assert [page.locator(f"#{name}").is_visible() for name in ("width", "label", "frames")] == [False, False, True]
    page.locator("#examples button", has_text="fox face spins over bricks").click()
    fill(page, steps=1000)
    page.locator("#go").click()
    page.locator("#video", has_text="/1000 steps").wait_for()  # this pipeline has no callback
    page.locator("#stop").click()
    assert_shows_nothing(page, "Stopped.")
    page.locator("#video", has_text="/1000 steps").wait_for(state="detached")
    rows = generate(page, seed=2, steps=12, budget=2)
    assert rows["Full steps"] == ["12", "6, 2.00× fewer"]
    page.wait_for_function("document.querySelector('#video video')?.currentTime > 0")
    video = page.locator("#video video")
    assert video.evaluate("video => [video.videoWidth, video.videoHeight, video.paused]") == [
        2 * 512 + 32, 512, False
    ]  # fmt: skip

    executed(copied(page) + "\nimport numpy\nnumpy.save('frames.npy', frames)\n", tmp_path)
    settings = {"guidance": 3.0, "steps": 12, "seed": 2}
    wanted = expected(TAPConfig(full_steps=6), "fox face spins over bricks", "sprites", **settings)
    frames = np.load(tmp_path / "frames.npy")
    np.testing.assert_array_equal(2 * torch.from_numpy(frames).movedim(-1, -3) - 1, wanted)
    assert (tmp_path / "video.mp4").stat().st_size > 0

    choose(page, "model", "fashion")
    page.locator("#label").wait_for()
    assert not page.locator("#prompt").is_visible()
    assert generate(page)["Full steps"] == ["12", "6, 2.00× fewer"]
    assert page.locator("#pictures img").count() == 2
    assert page.locator("#runs li").count() == 3


def test_earlier_runs_come_back(tab: Callable[[], Any]) -> None:
    page = tab()
    generate(page, prompt="wolf face", seed=5, steps=12, budget=2, negative_prompt="green")
    first = page.locator("#result").inner_text()
    page.locator("#random").click()
    page.wait_for_function("document.querySelector('#seed input').value != '5'")
    seed = int(page.locator("#seed input").input_value())
    assert 0 <= seed < 2**32
    page.get_by_role("radio", name="number of full steps").check()
    page.locator("#budget", has_text="Full steps").wait_for()
    generate(page, prompt="sunflower", budget=7, negative_prompt="")
    assert_shows(page, both("sunflower", 7, seed=seed, steps=12))
    runs = page.locator("#runs button")
    assert [text.splitlines()[0] for text in runs.all_inner_texts()] == ["sunflower", "wolf face"]
    assert re.search(r"[\d.]+ dB, [\d.]+ → [\d.]+ s", runs.last.inner_text())
    runs.last.click()
    page.locator("#result caption", has_text="wolf face").wait_for()
    assert page.locator("#result").inner_text() == first
    assert_shows(page, both("wolf face", 6, seed=5, steps=12, negative_prompt="green"))
    for name, value in (("prompt", "wolf face"), ("seed", "5"), ("budget", "2"), ("negative_prompt", "green")):
        assert page.locator(f"#{name} :is(input, textarea)").first.input_value() == value
    assert page.get_by_role("radio", name="target speed-up").is_checked()
    assert generate(page, budget=3)["Full steps"] == ["12", "6, 2.00× fewer"]  # with the settings that came back


def test_the_copied_script_draws_the_same_picture(tab: Callable[[], Any], tmp_path: Path) -> None:
    page = tab()
    choose(page, "method", "TAP, as in the paper")
    generate(page, prompt="Strawberry cake", seed=11, steps=14, budget=2, guidance=1.5, negative_prompt="red car")
    executed(copied(page), tmp_path)
    drawn = np.asarray(Image.open(tmp_path / "picture.png"))
    full, accelerated = shown(page)
    np.testing.assert_array_equal(drawn, accelerated)
    assert not np.array_equal(drawn, full)


def test_two_tabs_do_not_disturb_each_other(tab: Callable[[], Any]) -> None:
    one, two = tab(), tab()
    fill(one, prompt="red car", steps=24)
    one.locator("#go").click()
    one.locator("#pictures", has_text="/24 steps").wait_for()
    two.locator("#stop").click()  # nothing runs there, and so nothing stops
    assert generate(two, prompt="red apple", seed=3, steps=12, budget=2)["Full steps"] == ["12", "6, 2.00× fewer"]
    assert table(one)["Full steps"] == ["24", "6, 4.00× fewer"]
    assert_shows(one, both("red car", 6, seed=0, steps=24))
    assert_shows(two, both("red apple", 6, seed=3, steps=12))


def test_a_run_that_waits_can_be_stopped_and_a_closed_tab_stops(tab: Callable[[], Any]) -> None:
    one, two = tab(), tab()
    choose(one, "model", "sprites")
    one.locator("#examples", has_text="fox face spins over bricks").wait_for()
    fill(one, steps=1000)  # many minutes
    one.locator("#go").click()
    one.locator("#video", has_text="/1000 steps").wait_for()
    two.locator("#go").click()
    two.locator("#pictures", has_text="queue").wait_for()
    two.locator("#stop").click()
    assert_shows_nothing(two, "Stopped.")
    two.locator("#pictures", has_text="queue").wait_for(state="detached")
    one.close()
    assert generate(two, steps=12, budget=2)["Full steps"] == ["12", "6, 2.00× fewer"]
