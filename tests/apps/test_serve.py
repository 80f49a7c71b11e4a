"""The examples that serve pictures over HTTP, each as its own users run it: real servers, concurrent requests.

They need the extra ``serve``; without it these tests are left out.
"""

from __future__ import annotations

import http.client
import importlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tap_diffusion as tap

pytest.importorskip("fastapi", reason="needs the extra serve")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:TAP ran:tap_diffusion.core.errors.TAPWarning")]
EXAMPLES = Path(__file__).parents[2] / "examples"
PATIENCE = 300.0  # seconds: the machine may be busy with other things

KINDS: list[dict[str, Any]] = [
    {"steps": 8, "full_steps": 6},
    {"steps": 8, "full_steps": 6, "width": 32, "height": 32},
    {"steps": 8, "full_steps": 7, "width": 32, "height": 32},
    {"steps": 10, "width": 32},
]
PROMPTS = ["red apple", "green frog face", "blue book", "cat face"]
WISHES = [  # 32 of mixed size and budget, of a seed each
    {"prompt": prompt, "seed": 10 * place + number} | kind
    for number in range(2)
    for place, prompt in enumerate(PROMPTS)
    for kind in KINDS
]
ENDLESS = {"prompt": "red apple", "steps": 1000, "full_steps": 900}


@dataclass
class Server:
    """A server that runs.

    Attributes:
        kill: ends one of its processes that generate, which it has to replace.
    """

    port: int
    metrics: str
    kill: Callable[[], None] | None = None

    def ask(self, wish: dict[str, Any], patience: float = PATIENCE) -> bytes:
        body = json.dumps(wish).encode()
        address, headers = f"http://127.0.0.1:{self.port}/pictures", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=patience) as response:
            content: bytes = response.read()
        return content

    def status(self, wish: dict[str, Any], patience: float = PATIENCE) -> int:
        """Of its answer; 0 where that did not come in so many seconds."""
        try:
            self.ask(wish, patience)
        except urllib.error.HTTPError as error:
            return error.code
        except TimeoutError:
            return 0
        return 200

    def refused(self, wish: dict[str, Any], status: int) -> tuple[str, Any]:
        """What it says, and the headers."""
        with pytest.raises(urllib.error.HTTPError, match=str(status)) as raised:
            self.ask(wish)
        return raised.value.read().decode(), raised.value.headers

    @contextmanager
    def impatient(self, wish: dict[str, Any]) -> Iterator[None]:
        """A client that asks, and is gone at the end of the block without an answer."""
        client = http.client.HTTPConnection("127.0.0.1", self.port)
        client.request("POST", "/pictures", json.dumps(wish), {"Content-Type": "application/json"})
        yield
        assert client.sock is not None
        client.close()

    def page(self, path: str) -> str:
        return fetched(f"http://127.0.0.1:{self.port}{path}")

    def counts(self, name: str) -> dict[str, int]:
        """How many a metric has counted, by budget."""
        pattern, found = re.compile(rf'(?m)^(?:ray_)?{name}{{.*full_steps="(\w+)".*}} (\S+)$'), dict[str, int]()
        for budget, value in pattern.findall(fetched(self.metrics)):
            found[budget] = found.get(budget, 0) + int(float(value))
        return found


