from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tap_diffusion import ConfigError, TAPConfig
from tap_diffusion.predictors import FAMILIES


def test_paper_is_the_paper() -> None:
    assert TAPConfig.paper(interval=8).to_dict() == {
        "interval": 8,
        "warmup": 3,
        "full_steps": None,
        "family": "taylor",
        "orders": [0, 1, 2],
        "history": None,
        "horizon_span": 4.0,
        "horizon_step": 1.0,
        "loss": "cosine",
        "granularity": "token",
        "probe": "modulated_input",
        "cache_dtype": "model",
    }


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("interval", 0, "at least 1"),
        ("interval", 2.5, "integer"),
        ("interval", True, "integer"),
        ("warmup", 0, "at least 1"),
        ("family", "fourier", "taylor, newton"),
        ("orders", (), "non-empty"),
        ("orders", (0, 0), "distinct"),
        ("orders", (9,), "from 0 to 8"),
        ("orders", (-1,), "from 0 to 8"),
        ("orders", "012", "tuple"),
        ("history", 0, "from 3"),
        ("history", 2, "from 3"),
        ("history", 65, "to 64"),
        ("history", True, "integer"),
        ("horizon_span", -1, "≥ 0"),
        ("horizon_span", float("nan"), "≥ 0"),
        ("horizon_step", 0, "> 0"),
        ("horizon_step", 0.001, "255 candidates"),
        ("loss", "mse", "cosine, l2, relative_l2, l1"),
        ("granularity", "pixel", "token, sample, batch"),
        ("probe", "second_block", "modulated_input, first_block"),
        ("cache_dtype", "int8", "model, float32, bfloat16, float16"),
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
        interval=st.integers(1, 50),
        warmup=st.integers(1, 50),
        family=st.sampled_from(list(FAMILIES)),
        orders=st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True).map(tuple),
        history=st.none() | st.integers(9, 64),
        horizon_span=st.floats(0, 8),
        loss=st.sampled_from(["cosine", "l2", "relative_l2", "l1"]),
        granularity=st.sampled_from(["token", "sample", "batch"]),
        probe=st.sampled_from(["modulated_input", "first_block"]),
    )
)
def test_json_round_trip(config: TAPConfig) -> None:
    assert TAPConfig.from_json(config.to_json()) == config


def test_file_round_trip(tmp_path: Path) -> None:
    config = TAPConfig.paper(5)
    config.save(tmp_path / "tap.json")
    assert TAPConfig.load(tmp_path / "tap.json") == config


@pytest.mark.parametrize("text", ["{", "[]", '{"intervall": 4}', '{"interval": 0}'])
def test_bad_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        TAPConfig.from_json(text)


def test_an_unknown_field_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no field 'intervall'.*interval, warmup"):
        TAPConfig.from_dict({"intervall": 4})


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
