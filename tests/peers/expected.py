"""Which of diffusers' tests fail for a reason that is no fault of TAP's."""

from __future__ import annotations

import re
from typing import NamedTuple

HUB_FILES = "needs files of the hub that can't be made here"
HUB_NUMBERS = "compares with numbers that come of the hub's weights and words, and those here are made up"
NO_TORCHVISION = "needs transformers' Qwen2VLProcessor, and that needs torchvision"
OUTSIDE = "fails without TAP as well, with the words and weights made up here"
OTHER_CACHE = "enables TAP on a model on which another cache is at work, and TAP says no"

ANY = ("plain", "interval=1", "one-full-step")
TAP = ("interval=1", "one-full-step")


class Expected(NamedTuple):
    """Tests that fail.

    Attributes:
        tests: a regular expression, searched for in a test's id.
        modes: of the plugin, in which they do.
        reason: why this is no fault.
    """

    tests: str
    modes: tuple[str, ...]
    reason: str


EXPECTED = (
    Expected(r"::test_correct_class_remapping_from_pretrained_config$", ANY, HUB_FILES),
    Expected(r"/test_cogvideox(_fun_control|_image2video)?\.py::.*::test_inference$", ANY, HUB_NUMBERS),
    Expected(r"pipelines/hunyuan_video/.*::test_inference$", ANY, HUB_NUMBERS),
    Expected(r"/test_wan_(22\w*|image_to_video|vace|video_to_video)\.py::.*::test_inference$", ANY, HUB_NUMBERS),
    Expected(r"/test_wan_vace\.py::.*::test_inference_with_(single|multiple)_reference_image$", ANY, HUB_NUMBERS),
    Expected(r"pipelines/stable_diffusion_3/.*::test_inference$", ANY, HUB_NUMBERS),
    Expected(r"pipelines/pixart_\w+/.*::test_inference(_non_square_images)?$", ANY, HUB_NUMBERS),
    Expected(r"::PixArt\w+::test_inference_with_multiple_images_per_prompt$", ANY, HUB_NUMBERS),
    Expected(r"/test_cogvideox_fun_control\.py::.*::test_vae_tiling$", ANY, OUTSIDE),
    Expected(r"/test_pipeline_flux_kontext\w*\.py::.*::test_faster_cache_basic_\w+$", TAP, OTHER_CACHE),
    Expected(r"/test_hunyuan_video(_framepack)?\.py::.*::test_faster_cache_basic_\w+$", TAP, OTHER_CACHE),
    Expected(r"pipelines/qwenimage/test_qwenimage_edit.*::test_(?!pipeline_call_signature)", ANY, NO_TORCHVISION),
)


def reason(test: str, mode: str) -> str | None:
    """Why a test fails in a mode; None where it should pass."""
    return next((e.reason for e in EXPECTED if mode in e.modes and re.search(e.tests, test)), None)
