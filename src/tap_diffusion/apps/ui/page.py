"""The page of ``tap ui``: results with every step full beside accelerated ones, what they cost, and earlier runs."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from threading import Lock
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from tap_diffusion.apps import media
from tap_diffusion.apps.generate import MODELS, Request, psnr, run
from tap_diffusion.apps.sheets import to_image
from tap_diffusion.apps.ui.methods import FASTER, FULL, METHODS, RecordingEngine, full_steps
from tap_diffusion.apps.ui.model import NAMES, Model, Settings, watched
from tap_diffusion.apps.ui.parts import history, maps, table
from tap_diffusion.apps.ui.script import script
from tap_diffusion.core.errors import ConfigError, UnsupportedModelError, UsageError
from tap_diffusion.integrations.diffusers.api import enabled, hooks, report

OUTPUTS = 10  # parts of the page that a run fills
KEPT = 20  # runs of a tab that can be brought back
WIDTH = 512  # pixels that small pictures are enlarged to


@dataclass(frozen=True)
class Outcome:
    """One run, as it is shown and brought back.

    Attributes:
        drawn: both pictures, or a file with both videos side by side.
        results: the table, as HTML.
        frames, maps: of :func:`~tap_diffusion.apps.ui.parts.maps`.
        source: of a script that draws the same.
        line: in the list of runs: title, settings, results, and a small picture.
    """

    settings: Settings
    drawn: tuple[Image.Image, Image.Image] | str
    results: str
    frames: int
    maps: str
    source: str
    line: tuple[str, str, str, Image.Image]


@dataclass
class Session:
    """What is remembered of a browser tab.

    Attributes:
        current: the run that goes on; another object, or None, stops it after the step that it is at.
        plain: the last request, its model, its result (1, 3, H, W) or (1, F, 3, H, W), and its seconds without TAP,
            so that another speed or method need not wait for the same again.
        runs: the last ``KEPT`` of them.
        folder: of their videos.
    """

    current: object = None
    plain: tuple[Model, Request, Tensor, float] | None = None
    runs: list[Outcome] = field(default_factory=list)
    folder: tempfile.TemporaryDirectory[str] | None = None


class _Stopped(Exception):
    """A run is no longer its session's current one."""


