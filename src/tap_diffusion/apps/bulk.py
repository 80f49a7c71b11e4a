"""Generating pictures or videos for many prompts, in this process or on Ray: what ``tap generate --engine`` does.

The output folder gets ``pictures``, one PNG or MP4 for each row, and ``manifest.parquet``, which tells of each row how
it was made and what came of it. Each finished batch leaves a small Parquet file of its own in ``parts``, merged into
the manifest at the end, so that whatever happens in between, the same call goes on from there.

A picture depends on its row alone. Its seed is the row's, batches are made from the file before anything is left out or
handed to a worker, and where samples of a batch would depend on each other they are generated one by one.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import ceil
from operator import methodcaller
from pathlib import Path
from typing import Any

import diffusers
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tap_diffusion import __version__
from tap_diffusion.apps.cut_off import watched
from tap_diffusion.apps.files import FPS, difference, write_whole
from tap_diffusion.apps.generate import Request, draw, load_pipeline
from tap_diffusion.apps.lora import Lora
from tap_diffusion.apps.media import encoded
from tap_diffusion.apps.pipelines import longest_prompt
from tap_diffusion.apps.prompts_file import ROWS, Row, batches
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.errors import UsageError
from tap_diffusion.integrations.diffusers.api import enable, report

TRIES = 3  # of a batch whose worker dies

MANIFEST = pa.schema(
    [
        *ROWS,
        ("file", pa.string()),  # in the output folder; null where there is an error
        ("error", pa.string()),
        ("cut_off", pa.string()),  # how a tokenizer cut the prompt; null where none did
        ("seconds", pa.float64()),  # share of the time of its batch
        ("batch", pa.int64()),  # pictures generated with it, itself included
        ("full_steps", pa.int64()),
        ("predicted_steps", pa.int64()),
        ("device", pa.string()),
        ("worker", pa.string()),  # host:process
        ("settings", pa.string()),  # JSON, what all pictures of a run have in common
    ]
)
RESULTS = MANIFEST.append(pa.field("content", pa.binary()))


@dataclass(frozen=True)
class Settings:
    """What all pictures of a run have in common.

    Attributes:
        model: as :func:`~tap_diffusion.apps.generate.load_pipeline` takes it.
        dtype: name of a torch dtype.
        guidance, frames: as in :class:`~tap_diffusion.apps.generate.Request`.
        fps: frames a second of videos.
        loras, compiled: as :func:`~tap_diffusion.apps.generate.load_pipeline` takes them.
    """

    model: str
    dtype: str
    steps: int
    guidance: float | None
    config: TAPConfig
    frames: int | None = None
    fps: int = FPS
    loras: tuple[Lora, ...] = ()
    compiled: bool = False

    def to_json(self) -> str:
        """All fields, and the versions that a picture depends on."""
        versions = {"tap_diffusion": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
        return json.dumps(asdict(self) | {"config": self.config.to_dict(), "versions": versions}, sort_keys=True)


Engine = Callable[[Settings, Sequence[Sequence[Row]]], Iterator[Any]]  # batches -> tables of RESULTS, in any order


def generate_many(
    rows: Sequence[Row],
    settings: Settings,
    out: Path,
    engine: Engine,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """Generate all rows that the folder doesn't hold yet.

    Args:
        engine: :func:`here` or :func:`on_ray`, with their options.
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
    if Path(settings.model).is_dir():
        settings = replace(settings, model=str(Path(settings.model).resolve()))  # workers may start in another folder
    loras = tuple(
        replace(lora, source=str(Path(lora.source).resolve())) if Path(lora.source).exists() else lora
        for lora in settings.loras
    )
    settings = replace(settings, loras=loras)
    manifest = Manifest(out)
    finished = manifest.finished(rows, settings)
    progress(len(finished), 0)
    left = ([row for row in batch if row.id not in finished] for batch in batches(rows, batch_size))
    todo = [batch for batch in left if batch]
    lost = {row.id: row for batch in todo for row in batch}
    try:
        for results in engine(settings, todo) if todo else ():
            manifest.add(results)
            for name in results["id"].to_pylist():
                lost.pop(name, None)
            progress(len(results), len(results) - results["error"].null_count)
        if lost:
            error = f"the worker that generated its batch died, {TRIES} times in a row; out of memory?"
            manifest.add(_table(settings, [asdict(row) | {"error": error} for row in lost.values()]))
            progress(len(lost), len(lost))
    finally:
        manifest.merge([row.id for row in rows])
    entries = manifest.entries()
    return [entries[row.id] for row in rows]


