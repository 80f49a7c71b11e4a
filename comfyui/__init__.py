"""TAP for ComfyUI: one node, which makes a model sample faster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_SRC = Path(__file__).resolve().parents[1] / "src"
if (_SRC / "tap_diffusion").is_dir() and str(_SRC) not in sys.path:
    sys.path.insert(0, str(_SRC))  # this folder is part of a checkout of tap-diffusion: nothing has to be installed

try:
    from tap_diffusion import ConfigError, TAPConfig
    from tap_diffusion.integrations.comfyui import accelerate
except ModuleNotFoundError as error:
    raise ImportError(
        f"the node TAP accelerate needs the package tap-diffusion in ComfyUI's Python ({error}); see its README"
    ) from error

_DEFAULT = TAPConfig()


class TAPAccelerate:
    """MODEL in, MODEL out. The one that comes in stays as it is."""

    CATEGORY = "advanced/model"
    DESCRIPTION = (
        "Samples faster: only some steps run the whole model. The others run its first layer and predict the rest"
        " (TAP, arXiv 2603.03792). For diffusion transformers such as Flux, Qwen-Image, Wan and HunyuanVideo."
    )
    FUNCTION = "accelerate"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The accelerated model. Put this node after LoRAs and model sampling nodes.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI shows."""
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to accelerate. It is not changed."}),
                "enabled": (
                    "BOOLEAN", {"default": True, "tooltip": "Off: the model comes out as it came in."},
                ),
                "speedup": (
                    "FLOAT",
                    {
                        "default": _DEFAULT.speedup, "min": 1.0, "max": 20.0, "step": 0.5, "round": 0.01,
                        "tooltip": "Target speed-up: one step in this many runs the whole model. At least 6 do, so"
                        " few steps gain little. Higher is faster and further from the plain result.",
                    },
                ),
                "full_steps": (
                    "INT",
                    {
                        "default": 0, "min": 0, "max": 1000,
                        "tooltip": "How many steps run the whole model, in place of the speedup. 0: as that says.",
                    },
                ),
                "start_percent": (
                    "FLOAT",
                    {
                        "default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01,
                        "tooltip": "Steps before this share of sampling all run the whole model.",
                    },
                ),
                "end_percent": (
                    "FLOAT",
                    {
                        "default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01,
                        "tooltip": "Steps after this share of sampling all run the whole model.",
                    },
                ),
            },
            "optional": {
                "config": (
                    "STRING",
                    {
                        "default": "", "multiline": True,
                        "tooltip": "Other settings: a JSON object of fields of TAPConfig, which win over speedup and"
                        ' full_steps. The paper with a cache in host memory, for example: {"interval": 6,'
                        ' "clock": "step", "hindsight": 0, "family": "taylor", "orders": [0, 1, 2], "slopes": 1,'
                        ' "horizon_span": 4, "sketch": 1, "offload": "cpu"}',
                    },
                ),
            },
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, config: str = "") -> bool | str:
        """What is wrong with ``config``, before anything runs.

        ComfyUI leaves out its own checks, of bounds, for each input that is named here, and shows the answer at each.
        """
        try:
            _fields(config)
        except ConfigError as error:
            return str(error)
        return True

    def accelerate(
        self,
        model: Any,
        enabled: bool = True,
        speedup: float = _DEFAULT.speedup,
        full_steps: int = 0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        config: str = "",
    ) -> tuple[Any]:
        """Run the node. Raises ConfigError, or UnsupportedModelError for a model of another class."""
        if not enabled:
            return (model,)
        _check_bounds(speedup=speedup, full_steps=full_steps)
        settings = _config(speedup, full_steps, config)
        return (accelerate(model, settings, start_percent=start_percent, end_percent=end_percent),)


def _check_bounds(**values: float) -> None:
    """ComfyUI checks what is typed in, but not what comes from another node."""
    for name, value in values.items():
        _, options = TAPAccelerate.INPUT_TYPES()["required"][name]
        if not options["min"] <= value <= options["max"]:
            raise ConfigError(f"{name} is {value}; it must be from {options['min']:g} to {options['max']:g}")


def _fields(config: str) -> dict[str, Any]:
    """The fields that are given. Raises ConfigError where one is no field, or has a value that is not allowed."""
    if not config.strip():
        return {}
    TAPConfig.from_json(config)
    fields: dict[str, Any] = json.loads(config)
    return fields


def _config(speedup: float, full_steps: int, config: str) -> TAPConfig:
    given = _fields(config)
    schedule = {"full_steps": full_steps} if full_steps else {"speedup": speedup}
    if {"speedup", "full_steps", "interval"} & set(given):
        schedule = {}
    return TAPConfig.from_dict(schedule | given)


NODE_CLASS_MAPPINGS = {"TAPAccelerate": TAPAccelerate}
NODE_DISPLAY_NAME_MAPPINGS = {"TAPAccelerate": "TAP accelerate"}
