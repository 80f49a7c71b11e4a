"""Generating pictures from prompts with and without TAP: what ``tap generate`` and ``make demo`` do."""

from __future__ import annotations

import json
import math
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor

from tap_diffusion import __version__
from tap_diffusion.config import TAPConfig
from tap_diffusion.demo import EMOJI
from tap_diffusion.demo.sheets import choices_sheet, sheet, stack, to_image
from tap_diffusion.errors import UsageError
from tap_diffusion.integrations.api import enabled, report
from tap_diffusion.reporting import Report

COLUMNS = 8  # of compare.png


def load_pipeline(model: str, dtype: torch.dtype, device: str) -> DiffusionPipeline:
    """Load a pipeline with diffusers' own loading code.

    Args:
        model: ``emoji`` (the embedded model), a folder with a ``model_index.json``, or a hub id ``owner/name``.

    Raises:
        UsageError: there is no such model, or the hub could not be reached.
    """
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None
    path = EMOJI if model == "emoji" else Path(model)
    if path.is_dir():
        if not (path / "model_index.json").exists():
            raise UsageError(f"the folder {model} holds no pipeline: it has no model_index.json")
        source = str(path)
    elif is_hub_id:
        source = model
    else:
        raise UsageError(
            f"unknown model '{model}': give emoji, a folder with a model_index.json, or a hub id owner/name"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        if not path.is_dir() and _is_connection_error(error):
            raise UsageError(
                f"the hub could not be reached to load '{model}', and it is not in the local cache;"
                " connect to the network, or give a folder"
            ) from error
        raise UsageError(f"could not load '{model}': {_first_line(error)}") from error
    return pipe.to(device)


def prompt_for(model: str, prompt: str) -> str:
    """A prompt as a model reads it: the embedded one's vocabulary has no capitals."""
    return prompt.lower() if model == "emoji" else prompt


def guidance_for(model: str, guidance: float | None) -> float | None:
    """The guidance scale asked for; where none was, 2 for the embedded model, and None for a pipeline's own."""
    return 2.0 if guidance is None and model == "emoji" else guidance


def _is_connection_error(error: BaseException) -> bool:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    names = {base.__name__ for link in chain for base in type(link).__mro__}
    return bool(
        names & {"ConnectionError", "ConnectError", "ConnectTimeout", "OfflineModeIsEnabled", "TimeoutException"}
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        guidance: ``guidance_scale`` where the transformer embeds it, else ``true_cfg_scale`` with an empty
            negative prompt; None takes the pipeline's default.
        height, width: None takes the model's own size.
    """

    prompts: Sequence[str]
    steps: int = 50
    seed: int = 0
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 8

    def check(self, pipe: Any) -> None:
        """Raise UsageError for what this pipeline can't do."""
        if not isinstance(pipe, FluxPipeline):
            raise UsageError(f"tap runs text-to-image FLUX pipelines here; this is a {type(pipe).__name__}")
        multiple = 2 * pipe.vae_scale_factor
        for name, value in (("height", self.height), ("width", self.width)):
            if value is not None and (value % multiple or value < multiple):
                raise UsageError(f"{name} {value} can't be done by this model: it must be a multiple of {multiple}")

    def size(self, pipe: Any) -> tuple[int, int]:
        """Height and width in pixels; the model's own where none are given."""
        native = pipe.vae.config.sample_size  # FluxPipeline.default_sample_size is that of FLUX.1 whatever the model
        return self.height or native, self.width or native

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """Arguments of the pipeline's call but for prompts and generators."""
        height, width = self.size(pipe)
        arguments: dict[str, Any] = {
            "num_inference_steps": self.steps,
            "height": height,
            "width": width,
            "max_sequence_length": min(512, pipe.tokenizer_2.model_max_length),
            "output_type": "pt",
        }
        if self.guidance is None:
            return arguments
        if pipe.transformer.config.guidance_embeds:
            return arguments | {"guidance_scale": self.guidance}
        return arguments | {"negative_prompt": "", "true_cfg_scale": self.guidance}


def run(pipe: Any, request: Request, label: str, **more: Any) -> tuple[Tensor, float]:
    """Generate all prompts; the i-th has seed ``request.seed + i`` whatever the batch size.

    Args:
        label: of the progress bar.
        more: further arguments of the pipeline's call.

    Returns:
        pictures (count, 3, H, W) in [-1, 1] on the CPU, float32; seconds.
    """
    pictures = []
    pipe.set_progress_bar_config(desc=label, leave=False)
    start = time.perf_counter()
    for first in range(0, len(request.prompts), request.batch_size):
        prompts = request.prompts[first : first + request.batch_size]
        seeds = range(request.seed + first, request.seed + first + len(prompts))
        pictures.append(draw(pipe, request, prompts, seeds, **more))
    return torch.cat(pictures), time.perf_counter() - start


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
        pictures (count, 3, H, W) in [-1, 1] on the CPU, float32.

    Raises:
        UsageError: there is a negative prompt, and nothing that it could have an effect on.
    """
    arguments = request.arguments(pipe) | more
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    negative = [prompt or "" for prompt in negative_prompts]
    if any(negative) and arguments.get("true_cfg_scale", 1) <= 1:
        embedded = pipe.transformer.config.guidance_embeds
        reason = "this model embeds its guidance" if embedded else "give a guidance scale above 1"
        raise UsageError(f"a negative prompt has no effect here: {reason}")
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = negative or [""] * len(prompts)
    pictures: Tensor = pipe(list(prompts), generator=generators, **arguments).images
    return pictures.float().cpu() * 2 - 1


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
) -> dict[str, Any]:
    """Generate with TAP, and with ``compare`` without it too; write pictures, sheets and ``report.json`` to ``out``.

    Args:
        repeats: with ``compare``, runs of each, alternating; the time ratio is of their medians.
        note: is told each file that was written.

    Returns:
        what report.json holds.
    """
    request.check(pipe)
    seconds: dict[str, list[float]] = {"full": [], "tap": []}
    full = None
    for _ in range(repeats):
        if compare:
            full, elapsed = run(pipe, request, "full")
            seconds["full"].append(elapsed)
        with enabled(pipe, config):
            accelerated, elapsed = run(pipe, request, "TAP ")
            seconds["tap"].append(elapsed)
            account = report(pipe)

    result = _summary(pipe, model, request, config, account)
    pictures = {"tap": accelerated} | ({"full": full} if full is not None else {})
    for i, prompt in enumerate(request.prompts):
        name = f"{i:03d}-{re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60]}"
        for kind, batch in pictures.items():
            to_image(batch[i]).save(out / f"{name}-{kind}.png")
    if full is not None:
        values = psnr(accelerated, full)
        result |= {
            "time_speedup": median(seconds["full"]) / median(seconds["tap"]),
            "psnr_db": sum(values) / len(values),
            "psnr_db_each": values,
        }
        scale = max(1, 160 // full.shape[-1])
        parts = [slice(i, i + COLUMNS) for i in range(0, len(full), COLUMNS)]
        sheets = [
            sheet([full[part], accelerated[part]], ["full", "TAP"], request.prompts[part], scale) for part in parts
        ]
        stack(sheets).save(out / "compare.png")
        note("compare.png")
    _save_choices(pipe, request, account, accelerated, out, note)
    result["seconds"] = seconds
    (out / "report.json").write_text(json.dumps(_without_nan(result), indent=2) + "\n", encoding="utf-8")
    note("report.json")
    return result


def _save_choices(
    pipe: Any, request: Request, account: Report, pictures: Tensor, out: Path, note: Callable[[str], None]
) -> None:
    """Maps of four predicted steps, evenly over the trajectory, of the last batch's first branch."""
    choices = [choice for choice in account.choices if choice.branch == account.choices[0].branch]
    if not choices:
        return
    shown = [choices[round(i * (len(choices) - 1) / 3)] for i in range(min(4, len(choices)))]
    count = min(COLUMNS, len(shown[0].index))
    first = len(request.prompts) - len(shown[0].index)
    shown = [choice.of(slice(0, count)) for choice in shown]
    height, width = request.size(pipe)
    patch = 2 * pipe.vae_scale_factor
    part = slice(first, first + count)
    scale = max(1, 160 // pictures.shape[-1])
    choices_sheet(shown, pictures[part], (height // patch, width // patch), list(request.prompts[part]), scale).save(
        out / "choices.png"
    )
    note("choices.png")


def _summary(pipe: Any, model: str, request: Request, config: TAPConfig, account: Report) -> dict[str, Any]:
    height, width = request.size(pipe)
    parameter = next(pipe.transformer.parameters())
    return {"model": model} | account.to_dict() | {
        "prompts": list(request.prompts),
        "seed": request.seed,
        "guidance": request.guidance,
        "height": height,
        "width": width,
        "batch_size": request.batch_size,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "config": config.to_dict(),
        "versions": {
            "tap_diffusion": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }  # fmt: skip


def _without_nan(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
