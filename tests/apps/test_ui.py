"""What is behind the page of `tap ui`. The page itself, in a real browser: test_ui_browser.py."""

# ruff: noqa: E402
from __future__ import annotations

import base64
import io
import re
import socket
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import astuple
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

gr = pytest.importorskip("gradio", reason="the extra `ui` is not installed")

from test_generate import dit, sd3, wan
from test_sprites import build as build_sprites

from tap_diffusion import TAPConfig, enabled, report
from tap_diffusion.apps import media
from tap_diffusion.apps.cli import app
from tap_diffusion.apps.generate import Request, psnr, run
from tap_diffusion.apps.sheets import colour, to_image
from tap_diffusion.apps.ui import page as page_module
from tap_diffusion.apps.ui.methods import FASTER, FULL, METHODS, RecordingEngine, full_steps
from tap_diffusion.apps.ui.model import NAMES, Model, Settings, watched
from tap_diffusion.apps.ui.page import Page, serve
from tap_diffusion.apps.ui.parts import maps, meaning
from tap_diffusion.core.errors import UsageError
from tap_diffusion.core.predictors import Candidate
from tap_diffusion.core.report import Choice, Report
from tap_diffusion.core.schedule import paper_steps, plan
from tap_diffusion.integrations.diffusers.api import hooks
from tiny import build_pipeline, count_calls

RECOMMENDED, PAPER = list(METHODS)[:2]
INPUTS: dict[str, Any] = {
    "model": "emoji", "prompt": "red apple", "label": None, "negative_prompt": "", "guidance": 2.0, "width": 32,
    "height": 32, "frames": None, "seed": 3, "steps": 12, "kind": FULL, "budget": 4, "method": RECOMMENDED,
}  # fmt: skip
OUTPUTS = ("pictures", "video", "results", "python", "script", "runs", "section", "maps", "at", "play")


def page_of(pipe: Any, model: str = "emoji") -> Page:
    """With the words of ``emoji``, which are those that the tiny pipeline knows."""
    return Page(model, {model: pipe}.__getitem__)


@pytest.fixture
def page(pipe: Any) -> Page:
    return page_of(pipe)


def of(session: str) -> Any:
    return SimpleNamespace(session_hash=session)


def generated(page: Page, session: str = "a", progress: Any = lambda *_, **__: None, **changes: Any) -> dict[str, Any]:
    """What is shown then, by the names of :data:`OUTPUTS`."""
    settings = Settings(**INPUTS | changes)
    return dict(zip(OUTPUTS, page.generate(of(session), progress, *astuple(settings)), strict=True))


def pictures(shown: dict[str, Any]) -> tuple[Image.Image, Image.Image]:
    assert shown["pictures"]["visible"]
    assert not shown["video"]["visible"]
    both: tuple[Image.Image, Image.Image] = shown["pictures"]["value"]
    return both


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


def assert_shows(shown: dict[str, Any], plain: torch.Tensor, accelerated: torch.Tensor) -> None:
    for image, wanted in zip(pictures(shown), (plain, accelerated), strict=True):
        np.testing.assert_array_equal(shrunk(image, wanted.shape[-1]), np.asarray(to_image(wanted[0])))


def assert_shows_nothing(shown: dict[str, Any], runs: int = 0) -> None:
    assert shown["pictures"]["value"] is shown["video"]["value"] is None
    assert [shown[name] for name in ("maps", "script")] == ["", ""]
    assert not any(shown[name]["visible"] for name in ("python", "section", "at", "play"))
    assert shown["runs"].count("<li>") == runs
    assert "aria-current='true'" not in shown["runs"]


# ------------------------------------------------------------------------------------------------------- what is behind


