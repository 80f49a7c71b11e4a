"""Generating pictures for many prompts, in this process or on Ray: what ``tap generate --engine`` does.

The output folder gets ``pictures``, one PNG for each row, and ``manifest.parquet``, which tells of each row how it was
made and what came of it. Each finished batch leaves a small Parquet file of its own in ``parts``, merged into the
manifest at the end, so that whatever happens in between, the same call goes on from there.

A picture depends on its row alone. Its seed is the row's, batches are made from the file before anything is left out or
handed to a worker, and where samples of a batch would depend on each other they are generated one by one.
"""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import quote

import diffusers
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tap_diffusion import __version__
from tap_diffusion.config import TAPConfig
from tap_diffusion.demo.sheets import to_image
from tap_diffusion.errors import UsageError
from tap_diffusion.files import write_whole
from tap_diffusion.generate import Request, draw, load_pipeline
from tap_diffusion.integrations.api import enable, report

TRIES = 4  # of a batch whose worker dies

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
_OUTCOMES = pa.schema(
    [
        *ROWS,
        ("file", pa.string()),  # in the output folder; null where there is an error
        ("error", pa.string()),
        ("seconds", pa.float64()),  # share of the time of its batch
        ("batch", pa.int64()),  # pictures generated with it, itself included
        ("full_steps", pa.int64()),
        ("predicted_steps", pa.int64()),
        ("device", pa.string()),
        ("worker", pa.string()),  # host:process
    ]
)
MANIFEST = _OUTCOMES.append(pa.field("settings", pa.string()))  # JSON, what all pictures of a run have in common
_RESULTS = _OUTCOMES.append(pa.field("png", pa.binary()))


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


