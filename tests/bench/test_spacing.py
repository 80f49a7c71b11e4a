"""The rule for full steps against what searches on real models found, and against the bench's own models."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from tap_bench.spacing import EXPONENTS, REPORTS, Evidence, distance
from tap_diffusion import TAPConfig
from tap_diffusion.core.presets import PRESETS, STEPS

EVIDENCE = Evidence()
NAMES = {
    "flux.1-dev": "FLUX.1-dev", "qwen-image": "Qwen-Image", "wan2.1-1.3b": "Wan2.1-T2V-1.3B",
    "hunyuan-video": "HunyuanVideo",
}  # fmt: skip
MEASURED = REPORTS.parent / "schedules" / "measured.json"


def test_the_rule_is_near_what_searches_found() -> None:
    errors = {model: EVIDENCE.error(model) for model in EVIDENCE.models}
    assert fmean(errors.values()) <= 0.13
    assert max(errors.values()) <= 0.25


@pytest.mark.parametrize("model", EVIDENCE.models)
def test_so_it_is_for_a_model_left_out(model: str) -> None:
    exponent, error = EVIDENCE.left_out(model)
    assert exponent in EXPONENTS
    assert error <= 0.25


@pytest.mark.parametrize("model", EVIDENCE.models)
def test_tokens_and_noise_explain_more_than_either_windows_that_grow_or_noise_alone(model: str) -> None:
    assert all(EVIDENCE.error(model) < 0.7 * error for error in EVIDENCE.errors_of_others(model).values())


def test_all_frames_of_a_video_count() -> None:
    for model in ("Wan2.1-T2V-1.3B", "HunyuanVideo"):
        errors = [EVIDENCE.frames_counted(model, exponent) for exponent in (0.0, 0.5, 1.0)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] == EVIDENCE.error(model)
    assert EVIDENCE.frames_counted("FLUX.1-dev", 0.0) == EVIDENCE.error("FLUX.1-dev")


def test_the_distance_is_that_of_logarithms() -> None:
    assert distance((0, 1, 3), (0, 3, 3)) == pytest.approx(0.6931471805599453 / 3)
    assert distance((0, 5), (0, 5)) == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_what_was_found(preset: str) -> None:
    found = EVIDENCE.found[NAMES[preset]]
    for count, full in PRESETS[preset].items():
        searched = [objective for objective, steps in found if steps == full]
        assert searched[:1] == (["psnr"] if preset in ("flux.1-dev", "qwen-image") else ["budcache"])
        assert TAPConfig.preset(preset, full_steps=count) == TAPConfig(full_steps=full, steps=STEPS)


@pytest.mark.skipif(not MEASURED.exists(), reason="nothing has been measured")
def test_it_costs_the_bench_s_own_models_little() -> None:
    cells = json.loads(Path(MEASURED).read_text(encoding="utf-8"))
    lost = [fmean(cell["before"]) - fmean(cell["now"]) for cell in cells.values()]
    assert sum(lost) / 18 <= 0.3  # the others, of 64 tokens, are as they were
