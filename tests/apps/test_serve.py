"""The example for Ray Serve: concurrent requests of several kinds over HTTP, each as if it were the only one.

It needs the extra ``serve``; without it the test is left out.
"""

from __future__ import annotations

import importlib
import io
import json
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tap_diffusion as tap
from tiny import build_pipeline

pytest.importorskip("fastapi", reason="needs the extra serve")
pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"

KINDS: list[dict[str, Any]] = [
    {"steps": 8, "full_steps": 6},
    {"steps": 8, "full_steps": 7},
    {"steps": 8, "full_steps": 6, "width": 64},
    {"steps": 10},
]


def by_hand(pipe: Any, prompt: str, seed: int, steps: int, full_steps: int | None = None, width: int = 32) -> Any:
    with tap.enabled(pipe, tap.TAPConfig(full_steps=full_steps)):
        picture = pipe(
            prompt, generator=torch.Generator().manual_seed(seed), num_inference_steps=steps, height=32, width=width,
            max_sequence_length=pipe.tokenizer_2.model_max_length, output_type="np",
        ).images[0]  # fmt: skip
    return 255 * picture


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_concurrent_requests_of_several_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray import serve

    monkeypatch.syspath_prepend(EXAMPLES)
    example: Any = importlib.import_module("serve")
    pipe = build_pipeline()
    pipe.save_pretrained(tmp_path)
    port, metrics = free_port(), free_port()
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, _metrics_export_port=metrics,
        runtime_env={"env_vars": {"PYTHONPATH": str(EXAMPLES)}},
    )  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(example.app(example.Options(model=str(tmp_path), device="cpu")))

        def ask(wish: dict[str, Any]) -> bytes:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/pictures", json.dumps(wish).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=300) as response:
                content: bytes = response.read()
            return content

        wishes = [
            {"prompt": prompt, "seed": seed} | kind
            for seed in (0, 1)
            for kind in KINDS
            for prompt in ("red apple", "blue book")
        ]
        with ThreadPoolExecutor(len(wishes) + 2) as pool:
            bad = pool.submit(ask, {"prompt": "red apple", "width": 33})
            silent = pool.submit(ask, {"seed": 1})
            answers = list(pool.map(ask, wishes))
        for wish, answer in zip(wishes, answers, strict=True):
            picture = np.asarray(Image.open(io.BytesIO(answer)))
            assert np.abs(picture - by_hand(pipe, **wish)).max() <= 0.51
        with pytest.raises(urllib.error.HTTPError, match="422") as raised:
            bad.result()
        assert "width 33 can't be done by this model" in raised.value.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="422"):
            silent.result()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/healthz", timeout=60) as response:
            assert response.status == 200
        deadline = time.monotonic() + 60
        while "tap_pictures" not in (told := page(f"http://127.0.0.1:{metrics}/metrics")):
            assert time.monotonic() < deadline, told
            time.sleep(1)
        counts = [float(line.split()[-1]) for line in told.splitlines() if line.startswith("ray_tap_pictures")]
        assert sum(counts) == len(wishes)
    finally:
        serve.shutdown()
        ray.shutdown()


def page(address: str) -> str:
    with urllib.request.urlopen(address, timeout=60) as response:
        text: str = response.read().decode()
    return text