@pytest.mark.parametrize("method", METHODS)
def test_pictures_are_those_of_generate(page: Page, method: str) -> None:
    shown = generated(page, method=method)
    plain, picture = expected(None), expected(METHODS[method](12, 4))
    assert_shows(shown, plain, picture)
    assert f"{psnr(picture, plain)[0]:.1f} dB" in shown["results"]
    assert f"{psnr(picture, plain)[0]:.1f} dB" in shown["runs"]
    assert hooks(page.first.pipe) == []


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
    calls, accelerated = count_calls(page.first.pipe.transformer), expected(TAPConfig(full_steps=4))
    first = generated(page, "a")
    per_run = calls[0]
    other = generated(page, "b", prompt="blue book")
    assert calls[0] == 2 * per_run
    again = generated(page, "a")  # the plain picture of this session is still there
    assert calls[0] == 2.5 * per_run
    for shown in (first, again):
        assert_shows(shown, expected(None), accelerated)
    assert_shows(other, expected(None, "blue book"), expected(TAPConfig(full_steps=4), "blue book"))
    assert [shown["runs"].count("<li>") for shown in (first, other, again)] == [1, 1, 2]
    assert set(page.sessions) == {"a", "b"}
    page.leave(of("a"))
    assert set(page.sessions) == {"b"}


@pytest.mark.parametrize("title", ["Every step full", "Accelerated"])
def test_stop_stops_between_steps_and_leaves_all_usable(page: Page, title: str) -> None:
    seen: list[tuple[str, int]] = []

    def progress(at: tuple[int, int], desc: str) -> None:
        seen.append((desc, at[0]))
        if (desc, at[0]) == (title, 5):
            stopped.append(dict(zip(OUTPUTS, page.stop("emoji", of("a")), strict=True)))

    generated(page, prompt="blue book")
    stopped: list[dict[str, Any]] = []
    cleared = dict(zip(OUTPUTS, page.clear(of("a"), "emoji"), strict=True))
    assert set(map(str, generated(page, progress=progress).values())) == {str(gr.skip())}
    for shown in (cleared, *stopped):
        assert_shows_nothing(shown, runs=1)
    assert [shown["results"] for shown in (cleared, *stopped)] == ["", "<p>Stopped.</p>"]
    assert seen[-1] == (title, 5)
    assert hooks(page.first.pipe) == []
    assert "progress_bar" not in vars(page.first.pipe)
    assert_shows(generated(page), expected(None), expected(TAPConfig(full_steps=4)))


def test_a_closed_tab_stops_its_run_and_no_other(page: Page) -> None:
    seen: list[tuple[str, int]] = []

    def progress(at: tuple[int, int], desc: str) -> None:
        seen.append((desc, at[0]))
        page.stop("emoji", of("b"))
        page.leave(of("b"))
        if desc == "Accelerated":
            page.leave(of("a"))

    assert generated(page, "a", progress)["pictures"] == gr.skip()
    assert seen[-2:] == [("Every step full", 12), ("Accelerated", 1)]


def test_an_error_in_a_run_leaves_all_usable(page: Page) -> None:
    def progress(at: tuple[int, int], desc: str) -> None:
        if desc == "Accelerated" and at[0] == 7:
            raise torch.OutOfMemoryError

    with pytest.raises(gr.Error, match=r"Out of memory\. Take a smaller size, or start `tap ui`"):
        generated(page, progress=progress)
    assert hooks(page.first.pipe) == []
    assert_shows(generated(page), expected(None), expected(TAPConfig(full_steps=4)))