class Page:
    """Pipelines and the sessions that share them, one run at a time.

    Args:
        model: name of the one to begin with. Those of the project that are installed can be chosen too.
        load: gives the pipeline of a name, as :func:`tap_diffusion.apps.generate.load_pipeline` does.

    Raises:
        UsageError, UnsupportedModelError: it can't be loaded, or draws neither pictures nor videos from prompts.
    """

    def __init__(self, model: str, load: Callable[[str], Any]) -> None:
        self.names = list(dict.fromkeys([model, *sorted(entry_points(group=MODELS).names)]))
        self.sessions: defaultdict[str | None, Session] = defaultdict(Session)
        self._load, self._lock = load, Lock()
        self._models: dict[str, Model] = {}
        self.first = self.model(model)

    def model(self, name: str) -> Model:
        """A model by name, loaded where it wasn't. Raises as the class does."""
        if name not in self._models:  # a model that is there must not wait for a run to end
            with self._lock:
                if name not in self._models:
                    model = Model(name, self._load(name))
                    # The first steps of a process are slower, which must not count.
                    run(model.pipe, Request([(model.examples or ["0"])[0]], steps=2), "warm-up")
                    self._models[name] = model
        return self._models[name]

    def validate(self, *inputs: Any) -> list[dict[str, Any]]:
        """:meth:`Model.problems` as Gradio shows them, each at its input."""
        settings = Settings(*inputs)
        problems = self.model(settings.model).problems(settings)
        return [gr.validate(name not in problems, problems.get(name, "")) for name in NAMES]

    def clear(self, request: gr.Request, name: str, *_: Any) -> tuple[Any, ...]:
        """Show nothing, before a run."""
        return self._shown(self.sessions[request.session_hash], self.model(name), None)

    def generate(
        self, request: gr.Request, progress: gr.Progress = gr.Progress(), *inputs: Any,  # noqa: B008
    ) -> tuple[Any, ...]:  # fmt: skip
        """Show a run; nothing new where it was stopped."""
        settings, session, this = Settings(*inputs), self.sessions[request.session_hash], object()
        session.current = this
        model = self.model(settings.model)
        try:
            with self._lock:
                outcome = self._run(model, settings, session, this, progress)
        except _Stopped:
            return (gr.skip(),) * OUTPUTS
        except torch.OutOfMemoryError:
            raise gr.Error("Out of memory. Take a smaller size, or start `tap ui` with --dtype bfloat16.") from None
        except (ConfigError, UsageError) as error:
            raise gr.Error(str(error)) from None
        session.current = None
        session.runs = [*session.runs, outcome][-KEPT:]
        return self._shown(session, model, outcome)

    def _run(self, model: Model, settings: Settings, session: Session, this: object, progress: Any) -> Outcome:
        wanted, config, pipe = model.request(settings), settings.config, model.pipe

        def drawn(title: str) -> tuple[Tensor, float]:
            steps = 0

            def after_step() -> None:
                nonlocal steps
                steps += 1
                if session.current is not this:
                    raise _Stopped
                progress((steps, wanted.steps), desc=title)

            if session.current is not this:
                raise _Stopped
            with watched(pipe, after_step):
                result = run(pipe, wanted, title)
            if session.current is not this:
                raise _Stopped
            return result

        if session.plain is None or session.plain[:2] != (model, wanted):
            session.plain = model, wanted, *drawn("Every step full")
        with enabled(pipe, config):
            for hook in hooks(pipe):
                hook.engine = RecordingEngine(config)
            result, seconds = drawn("Accelerated")
            account = report(pipe)
        *_, plain, plain_seconds = session.plain
        (decibels,) = psnr(result, plain)
        last = to_image(result[0, -1] if model.is_video else result[0])
        title, details = _said(model, settings)
        frames, html = (0, "") if model.is_video else maps(account, wanted.steps, last)
        return Outcome(
            settings,
            _side_by_side(session, plain[0], result[0])
            if model.is_video
            else (_enlarged(to_image(plain[0])), _enlarged(last)),
            table(account, plain_seconds, seconds, decibels, f"{title}: {details}"),
            frames,
            html,
            script(model.name, pipe, wanted, config),
            (title, details, f"{decibels:.1f} dB, {plain_seconds:.1f} → {seconds:.1f} s", _thumbnail(last)),
        )

    def stop(self, name: str, request: gr.Request) -> tuple[Any, ...]:
        """Stop the session's run after the step that it is at, and show nothing."""
        session = self.sessions[request.session_hash]
        session.current = None
        return self._shown(session, self.model(name), None, "<p>Stopped.</p>")

    def leave(self, request: gr.Request) -> None:
        """Stop and forget a session."""
        if session := self.sessions.pop(request.session_hash, None):
            session.current = None
            if session.folder is not None:
                session.folder.cleanup()

    def change(self, name: str, request: gr.Request) -> list[Any]:
        """The controls that another model takes, and nothing of the one before, whose run stops."""
        session = self.sessions[request.session_hash]
        session.current = None
        try:
            model = self.model(name)
        except (ConfigError, UnsupportedModelError, UsageError) as error:
            raise gr.Error(str(error)) from None
        kept = ("model", "seed", "steps", "kind", "budget", "method")
        controls = [gr.skip() if name in kept else gr.update(**_properties(model, name)) for name in NAMES]
        return [*controls, _examples(model), *self._shown(session, model, None)]

    def bring_back(self, event: gr.EventData, request: gr.Request) -> list[Any]:
        """The settings and results of an earlier run."""
        session = self.sessions[request.session_hash]
        outcome = session.runs[event.run]
        model, values = self.model(outcome.settings.model), asdict(outcome.settings)
        controls = [gr.update(**_properties(model, name) | {"value": values[name]}) for name in NAMES]
        controls[NAMES.index("budget")] = gr.update(**BUDGETS[outcome.settings.kind], value=outcome.settings.budget)
        return [*controls, _examples(model), *self._shown(session, model, outcome)]

    def _shown(self, session: Session, model: Model, outcome: Outcome | None, words: str = "") -> tuple[Any, ...]:
        """What the right half of the page and the parts below it hold: of a run, or nothing but these words."""
        place = next((i for i, run in enumerate(session.runs) if run is outcome), None)
        drawn = outcome.drawn if outcome else None
        frames = outcome.frames if outcome else 0
        return (
            gr.update(value=None if model.is_video else drawn, visible=not model.is_video),
            gr.update(value=drawn if model.is_video else None, visible=model.is_video),
            outcome.results if outcome else words,
            gr.update(visible=outcome is not None),
            outcome.source if outcome else "",
            history([run.line for run in session.runs], place),
            gr.update(visible=outcome is not None and not model.is_video),
            outcome.maps if outcome else "",
            gr.update(maximum=max(2, frames), value=1, visible=frames > 1),
            gr.update(visible=frames > 1),
        )

    def blocks(self, plots: str = "") -> gr.Blocks:
        """The page; ``plots`` are those of a bench run, if any."""
        private = {"api_visibility": "private"}
        aside = private | {"queue": False, "show_progress": "hidden"}
        # An hour: pictures are files until then.
        with gr.Blocks(title="TAP", analytics_enabled=False, delete_cache=(600, 3600)) as page:
            gr.HTML(
                "<h1>TAP: the same picture with fewer full steps</h1><p>Each run is drawn twice with the same seed:"
                " once with every step full, and once accelerated.</p>",
                elem_id="head",
            )
            made: dict[str, Any] = {}
            with gr.Row(elem_id="work"):  # what is where: page.css
                with gr.Column(elem_id="ask"):
                    examples, go, stop = self._subject(made)
                with gr.Column(elem_id="answer"):
                    is_video = self.first.is_video
                    pictures = gr.ImageSlider(
                        label="Every step full | accelerated", format="png", max_height=WIDTH, interactive=False,
                        visible=not is_video, elem_id="pictures",
                    )  # fmt: skip
                    video = gr.Video(
                        label="Every step full | accelerated", autoplay=True, loop=True, interactive=False,
                        visible=is_video, elem_id="video",
                    )  # fmt: skip
                    result = gr.HTML(elem_id="result")
                    with gr.Accordion("Copy as Python", open=False, visible=False, elem_id="python") as python:
                        code = gr.Code(
                            language="python", interactive=False, show_label=False, buttons=["copy"], elem_id="code"
                        )
                with gr.Column(elem_id="settings"):
                    random = self._settings(made)
            inputs = {name: made[name] for name in NAMES}
            gr.HTML("<h2>Runs of this tab</h2>")
            runs = gr.HTML(history([], None), js_on_load=_CHOOSE, elem_id="runs")
            with gr.Column(visible=False) as section:
                gr.HTML(
                    "<h2>What each token took</h2><p>A token is one square of the picture. At each predicted step TAP"
                    " picks, for each token, the forecast that would have come closest at the first layer. Order 0"
                    " repeats the last full step, order 1 goes on in a straight line, order 2 in a curve. The loss says"
                    " how far off the one picked still was.</p>"
                )
                with gr.Row(equal_height=True):
                    at = gr.Slider(1, 2, 1, step=1, label="Predicted step", buttons=[], scale=5, elem_id="at")
                    play = gr.Button(PLAY, min_width=90, elem_id="play")
                shown = gr.HTML(elem_id="maps")
            timer = gr.Timer(0.5, active=False)
            if plots:
                gr.HTML(f"<h2>Quality against speed in a bench run</h2>{plots}", elem_id="frontier")

            outputs = [pictures, video, result, python, code, runs, section, shown, at, play]
            prompt, model = inputs["prompt"], inputs["model"]
            values = list(inputs.values())
            cleared = gr.on(
                [go.click, prompt.submit], self.clear, values, outputs, validator=self.validate,
                show_progress="hidden", concurrency_limit=None, **private,
            )  # fmt: skip
            ran = cleared.success(
                self.generate, values, outputs, show_progress_on=[pictures, video], concurrency_limit=1, **private
            )
            stop.click(self.stop, model, outputs, **aside)
            whole = [*values, examples, *outputs]
            model.input(self.change, model, whole, queue=False, show_progress_on=[pictures, video], **private)
            gr.on([stop.click, model.input], None, cancels=[cleared, ran])  # for a run that still waits for its turn
            runs.click(self.bring_back, None, whole, **aside)
            examples.click(lambda sample: sample[0], examples, prompt, **aside)
            random.click(None, None, inputs["seed"], js="() => Math.floor(2 ** 32 * Math.random())")
            kind, budget = inputs["kind"], inputs["budget"]
            kind.input(_other_budget, [kind, budget, inputs["steps"]], budget, **aside)
            at.change(None, at, js=_SHOW)
            timer.tick(None, at, at, js=_NEXT)
            play.click(_toggled, play, [timer, play], **aside)
            page.unload(self.leave)
        return page

    def _control(self, made: dict[str, Any], kind: Any, name: str, **more: Any) -> None:
        made[name] = kind(elem_id=name, **_properties(self.first, name) | more)

    def _subject(self, made: dict[str, Any]) -> tuple[gr.Dataset, gr.Button, gr.Button]:
        """What is needed for each run. Returns examples, and the buttons that begin and stop."""
        control = partial(self._control, made)
        choices = {"choices": self.names, "visible": len(self.names) > 1, "filterable": False}
        control(gr.Dropdown, "model", label="Model", **choices)
        control(gr.Textbox, "prompt", label="Prompt", max_lines=3)
        examples = gr.Dataset(
            components=[gr.Textbox(visible=False)], label="This model knows, for example", elem_id="examples",
            samples=[[line] for line in self.first.examples], visible=bool(self.first.examples),
        )  # fmt: skip
        control(gr.Dropdown, "label", label="What to draw")
        with gr.Row():
            go = gr.Button("Generate", variant="primary", elem_id="go", **SMALL)
            stop = gr.Button("Stop", elem_id="stop", **SMALL)
        return examples, go, stop

    def _settings(self, made: dict[str, Any]) -> gr.Button:
        """What can be left as it is. Returns the button that draws a seed."""
        control = partial(self._control, made)
        control(gr.Radio, "kind", label="Set the speed by", choices=[FASTER, FULL], value=FASTER)
        control(gr.Number, "budget", step=1, value=5, **BUDGETS[FASTER])
        methods = list(METHODS)
        control(gr.Dropdown, "method", label="Method", choices=methods, value=methods[0], filterable=False)
        with gr.Row():
            control(gr.Number, "steps", label="Steps", step=1, **SMALL)
            control(gr.Number, "guidance", label="Guidance", step=0.5, **SMALL)
        with gr.Row(equal_height=True):
            control(gr.Number, "seed", label="Seed", step=1, scale=3, **SMALL)
            random = gr.Button("Random", elem_id="random", scale=2, **SMALL)
        control(gr.Textbox, "negative_prompt", label="Negative prompt", max_lines=3, placeholder="what to keep out")
        with gr.Row():
            control(gr.Number, "width", label="Width", **SMALL)
            control(gr.Number, "height", label="Height", **SMALL)
            control(gr.Number, "frames", label="Frames", step=1, **SMALL)
        return random


