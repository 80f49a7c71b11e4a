"""The example for Ray Serve, in this process: concurrent requests of several kinds, each as if it were the only one.

It needs the extra ``serve``; without it the test is left out.
"""

from __future__ import annotations

import importlib.util
import io
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


def test_concurrent_requests_of_several_kinds(tmp_path: Path) -> None:
    serve: Any = pytest.importorskip("ray.serve")
    spec: Any = importlib.util.spec_from_file_location(
        "serve_example", Path(__file__).parents[1] / "examples" / "serve.py"
    )
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    pipe = build_pipeline()
    pipe.save_pretrained(tmp_path)
    application = example.app(example.Options(model=str(tmp_path), device="cpu"))
    handle = serve.run(application, _local_testing_mode=True)
    wishes = [
        {"prompt": prompt, "seed": seed} | kind
        for seed in (0, 1)
        for kind in KINDS
        for prompt in ("red apple", "blue book")
    ]
    bad = handle.picture.remote(example.Wish(prompt="red apple", width=33))
    answers = [handle.picture.remote(example.Wish(**wish)) for wish in wishes]
    for wish, answer in zip(wishes, answers, strict=True):
        picture = np.asarray(Image.open(io.BytesIO(answer.result().body)))
        assert np.abs(picture - by_hand(pipe, **wish)).max() <= 0.51
    with pytest.raises(Exception, match="width 33 can't be done by this model"):
        bad.result()