@pytest.mark.parametrize(
    ("changes", "place", "words"),
    [
        ({"prompt": " "}, "prompt", "Say what to draw"),
        ({"prompt": "red applle"}, "prompt", "never saw the word “applle”. It knows, for example: apple"),
        ({"prompt": "red qqq"}, "prompt", "It knows, for example: red"),
        ({"prompt": "red " * 9}, "prompt", "The model reads 8 tokens, and this has 10"),
        ({"negative_prompt": "qqq"}, "negative_prompt", "never saw the word “qqq”"),
        ({"negative_prompt": "red", "guidance": 1}, "guidance", "a negative prompt has no effect. Give more than 1"),
        ({"width": 33}, "width", "The width must be a multiple of 4"),
        ({"height": 0}, "height", "The height must be a multiple of 4"),
        ({"seed": -1}, "seed", "a whole number from 0"),
        ({"seed": 1.5}, "seed", "a whole number from 0"),
        ({"seed": None}, "seed", "a whole number from 0"),
        ({"steps": 1}, "steps", "from 2 to 1000"),
        ({"steps": None}, "steps", "from 2 to 1000"),
        ({"budget": None}, "budget", "must be a whole number of at least 1"),
        ({"budget": 0}, "budget", "must be a whole number of at least 1"),
        ({"budget": 2.5}, "budget", "must be a whole number of at least 1"),
        ({"budget": 12}, "budget", "leaves none of 12 steps to predict. Give at most 11, or take more steps"),
        ({"kind": FASTER, "budget": 5, "steps": 6}, "budget", "At least 6 are full: say how many, or take more steps"),
        ({"kind": FASTER, "budget": 0.5}, "budget", "must be a number of at least 1"),
        ({"budget": 2, "method": PAPER}, "budget", "3 warm-up steps are more than the 2 full steps wanted. Give more"),
        ({"prompt": "Red APPLE"}, None, ""),
        ({"kind": FASTER, "budget": 1.5}, None, ""),
        ({"guidance": None, "width": None, "height": None}, None, ""),
    ],
)
def test_bad_input_is_explained_at_its_place(
    page: Page, changes: dict[str, Any], place: str | None, words: str
) -> None:
    settings = Settings(**INPUTS | changes)
    problems = page.first.problems(settings)
    assert list(problems) == ([] if place is None else [place])
    assert words in "".join(problems.values())
    checks = page.validate(*astuple(settings))
    assert [check["is_valid"] for check in checks] == [name != place for name in NAMES]


def test_words_are_asked_of_the_embedded_model_alone(pipe: Any) -> None:
    assert Model("some/model", pipe).problems(Settings(**INPUTS | {"prompt": "a dog"})) == {}


def flux_with_guidance_as_an_input() -> Any:
    return build_pipeline(guidance_embeds=True)


ALWAYS = {"model", "seed", "steps"}
TAKEN: dict[Callable[[], Any], dict[str, Any]] = {
    build_pipeline: {"prompt": "", "negative_prompt": "", "guidance": 1.0, "width": 32, "height": 32},
    flux_with_guidance_as_an_input: {"prompt": "", "guidance": 3.5, "width": 32, "height": 32},
    sd3: {"prompt": "", "negative_prompt": "", "guidance": 7.0},
    wan: {"prompt": "", "negative_prompt": "", "guidance": 5.0, "width": 832, "height": 480, "frames": 81},
    build_sprites: {"prompt": "", "negative_prompt": "", "guidance": 3.0, "frames": 3},
    dit: {"label": 0, "guidance": 4.0},
}


@pytest.mark.parametrize("make", TAKEN)
def test_only_controls_that_the_pipeline_takes_are_shown(make: Callable[[], Any]) -> None:
    model, wanted = Model("some/model", make()), TAKEN[make]
    shown = {name: value for name, value in model.defaults.items() if name not in ALWAYS}
    if make is sd3:  # of its own size, which is of its parts
        size = model.pipe.default_sample_size * model.pipe.vae_scale_factor
        wanted = wanted | {"width": size, "height": size}
    assert shown == wanted


def test_a_pipeline_that_needs_more_than_a_prompt_is_refused() -> None:
    pipe = diffusers.WanImageToVideoPipeline(**wan().components)
    with pytest.raises(UsageError, match="WanImageToVideoPipeline needs more than prompts"):
        page_of(pipe)


def test_a_pipeline_of_another_kind() -> None:
    """Both branches of guidance in one batch, of which the maps show the one with the prompt."""
    pipe = sd3()
    shown = generated(page_of(pipe, "some/model"), model="some/model", guidance=7.0, width=None, height=None)
    request = Request(["red apple"], 12, 3)
    plain = run(pipe, request, "")[0]
    with enabled(pipe, METHODS[RECOMMENDED](12, 4)):
        picture, _ = run(pipe, request, "")
        choices = report(pipe).choices
    assert_shows(shown, plain, picture)
    assert shown["at"]["maximum"] == len(choices) > 2
    assert choices[0].index.shape[0] == 2
    for choice in choices:
        share = (choice.index[-1] == 0).float().mean()
        assert f"Step {choice.step + 1} of 12.</strong>" in shown["maps"]
        assert f"order 1 {100 * share:.0f} %" in shown["maps"] or share == 0


