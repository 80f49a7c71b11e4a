"""The binding to ComfyUI."""

from tap_diffusion.integrations.comfyui.wrappers import accelerate, report

__all__ = ["accelerate", "report"]