SMALL: dict[str, Any] = {"min_width": 110}
PLAY, PAUSE = "▶ Play", "⏸ Pause"
BUDGETS = {
    FASTER: {"label": "Target speed-up", "info": "5: one step in five runs the whole model."},
    FULL: {"label": "Full steps", "info": "Steps that run the whole model. The rest are predicted."},
}
_SHOW = "(i) => document.querySelectorAll('#maps [data-frame]').forEach(e => { e.hidden = e.dataset.frame != i })"
_NEXT = "(i) => i % document.querySelectorAll('#maps .words [data-frame]').length + 1"
_CHOOSE = """element.addEventListener('click', event => {
    const run = event.target.closest('[data-run]')
    if (run) trigger('click', {run: Number(run.dataset.run)})
})"""


def _properties(model: Model, name: str) -> dict[str, Any]:
    """Of a control, for a model: whether it takes it, with what value to begin, and what more there is to say."""
    if name in ("kind", "budget", "method"):
        return {}
    default = "" if name in ("prompt", "negative_prompt") else None
    properties = {"value": model.defaults.get(name, default), "visible": name in model.defaults}
    match name:
        case "label":
            return properties | {"choices": model.classes}
        case "model":
            return {"value": model.name}
    return properties


def _examples(model: Model) -> Any:
    return gr.update(samples=[[line] for line in model.examples], visible=bool(model.examples))


