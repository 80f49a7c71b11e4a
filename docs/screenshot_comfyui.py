"""The picture of a workflow in ComfyUI's own page.

    python main.py --cpu --port 8188    # ComfyUI with the node; empty files stand in for the models that it names
    python docs/screenshot_comfyui.py http://127.0.0.1:8188 comfyui/example_workflows/flux_tap.json page.png
    convert page.png -quality 88 comfyui/example_workflows/flux_tap.jpg

Needs Chromium and the package websocket-client.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import websocket

WIDTH, HEIGHT, PORT = 1400, 780, 9333
# No tutorial, no map, narrow side bar. ComfyUI keeps these.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False,
            "Comfy.Sidebar.Size": "small"}  # fmt: skip
READY = "!!(window.app?.graph && window.app.canvas && window.LiteGraph?.registered_node_types['TAPAccelerate'])"
PLACE = "const view = app.canvas.ds; view.scale = 1; view.offset[0] = 45; view.offset[1] = 80"


def until(found: Callable[[], Any], seconds: float = 120) -> Any:
    """What a function returns as soon as it returns something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if result := found():
                return result
        except OSError:
            pass
        time.sleep(0.5)
    raise TimeoutError


class Page:
    """A page of Chromium, by its devtools protocol."""

    def __init__(self, url: str) -> None:
        self._socket = websocket.create_connection(url, timeout=120)
        self._count = 0

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """Run a command and wait for its result."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": params}))
        while (answer := json.loads(self._socket.recv())).get("id") != self._count:
            pass
        return answer["result"]

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        done = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return done["result"].get("value")


def main(url: str, workflow: str, out: str) -> None:
    """Open the page, load the workflow, wait until it is drawn, and save the picture."""
    data = json.dumps(SETTINGS).encode()
    urllib.request.urlopen(urllib.request.Request(f"{url}/settings", data, {"Content-Type": "application/json"}))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--remote-debugging-port={PORT}",
             "--remote-allow-origins=*", f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            tabs = until(lambda: json.load(urllib.request.urlopen(f"http://127.0.0.1:{PORT}/json")))
            page = Page(next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"))
            page("Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1, mobile=False)
            page("Page.navigate", url=url)
            until(lambda: page.run(READY))
            time.sleep(3)
            graph = Path(workflow).read_text(encoding="utf-8")
            page.run(f"app.loadGraphData({graph}, true, true, '{Path(workflow).stem}')")
            time.sleep(3)
            page.run(f"{PLACE}; app.graph.setDirtyCanvas(true, true)")
            time.sleep(2)
            Path(out).write_bytes(base64.b64decode(page("Page.captureScreenshot", format="png")["data"]))
        finally:
            browser.terminate()
            browser.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
