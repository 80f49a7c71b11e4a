"""Writing files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FPS = 16  # frames a second of videos, where none are given: Wan's; pipelines don't tell


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = file.with_suffix(".partial")
    write(partial)
    partial.replace(file)


def difference(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, Any, Any]:
    """The first of two settings that differ, by its own name.

    Raises:
        ValueError: none do.
    """
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            return difference(old, new)
        if old != new:
            return name, old, new
    raise ValueError("the settings are the same")


def write_json(file: Path, value: Any) -> None:
    """Write JSON, indented."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(file, lambda partial: partial.write_text(text, encoding="utf-8"))