def _said(model: Model, settings: Settings) -> tuple[str, str]:
    """A run's title and its other settings, in words."""
    title = next((name for name, label in model.classes if label == settings.label), settings.prompt)
    parts = [settings.model, f"seed {settings.seed:.0f}", f"{settings.steps:.0f} steps"]
    if settings.guidance is not None:
        parts.append(f"guidance {settings.guidance:g}")
    if settings.negative_prompt:
        parts.append(f"without “{settings.negative_prompt}”")
    if settings.width and settings.height:
        parts.append(f"{settings.width:.0f} × {settings.height:.0f}")
    if settings.frames:
        parts.append(f"{settings.frames:.0f} frames")
    speed = f"{settings.budget:g} full steps" if settings.kind == FULL else f"speed-up {settings.budget:g}"
    return title, " · ".join([*parts, speed, settings.method])


def _toggled(label: str) -> tuple[Any, str]:
    return gr.Timer(active=label == PLAY), PAUSE if label == PLAY else PLAY


def _other_budget(kind: str, budget: float | None, steps: float | None) -> Any:
    """The same budget, said the other way."""
    said: dict[str, Any] = BUDGETS[kind]
    if not budget or not steps:
        return gr.update(**said)
    value = full_steps(round(steps), FASTER, budget) if kind == FULL else round(steps / budget, 2)
    return gr.update(value=value, **said)


