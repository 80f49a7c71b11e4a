"""A part of diffusers' own test-suite, with TAP enabled on all that it builds; README.md beside this runs the rest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
CHECKOUT = Path(os.environ.get("DIFFUSERS_CHECKOUT", TESTS.parents[1] / "diffusers-src"))
MODELS, PIPELINES = "tests/models/transformers/", "tests/pipelines/"
PART = (
    MODELS + "test_models_transformer_flux.py",
    MODELS + "test_models_dit_transformer2d.py",
    PIPELINES + "flux/test_pipeline_flux.py",
    PIPELINES + "dit/test_dit.py",
)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["interval=1", "one-full-step"])
def test_part_of_the_suite(mode: str) -> None:
    if not (CHECKOUT / MODELS).is_dir():
        pytest.skip(f"git clone https://github.com/huggingface/diffusers {CHECKOUT}, or set DIFFUSERS_CHECKOUT")
    missing = [name for name in ("parameterized", "requests_mock") if find_spec(name) is None]
    if missing:
        pytest.skip(f"pip install {' '.join(missing)}, which diffusers' tests import")
    run = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "peers.tap_everywhere", "--tap", mode]
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*run, "-q", "-W", "ignore", "--tb=short", *PART],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )

    said = re.search(r"TAP: enabled (\d+) times, (\d+) full and (\d+) predicted calls", done.stdout)
    passed = re.search(r"(\d+) passed", done.stdout)

    assert done.returncode == 0, done.stdout[-8000:]
    assert said is not None
    assert passed is not None
    assert int(passed[1]) > 100
    enabled, full, predicted = map(int, said.groups())
    assert min(enabled, full) > 100
    assert (predicted > 20) == (mode == "one-full-step")
