"""The example notebook runs, and shows what it gives."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

FILE = Path(__file__).parents[2] / "examples" / "quality_for_speed.ipynb"


def printed(cell: dict[str, Any]) -> str:
    return "".join(text for output in cell["outputs"] if output.get("name") == "stdout" for text in output["text"])


@pytest.mark.slow
def test_the_notebook_gives_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mpl.rcParams, "backend", "agg")
    cells = [cell for cell in json.loads(FILE.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    namespace: dict[str, Any] = {}
    for i, cell in enumerate(cells):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("".join(cell["source"]), f"{FILE.name}, code cell {i + 1}", "exec"), namespace)
        text, shown = out.getvalue(), printed(cell)
        assert re.sub(r"[\d.]+", "#", text) == re.sub(r"[\d.]+", "#", shown)
        values = [[float(number) for number in re.findall(r"\d+(?:\.\d+)?", part)] for part in (text, shown)]
        # In dB, of which another processor may give a little more or less.
        assert values[0] == pytest.approx(values[1], abs=0.3), f"jupyter nbconvert --execute --inplace {FILE.name}"
    assert sum("image/png" in output.get("data", ()) for cell in cells for output in cell["outputs"]) == 2
