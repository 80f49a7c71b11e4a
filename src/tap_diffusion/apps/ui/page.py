"""The page of ``tap ui``: plain and accelerated pictures of one pipeline, and what each token took."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from html import escape
from pathlib import Path
from threading import Lock
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import torch
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor

from tap_diffusion.apps import pipelines
from tap_diffusion.apps.generate import Request, guidance_for, prompt_for, psnr, run
from tap_diffusion.apps.sheets import to_image
from tap_diffusion.apps.ui.parts import maps, table
from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.errors import UsageError
from tap_diffusion.core.schedule import FEWEST, paper_steps
from tap_diffusion.integrations.diffusers.api import enabled, hooks, report

FASTER, FULL = "times faster", "full steps"
LABELS = {FASTER: "Steps for each full one", FULL: "How many are full"}
LARGEST_SEED = 2**53 - 1  # that a browser's numbers hold exactly


def _on_paper_s_schedule(**changes: Any) -> Callable[[int, int], TAPConfig]:
    return lambda steps, full: TAPConfig.paper(full_steps=paper_steps(steps, full), **changes)


METHODS: dict[str, Callable[[int, int], TAPConfig]] = {
    "TAP, recommended": lambda _, full: TAPConfig(full_steps=full),
    "TAP, as in the paper": _on_paper_s_schedule(),
    "Taylor, order 1 for all tokens": _on_paper_s_schedule(orders=(1,), horizon_span=0.0),
    "Taylor, order 2 for all tokens": _on_paper_s_schedule(orders=(2,), horizon_span=0.0),
    "Reuse of the last full step": _on_paper_s_schedule(orders=(0,), horizon_span=0.0),
}
"""Configurations by name, as functions of the number of steps and of full ones."""


def full_steps(steps: int, kind: str, budget: float) -> int:
    """Full steps of a budget; a speed-up leaves as many as ``TAPConfig(speedup=budget)`` does."""
    return int(budget) if kind == FULL else max(FEWEST, round(steps / budget))


class RecordingEngine(Engine):
    """Engine that keeps the proxy loss of each token's choice. On a GPU that takes a second kernel per step."""

    _loss: Tensor | None = None

    def _choose(self, losses: Tensor) -> Tensor:
        choice = super()._choose(losses)
        self._loss = losses.gather(0, choice.unsqueeze(0)).squeeze(0)
        return choice

    def predict(self, call: Call, hidden_states: Tensor, probe: Callable[[], Tensor], stream: str = "") -> Tensor:
        """As :meth:`Engine.predict`."""
        self._loss = None
        result = super().predict(call, hidden_states, probe, stream)
        if self._loss is not None:
            self._pending[-1] = replace(self._pending[-1], loss=self._loss)
        return result


@dataclass
class Session:
    """What is remembered of a browser tab.

    Attributes:
        current: the run that goes on; another object, or None, stops it after the step that it is at.
        plain: the last request, its picture (1, 3, H, W) and seconds without TAP, so that another budget or method
            need not wait for the same again.
    """

    current: object = None
    plain: tuple[Request, Tensor, float] | None = None


class _Stopped(Exception):
    """A run is no longer its session's current one."""