class Manifest:
    """What a folder holds: ``manifest.parquet``, and a part for each batch that was finished since.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._pictures, self._parts, self._merged = out / "pictures", out / "parts", out / "manifest.parquet"
        self._pictures.mkdir(parents=True, exist_ok=True)
        self._parts.mkdir(exist_ok=True)

    def entries(self) -> dict[str, dict[str, Any]]:
        """The newest entry of each id."""
        return _read(self._files())

    def finished(self, rows: Iterable[Row], settings: Settings) -> set[str]:
        """Ids of the rows whose pictures are there.

        Raises:
            UsageError: they were made with other settings, or from other rows.
        """
        good = {name: entry for name, entry in self.entries().items() if entry["error"] is None}
        for before in {entry["settings"] for entry in good.values()} - {settings.to_json()}:
            name, old, new = difference(json.loads(before), json.loads(settings.to_json()))
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
        for file, content in zip(results["file"].to_pylist(), results["content"].to_pylist(), strict=True):
            if file is not None:
                write_whole(self.out / file, methodcaller("write_bytes", content))
        # In order of time, the newest last; the rest of the name keeps two runs in one folder from losing each other's.
        part = self._parts / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
        write_whole(part, lambda partial: pq.write_table(results.drop_columns("content"), partial))

    def merge(self, order: Sequence[str]) -> None:
        """Make one file of all, these ids first."""
        files = self._files()
        entries = _read(files)
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


def _read(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for file in files for entry in pq.read_table(file).to_pylist()}


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
        self.pipe: Any = load_pipeline(
            settings.model, getattr(torch, settings.dtype), device, loras=settings.loras, compiled=settings.compiled
        )
        self.pipe.set_progress_bar_config(disable=True)
        self._request(None, None).check(self.pipe)
        enable(self.pipe, settings.config)
        self._place = {"device": str(self.pipe.device), "worker": f"{socket.gethostname()}:{os.getpid()}"}

    def __call__(self, batch: Any) -> Any:
        """Results of a batch of rows of one size, a table for a table."""
        return _table(self.settings, self._try([Row(**row) for row in batch.to_pylist()]))

    def _request(self, width: int | None, height: int | None) -> Request:
        settings = self.settings
        return Request(
            (), settings.steps, guidance=settings.guidance, height=height, width=width, frames=settings.frames
        )

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
        prompts = [row.prompt for row in rows]
        replace(request, prompts=prompts).check(self.pipe)
        columns = zip(*((row.prompt, row.seed, row.negative_prompt) for row in rows), strict=True)
        with watched(self.pipe, prompts, longest_prompt(self.pipe, request.arguments(self.pipe))) as cut:
            samples = draw(self.pipe, request, *columns)
        account = report(self.pipe)
        if account.fallbacks and len(rows) > 1:
            raise _Coupled("a value of one sample that is not finite made a step full for all of them")
        if not samples.isfinite().all():
            raise ValueError("the result has values that are not finite")
        files = [encoded(sample, self.settings.fps) for sample in samples]
        common = self._place | {
            "seconds": (time.perf_counter() - start) / len(rows),
            "batch": len(rows),
            "full_steps": account.full_steps,
            "predicted_steps": account.predicted_steps,
        }
        return [
            asdict(row)
            | common
            | {"file": f"pictures/{row.stem}{suffix}", "content": content, "cut_off": cut.of(row.prompt)}
            for row, (suffix, content) in zip(rows, files, strict=True)
        ]


class _Coupled(Exception):
    """The samples of a batch depend on each other."""


def _table(settings: Settings, entries: Iterable[dict[str, Any]]) -> Any:
    common = {"settings": settings.to_json()}
    return pa.Table.from_pylist([entry | common for entry in entries], schema=RESULTS)


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
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device is cpu or cuda with --engine ray, not '{device}': Ray gives each worker a GPU")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*deprecated", category=DeprecationWarning, module=__name__)
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise UsageError(f"no Ray cluster at {address}: {' '.join(str(error).split())}") from error
    return device or ("cuda" if ray.cluster_resources().get("GPU") else "cpu")


def on_ray(settings: Settings, todo: Sequence[Sequence[Row]], device: str, workers: int | None = None) -> Iterator[Any]:
    """Engine: Ray Data over a pool of actors, a worker each. :func:`connect` first.

    Args:
        workers: at most as many as there are GPUs, which is the default; on CPUs they share those of a machine, and
            the default is one for each machine.

    Raises:
        UsageError: there are fewer GPUs, or a worker can't start.
    """
    import ray

    workers, share = _shares([node["Resources"] for node in ray.nodes() if node["Alive"]], device, workers)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1  # a batch that no worker survives doesn't end the run
    results = ray.data.from_arrow([_as_table(batch) for batch in todo]).map_batches(
        Worker,
        fn_constructor_args=(settings, device),
        batch_size=None,  # a block, which is one of our batches
        batch_format="pyarrow",
        # One batch at a time, so that a death counts against the batch that caused it alone.
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(todo)), max_tasks_in_flight_per_actor=1),
        max_task_retries=TRIES - 1,
        **share,
    )
    try:
        yield from results.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.ActorDiedError as error:  # as it started; later it would be replaced
        reason = str(error).strip().splitlines()[-1].removeprefix(f"{UsageError.__module__}.{UsageError.__name__}: ")
        raise UsageError(f"a worker could not start: {reason}") from error


def _shares(machines: Sequence[dict[str, float]], device: str, workers: int | None) -> tuple[int, dict[str, float]]:
    """How many workers there are, and what each needs of the resources of these machines, as options of Ray's."""
    if device == "cuda":
        gpus = int(sum(resources.get("GPU", 0) for resources in machines))
        if (workers or 1) > gpus:
            raise UsageError(f"{workers or 1} workers on GPUs, and the cluster has {gpus} of them")
        return workers or gpus, {"num_gpus": 1}
    processors = [resources["CPU"] for resources in machines if resources.get("CPU")]
    workers = workers or len(processors)
    cores = min(processors) / ceil(workers / len(processors))
    return workers, {"num_cpus": int(cores) if cores >= 1 else cores}


def _as_table(batch: Iterable[Row]) -> Any:
    return pa.Table.from_pylist([asdict(row) for row in batch], schema=ROWS)
