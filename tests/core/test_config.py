from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tap_diffusion import ConfigError, TAPConfig
from tap_diffusion.core.predictors import FAMILIES
from tap_diffusion.core.presets import PRESETS
from tap_diffusion.core.schedule import plan


def test_paper_is_the_paper() -> None:
    assert TAPConfig.paper(interval=8).to_dict() == {
        "speedup": 5.0,
        "full_steps": None,
        "interval": 8,
        "warmup": 3,
        "steps": None,
        "clock": "step",
        "hindsight": 0.0,
        "family": "taylor",
        "orders": [0, 1, 2],
        "slopes": 1.0,
        "history": None,
        "horizon_span": 4.0,
        "horizon_step": 1.0,
        "loss": "cosine",
        "granularity": "token",
        "probe": "modulated_input",
        "sketch": 1,
        "cache_dtype": "model",
        "offload": None,
    }


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("interval", 0, "at least 1"),
        ("interval", 2.5, "whole number"),
        ("interval", True, "whole number"),
        ("warmup", 0, "at least 1"),
        ("speedup", 0.9, "≥ 1"),
        ("speedup", float("inf"), "≥ 1"),
        ("full_steps", 0, "at least 1"),
        ("full_steps", True, "at least 1"),
        ("full_steps", (), "starts with 0"),
        ("full_steps", (1, 2), "starts with 0"),
        ("full_steps", (0, 2, 2), "rising"),
        ("steps", 0, "at least 1"),
        ("clock", "sigma", "noise, step"),
        ("hindsight", -0.1, "from 0 to 2"),
        ("family", "fourier", "taylor, newton"),
        ("orders", (), "at least one"),
        ("orders", (0, 0), "different"),
        ("orders", (9,), "from 0 to 8"),
        ("orders", (-1,), "from 0 to 8"),
        ("orders", "012", "tuple"),
        ("history", 0, "from 3"),
        ("history", 2, "from 3"),
        ("history", 65, "to 64"),
        ("history", True, "whole number"),
        ("slopes", 1.5, "from 0 to 1"),
        ("slopes", float("nan"), "from 0 to 1"),
        ("horizon_span", -1, "≥ 0"),
        ("horizon_span", float("nan"), "≥ 0"),
        ("horizon_step", 0, "> 0"),
        ("horizon_step", 0.001, "255 candidates"),
        ("loss", "mse", "cosine, l2, relative_l2, l1"),
        ("granularity", "pixel", "token, sample, batch"),
        ("probe", "second_block", "modulated_input, first_block"),
        ("sketch", 0, "None or a whole number of at least 1"),
        ("cache_dtype", "int8", "model, float32, bfloat16, float16"),
        ("offload", "disk", "None or 'cpu'"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(field: str, value: Any, allowed: str) -> None:
    changes = {field: value} | ({"horizon_span": 4} if field == "horizon_step" else {})
    with pytest.raises(ConfigError) as caught:
        TAPConfig(**changes)
    message = str(caught.value)
    assert f"TAPConfig.{field} is {value!r}" in message
    assert allowed in message


@given(
    st.builds(
        TAPConfig,
        full_steps=st.none() | st.integers(1, 50) | st.sets(st.integers(1, 49)).map(lambda s: (0, *sorted(s))),
        steps=st.none() | st.integers(1, 50),
        clock=st.sampled_from(["noise", "step"]),
        hindsight=st.floats(0, 2),
        warmup=st.integers(1, 50),
        family=st.sampled_from(list(FAMILIES)),
        orders=st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True).map(tuple),
        slopes=st.none() | st.floats(0, 1),
        history=st.none() | st.integers(9, 64),
        horizon_span=st.floats(0, 8),
        loss=st.sampled_from(["cosine", "l2", "relative_l2", "l1"]),
        granularity=st.sampled_from(["token", "sample", "batch"]),
        probe=st.sampled_from(["modulated_input", "first_block"]),
    )
)
def test_json_round_trip(config: TAPConfig) -> None:
    assert TAPConfig.from_json(config.to_json()) == config


