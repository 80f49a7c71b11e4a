"""``tap ui``."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

from tap_diffusion.apps.cli.options import (
    DType,
    ModelDeviceOption,
    ModelDTypeOption,
    ModelOption,
    console,
    failed,
    importing,
    option,
    placement,
)
from tap_diffusion.core.errors import ConfigError, UnsupportedModelError, UsageError


def ui(
    model: ModelOption = "emoji",
    dtype: ModelDTypeOption = DType.auto,
    device: ModelDeviceOption = None,
    results: Annotated[
        Path | None, option("Page", help="results.json of a bench run, or its folder, to show the frontier of.")
    ] = None,
    host: Annotated[
        str, option("Page", help="Address to listen at; 0.0.0.0 lets in whoever reaches this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, option("Page", help="Port to listen at.", default="the first free from 7860", min=1, max=65535)
    ] = None,
) -> None:
    """Open a page in the browser: pictures or videos with and without TAP, how close they are, and what they cost.

    Example: tap ui --results bench/fashion/results.json
    """
    try:
        with importing("the page", "ui"):
            from tap_diffusion.apps.generate import load_pipeline
            from tap_diffusion.apps.ui.page import Page, serve
        plots = ""
        if results is not None:
            plots = _frontier(results.parent if results.name == "results.json" else results)
        where = placement(dtype, device)
        with console.status("loading the model, and trying it"):
            page = Page(model, lambda name: load_pipeline(name, *where))
        blocks = page.blocks(plots)
        address = serve(blocks, host, port)
    except (ConfigError, UnsupportedModelError, UsageError) as error:
        raise failed(error) from None
    console.print(f"Open {address} in a browser. Ctrl-C ends it.", highlight=False, soft_wrap=True)
    blocks.block_thread()


def _frontier(results: Path) -> str:
    """A bench run's figure, as SVG. Raises UsageError where the bench is not installed, or the folder holds no run."""
    drawn = entry_points(group="tap_diffusion.results")
    if "frontier" not in drawn.names:
        raise UsageError("--results needs the bench: pip install 'tap-diffusion[bench]'")
    with importing():
        found: str = drawn["frontier"].load()(results)
    return found
