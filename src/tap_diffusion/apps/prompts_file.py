"""What to generate in bulk: rows of a file of prompts, and batches of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from tap_diffusion.core.errors import UsageError

LONGEST = 200  # bytes of a file's name, without its suffix

ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("negative_prompt", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Row:
    """One picture to generate.

    Attributes:
        id: names it; no two rows of a run have the same.
        seed: of its own generator.
        negative_prompt: None is an empty one.
        width, height: pixels; None is the model's own.
    """

    id: str
    prompt: str
    seed: int
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None

    @property
    def stem(self) -> str:
        """Its file's name, without a suffix."""
        return quote(self.id, safe=" ")


def batches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """At most ``size`` rows each, all of one width and height, by the order of their first rows."""
    places = {row.id: place for place, row in enumerate(rows)}
    by_size: dict[tuple[int | None, int | None], list[Row]] = {}
    for row in rows:
        by_size.setdefault((row.width, row.height), []).append(row)
    cut = [same[i : i + size] for same in by_size.values() for i in range(0, len(same), size)]
    return sorted(cut, key=lambda batch: places[batch[0].id])


def read_rows(
    file: Path, seed: int, width: int | None = None, height: int | None = None
) -> tuple[list[Row], list[str]]:
    """Read what to generate: JSON lines, Parquet, or (any other name) one prompt a line.

    A row without ``id`` is called by its place in the file, and without ``seed`` it has ``seed`` plus that place.

    Args:
        width, height: of rows that have none.

    Returns:
        the rows, and the names of columns that mean nothing here.

    Raises:
        UsageError: the file can't be read, a value is of the wrong type, or two rows have the same id.
    """
    try:
        records = list(_records(file))
    except (OSError, ValueError, pa.ArrowException) as error:  # a ValueError is of the encoding, or JSON's
        raise UsageError(f"can't read the prompt file {file}: {error}") from error
    if not records:
        raise UsageError(f"the prompt file {file} is empty")
    rows: list[Row] = []
    places: dict[str, int] = {}
    for place, record in enumerate(records):
        try:
            row = _row(record, place, seed, width, height)
        except ValueError as error:
            raise UsageError(f"{file}, row {place + 1}: {error}") from error
        if row.id in places:
            raise UsageError(f"{file}, rows {places[row.id] + 1} and {place + 1}: both have the id '{row.id}'")
        places[row.id] = place
        rows.append(row)
    return rows, sorted({name for record in records for name in record} - set(ROWS.names))


def _records(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        yield from pq.read_table(file).to_pylist()
        return
    # Not splitlines: JSON may have other separators than these within a string. Windows may put a mark in front.
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            yield {"prompt": line.strip()}
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is not a JSON object")
        yield record


def _row(record: dict[str, Any], place: int, seed: int, width: int | None, height: int | None) -> Row:
    def text(name: str) -> str | None:
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"its {name} is {value!r}, not a string")
        return value

    def number(name: str, least: int) -> int | None:
        value = record.get(name)
        if value is None or value != value:  # pandas writes a missing integer as NaN, and the others as floats
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
            raise ValueError(f"its {name} is {value!r}, not an integer of at least {least}")
        return value

    prompt, name, own = text("prompt"), record.get("id"), number("seed", 0)
    if prompt is None:
        raise ValueError("it has no prompt")
    if name is None:
        name = f"{place:06d}"
    elif not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise ValueError(f"its id is {name!r}, not a string or an integer")
    row = Row(
        str(name), prompt, seed + place if own is None else own, text("negative_prompt"),
        number("width", 1) or width, number("height", 1) or height,
    )  # fmt: skip
    if len(row.stem) > LONGEST:
        raise ValueError(f"its id is too long for a file's name: {row.id[:40]}…")
    return row