@given(st.floats(1, 50))
def test_json_round_trip_of_a_speedup(speedup: float) -> None:
    assert TAPConfig.from_json(TAPConfig(speedup=speedup).to_json()).speedup == speedup


@pytest.mark.parametrize("other", [{"full_steps": 8}, {"full_steps": (0, 4)}, {"interval": 6}])
def test_a_speedup_beside_a_number_of_full_steps_contradicts_it(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="speedup is 4; it must be left out beside full_steps or interval"):
        TAPConfig(speedup=4, **other)


def test_file_round_trip(tmp_path: Path) -> None:
    config = TAPConfig.paper(5)
    config.save(tmp_path / "tap.json")
    assert TAPConfig.load(tmp_path / "tap.json") == config


@pytest.mark.parametrize("text", ["{", "[]", '{"intervall": 4}', '{"interval": 0}'])
def test_bad_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        TAPConfig.from_json(text)


def test_an_unknown_field_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no field 'intervall'; did you mean 'interval'\? .*interval, warmup"):
        TAPConfig.from_dict({"intervall": 4})
    with pytest.raises(ConfigError, match="no field 'x'; its fields are speedup"):
        TAPConfig.from_dict({"x": 4})


def test_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TAPConfig().interval = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "chooses"),
    [
        ({"orders": (0, 1), "horizon_span": 0}, True),
        ({"orders": (2,), "horizon_span": 0}, False),
        ({"orders": (2,), "horizon_span": 1}, True),
        ({"orders": (2,), "horizon_span": 0.5}, False),
        ({"orders": (0,), "horizon_span": 4}, False),
    ],
)
def test_one_candidate_leaves_nothing_to_choose(changes: dict[str, Any], chooses: bool) -> None:
    assert TAPConfig(**changes).chooses is chooses


def test_anchors_are_those_of_the_largest_order_or_the_history() -> None:
    assert TAPConfig(orders=(0, 3)).anchors == 4
    assert TAPConfig(orders=(0, 3), history=4).anchors == 4
    assert TAPConfig(orders=(4,), family="chebyshev", history=14).anchors == 14


def test_the_paper_with_changes() -> None:
    changed = TAPConfig.paper(full_steps=(0, 5), orders=(1,))
    assert (changed.interval, changed.full_steps, changed.orders) == (None, (0, 5), (1,))
    assert changed.hindsight == 0
    assert TAPConfig.paper() == TAPConfig.paper(6)


def test_two_schedules_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="interval is 4; it must be left out beside full_steps"):
        TAPConfig(interval=4, full_steps=8)


@pytest.mark.parametrize(
    ("changes", "predicts"),
    [({}, True), ({"speedup": 1}, False), ({"interval": 1}, False), ({"interval": 2}, True), ({"full_steps": 3}, True)],
)
def test_whether_anything_is_predicted(changes: dict[str, Any], predicts: bool) -> None:
    assert TAPConfig(**changes).predicts is predicts


# -------------------------------------------------------------------------------------------------------------- presets


def test_a_preset_is_for_its_number_of_steps() -> None:
    config = TAPConfig.preset("flux.1-dev", full_steps=9, sketch=2)
    assert config == TAPConfig(full_steps=(0, 1, 2, 3, 5, 8, 13, 27, 49), steps=50, sketch=2)
    assert TAPConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="for trajectories of 50 steps, and this one has 28"):
        plan(config, 28, None)


@pytest.mark.parametrize("model", PRESETS)
def test_what_there_is_no_preset_for_is_named(model: str) -> None:
    for full_steps in (9, 13, 21):
        assert len(TAPConfig.preset(model, full_steps).full_steps or ()) == full_steps  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"10 full steps for {model}.*9, 13, 21; TAPConfig\(full_steps=10\)"):
        TAPConfig.preset(model, full_steps=10)
    with pytest.raises(
        ConfigError, match=r"'flux'; there are presets for flux\.1-dev, qwen-image, wan2\.1-1\.3b, hunyuan-video"
    ):
        TAPConfig.preset("flux", full_steps=9)
