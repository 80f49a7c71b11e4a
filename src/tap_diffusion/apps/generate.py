"""Generating pictures and videos from prompts with and without TAP: what ``tap generate`` and ``make demo`` do."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from tap_diffusion import __version__
from tap_diffusion.apps import lora, media, pipelines
from tap_diffusion.apps.cut_off import watched
from tap_diffusion.apps.files import FPS
from tap_diffusion.apps.lora import Lora
from tap_diffusion.apps.results import COLUMNS, SHEETS, SIZE, Results
from tap_diffusion.apps.sheets import choices_sheet
from tap_diffusion.core.config import DEFAULT_SPEEDUP, TAPConfig
from tap_diffusion.core.errors import ConfigError, UsageError, told_by, warn
from tap_diffusion.core.report import Report
from tap_diffusion.integrations.diffusers.api import enabled, report, supported, transformers
from tap_diffusion.integrations.diffusers.versions import of_dtype

MODELS = "tap_diffusion.models"  # entry points of packages that bring models: a name, and what gives folder and class
APART = {
    "emoji": "demo",
    "fashion": "bench",
    "sprites": "bench",
    "scenes": "bench",
}  # the project's own, and the extras that bring them


def load_pipeline(
    model: str,
    dtype: torch.dtype,
    device: str,
    offload: bool = False,
    loras: Sequence[Lora] = (),
    compiled: bool = False,
) -> DiffusionPipeline:
    """Load a pipeline with diffusers' own loading code.

    Args:
        model: ``emoji`` (the embedded model), ``fashion``, ``sprites`` or ``scenes`` (the bench's), a folder with a
            ``model_index.json``, or a hub id ``owner/name``.
        offload: keep the parts in host memory while they are not needed.
        loras: adapters that act together.
        compiled: compile the transformer's blocks, see :func:`~tap_diffusion.apps.pipelines.compile_blocks`.

    Raises:
        UsageError: there is no such model or adapter, or the hub could not be reached; there is nothing to offload
            from; or the pipeline takes no adapters.
    """
    if offload and device == "cpu":
        raise UsageError("offloading is for a GPU, whose memory a model doesn't fit in")
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    is_hub_id = not is_path and re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None
    brought = entry_points(group=MODELS)
    path, kind = brought[model].load()() if model in brought.names else (Path(model), DiffusionPipeline)
    if path.is_dir():
        if not (path / "model_index.json").exists():
            raise UsageError(f"the folder {model} holds no pipeline: it has no model_index.json")
        source = str(path)
    elif is_hub_id:
        source = model
    elif is_path:
        raise UsageError(f"there is no folder {model}")
    elif model in APART:
        raise UsageError(f"the model '{model}' is in a package of its own: pip install 'tap-diffusion[{APART[model]}]'")
    else:
        raise UsageError(
            f"unknown model '{model}': give {', '.join(APART)}, a folder with a model_index.json, or a hub id"
            " owner/name"
        )
    with _loading(model):
        pipe = kind.from_pretrained(source, **of_dtype(dtype))
    names = [f"lora_{i}" for i in range(len(loras))]
    for name, adapter in zip(names, loras, strict=True):
        lora.check(pipe, adapter)
        with _loading(adapter.source):
            lora.load(pipe, adapter, name)
    if loras:
        lora.activate(pipe, loras, names)
    if compiled:
        pipelines.compile_blocks(pipe)
    if not offload:
        return pipe.to(device)
    pipe.enable_model_cpu_offload(device=device)
    return pipe


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Tell in a line why something could not be loaded, from a folder, a file or the hub."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if not Path(what).exists() and _is_connection_error(error):
            raise UsageError(
                f"the hub could not be reached to load '{what}', and it is not in the local cache;"
                " connect to the network, or give a folder"
            ) from error
        # AttributeError: diffusers has no such pipeline; LookupError, RuntimeError: an adapter is of another model.
        if isinstance(error, OSError | ValueError | AttributeError | LookupError | RuntimeError | SafetensorError):
            raise UsageError(f"could not load '{what}': {_first_line(error)}") from error
        raise


def prompt_for(model: str, prompt: str) -> str:
    """A prompt as a model reads it: the embedded ones' vocabularies have no capitals."""
    return prompt.lower() if model in APART else prompt


def guidance_for(model: str, guidance: float | None) -> float | None:
    """The guidance scale asked for; where none was, the embedded models', and None for a pipeline's own."""
    return {"emoji": 2.0, "scenes": 3.0}.get(model) if guidance is None else guidance


def _is_connection_error(error: BaseException) -> bool:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    names = {base.__name__ for link in chain for base in type(link).__mro__}
    return bool(
        names & {"ConnectionError", "ConnectError", "ConnectTimeout", "OfflineModeIsEnabled", "TimeoutException"}
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@dataclass(frozen=True)
class Request:
    """What to generate, with a pipeline that draws pictures or videos from prompts, or from class labels.

    Attributes:
        prompts: or labels, as text.
        guidance: None takes the pipeline's default; see :func:`~tap_diffusion.apps.pipelines.guidance_argument`.
        height, width, frames: None takes the model's own.
        batch_size: None is 8 pictures, or 1 video.
        negative_prompt: what not to draw, for all of them; None: nothing in particular.
    """

    prompts: Sequence[str]
    steps: int = 50
    seed: int = 0
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    batch_size: int | None = None
    negative_prompt: str | None = None

    def check(self, pipe: Any) -> None:
        """Raise UsageError for what this pipeline can't do, or UnsupportedModelError."""
        supported(pipe)
        title, known = type(pipe).__name__, pipelines.parameters(pipe)
        if pipelines.condition(pipe) == "class_labels":
            for prompt in self.prompts:
                pipelines.class_number(pipe, prompt)
        if pipelines.frames_argument(pipe) is not None:
            media.check_videos()
        elif self.frames is not None:
            raise UsageError(f"{title} takes no number of frames: it draws pictures")
        if self.guidance is not None and pipelines.guidance_argument(pipe) is None:
            raise UsageError(f"{title} takes no guidance scale")
        for name, value in (("height", self.height), ("width", self.width)):
            if value is None:
                continue
            if name not in known:
                raise UsageError(f"{title} has one size only, which can't be chosen")
            multiple = pipelines.multiple(pipe)
            if value % multiple or value < multiple:
                raise UsageError(f"{name} {value} can't be done by this model: it must be a multiple of {multiple}")

    def size(self, pipe: Any) -> tuple[int | None, int | None]:
        """Height and width in pixels to ask for; None where the pipeline is to take its own."""
        # FluxPipeline takes that of FLUX.1 whatever the model.
        native = pipe.vae.config.sample_size if isinstance(pipe, FluxPipeline) else None
        return self.height or native, self.width or native

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """Arguments of the pipeline's call but for prompts and generators."""
        height, width = self.size(pipe)
        arguments: dict[str, Any] = {"num_inference_steps": self.steps, "output_type": "pt"}
        asked = (("height", height), ("width", width), (pipelines.frames_argument(pipe), self.frames))
        arguments |= {name: value for name, value in asked if name is not None and value is not None}
        if isinstance(pipe, FluxPipeline):
            arguments["max_sequence_length"] = min(512, pipe.tokenizer_2.model_max_length)
        if self.guidance is None:
            return arguments
        name = pipelines.guidance_argument(pipe) or "guidance_scale"
        if name == "true_cfg_scale":  # without a negative prompt it would have no effect
            arguments["negative_prompt"] = ""
        return arguments | {name: self.guidance}

    @property
    def texts(self) -> list[str]:
        """Everything that a tokenizer reads."""
        return [*self.prompts, *filter(None, [self.negative_prompt])]

    def part(self, batch: range) -> Request:
        """The request of one batch, whose prompts keep their seeds."""
        prompts = self.prompts[batch.start : batch.stop]
        return replace(self, prompts=prompts, seed=self.seed + batch.start, batch_size=len(batch))

    def per_batch(self, pipe: Any) -> int:
        """How many prompts are drawn together."""
        return self.batch_size or (8 if pipelines.frames_argument(pipe) is None else 1)

    def batches(self, pipe: Any) -> Iterator[range]:
        """Which prompts are drawn together."""
        size = self.per_batch(pipe)
        for first in range(0, len(self.prompts), size):
            yield range(first, min(first + size, len(self.prompts)))


def run(pipe: Any, request: Request, label: str, **more: Any) -> tuple[Tensor, float]:
    """Generate all prompts; the i-th has seed ``request.seed + i`` whatever the batch size.

    Args:
        label: of the progress bar.
        more: further arguments of the pipeline's call.

    Returns:
        pictures (count, 3, H, W), or videos (count, F, 3, H, W), in [-1, 1] on the CPU, float32; seconds.
    """
    samples = []
    pipe.set_progress_bar_config(desc=label, leave=False, disable=None)  # None: where stderr is a terminal
    start = time.perf_counter()
    for batch in request.batches(pipe):
        prompts = [request.prompts[i] for i in batch]
        seeds, negative = [request.seed + i for i in batch], [request.negative_prompt] * len(batch)
        samples.append(draw(pipe, request, prompts, seeds, negative, **more))
    return torch.cat(samples), time.perf_counter() - start


def draw(
    pipe: Any,
    request: Request,
    prompts: Sequence[str],
    seeds: Sequence[int],
    negative_prompts: Sequence[str | None] = (),
    **more: Any,
) -> Tensor:
    """Generate one batch, whose prompts are these, each with a generator of its own.

    Args:
        more: further arguments of the pipeline's call.

    Returns:
        as :func:`run` does.

    Raises:
        UsageError: there is a negative prompt, and nothing that it could have an effect on; or the pipeline finds
            something wrong with its arguments.
    """
    arguments = request.arguments(pipe) | more
    arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    negative = [prompt or "" for prompt in negative_prompts]
    if any(negative):
        _check_negative(pipe, arguments)
        arguments["negative_prompt"] = negative
    elif "negative_prompt" in arguments:
        arguments["negative_prompt"] = [""] * len(prompts)
    name = pipelines.condition(pipe)
    arguments[name] = (
        [pipelines.class_number(pipe, prompt) for prompt in prompts] if name == "class_labels" else list(prompts)
    )
    try:
        output = pipe(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise UsageError(f"{type(pipe).__name__}: {_first_line(error)}") from error
    samples = 2 * pipelines.drawn(output) - 1
    return samples.expand(*samples.shape[:-3], 3, -1, -1)  # gray ones as well


def _check_negative(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise UsageError where a negative prompt would have no effect."""
    known = pipelines.parameters(pipe)
    if "negative_prompt" not in known:
        raise UsageError(f"{type(pipe).__name__} takes no negative prompt")
    name = next((name for name in ("true_cfg_scale", "guidance_scale") if name in known), None)
    scale = arguments.get(name, known[name].default) if name is not None else None
    if scale is not None and scale <= 1:
        embedded = pipelines.embeds_guidance(pipe)
        reason = "this model embeds its guidance" if embedded else "give a guidance scale above 1"
        raise UsageError(f"a negative prompt has no effect here: {reason}")


def psnr(pictures: Tensor, reference: Tensor, span: float = 2.0) -> list[float]:
    """Peak signal-to-noise ratio of each picture or video, dB; ``span`` is the range of values, 2 for [-1, 1]."""
    error = (pictures.double() - reference.double()).square().flatten(1).mean(1)
    return [float(value) for value in 10 * torch.log10(span**2 / error)]


def generate(
    pipe: Any,
    model: str,
    request: Request,
    config: TAPConfig,
    out: Path,
    compare: bool = False,
    repeats: int = 1,
    note: Callable[[str], None] = lambda _: None,
    fps: int = FPS,
    overwrite: bool = False,
    loras: Sequence[Lora] = (),
) -> dict[str, Any]:
    """Generate with TAP, and with ``compare`` without it too, into a folder, batch by batch.

    Each batch is written as it is done, so a run that was interrupted goes on where it is called again.

    Args:
        out: gets pictures or videos, sheets and ``report.json``.
        repeats: with ``compare``, runs of each, alternating; the time ratio is of their medians.
        note: is told each sheet that was written, and ``report.json``.
        fps: frames a second of videos.
        overwrite: delete what an earlier run left in the folder, instead of going on with it.
        loras: adapters that the pipeline was loaded with, which the report names.

    Warns:
        of each prompt that a tokenizer cut off.

    Returns:
        what report.json holds, and under ``found`` how many of the prompts an earlier run had done.

    Raises:
        UsageError: the folder holds results of other settings; or see :meth:`Request.check`.
    """
    request.check(pipe)
    settings = _settings(pipe, model, request, config, fps) | {"compare": compare, "repeats": repeats}
    settings["loras"] = [asdict(adapter) for adapter in loras]
    results = Results(out, settings, overwrite)
    found = results.done
    todo = [batch for batch in request.batches(pipe) if batch.start >= found]
    kinds = ("full", "tap") if compare else ("tap",)
    if compare or pipelines.is_compiled(pipe):
        _warm_up(pipe, request, config, todo)

    for batch in todo:
        part, label = request.part(batch), f"{batch.stop} of {len(request.prompts)}"
        samples: dict[str, Tensor] = {}
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        with watched(pipe, part.texts, pipelines.longest_prompt(pipe, part.arguments(pipe))) as cut:
            for _ in range(repeats):
                if compare:
                    samples["full"], elapsed = run(pipe, part, f"full {label}")
                    seconds["full"].append(elapsed)
                with enabled(pipe, config):
                    samples["tap"], elapsed = run(pipe, part, f"TAP  {label}")
                    account = report(pipe)
                seconds["tap"].append(elapsed)
        for message in cut.messages():
            warn(message)
        values = psnr(samples["tap"], samples["full"]) if compare else []
        results.add(samples, seconds, _size(samples["tap"]) | account.to_dict(), values, fps)
        maps = _choices(pipe, part, account, samples["tap"])
        if maps is not None:
            maps.save(out / "choices.png")

    if compare:
        results.compare()
    for name in (*SHEETS, "report.json"):
        if (out / name).exists():
            note(name)
    return results.report | {"found": found}


def _warm_up(pipe: Any, request: Request, config: TAPConfig, todo: Sequence[range]) -> None:
    """What happens once must not count as time: a process's first steps are slower, and compiled blocks are compiled
    at their first call, for each size of batch."""
    compiled = pipelines.is_compiled(pipe)
    short = replace(config, speedup=DEFAULT_SPEEDUP, full_steps=(0, 1, 3), interval=None, steps=None)
    for batch in {len(batch): batch for batch in todo}.values() if compiled else todo[:1]:
        part = request.part(batch)
        run(pipe, replace(part, steps=min(2, request.steps)), "warm-up")
        if compiled:
            with told_by(lambda _: None), enabled(pipe, short):
                run(pipe, replace(part, steps=5), "warm-up")


def _choices(pipe: Any, request: Request, account: Report, pictures: Tensor) -> Image.Image | None:
    """Maps of four predicted steps, evenly over the trajectory, of a batch's first branch; None where nothing was
    chosen, or not by tokens that are the picture's alone."""
    if pictures.ndim != 4:
        return None
    choices = [choice for choice in account.choices if choice.branch == account.choices[0].branch]
    if not choices:
        return None
    shown = [choices[round(i * (len(choices) - 1) / 3)] for i in range(min(4, len(choices)))]
    samples, tokens = shown[0].index.shape
    count = len(request.prompts)
    height, width = pictures.shape[-2:]
    grid = pipelines.grid(tokens, height, width)
    if grid is None or samples % count:
        return None
    # With both branches in one batch, the one with the prompt is the last, but for class labels the first.
    first = 0 if pipelines.condition(pipe) == "class_labels" else samples - count
    part = slice(COLUMNS)
    shown = [choice.of(slice(first, first + min(count, COLUMNS))) for choice in shown]
    return choices_sheet(shown, pictures[part], grid, request.prompts[part], max(1, SIZE // width))


def _size(samples: Tensor) -> dict[str, Any]:
    frames = samples.shape[1] if samples.ndim == 5 else None
    return {"height": samples.shape[-2], "width": samples.shape[-1], "frames": frames}


def _settings(pipe: Any, model: str, request: Request, config: TAPConfig, fps: int) -> dict[str, Any]:
    """Everything that results depend on, as JSON takes it."""
    asked = asdict(request)
    parameter = next(transformers(pipe)[0].parameters())
    return {
        "model": model,
        "prompts": list(asked.pop("prompts")),
        "batch_size": request.per_batch(pipe),
        "request": asked,
        "fps": fps,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(pipe._execution_device),  # where parts are only while they run, if offloaded
        "compiled": pipelines.is_compiled(pipe),
        "config": config.to_dict(),
        "versions": {
            "tap_diffusion": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }
