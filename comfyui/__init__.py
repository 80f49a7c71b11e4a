"""TAP for ComfyUI: one node, which makes a model sample faster."""

from __future__ import annotations

import json
from typing import Any

try:
    from tap_diffusion import ConfigError, TAPConfig
    from tap_diffusion.integrations.comfy import accelerate
except ModuleNotFoundError as error:
    raise ImportError(
        f"the node TAP accelerate needs the package tap-diffusion in ComfyUI's Python ({error}); see its README"
    ) from error

_DEFAULT = TAPConfig()


class TAPAccelerate:
    """MODEL in, MODEL out. The one that comes in stays as it is."""

    CATEGORY = "advanced/model"
    DESCRIPTION = (
        "Samples faster: the whole model runs on some of the steps only; on the others it runs as far as its first"
        " layer, and each token picks the cheap predictor that explains that layer best (TAP, arXiv 2603.03792)."
        " For Flux, Qwen-Image, Wan, HunyuanVideo and SD3."
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
                "speedup": (
                    "FLOAT",
                    {
                        "default": _DEFAULT.speedup, "min": 1.0, "max": 20.0, "step": 0.5, "round": 0.01,
                        "tooltip": "Steps for each one that runs the whole model. At least 6 steps are full, or all"
                        " where there are fewer: few steps gain little. Higher is faster and further from the plain"
                        " result.",
                    },
                ),
                "full_steps": (
                    "INT",
                    {
                        "default": 0, "min": 0, "max": 1000,
                        "tooltip": "How many steps run the whole model, instead of the speedup. 0: as that says.",
                    },
                ),
            },
            "optional": {
                "config": (
                    "STRING",
                    {
                        "default": "", "multiline": True,
                        "tooltip": "Any other settings: a JSON object of fields of TAPConfig, which come before those"
                        ' above. The paper with a cache in host memory, for example: {"interval": 6, "clock": "step",'
                        ' "hindsight": 0, "family": "taylor", "orders": [0, 1, 2], "slopes": 1,'
                        ' "horizon_span": 4, "sketch": 1, "offload": "cpu"}',
                    },
                ),
            },
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, speedup: float = _DEFAULT.speedup, full_steps: int = 0, config: str = "") -> bool | str:
        """What is wrong with the settings, before anything runs."""
        try:
            _config(speedup, full_steps, config)
        except ConfigError as error:
            return str(error)
        return True

    def accelerate(self, model: Any, speedup: float, full_steps: int, config: str = "") -> tuple[Any]:
        """Run the node. Raises ConfigError, or UnsupportedModelError for a model of another class."""
        return (accelerate(model, _config(speedup, full_steps, config)),)


def _config(speedup: float, full_steps: int, config: str) -> TAPConfig:
    given: dict[str, Any] = {}
    if config.strip():
        TAPConfig.from_json(config)  # which raises where it is no object of fields
        given = json.loads(config)
    schedule = {"full_steps": full_steps} if full_steps and "interval" not in given else {}
    return TAPConfig.from_dict({"speedup": speedup} | schedule | given)


NODE_CLASS_MAPPINGS = {"TAPAccelerate": TAPAccelerate}
NODE_DISPLAY_NAME_MAPPINGS = {"TAPAccelerate": "TAP accelerate"}
