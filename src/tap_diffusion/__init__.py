"""TAP, the Token-Adaptive Predictor: training-free acceleration of diffusion transformers (arXiv 2603.03792).

import tap_diffusion as tap
tap.enable(pipe)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.errors import ConfigError, TAPWarning, UnsupportedModelError

if TYPE_CHECKING:
    from tap_diffusion.core.report import Report
    from tap_diffusion.integrations.diffusers.api import apply_tap, disable, enable, enabled, report, trajectory

__version__ = "0.2.0"

__all__ = [
    "ConfigError",
    "Report",
    "TAPConfig",
    "TAPWarning",
    "UnsupportedModelError",
    "apply_tap",
    "disable",
    "enable",
    "enabled",
    "report",
    "trajectory",
]


def __getattr__(name: str) -> Any:
    """Import what needs diffusers only when it is asked for: that takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = "core.report" if name == "Report" else "integrations.diffusers.api"
    return getattr(import_module(f"tap_diffusion.{place}"), name)


def __dir__() -> list[str]:
    """What there is to use."""
    return [*__all__, "__version__"]
