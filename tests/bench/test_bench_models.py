"""The shipped models and judges of the bench, as they are."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch

from tap_bench import judges
from tap_bench.calibration import Calibration
from tap_bench.models import MODELS, BenchModel, draw
from tap_bench.variant import on_engine
from tap_diffusion.core.config import TAPConfig

# What the judges must at least say of these few samples by the full model, out of 1; by chance it is 1/313, 1/10, 1/10,
# and less than 1/10 (the objects of scenes are blobs).
LEAST = {
    "emoji": ("caption_retrieval", 0.75),
    "fashion": ("classifier_accuracy", 0.75),
    "sprites": ("caption_accuracy", 0.7),
    "scenes": ("caption_accuracy", 0.35),
}


def loaded(name: str) -> tuple[BenchModel, Any]:
    model = MODELS[name]()
    pipe = model.load()
    pipe.set_progress_bar_config(disable=True)
    return model, pipe


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAST)
def test_models_draw_what_is_asked_for(name: str) -> None:
    model, pipe = loaded(name)
    drawn = draw(pipe, model, model.measured[:8], 0, num_inference_steps=25)
    assert drawn.pictures.shape[0] == len(drawn.latents) == 8
    assert 0 <= float(drawn.pictures.min()) < float(drawn.pictures.max()) <= 1
    key, least = LEAST[name]
    right = model.scores[0](drawn.pictures, model.measured[:8])[key]
    wrong = model.scores[0](drawn.pictures, model.measured[8:16])[key]
    assert fmean(right) >= least > fmean(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_tell_a_good_method_from_a_bad_one(name: str) -> None:
    model, pipe = loaded(name)
    calibration = Calibration(pipe, replace(model, calibration=model.calibration[:2]), steps=20)
    dense, sparse = (
        calibration.quality(on_engine("", TAPConfig.paper(full_steps=full, orders=orders)))[0]
        for full, orders in ((tuple(range(0, 20, 2)), (0, 1)), ((0, 10), (0,)))
    )
    assert dense > sparse + 6


def test_measured_and_calibration_conditions_are_apart() -> None:
    for name in ("emoji", "sprites", "scenes"):
        model = MODELS[name]()
        assert len(model.measured) == 256
        assert len(set(model.measured[:64])) == 64
        assert len(model.calibration) == 32
        assert not set(model.measured) & set(model.calibration)


@pytest.mark.slow
def test_distance_of_garments_grows_with_noise() -> None:
    model, pipe = loaded("fashion")
    pictures = draw(pipe, model, model.measured[:32], 0, num_inference_steps=25).pictures
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        judges.distance_of_garments((pictures + level * noise).clamp(0, 1), [])["frechet_distance"]
        for level in (0.0, 0.2, 0.6)
    ]
    assert distances == sorted(distances)
    assert distances[2] > 1.5 * distances[0]