def _scale(width: int) -> int:
    return max(1, WIDTH // width)


def _enlarged(image: Image.Image) -> Image.Image:
    """Small pictures with each pixel a square, which a browser would blur."""
    scale = _scale(image.width)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _thumbnail(image: Image.Image) -> Image.Image:
    return image.resize((48, max(1, round(48 * image.height / image.width))))


def _side_by_side(session: Session, plain: Tensor, result: Tensor) -> str:
    """A file with two videos (F, 3, H, W) in one, so that they play in step."""
    scale = _scale(plain.shape[-1])
    both = torch.cat([pad(plain, (0, 2), value=1.0), result], -1)  # H.264 needs even sizes
    large = both.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    session.folder = session.folder or tempfile.TemporaryDirectory()
    suffix, content = media.encoded(large)
    with tempfile.NamedTemporaryFile(dir=session.folder.name, suffix=suffix, delete=False) as file:
        file.write(content)
    return file.name


def serve(page: gr.Blocks, host: str, port: int | None) -> str:
    """Serve the page from threads of their own, and return its address.

    Args:
        host: address to listen at.
        port: None takes the first free one from 7860.

    Raises:
        UsageError: the port is taken, or there is no such host.
    """
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme.set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700")
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_400")
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, footer_links=[],
            run_history=False, enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False, show_error=True,
            theme=theme, css_paths=Path(__file__).with_suffix(".css"),
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"can't listen at {host}, port {port or '7860 to 7959'}: {error}") from error
    return str(address)