class Page:
    """One pipeline and the sessions that share it, one run at a time.

    Args:
        pipe: draws pictures from prompts.
        model: its name, as :func:`tap_diffusion.apps.generate.load_pipeline` takes it.

    Raises:
        UsageError: the pipeline is another one.
    """

    def __init__(self, pipe: Any, model: str) -> None:
        if pipelines.frames_argument(pipe) is not None or pipelines.condition(pipe) != "prompt":
            raise UsageError(f"tap ui draws pictures from prompts, and {type(pipe).__name__} draws something else")
        Request([""]).check(pipe)
        self.pipe, self.model = pipe, model
        self.sessions: defaultdict[str | None, Session] = defaultdict(Session)
        self._lock = Lock()

    def warm_up(self) -> None:
        """Take two steps, since the first of a process are slower, which must not count."""
        run(self.pipe, self._request("red apple", 0, 2), "warm-up")

    def _request(self, prompt: str, seed: float, steps: float) -> Request:
        prompts = [prompt_for(self.model, prompt)]
        return Request(prompts, int(steps), int(seed), guidance_for(self.model, None))

    def problems(self, prompt: str, seed: Any, steps: Any, kind: str, budget: Any, method: str) -> list[str]:
        """What is wrong with each of the inputs, in their order, and its remedy; empty where nothing is."""
        wrong = [""] * 6
        wrong[0] = self._problem_of_prompt(prompt)
        if not _is_whole(seed) or not 0 <= seed <= LARGEST_SEED:
            wrong[1] = "The seed must be a whole number from 0 to 2⁵³ − 1."
        if not _is_whole(steps) or not 2 <= steps <= 1000:
            wrong[2] = "Steps must be a whole number from 2 to 1000."
        elif budget is None or budget < 1 or (kind == FULL and not _is_whole(budget)):
            wrong[4] = f"Give a {'whole ' if kind == FULL else ''}number of at least 1."
        elif (full := full_steps(steps, kind, budget)) >= steps:
            remedy = f"Give at most {steps - 1}" if kind == FULL else f"At least {FEWEST} are full: say how many"
            wrong[4] = f"This leaves none of {steps} steps to predict. {remedy}, or take more steps."
        else:
            try:
                METHODS[method](int(steps), full)
            except ValueError as error:
                wrong[4] = f"{error}. Give more full steps, or take the recommended method."
        return wrong

    def _problem_of_prompt(self, prompt: str) -> str:
        if not prompt.strip():
            return "Say what to draw."
        if not isinstance(self.pipe, FluxPipeline):  # others cut off what is too long, and warn
            return ""
        tokenizer = self.pipe.tokenizer_2
        if self.model == "emoji":
            known = {token.removeprefix("▁") for token in tokenizer.get_vocab() if token.startswith("▁")} - {""}
            for word in prompt_for(self.model, prompt).split():
                if word not in known:
                    near = get_close_matches(word, known) or ["red", "green", "apple", "frog", "face"]
                    return f"The embedded model never saw the word “{word}”. It knows, for example: {', '.join(near)}."
        most = Request([prompt]).arguments(self.pipe)["max_sequence_length"]
        count = len(tokenizer(prompt).input_ids)
        return f"The model reads {most} tokens, and this has {count}: make it shorter." if count > most else ""

    def validate(self, *inputs: Any) -> list[dict[str, Any]]:
        """:meth:`problems` as Gradio shows them, each at its input."""
        return [gr.validate(not problem, problem) for problem in self.problems(*inputs)]

    def generate(
        self, prompt: str, seed: int, steps: int, kind: str, budget: float, method: str, request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:  # fmt: skip
        """Both pictures, the table, the maps, and the slider and buttons over these; nothing new where stopped."""
        session, this = self.sessions[request.session_hash], object()
        session.current = this
        wanted = self._request(prompt, seed, steps)
        config = METHODS[method](wanted.steps, full_steps(wanted.steps, kind, budget))

        def picture_by(title: str) -> tuple[Tensor, float]:
            def after_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
                progress((step + 1, wanted.steps), desc=title)
                pipe._interrupt = session.current is not this
                return values

            told = "callback_on_step_end" in pipelines.parameters(self.pipe)
            result = run(self.pipe, wanted, title, **({"callback_on_step_end": after_step} if told else {}))
            if session.current is not this:
                raise _Stopped
            return result

        try:
            with self._lock:
                if session.plain is None or session.plain[0] != wanted:
                    session.plain = wanted, *picture_by("Every step full")
                with enabled(self.pipe, config):
                    for hook in hooks(self.pipe):
                        hook.engine = RecordingEngine(config)
                    picture, seconds = picture_by(method)
                    account = report(self.pipe)
        except _Stopped:
            return (gr.skip(),) * 6
        except torch.OutOfMemoryError:
            raise gr.Error("Out of memory: start `tap ui` with --dtype bfloat16, or a smaller model.") from None
        session.current = None
        _, full, full_seconds = session.plain
        frames, html = maps(account, wanted.steps, to_image(picture[0]))
        return (
            (_enlarged(to_image(full[0])), _enlarged(to_image(picture[0]))),
            table(account, full_seconds, seconds, psnr(picture, full)[0]),
            gr.Column(visible=True),
            html,
            gr.Slider(maximum=max(2, frames), value=1, visible=frames > 1),
            gr.Button(visible=frames > 1),
        )

    def stop(self, request: gr.Request) -> str:
        """Stop the session's run after the step that it is at."""
        self.sessions[request.session_hash].current = None
        return "<p>Stopped.</p>"

    def leave(self, request: gr.Request) -> None:
        """Stop and forget a session."""
        if session := self.sessions.pop(request.session_hash, None):
            session.current = None

    def blocks(self, plots: str = "") -> gr.Blocks:
        """The page; ``plots`` are those of :func:`frontier`, if any."""
        private = {"api_visibility": "private"}
        aside = private | {"queue": False, "show_progress": "hidden"}
        # An hour: pictures are files until then.
        with gr.Blocks(title="TAP", analytics_enabled=False, delete_cache=(600, 3600)) as page:
            gr.HTML(
                f"<h1>Token-Adaptive Predictor</h1><p>Model {escape(self.model)}: every step full, beside most steps"
                " predicted.</p>",
                elem_id="head",
            )
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    prompt = gr.Textbox("red apple", label="Prompt", max_lines=3, elem_id="prompt")
                    if self.model == "emoji":
                        lines = (Path(__file__).with_name("prompts.txt")).read_text(encoding="utf-8").splitlines()
                        gr.Examples(lines, prompt, label="It knows emoji, such as", **private)
                    with gr.Row():
                        seed = gr.Number(0, label="Seed", step=1, min_width=110, elem_id="seed")
                        steps = gr.Number(50, label="Steps", step=1, min_width=110, elem_id="steps")
                    kind = gr.Radio([FASTER, FULL], value=FASTER, label="Budget", elem_id="kind")
                    budget = gr.Number(5, label=LABELS[FASTER], step=1, elem_id="budget")
                    method = gr.Dropdown(list(METHODS), label="Method", filterable=False, elem_id="method")
                    with gr.Row():
                        go = gr.Button("Generate", variant="primary", min_width=110, elem_id="go")
                        stop = gr.Button("Stop", min_width=110, elem_id="stop")
                with gr.Column(scale=3, min_width=300):
                    pictures = gr.ImageSlider(
                        label="Every step full | accelerated", format="png", max_height=512, interactive=False,
                        elem_id="pictures",
                    )  # fmt: skip
                    result = gr.HTML(elem_id="result")
            with gr.Column(visible=False) as section:
                gr.HTML("<h2>What each token took</h2>")
                with gr.Row(equal_height=True):
                    at = gr.Slider(1, 2, 1, step=1, label="Predicted step", buttons=[], scale=5, elem_id="at")
                    play = gr.Button(PLAY, min_width=90, elem_id="play")
                shown = gr.HTML(elem_id="maps")
            timer = gr.Timer(0.5, active=False)
            if plots:
                gr.HTML(f"<h2>Frontier of a bench run</h2>{plots}", elem_id="frontier")

            inputs = [prompt, seed, steps, kind, budget, method]
            outputs = [pictures, result, section, shown, at, play]
            ran = gr.on(
                [go.click, prompt.submit], self.generate, inputs, outputs, validator=self.validate,
                show_progress_on=pictures, concurrency_limit=1, **private,
            )  # fmt: skip
            stop.click(self.stop, None, result, **aside)
            stop.click(None, cancels=ran)  # for a run that still waits for its turn
            kind.change(_other_budget, [kind, budget, steps], budget, **aside)
            at.change(None, at, js=_SHOW)
            timer.tick(None, at, at, js=_NEXT)
            play.click(_toggled, play, [timer, play], **aside)
            page.unload(self.leave)
        return page


PLAY, PAUSE = "▶ Play", "⏸ Pause"
_SHOW = "(i) => document.querySelectorAll('#maps [data-frame]').forEach(e => { e.hidden = e.dataset.frame != i })"
_NEXT = "(i) => i % document.querySelectorAll('#maps .words [data-frame]').length + 1"


def _toggled(label: str) -> tuple[Any, str]:
    return gr.Timer(active=label == PLAY), PAUSE if label == PLAY else PLAY


def _other_budget(kind: str, budget: float | None, steps: float | None) -> Any:
    """The same budget, said the other way."""
    label = LABELS[kind]
    if not budget or not steps:
        return gr.Number(label=label)
    value = full_steps(round(steps), FASTER, budget) if kind == FULL else round(steps / budget, 2)
    return gr.Number(value, label=label)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float) and value == round(value)


def _enlarged(image: Image.Image) -> Image.Image:
    """Small pictures with each pixel a square, which a browser would blur."""
    scale = max(1, 512 // image.width)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


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
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, footer_links=[],
            run_history=False, enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False, show_error=True,
            theme=theme, css_paths=Path(__file__).with_suffix(".css"),
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"can't listen at {host}, port {port or '7860 to 7959'}: {error}") from error
    return str(address)
