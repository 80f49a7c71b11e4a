"""The real ComfyUI, importable; or the tests that import this are skipped. `make test-comfyui` installs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import standins

COMFYUI = Path(os.environ.get("COMFYUI", Path(sys.prefix, "comfyui")))

if not COMFYUI.exists():
    pytest.skip("ComfyUI is not installed here; `make test-comfyui` makes an environment that has it", True)

standins.install()
sys.path.insert(0, str(COMFYUI))

from comfy.cli_args import args  # noqa: E402

args.cpu = True
args.use_pytorch_cross_attention = True  # as on a GPU