def fetched(address: str) -> str:
    with urllib.request.urlopen(address, timeout=60) as response:
        text: str = response.read().decode()
    return text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def until(condition: Callable[[], Any]) -> Any:
    """What it gives, once that is something."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


@contextmanager
def with_ray(replicas: int = 1, queue: int = 64) -> Iterator[Server]:
    import ray
    from ray import serve

    sys.path.insert(0, str(EXAMPLES))
    port, metrics = free_port(), free_port()
    variables = {"PYTHONPATH": str(EXAMPLES), "OMP_NUM_THREADS": "1"}
    variables |= {f"RAY_SERVE_PROXY_{name}_CHECK_TIMEOUT_S": str(PATIENCE) for name in ("READY", "HEALTH")}
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, _metrics_export_port=metrics,
        runtime_env={"env_vars": variables},
    )  # fmt: skip

    def kill() -> None:
        names = (actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))
        ray.kill(ray.get_actor(next(name for name in names if "#Pictures#" in name), namespace="serve"))

    try:
        example: Any = importlib.import_module("serve")
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(example.app(example.Options(device="cpu", replicas=replicas, queue=queue)))
        yield Server(port, f"http://127.0.0.1:{metrics}/metrics", kill)
    finally:
        serve.shutdown()
        ray.shutdown()
        sys.path.remove(str(EXAMPLES))


@contextmanager
def with_fastapi(queue: int = 64) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "serve_fastapi:api", "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ | {"DEVICE": "cpu", "QUEUE": str(queue), "OMP_NUM_THREADS": "1"})
    server = Server(port, f"http://127.0.0.1:{port}/metrics")

    def is_up() -> bool:
        assert process.poll() is None, "it has ended"
        try:
            return bool(server.page("/docs"))
        except OSError:
            return False

    try:
        until(is_up)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=60)


SERVERS = pytest.mark.parametrize("running", [with_ray, with_fastapi])


def alone(pipe: Any, prompt: str, seed: int, steps: int, full_steps: int | None = None, **size: int) -> Any:
    """The picture that a wish is for, by diffusers, in a batch of its own; not rounded, in [0, 255]."""
    size = {"width": 64, "height": 64} | size
    with tap.enabled(pipe, tap.TAPConfig(full_steps=full_steps)):
        picture = pipe(
            prompt, generator=torch.Generator().manual_seed(seed), num_inference_steps=steps, true_cfg_scale=2.0,
            negative_prompt="", max_sequence_length=pipe.tokenizer_2.model_max_length, output_type="np", **size,
        ).images[0]  # fmt: skip
    return 255 * picture


def check_pictures(pipe: Any, wishes: list[dict[str, Any]], answers: list[bytes]) -> None:
    for wish, answer in zip(wishes, answers, strict=True):
        picture = np.asarray(Image.open(io.BytesIO(answer)))
        assert np.abs(picture - alone(pipe, **wish)).max() <= 0.51, wish  # rounded, by other batches too


def by_budget(wishes: list[dict[str, Any]]) -> dict[str, int]:
    budgets = [str(wish.get("full_steps", "default")) for wish in wishes]
    return {budget: budgets.count(budget) for budget in budgets}


@SERVERS
def test_under_load(emoji: Any, running: Any) -> None:
    """32 requests at once, and with Ray one of two replicas killed among them: none is lost, and none is another's.

    The examples of its page are asked for as well.
    """
    with running(**{"replicas": 2} if running is with_ray else {}) as server:
        assert "/openapi.json" in server.page("/docs")
        told = json.loads(server.page("/openapi.json"))
        assert told["paths"]["/pictures"]["post"]["responses"].keys() == {"200", "422", "429"}
        examples = told["components"]["schemas"]["Wish"]["examples"]
        assert len(examples) == 2
        wishes = [*WISHES, *examples]
        with ThreadPoolExecutor(len(wishes) + 2) as pool:
            bad = pool.submit(server.refused, {"prompt": "red apple", "width": 33}, 422)
            silent = pool.submit(server.refused, {"seed": 1}, 422)
            asked = [pool.submit(server.ask, wish) for wish in wishes]
            if server.kill is not None:
                until(lambda: sum(future.done() for future in asked) >= 4)
                server.kill()
                assert sum(future.done() for future in asked) < 28
            answers = [future.result() for future in asked]
        check_pictures(emoji, [{"steps": 50} | wish for wish in wishes], answers)
        assert "width 33 can't be done by this model" in bad.result()[0]
        silent.result()
        until(lambda: server.counts("tap_seconds_per_request_count") == by_budget(wishes))


@SERVERS
def test_so_many_may_wait_and_one_that_nobody_waits_for_is_given_up(emoji: Any, running: Any) -> None:
    wish = {"prompt": "blue book", "seed": 0, "steps": 8, "full_steps": 6}
    with running(queue=2) as server:
        with server.impatient(ENDLESS), server.impatient(ENDLESS | {"full_steps": 899}):
            until(lambda: server.status(wish, patience=5) == 429)  # once both are taken
            message, headers = server.refused(wish, 429)
            assert "2 requests wait already" in message
            assert int(headers["Retry-After"]) > 0
        # One was being generated, the other waited: both make room, and neither is generated to its end.
        until(lambda: server.status(wish) == 200)
        check_pictures(emoji, [wish], [server.ask(wish)])
        until(lambda: server.counts("tap_seconds_per_request_count").get("6", 0) >= 2)
        assert server.counts("tap_seconds_per_picture_count").keys() == {"6"}