@dataclass(frozen=True)
class Settings:
    """What all pictures of a run have in common.

    Attributes:
        model: as :func:`~tap_diffusion.generate.load_pipeline` takes it.
        dtype: name of a torch dtype.
        guidance: as in :class:`~tap_diffusion.generate.Request`.
    """

    model: str
    dtype: str
    steps: int
    guidance: float | None
    config: TAPConfig

    def to_json(self) -> str:
        """All fields, and the versions that a picture depends on."""
        versions = {"tap_diffusion": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
        return json.dumps(asdict(self) | {"config": self.config.to_dict(), "versions": versions}, sort_keys=True)


Engine = Callable[[Settings, Sequence[Sequence[Row]]], Iterator[Any]]  # batches to tables of results, in any order


def generate_many(
    rows: Sequence[Row],
    settings: Settings,
    out: Path,
    engine: Engine,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, failed: None,
) -> list[dict[str, Any]]:
    """Generate all rows that the folder doesn't hold yet.

    Args:
        engine: :func:`here`, or :func:`on_ray` with its options.
        batch_size: pictures generated at a time, all of one size.
        progress: told how many rows more are done, and how many of these have failed.

    Returns:
        the rows of the manifest that belong to ``rows``, in their order. An error in one of them is no exception.

    Raises:
        UsageError: the folder holds pictures of other settings, or other pictures of the same ids; or nothing can be
            generated at all with these settings.
    """
    if settings.config.granularity == "batch" and batch_size > 1:
        raise UsageError(
            "granularity 'batch' makes a picture depend on the others in its batch; give --batch-size 1, or choose"
            " 'sample' or 'token'"
        )
    manifest = Manifest(out, settings)
    finished = manifest.finished(rows)
    progress(len(finished), 0)
    left = ([row for row in batch if row.id not in finished] for batch in batches(rows, batch_size))
    todo = [batch for batch in left if batch]
    lost = {row.id: row for batch in todo for row in batch}
    try:
        for results in engine(settings, todo) if todo else ():
            manifest.add(results)
            for name in results["id"].to_pylist():
                del lost[name]
            progress(len(results), len(results) - results["error"].null_count)
        if lost:
            error = f"its worker died, {TRIES} times in a row; out of memory?"
            manifest.add(_table(asdict(row) | {"error": error} for row in lost.values()))
            progress(len(lost), len(lost))
    finally:
        manifest.merge([row.id for row in rows])
    entries = manifest.entries()
    return [entries[row.id] for row in rows]


def batches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """At most ``size`` rows each, all of one width and height, by the order of their first rows."""
    by_size: dict[tuple[int | None, int | None], list[tuple[int, Row]]] = {}
    for place, row in enumerate(rows):
        by_size.setdefault((row.width, row.height), []).append((place, row))
    cut = [same[i : i + size] for same in by_size.values() for i in range(0, len(same), size)]
    return [[row for _, row in batch] for batch in sorted(cut, key=lambda batch: batch[0][0])]


# ------------------------------------------------------------------------------------------------------------- the file


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
    rows, places = [], {}
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
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
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

    def number(name: str, least: int, default: int | None) -> int | None:
        value = record.get(name)
        if value is None or value != value:  # pandas writes a missing integer as NaN, and the others as floats
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
            raise ValueError(f"its {name} is {value!r}, not an integer of at least {least}")
        return value

    prompt, name = text("prompt"), record.get("id")
    if prompt is None:
        raise ValueError("it has no prompt")
    if name is None:
        name = f"{place:06d}"
    elif not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise ValueError(f"its id is {name!r}, not a string or an integer")
    own = number("seed", 0, None)
    return Row(
        str(name), prompt, seed + place if own is None else own, text("negative_prompt"),
        number("width", 1, width), number("height", 1, height),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the folder


class Manifest:
    """What a folder holds: ``manifest.parquet``, and a part for each batch that was finished since.

    Args:
        out: the folder.
        settings: of the pictures that it holds, or that are to come.
    """

    def __init__(self, out: Path, settings: Settings) -> None:
        self.out, self._settings = out, settings.to_json()
        self._pictures, self._parts, self._merged = out / "pictures", out / "parts", out / "manifest.parquet"
        self._pictures.mkdir(parents=True, exist_ok=True)
        self._parts.mkdir(exist_ok=True)
        self._count = max((int(part.name.partition("-")[0]) for part in self._parts.glob("*.parquet")), default=0)

    def entries(self) -> dict[str, dict[str, Any]]:
        """The newest entry of each id."""
        return self._read(self._files())

    def finished(self, rows: Iterable[Row]) -> set[str]:
        """Ids of the rows whose pictures are there.

        Raises:
            UsageError: they were made with other settings, or from other rows.
        """
        good = {name: entry for name, entry in self.entries().items() if entry["error"] is None}
        for before in {entry["settings"] for entry in good.values()} - {self._settings}:
            name, old, new = _difference(json.loads(before), json.loads(self._settings))
            raise UsageError(f"{self.out} holds pictures made with {name} {old}, not {new}; choose another --out")
        there = {file.name for file in self._pictures.iterdir()}
        finished = set()
        for row in rows:
            entry = good.get(row.id)
            if entry is None or Path(entry["file"]).name not in there:
                continue
            for name, value in asdict(row).items():
                if entry[name] != value:
                    raise UsageError(
                        f"{self.out} holds a picture '{row.id}' with {name} {entry[name]!r}, not {value!r};"
                        " choose another --out, or give the row another id"
                    )
            finished.add(row.id)
        return finished

    def add(self, results: Any) -> None:
        """Write the pictures of a batch, and then its part, each whole or not at all."""
        for file, png in zip(results["file"].to_pylist(), results["png"].to_pylist(), strict=True):
            if file is not None:
                write_whole(self.out / file, lambda partial, png=png: partial.write_bytes(png))
        self._count += 1
        # The rest of its name keeps two runs in one folder from losing each other's.
        part = self._parts / f"{self._count:06d}-{uuid.uuid4().hex[:8]}.parquet"
        outcomes = results.select(_OUTCOMES.names)
        table = outcomes.append_column(MANIFEST.field("settings"), pa.array([self._settings] * len(outcomes)))
        write_whole(part, lambda partial: pq.write_table(table, partial))

    def merge(self, order: Sequence[str]) -> None:
        """Make one file of all, these ids first."""
        files = self._files()
        entries = self._read(files)
        first = {name: entries[name] for name in order if name in entries}
        table = pa.Table.from_pylist(list((first | entries).values()), schema=MANIFEST)
        write_whole(self._merged, lambda partial: pq.write_table(table, partial))
        for file in files:
            if file != self._merged:
                file.unlink(missing_ok=True)
        with suppress(OSError):  # another run has parts there
            self._parts.rmdir()

    def _files(self) -> list[Path]:
        merged = [self._merged] if self._merged.exists() else []
        return merged + sorted(self._parts.glob("*.parquet"))

    @staticmethod
    def _read(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
        return {entry["id"]: entry for file in files for entry in pq.read_table(file).to_pylist()}


def _difference(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, Any, Any]:
    """The first of two settings that differ, by its own name."""
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            return _difference(old, new)
        if old != new:
            return name, old, new
    raise ValueError("the settings are the same")


# ---------------------------------------------------------------------------------------------------------- the workers


class Worker:
    """One pipeline, that generates batches: an actor of Ray's, or a part of this process.

    Args:
        settings: of the run.
        device: of the pipeline.

    Raises:
        UsageError: the model can't be loaded, or is not one that can generate pictures from prompts.
    """

    def __init__(self, settings: Settings, device: str) -> None:
        self.settings = settings
        self.pipe: Any = load_pipeline(settings.model, getattr(torch, settings.dtype), device)
        self.pipe.set_progress_bar_config(disable=True)
        self._request(None, None).check(self.pipe)
        enable(self.pipe, settings.config)
        self._place = {"device": str(self.pipe.device), "worker": f"{socket.gethostname()}:{os.getpid()}"}

    def __call__(self, batch: Any) -> Any:
        """Results of a batch of rows of one size, a table for a table."""
        return _table(self._try([Row(**row) for row in batch.to_pylist()]))

    def _request(self, width: int | None, height: int | None) -> Request:
        return Request((), self.settings.steps, guidance=self.settings.guidance, height=height, width=width)

    def _try(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        try:
            return self._entries(rows)
        except Exception as error:
            if len(rows) == 1:
                kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
                return [asdict(rows[0]) | self._place | {"error": kind + " ".join(str(error).split()), "batch": 1}]
        return [entry for row in rows for entry in self._try([row])]

    def _entries(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        start = time.perf_counter()
        request = self._request(rows[0].width, rows[0].height)
        request.check(self.pipe)
        columns = zip(*((row.prompt, row.seed, row.negative_prompt) for row in rows), strict=True)
        pictures = draw(self.pipe, request, *columns)
        account = report(self.pipe)
        if account.fallbacks and len(rows) > 1:
            raise _Coupled("a value of one sample that is not finite made a step full for all of them")
        if not pictures.isfinite().all():
            raise ValueError("the picture has values that are not finite")
        files = [io.BytesIO() for _ in rows]
        for picture, file in zip(pictures, files, strict=True):
            to_image(picture).save(file, "png")
        common = self._place | {
            "seconds": (time.perf_counter() - start) / len(rows),
            "batch": len(rows),
            "full_steps": account.full_steps,
            "predicted_steps": account.predicted_steps,
        }
        return [
            asdict(row) | common | {"file": f"pictures/{quote(row.id, safe='')}.png", "png": file.getvalue()}
            for row, file in zip(rows, files, strict=True)
        ]


class _Coupled(Exception):
    """The samples of a batch depend on each other."""


def _table(entries: Iterable[dict[str, Any]]) -> Any:
    return pa.Table.from_pylist(list(entries), schema=_RESULTS)


def here(settings: Settings, todo: Sequence[Sequence[Row]], device: str) -> Iterator[Any]:
    """Engine: one worker, in this process."""
    return map(Worker(settings, device), map(_as_table, todo))


def connect(address: str | None, device: str | None) -> str:
    """Connect to Ray, at an address or anew on this machine, and tell the device that its workers are to use.

    Raises:
        UsageError: Ray is not installed or nothing answers at the address, or the device is none that a worker has.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise UsageError(f"--engine ray needs {error.name}: pip install 'tap-diffusion[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise UsageError(f"no Ray cluster at {address}: {' '.join(str(error).split())}") from error
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device is cpu or cuda with --engine ray, not '{device}': Ray gives each worker a GPU")
    return device or ("cuda" if ray.cluster_resources().get("GPU") else "cpu")


def on_ray(settings: Settings, todo: Sequence[Sequence[Row]], device: str, workers: int | None = None) -> Iterator[Any]:
    """Engine: Ray Data over a pool of actors, a worker each. :func:`connect` first.

    Args:
        workers: at most as many as there are GPUs, which is the default; on CPUs they share those of a machine, and
            the default is one for each machine.
    """
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(resources.get("GPU", 0) for resources in machines))
    if device == "cuda":
        if (workers or 1) > gpus:
            raise UsageError(f"{workers or 1} workers on GPUs, and the cluster has {gpus} of them")
        share: dict[str, float] = {"num_gpus": 1}
        workers = workers or gpus
    else:
        workers = workers or len(machines)
        cores = min(resources.get("CPU", 1) for resources in machines) / ceil(workers / len(machines))
        share = {"num_cpus": int(cores) if cores >= 1 else cores}
    if Path(settings.model).is_dir():
        settings = replace(settings, model=str(Path(settings.model).resolve()))  # workers start in another folder
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a batch that no worker survives doesn't end the run
    results = ray.data.from_arrow([_as_table(batch) for batch in todo]).map_batches(
        Worker,
        fn_constructor_args=(settings, device),
        batch_size=None,  # a block, which is one of our batches
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(todo))),
        max_task_retries=TRIES - 1,
        **share,
    )
    yield from results.iter_batches(batch_size=None, batch_format="pyarrow")


def _as_table(batch: Iterable[Row]) -> Any:
    return pa.Table.from_pylist([asdict(row) for row in batch], schema=ROWS)
