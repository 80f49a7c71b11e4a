"""Pictures over HTTP by FastAPI alone: one pipeline, one thread that generates, a copy of the pipeline per request.

    pip install tap-diffusion fastapi uvicorn prometheus-client
    MODEL=black-forest-labs/FLUX.1-dev QUEUE=64 uvicorn --app-dir examples serve_fastapi:api

    curl localhost:8000/pictures --json '{"prompt": "a red apple", "seed": 3, "full_steps": 8}' --output apple.png

``localhost:8000/docs`` tells what a request may say, ``localhost:8000/metrics`` counts and times them for Prometheus.
"""

import asyncio
import copy
import os
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Response
from fastapi import Request as Connection
from prometheus_client import Histogram, make_asgi_app
from pydantic import BaseModel, ConfigDict, Field

import tap_diffusion as tap
from tap_diffusion.apps.generate import Request, draw, guidance_for, load_pipeline, prompt_for
from tap_diffusion.apps.pipelines import frames_argument, parameters
from tap_diffusion.apps.sheets import png, to_image
from tap_diffusion.core.errors import UsageError

MODEL = os.environ.get("MODEL", "emoji")
DEVICE = os.environ.get("DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
QUEUE = int(os.environ.get("QUEUE", "64"))  # requests at a time, the one being generated included
BUCKETS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
GENERATED = Histogram("tap_seconds_per_picture", "Time of generating it.", ["full_steps"], buckets=BUCKETS)
ANSWERED = Histogram("tap_seconds_per_request", "From a request to its answer.", ["full_steps"], buckets=BUCKETS)


class Wish(BaseModel):
    """A picture to generate."""

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


class GivenUp(Exception):
    """Nobody waits for this picture any more."""


@asynccontextmanager
async def lifespan(api: FastAPI) -> AsyncIterator[None]:
    api.state.pipe = load_pipeline(MODEL, torch.float32 if DEVICE == "cpu" else torch.bfloat16, DEVICE)
    api.state.pipe.set_progress_bar_config(disable=True)
    if frames_argument(api.state.pipe) is not None:
        raise UsageError(f"this serves pictures, and a {type(api.state.pipe).__name__} makes videos")
    # One thread: on one device two at once are no faster, and the budget is the transformer's, which all share.
    api.state.worker, api.state.taken = ThreadPoolExecutor(1), 0
    yield
    api.state.worker.shutdown(cancel_futures=True)


api = FastAPI(title="tap-diffusion", lifespan=lifespan)
api.mount("/metrics", make_asgi_app())


@api.post(
    "/pictures",
    response_class=Response,
    responses={
        200: {"content": {"image/png": {}}},
        422: {"description": "This model can't do that."},
        429: {"description": "Too many requests wait. Ask again after `Retry-After` seconds."},
    },
)
async def picture(wish: Wish, connection: Connection) -> Response:
    """A PNG. The same wish gives the same picture."""
    if api.state.taken >= QUEUE:
        raise HTTPException(429, f"{api.state.taken} requests wait already, ask again later", {"Retry-After": "5"})
    start, given_up = time.perf_counter(), threading.Event()
    api.state.taken += 1
    try:
        job = asyncio.get_running_loop().run_in_executor(api.state.worker, generate, api.state.pipe, wish, given_up)
        while not (await asyncio.wait([job], timeout=0.2))[0]:
            if await connection.is_disconnected():
                given_up.set()
        content = await job
    except UsageError as error:
        raise HTTPException(422, str(error)) from error
    except GivenUp:
        return Response(status_code=499)  # which nobody reads
    finally:
        api.state.taken -= 1
    ANSWERED.labels(wish.full_steps or "default").observe(time.perf_counter() - start)
    return Response(content, media_type="image/png")


def generate(template: Any, wish: Wish, given_up: threading.Event) -> bytes:
    """A PNG, from a copy of the pipeline: all parts are shared but the scheduler, which counts a request's steps."""
    start, pipe = time.perf_counter(), copy.copy(template)
    pipe.scheduler = copy.deepcopy(template.scheduler)

    def go_on(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if given_up.is_set():
            raise GivenUp
        return tensors

    go_on(pipe, 0, None, {})
    prompts = [prompt_for(MODEL, wish.prompt)]
    request = Request(prompts, wish.steps, guidance=guidance_for(MODEL, None), height=wish.height, width=wish.width)
    request.check(pipe)
    more = {"callback_on_step_end": go_on} if "callback_on_step_end" in parameters(pipe) else {}
    with tap.enabled(pipe, tap.TAPConfig(full_steps=wish.full_steps)):
        pictures = draw(pipe, request, prompts, [wish.seed], **more)
    GENERATED.labels(wish.full_steps or "default").observe(time.perf_counter() - start)
    return png(to_image(pictures[0]))
