"""Pictures over HTTP by Ray Serve: a pipeline on each GPU, dynamic batching, and a budget for each request.

    pip install "tap-diffusion[serve]"
    PYTHONPATH=examples serve run serve:app model=black-forest-labs/FLUX.1-dev replicas=8

    curl localhost:8000/pictures --json '{"prompt": "a red apple", "seed": 3, "full_steps": 8}' --output apple.png

``localhost:8000/-/healthz`` tells whether requests are taken, ``localhost:8000/docs`` what they may say. Serve counts
requests and times them; this adds pictures and the seconds each took, both for Prometheus (docs/bulk.md).
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, Field
from ray import serve
from ray.serve.metrics import Counter, Histogram

import tap_diffusion as tap
from tap_diffusion.apps.generate import Request, draw, guidance_for, load_pipeline, prompt_for
from tap_diffusion.apps.pipelines import frames_argument
from tap_diffusion.apps.sheets import png, to_image
from tap_diffusion.core.errors import UsageError

BATCH = 8  # pictures at a time, at most
PATIENCE = 0.05  # seconds that the first of a batch waits for others
api = FastAPI(title="tap-diffusion")


class Wish(BaseModel):
    """A picture to generate. Those that differ in prompt and seed alone are generated together."""

    prompt: str
    seed: int = Field(0, ge=0, lt=2**63)
    width: int | None = Field(None, ge=1, le=4096)
    height: int | None = Field(None, ge=1, le=4096)
    steps: int = Field(50, ge=1, le=1000)
    full_steps: int | None = Field(None, ge=2, description="the budget; else one step in five is full")

    def kind(self) -> tuple[int | None, ...]:
        """What all pictures of a batch have in common."""
        return self.width, self.height, self.steps, self.full_steps


class Options(BaseModel):
    """What ``serve run`` takes as name=value."""

    model: str = "emoji"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    guidance: float | None = None
    replicas: int = Field(1, ge=1)


@serve.deployment(max_ongoing_requests=4 * BATCH)
@serve.ingress(api)
class Pictures:
    """One pipeline, and who waits for it."""

    def __init__(self, options: Options) -> None:
        dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        self.pipe: Any = load_pipeline(options.model, dtype, options.device)
        self.pipe.set_progress_bar_config(disable=True)
        if frames_argument(self.pipe) is not None:
            raise UsageError(f"this serves pictures, and a {type(self.pipe).__name__} makes videos")
        self.model, self.guidance = options.model, guidance_for(options.model, options.guidance)
        self.count = Counter("tap_pictures", "Pictures generated.", tag_keys=("full_steps",))
        self.seconds = Histogram(
            "tap_seconds_per_picture", "Time of a batch over its pictures.",
            boundaries=[0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100], tag_keys=("full_steps",),
        )  # fmt: skip

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica where this raises, as it does after an error of the GPU."""
        torch.ones(1, device=self.pipe.device).item()

    @api.post("/pictures", response_class=Response)
    async def picture(self, wish: Wish) -> Response:
        """A PNG."""
        result = await self.batch(wish)
        if isinstance(result, UsageError):
            raise HTTPException(422, str(result))
        if isinstance(result, Exception):
            raise HTTPException(500, f"{type(result).__name__}: {result}")
        return Response(result, media_type="image/png")

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=PATIENCE)
    async def batch(self, wishes: list[Wish]) -> list[bytes | Exception]:
        """The picture of each wish, or what went wrong."""
        results: dict[int, bytes | Exception] = {}
        for kind in dict.fromkeys(wish.kind() for wish in wishes):
            places = [place for place, wish in enumerate(wishes) if wish.kind() == kind]
            # In a thread, so that requests are taken and questions for its health answered meanwhile.
            pictures = await asyncio.to_thread(self.generate, [wishes[place] for place in places])
            results |= zip(places, pictures, strict=True)
        return [results[place] for place in range(len(wishes))]

    def generate(self, wishes: Sequence[Wish]) -> Sequence[bytes | Exception]:
        """Pictures of one kind. A sample that TAP predicts does not depend on the others of its batch."""
        start, first = time.perf_counter(), wishes[0]
        try:
            prompts = [prompt_for(self.model, wish.prompt) for wish in wishes]
            request = Request(prompts, first.steps, guidance=self.guidance, height=first.height, width=first.width)
            request.check(self.pipe)
            with tap.enabled(self.pipe, tap.TAPConfig(full_steps=first.full_steps)):
                pictures = draw(self.pipe, request, prompts, [wish.seed for wish in wishes])
        except Exception as error:
            return [error] * len(wishes)
        tags = {"full_steps": str(first.full_steps)}
        self.count.inc(len(wishes), tags)
        self.seconds.observe((time.perf_counter() - start) / len(wishes), tags)
        return [png(to_image(picture)) for picture in pictures]


def app(options: Options) -> serve.Application:
    """The application, for ``serve run``: a replica on a GPU of its own, or on a core."""
    share = {"num_gpus": 1} if options.device == "cuda" else {"num_cpus": 1}
    return Pictures.options(num_replicas=options.replicas, ray_actor_options=share).bind(options)