def test_videos_are_side_by_side() -> None:
    pipe = build_sprites()
    page = page_of(pipe, "some/model")
    settings: dict[str, Any] = {"guidance": 3.0, "frames": 4, "width": None, "height": None}
    settings |= {"model": "some/model", "prompt": "red apple moves left over grass"}
    shown = generated(page, **settings)
    assert not shown["pictures"]["visible"]
    assert shown["video"]["visible"]
    file = Path(shown["video"]["value"])
    video = media.decoded(file)
    request = Request([settings["prompt"]], 12, 3, 3.0, frames=4)
    plain = run(pipe, request, "")[0][0]
    with enabled(pipe, TAPConfig(full_steps=4)):
        accelerated = run(pipe, request, "")[0][0]
    scale, width = 64, 8
    for left, wanted in ((0, plain), (width + 2, accelerated)):
        part = video[..., scale * left : scale * (left + width)].unflatten(-1, (width, scale)).mean(-1)
        part = part.unflatten(-2, (width, scale)).mean(-2)
        assert psnr(part[None], wanted[None])[0] > 30  # what the codec leaves
    assert not shown["section"]["visible"]
    page.leave(of("a"))
    assert not file.exists()


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (build_pipeline, {"negative_prompt": "blue book"}),
        (build_pipeline, {"method": PAPER, "height": 24}),
        (flux_with_guidance_as_an_input, {"guidance": 3.5}),
        (sd3, {"guidance": 5.0, "width": None, "height": None, "method": list(METHODS)[-1]}),
        (dit, {"label": 7, "width": None, "height": None, "kind": FASTER, "budget": 1.5}),
    ],
)
def test_the_copied_script_draws_the_same(
    make: Callable[[], Any], changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    name = str(tmp_path)
    page = Page(name, lambda source: diffusers.DiffusionPipeline.from_pretrained(source))
    shown = generated(page, **{"model": name} | changes)
    exec(compile(shown["script"], "script.py", "exec"), {})
    drawn = np.asarray(Image.open("picture.png"))
    accelerated = pictures(shown)[1]
    step = accelerated.width // drawn.shape[1]
    np.testing.assert_array_equal(np.asarray(accelerated)[::step, ::step], drawn)
    assert not np.array_equal(drawn, np.asarray(pictures(shown)[0])[::step, ::step])


def test_a_quote_in_a_prompt_does_not_break_the_script(page: Page) -> None:
    prompt = 'say "hi"\\ it\'s {a} π\n'
    page = page_of(page.first.pipe, "some/model")
    script = generated(page, model="some/model", prompt=prompt)["script"]
    call: list[dict[str, Any]] = []
    found = re.search(r"(?s)pipe\((.*)\)\.images", script)
    assert found is not None
    eval(f"keep({found[1]})", {"keep": lambda **arguments: call.append(arguments), "torch": torch})
    assert call[0]["prompt"] == prompt


def test_earlier_runs_come_back_whole(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "KEPT", 3)
    changes = {"negative_prompt": "blue book", "method": PAPER}
    first = generated(page, **changes)
    for seed in range(2):
        generated(page, seed=seed, kind=FASTER, budget=1.5)
    back = page.bring_back(gr.EventData(None, {"run": 0}), of("a"))
    controls, shown = back[: len(NAMES)], dict(zip(OUTPUTS, back[len(NAMES) + 1 :], strict=True))
    values = {name: control["value"] for name, control in zip(NAMES, controls, strict=True)}
    assert values == INPUTS | changes
    assert controls[NAMES.index("budget")]["label"] == "Full steps"
    for one, two in zip(pictures(first), pictures(shown), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    for name in ("results", "script", "maps"):
        assert shown[name] == first[name]
    assert "data-run='0' aria-current='true'" in shown["runs"]
    assert shown["runs"].count("<li>") == 3
    last = generated(page)
    assert last["runs"].count("<li>") == 3  # the first is forgotten
    assert PAPER not in last["runs"]


def test_another_model_has_its_own_controls_and_stops_the_run(page: Page) -> None:
    video = build_sprites()
    page._load = {"sprites": video}.__getitem__
    back: list[list[Any]] = []

    def progress(at: tuple[int, int], desc: str) -> None:
        if not back:
            page._models["sprites"] = Model("sprites", video)
            back.append(page.change("sprites", of("a")))

    assert generated(page, progress=progress)["pictures"] == gr.skip()
    controls = dict(zip(NAMES, back[0], strict=False))
    visible = {name for name, control in controls.items() if control.get("visible")}
    assert visible == {"prompt", "negative_prompt", "guidance", "frames"}
    assert controls["prompt"]["value"] == "red apple moves left over grass"
    assert controls["seed"] == gr.skip()
    shown = dict(zip(OUTPUTS, back[0][len(NAMES) + 1 :], strict=True))
    assert_shows_nothing(shown)
    assert shown["video"]["visible"]
    with pytest.raises(gr.Error, match="unknown model"):
        Page("emoji", lambda name: page.first.pipe if name == "emoji" else unknown(name)).change("x", of("a"))


def unknown(name: str) -> Any:
    raise UsageError(f"unknown model '{name}'")


@pytest.mark.parametrize("make", [build_pipeline, build_sprites, dit, wan])
def test_steps_are_counted_whatever_the_pipeline_tells(make: Callable[[], Any]) -> None:
    pipe, steps = make(), [0]

    def after_step() -> None:
        steps[0] += 1

    size: dict[str, Any] = {"height": 16, "width": 16, "frames": 5} if make is wan else {}
    prompt = "1" if make is dit else "red apple"
    with watched(pipe, after_step):
        run(pipe, Request([prompt], 7, **size), "")
    assert steps == [7]
    assert "progress_bar" not in vars(pipe)


@pytest.mark.parametrize(
    ("decibels", "words"),
    [
        (float("inf"), "equal"),
        (47.9, "47.9 dB</strong>, hard to tell apart"),
        (33.0, "33.0 dB</strong>, fine detail differs"),
        (20.0, "20.0 dB</strong>, you can see differences"),
        (3.2, "3.2 dB</strong>, another picture"),
    ],
)
def test_what_a_psnr_means(decibels: float, words: str) -> None:
    assert words in meaning(decibels)


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
    shown = generated(page, method=list(METHODS)[-1])
    assert "nothing to choose" in shown["maps"]
    assert not shown["at"]["visible"]
    assert not shown["play"]["visible"]


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


@pytest.mark.slow
def test_it_listens_at_localhost_and_asks_nobody(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> None:
    asked: set[str] = set()
    original = socket.getaddrinfo

    def getaddrinfo(host: Any, *more: Any, **options: Any) -> Any:
        asked.add(host if isinstance(host, str) else str(host))
        return original(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    blocks = page_of(pipe).blocks()
    try:
        address = serve(blocks, "127.0.0.1", None)
        listening = blocks.server.servers[0].sockets
        assert {each.getsockname()[0] for each in listening} == {"127.0.0.1"}
        with urllib.request.urlopen(address) as answer:
            text = answer.read().decode()
        taken = int(address.rsplit(":", 1)[1].strip("/"))
        with pytest.raises(UsageError, match=f"can't listen at 127.0.0.1, port {taken}"):
            serve(page_of(pipe).blocks(), "127.0.0.1", taken)
    finally:
        blocks.close()
    assert asked <= {"127.0.0.1", "localhost"}
    assert not blocks.analytics_enabled
    assert not re.search(r'(<script[^>]* src|<link[^>]* href)="https?://(?!127\.0\.0\.1)', text)
