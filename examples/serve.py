"""Pictures over HTTP by Ray Serve: a pipeline on each GPU, dynamic batching, and a budget for each request.

    pip install "tap-diffusion[serve]"
    PYTHONPATH=examples serve run serve:app model=black-forest-labs/FLUX.1-dev replicas=8 queue=64

    curl localhost:8000/pictures --json '{"prompt": "a red apple", "seed": 3, "full_steps": 8}' --output apple.png

``localhost:8000/-/healthz`` tells whether requests are taken, ``localhost:8000/docs`` what they may say. Serve counts
requests and times them; this adds pictures and seconds by budget, both for Prometheus (docs/bulk.md).
"""

import asyncio
import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Histogram

import tap_diffusion as tap
from tap_diffusion.apps.generate import Request, draw, guidance_for, load_pipeline, prompt_for
from tap_diffusion.apps.pipelines import frames_argument, parameters
from tap_diffusion.apps.sheets import png, to_image
from tap_diffusion.core.errors import UsageError

BATCH = 8  # pictures at a time, at most
ATTEMPTS = 3  # at a picture, where replicas die
SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
api = FastAPI(title="tap-diffusion")


class Wish(BaseModel):
    """A picture to generate. Those that differ in prompt and seed alone are generated together."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "red apple", "seed": 3},
                {"prompt": "green frog face", "seed": 3, "steps": 28, "full_steps": 8},
            ]
        }
    )

    prompt: str
    seed: int = Field(0, ge=0, lt=2**63)
    width: int | None = Field(None, ge=1, le=4096, description="pixels; else the model's own")
    height: int | None = Field(None, ge=1, le=4096, description="pixels; else the model's own")
    steps: int = Field(50, ge=1, le=1000)
    full_steps: int | None = Field(None, ge=2, description="the budget; else one step in five is full")

    def kind(self) -> tuple[int | None, ...]:
        """What all pictures of a batch have in common."""
        return self.width, self.height, self.steps, self.full_steps

    def tags(self) -> dict[str, str]:
        """Of its metrics."""
        return {"full_steps": str(self.full_steps or "default")}


class Options(BaseModel):
    """What ``serve run`` takes as name=value."""

    model: str = "emoji"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    guidance: float | None = None
    replicas: int = Field(1, ge=1)
    queue: int = Field(64, ge=1, description="requests at a time, those being generated included")


class GivenUp(Exception):
    """Nobody waits for these pictures any more."""


@serve.deployment(max_ongoing_requests=1000)  # how many there may be is for Entrance to say
class Pictures:
    """One pipeline, and who waits for it."""

    def __init__(self, options: Options) -> None:
        dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        self.pipe: Any = load_pipeline(options.model, dtype, options.device)
        self.pipe.set_progress_bar_config(disable=True)
        if frames_argument(self.pipe) is not None:
            raise UsageError(f"this serves pictures, and a {type(self.pipe).__name__} makes videos")
        self.model, self.guidance = options.model, guidance_for(options.model, options.guidance)
        self.waiting: dict[asyncio.Future[bytes], Wish] = {}
        self.worker: asyncio.Task[None] | None = None
        self.count = Counter("tap_pictures", "Pictures generated.", tag_keys=("full_steps",))
        self.seconds = Histogram(
            "tap_seconds_per_picture", "Time of a batch over its pictures.", SECONDS, tag_keys=("full_steps",)
        )

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica where this raises, as it does after an error of the GPU."""
        torch.ones(1, device=self.pipe.device).item()

    async def __call__(self, wish: Wish) -> bytes:
        """A PNG. Serve cancels this where the client has gone, and the future is cancelled with it."""
        future = asyncio.get_running_loop().create_future()
        self.waiting[future] = wish
        if self.worker is None:
            self.worker = asyncio.create_task(self.work())
        return await future

    async def work(self) -> None:
        """Generate until nobody waits: for who came first, and for others who want a picture of the same kind.

        Serve's own batches answer all at once, so that a small budget would wait for the large ones of its batch.
        """
        while wanted := {future: wish for future, wish in self.waiting.items() if not future.cancelled()}:
            kind = next(iter(wanted.values())).kind()
            batch = dict(islice(((future, wish) for future, wish in wanted.items() if wish.kind() == kind), BATCH))
            self.waiting = {future: wish for future, wish in wanted.items() if future not in batch}
            # In a thread, so that requests are taken and questions for its health answered meanwhile.
            pictures = await asyncio.to_thread(self.generate, batch)
            for future, picture in zip(batch, pictures, strict=True):
                if future.cancelled():
                    continue
                if isinstance(picture, Exception):
                    future.set_exception(picture)
                else:
                    future.set_result(picture)
        self.worker = None

    def generate(self, batch: Mapping[asyncio.Future[bytes], Wish]) -> list[bytes] | list[Exception]:
        """Pictures of one kind, or what went wrong. A sample that TAP predicts does not depend on the others."""
        start, wishes = time.perf_counter(), list(batch.values())
        first, tags = wishes[0], wishes[0].tags()

        def go_on(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if all(future.cancelled() for future in batch):
                raise GivenUp
            return tensors

        more = {"callback_on_step_end": go_on} if "callback_on_step_end" in parameters(self.pipe) else {}
        try:
            prompts = [prompt_for(self.model, wish.prompt) for wish in wishes]
            request = Request(prompts, first.steps, guidance=self.guidance, height=first.height, width=first.width)
            request.check(self.pipe)
            with tap.enabled(self.pipe, tap.TAPConfig(full_steps=first.full_steps)):
                pictures = draw(self.pipe, request, prompts, [wish.seed for wish in wishes], **more)
            files = [png(to_image(picture)) for picture in pictures]
        except Exception as error:
            return [error] * len(wishes)
        self.count.inc(len(wishes), tags)
        self.seconds.observe((time.perf_counter() - start) / len(wishes), tags)
        return files


@serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
@serve.ingress(api)
class Entrance:
    """Takes requests, so many at a time and no more, and sees each of them through, whatever replica dies."""

    def __init__(self, pictures: DeploymentHandle, queue: int) -> None:
        self.pictures, self.queue, self.taken = pictures, queue, 0
        self.seconds = Histogram(
            "tap_seconds_per_request", "From a request to its answer.", SECONDS, tag_keys=("full_steps",)
        )

    @api.post(
        "/pictures",
        response_class=Response,
        responses={
            200: {"content": {"image/png": {}}},
            422: {"description": "This model can't do that."},
            429: {"description": "Too many requests wait. Ask again after `Retry-After` seconds."},
        },
    )
    async def picture(self, wish: Wish) -> Response:
        """A PNG. The same wish gives the same picture, so a client that got no answer may ask again."""
        if self.taken >= self.queue:
            raise HTTPException(429, f"{self.taken} requests wait already, ask again later", {"Retry-After": "5"})
        start = time.perf_counter()
        self.taken += 1
        try:
            picture = await self.generated(wish)
        finally:
            self.taken -= 1
        self.seconds.observe(time.perf_counter() - start, wish.tags())
        return Response(picture, media_type="image/png")

    async def generated(self, wish: Wish) -> bytes:
        """By another replica where one dies. A wish that kills whoever takes it is given up in the end."""
        for _ in range(ATTEMPTS):
            try:
                return await self.pictures.remote(wish)
            except RayActorError as error:
                died = error
            except RayTaskError as error:
                if isinstance(error.cause, UsageError):
                    raise HTTPException(422, str(error.cause)) from error
                raise HTTPException(500, f"{type(error.cause).__name__}: {error.cause}") from error
        raise HTTPException(500, f"{ATTEMPTS} replicas died while they had this to generate: {died}")


def app(options: Options) -> serve.Application:
    """The application, for ``serve run``: a replica on a GPU of its own, or on a core, and the entrance to all."""
    share = {"num_gpus": 1} if options.device == "cuda" else {"num_cpus": 1}
    pictures = Pictures.options(num_replicas=options.replicas, ray_actor_options=share).bind(options)
    return Entrance.bind(pictures, options.queue)
