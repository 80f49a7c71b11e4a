"""ComfyUI's server in a process of its own, with the node folder installed in one of the ways of its README."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from real import COMFYUI

ROOT = Path(__file__).parents[2]
START = """
import runpy, sys
comfyui, tests, *arguments = sys.argv[1:]
sys.path.insert(0, tests)
import standins
standins.install()
sys.path[0] = comfyui
sys.argv = ["main.py", *arguments]
runpy.run_path(f"{comfyui}/main.py", run_name="__main__")
"""
# A node of its own, to see what the server has imported.
WITNESS = """
import sys

class Witness:
    RETURN_TYPES, FUNCTION, CATEGORY = (), "run", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        found = {name: sys.modules[name].__file__ for name in ("tap_diffusion", "diffusers") if name in sys.modules}
        return {"required": {"found": ("STRING", {"default": found})}}

NODE_CLASS_MAPPINGS = {"Witness": Witness}
"""


class Server:
    """A running server.

    Attributes:
        base: its folder, with ``models``, ``custom_nodes``, ``output``.
    """

    def __init__(self, base: Path, port: int) -> None:
        self.base, self._url = base, f"http://127.0.0.1:{port}"

    @property
    def log(self) -> str:
        return (self.base / "log.txt").read_text(errors="replace")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self._url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, data: Any) -> tuple[int, Any]:
        """Status and answer."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, json.dumps(data).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
                return answer.status, json.loads(body) if body else None
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def queue(self, prompt: dict[str, Any]) -> tuple[int, Any]:
        """Check a workflow, in the form of ComfyUI's API, and have it run where it is right."""
        return self.post("/prompt", {"prompt": prompt})

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Run a workflow to its end: its entry in the history."""
        status, answer = self.queue(prompt)
        assert status == 200, answer
        return self.ended(answer["prompt_id"])

    def ended(self, number: str) -> dict[str, Any]:
        """The entry in the history of a workflow that was queued, once it has ended."""
        self.wait_for(lambda: number in self.get(f"/history/{number}"))
        found: dict[str, Any] = self.get(f"/history/{number}")[number]
        return found

    def wait_for(self, condition: Callable[[], bool], timeout: float = 300) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"the log ends so:\n{self.log[-3000:]}")
            time.sleep(0.2)


def checkout(folder: Path) -> None:
    """What `git clone` of this repository would bring, as the work tree is now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


@contextmanager
def running(base: Path, *, path: Path | None = None, timeout: float = 300) -> Iterator[Server]:
    """A server on what lies in a folder, its custom nodes among it. ``path`` comes before all other Python packages."""
    for name in ("custom_nodes", "models", "page"):
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "page" / "index.html").touch()
    (base / "custom_nodes" / "witness.py").write_text(WITNESS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [
        sys.executable, "-c", START, str(COMFYUI), str(Path(__file__).parent), "--cpu", "--disable-api-nodes",
        "--disable-metadata", "--use-pytorch-cross-attention", "--database-url", "sqlite:///:memory:",
        "--base-directory", str(base), "--front-end-root", str(base / "page"), "--port", str(port),
    ]  # fmt: skip
    server = Server(base, port)
    with (base / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=base)
    try:
        end = time.monotonic() + timeout
        while True:
            try:
                server.get("/system_stats")
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"ComfyUI's server did not start:\n{server.log[-5000:]}") from error
                time.sleep(0.3)
        yield server
    finally:
        process.terminate()
        process.wait(30)
