"""A clone of this repository in ComfyUI/custom_nodes is the node, as comfyui/ is by itself: see comfyui/README.md."""

from .comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
