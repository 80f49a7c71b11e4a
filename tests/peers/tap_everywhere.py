"""A pytest plugin that runs diffusers' own tests with TAP enabled on every transformer and pipeline they build.

    git clone https://github.com/huggingface/diffusers diffusers-src
    cd diffusers-src
    PYTHONPATH=…/tap-diffusion/tests python -m pytest -p peers.tap_everywhere --tap one-full-step tests/pipelines/flux

``--tap plain`` leaves TAP out, to compare with; ``interval=1`` makes every step full; ``one-full-step`` predicts all
steps of a trajectory but its first. The installed diffusers is tested, not the checkout's own. What the tests take
from the hub is made by :mod:`peers.offline_hub`; nothing is downloaded. A test that :mod:`peers.expected` lists counts
as xfailed with its reason, and fails if it passes.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before huggingface_hub reads them.
os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp(prefix="tap-peers-hub-")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from diffusers import DiffusionPipeline, ModelMixin

import tap_diffusion as tap
from peers import offline_hub
from peers.expected import reason
from tap_diffusion.core.engine import Engine
from tap_diffusion.integrations.specs import SPECS

counts = Counter[str]()
MODES = {
    "plain": None,
    "interval=1": tap.TAPConfig(interval=1),
    "one-full-step": tap.TAPConfig(full_steps=(0,)),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tap", choices=sorted(MODES), default="plain", help="TAP on every model and pipeline built")


def pytest_sessionstart(session: pytest.Session) -> None:
    offline_hub.make(Path(os.environ["HF_HUB_CACHE"]))
    count_calls(Engine)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["HF_HUB_CACHE"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say that TAP was there: tests that pass without it tell nothing."""
    terminalreporter.write_line(
        f"TAP: enabled {counts['enabled']} times, {counts['full']} full and {counts['predicted']} predicted calls"
    )


def count_calls(engine: Any) -> None:
    end = engine.end

    def counted_end(self: Any, call: Any, full: bool, *args: Any) -> None:
        counts["full" if full else "predicted"] += 1
        end(self, call, full, *args)

    engine.end = counted_end


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All test modules have been imported, and with them the classes they use."""
    mode = config.getoption("--tap")
    settings = MODES[mode]
    if settings is not None:
        for cls in _subclasses(ModelMixin):
            if cls.__name__ in SPECS:
                _enable_when_built(cls, settings)
        for cls in _subclasses(DiffusionPipeline):
            _enable_when_built(cls, settings)
    for item in items:
        why = reason(item.nodeid, mode)
        if why is not None:
            item.add_marker(pytest.mark.xfail(reason=why, strict=True))


def _subclasses(cls: Any) -> Iterator[Any]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _enable_when_built(cls: Any, settings: tap.TAPConfig) -> None:
    """Enable TAP at the end of a class's constructor; not of its parents' while that runs."""
    build: Callable[..., None] = cls.__init__

    @functools.wraps(build)
    def build_and_enable(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if type(self) is cls:
            try:
                tap.enable(self, settings)
                counts["enabled"] += 1
            except tap.UnsupportedModelError:  # a pipeline of UNets, or without its transformer
                if cls.__name__ in SPECS:
                    raise

    cls.__init__ = build_and_enable
