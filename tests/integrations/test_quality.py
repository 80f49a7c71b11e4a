"""Quality on the shipped, trained weights: random ones can't show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tap_diffusion as tap
from tap_diffusion import TAPConfig
from tap_diffusion.apps import ui
from tap_diffusion.apps.generate import Request, psnr, run

pytestmark = pytest.mark.slow

PROMPTS = [
    *(Path(ui.__file__).with_name("prompts.txt")).read_text().splitlines(),
    "watermelon", "elephant", "hamburger", "crown", "octopus", "pizza", "violin", "green apple",
]  # fmt: skip
REQUEST = Request(PROMPTS, steps=50, seed=100, guidance=2.0, batch_size=8)


@pytest.fixture(scope="module")
def full(emoji: Any) -> Tensor:
    return run(emoji, REQUEST, "full")[0]


def fidelity(emoji: Any, full: Tensor, config: TAPConfig) -> float:
    with tap.enabled(emoji, config):
        pictures, _ = run(emoji, REQUEST, "TAP")
        assert tap.report(emoji).full_steps == 8
    values = psnr(pictures, full)
    return sum(values) / len(values)


def test_tap_beats_the_best_fixed_predictor_on_the_paper_s_schedule(emoji: Any, full: Tensor) -> None:
    paper = fidelity(emoji, full, TAPConfig.paper(8))
    fixed = {
        order: fidelity(emoji, full, TAPConfig.paper(interval=8, orders=(order,), horizon_span=0))
        for order in (0, 1, 2)
    }
    print(f"PSNR at 8 of 50 full steps: TAP {paper:.2f} dB, Taylor {fixed}")
    assert paper >= max(fixed.values()) + 2


def test_the_recommended_settings_beat_the_paper(emoji: Any, full: Tensor) -> None:
    """And each of the two things that are new brings its part: the schedule on the clock, and hindsight."""
    recommended = fidelity(emoji, full, TAPConfig(full_steps=8))
    without = fidelity(emoji, full, TAPConfig(full_steps=8, hindsight=0.0))
    paper = fidelity(emoji, full, TAPConfig.paper(8))
    print(f"PSNR at 8 of 50 full steps: {recommended:.2f} dB, without hindsight {without:.2f}, the paper {paper:.2f}")
    assert recommended >= paper + 2
    assert recommended >= without + 1


def test_full_steps_are_bit_identical_to_the_plain_pipeline(emoji: Any, full: Tensor) -> None:
    with tap.enabled(emoji, TAPConfig.paper(interval=1)):
        assert torch.equal(run(emoji, REQUEST, "interval 1")[0], full)


def test_the_pipeline_is_left_as_it_was(emoji: Any, full: Tensor) -> None:
    with tap.enabled(emoji, TAPConfig.paper(8)):
        run(emoji, Request(PROMPTS[:1], steps=10, guidance=2.0), "TAP")
    assert torch.equal(run(emoji, REQUEST, "plain again")[0], full)
