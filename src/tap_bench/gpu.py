"""Everything that has to be measured on a GPU, a part at a time, each into one JSON file.

    gpu/run.sh                                          # all parts, one after the other: see gpu/README.md
    python -m tap_bench.gpu flux --out flux.json        # one part
    python -m tap_bench.gpu flux --tiny --out tiny.json # on a CPU, to see that it runs: the figures mean nothing

Models have their true size and random weights, made on the device. A section of a part that fails leaves its error in
the file, and the next one runs.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from tap_bench.profile import machine, profile
from tap_bench.profile.loops import Loops, attempted
from tap_bench.profile.subjects import Subject, of_size
from tap_bench.profile.timing import peak_memory
from tap_diffusion.apps.files import write_json
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.integrations.diffusers.api import enabled, report

TESTS = Path("tests/core/test_kernels.py"), Path("tests/bench/test_kernels_at_size.py")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Option(help="JSON file to write.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="A tiny model on the CPU: the figures mean nothing.")]


@dataclass
class Part:
    """One part: its sections so far, in its file after each.

    Args:
        out: the file.
        tiny: on the CPU.

    Raises:
        typer.BadParameter: there is no GPU.
    """

    out: Path
    tiny: bool
    sections: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        if not self.tiny and not torch.cuda.is_available():
            raise typer.BadParameter("there is no GPU; --tiny runs on the CPU")
        self.device, self.dtype = ("cpu", torch.float32) if self.tiny else ("cuda", torch.bfloat16)
        self.sections = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(torch.device(self.device)),
            "tiny": self.tiny,
        }

    def do(self, name: str, section: Callable[[], Any]) -> None:
        """Run a section and write what it returns, or its error."""
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        self.sections[name] = attempted(section) | {"took_s": round(time.perf_counter() - start, 1)}
        write_json(self.out, self.sections)

    def subject(self, size: str, **shape: int | None) -> Subject:
        """A transformer of a size, or the tiny one."""
        return of_size("tiny", self.dtype, self.device) if self.tiny else of_size(size, self.dtype, "cuda", **shape)

    def free(self) -> None:
        """Give memory back."""
        gc.collect()  # hooks are in cycles with the model
        if not self.tiny:
            torch.cuda.empty_cache()

    def end(self) -> None:
        """Exit with 1 where a section failed."""
        failed = [name for name, section in self.sections.items() if isinstance(section, dict) and "error" in section]
        if failed:
            print(f"failed: {', '.join(failed)}", flush=True)
            raise typer.Exit(1)


# ---------------------------------------------------------------------------------------------------------- the kernels


@app.command()
def kernels(out: Out, tiny: Tiny = False) -> None:
    """The kernels' tests, which run on the GPU there, and what bandwidth they reach beside a copy."""
    part = Part(out, tiny)
    size = ["--size", "1x64x32", "--rounds", "1"] if tiny else []
    part.do("bandwidth", partial(_benchmark, size))
    files = [file for file in TESTS if file.exists()]  # in a checkout
    if files:
        part.do("tests", partial(_tests, [*map(str, files[:1]), "-k", "ties"] if tiny else [*map(str, files)]))
    part.end()


def _benchmark(arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.json"
        _output("tap_bench.kernels", "--out", str(file), *arguments)
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found


def _tests(arguments: list[str]) -> dict[str, Any]:
    return {"passed": _output("pytest", "-n", "0", "-q", *arguments).splitlines()[-1]}


def _output(module: str, *arguments: str) -> str:
    """What a Python module prints that is run by itself; RuntimeError where it fails."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


# ------------------------------------------------------------------------------------------------------ FLUX, true size


@app.command()
def flux(out: Out, tiny: Tiny = False) -> None:
    """FLUX.1-dev at 1024²: a predicted step part by part, whole loops, memory, waits of the host, and TAP disabled."""
    part = Part(out, tiny)
    subject = part.subject("flux")
    steps, repeats = (12, 1) if tiny else (50, 3)
    part.do("off", partial(_off, subject))
    part.do("waits", partial(_waits, subject, steps))
    part.do("profile", partial(profile, subject, TAPConfig(full_steps=steps // 6), steps, 1))
    for count, speedups in ((steps, (5.0, 6.25)), (steps // 2 + 3, (4.0, 5.0))):
        part.do(f"{count} steps", partial(_loops, subject, count, speedups, repeats))
    part.end()


def _off(subject: Subject) -> dict[str, Any]:
    """Whether outputs are the same to the bit, with every step full and after TAP was disabled."""

    def drawn() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        images: torch.Tensor = subject.pipe(num_inference_steps=4, generator=generator).images
        return images

    plain = drawn()
    with enabled(subject.pipe, TAPConfig(interval=1)):
        full = drawn()
    with enabled(subject.pipe, TAPConfig(full_steps=2)):
        predicted = drawn()
    return {
        "interval_1_equal": torch.equal(full, plain),
        "disabled_equal": torch.equal(drawn(), plain),
        "finite": bool(predicted.isfinite().all()),
    }


def _waits(subject: Subject, steps: int) -> dict[str, Any]:
    """How often the host waits for the device in a run, the plain model's and TAP's."""
    found: dict[str, Any] = {}
    for name, config in (("plain", None), ("tap", TAPConfig(full_steps=steps // 6))):
        with _counted_waits() as counted:
            if config is None:
                subject.run(steps)
            else:
                with enabled(subject.pipe, config):
                    subject.run(steps)
        found[name] = len(counted)
        found[f"{name}_where"] = sorted(set(counted))[:20]
    return found


@contextmanager
def _counted_waits() -> Iterator[list[str]]:
    """Where the host waits for the device within a ``with`` block, as PyTorch notices it."""
    seen: list[str] = []
    if not torch.cuda.is_available():
        yield seen
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
            seen += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def _loops(subject: Subject, steps: int, speedups: tuple[float, ...], repeats: int) -> dict[str, Any]:
    """Seconds of the plain loop and TAP's, taking turns; how near to the limit, and memory."""
    configs: dict[str, TAPConfig | None] = {"plain": None}
    configs |= {f"{speedup:g}x": TAPConfig(full_steps=round(steps / speedup)) for speedup in speedups}
    rows: dict[str, dict[str, Any]] = {name: {"seconds_each": []} for name in configs}
    for turn in range(repeats + 1):  # the first warms up
        for name, config in configs.items():
            with peak_memory(subject.device) as peak:
                seconds, account = _timed(subject, config, steps)
                rows[name]["peak_bytes"] = peak()
            if turn:
                rows[name]["seconds_each"].append(seconds)
            if account is not None:
                rows[name] |= account
    plain = median(rows["plain"]["seconds_each"])
    for row in rows.values():
        row["seconds"] = median(row["seconds_each"])
        row["speedup"] = plain / row["seconds"]
        if "full_steps" in row:
            row["share_of_limit"] = row["speedup"] * row["full_steps"] / steps
    return rows


def _timed(subject: Subject, config: TAPConfig | None, steps: int) -> tuple[float, dict[str, Any] | None]:
    if config is None:
        stop = subject.stopwatch()
        subject.run(steps)
        return stop()() / 1000, None
    with enabled(subject.pipe, config):
        stop = subject.stopwatch()
        subject.run(steps)
        seconds = stop()() / 1000
        account = report(subject.pipe)
        return seconds, {
            "full_steps": account.full_steps, "cache_bytes": account.cache_bytes,
            "full_step_ms": account.full_step_ms, "predicted_step_ms": account.predicted_step_ms,
            "fallbacks": dict(account.fallbacks),
        }  # fmt: skip


@app.command()
def compiled(out: Out, tiny: Tiny = False) -> None:
    """FLUX.1-dev after its repeated blocks are compiled, plain and with TAP."""
    part = Part(out, tiny)
    subject = part.subject("flux")
    steps, full_steps = (12, 4) if tiny else (50, 8)
    loops = Loops(subject, steps, full_steps, repeats=1 if tiny else 3)
    part.do("loops", partial(loops.compiled, "eager" if tiny else "inductor"))
    part.end()


@app.command()
def peers(out: Out, tiny: Tiny = False) -> None:
    """FLUX.1-dev with TAP, and with the caches of diffusers and cache-dit at as many full steps."""
    part = Part(out, tiny)
    steps, full_steps = (12, 4) if tiny else (50, 8)
    part.do("loops", Loops(part.subject("flux"), steps, full_steps, repeats=1).methods)
    part.end()


@app.command()
def others(out: Out, tiny: Tiny = False) -> None:
    """Wan2.1-1.3B at 480p with guidance in two calls, and Qwen-Image at its true width."""
    part = Part(out, tiny)
    steps = 12 if tiny else 50
    for name, shape in (("wan-1.3b", {"frames": 33}), ("qwen-image", {"blocks": 20})):
        subject = part.subject(name, **shape)
        if name == "wan-1.3b":
            subject.pipe.branches = ("cond", "uncond")
        part.do(name, partial(_loops, subject, steps, (5.0,), repeats=1))
        del subject
        part.free()
    part.end()


@app.command()
def memory(out: Out, tiny: Tiny = False) -> None:
    """FLUX.1-dev with TAP's cache in host memory, with diffusers' model offloading, and a predicted step as a graph."""
    part = Part(out, tiny)
    subject = part.subject("flux")
    steps, full_steps = (12, 4) if tiny else (28, 6)
    for name, config in (("plain", None), ("tap", TAPConfig(full_steps=full_steps)),
                         ("tap-offload", TAPConfig(full_steps=full_steps, offload="cpu"))):  # fmt: skip
        part.do(name, partial(_with_peak, subject, config, steps))
    if not tiny:
        subject.pipe.enable_model_cpu_offload()
        part.do("model offloading, tap", partial(_with_peak, subject, TAPConfig(full_steps=full_steps), steps))
        subject.pipe.remove_all_hooks()
        subject.pipe.to("cuda")
        # Last, since what fails in a graph may spoil what comes after it.
        part.do("graph of a predicted step", partial(_graph, subject))
    part.end()


def _with_peak(subject: Subject, config: TAPConfig | None, steps: int) -> dict[str, Any]:
    _timed(subject, config and replace(config, full_steps=2), 4)
    with peak_memory(subject.device) as peak:
        seconds, account = _timed(subject, config, steps)
        return {"seconds": seconds, "peak_bytes": peak()} | (account or {})


def _graph(subject: Subject) -> dict[str, Any]:
    """Milliseconds of a predicted step, and of its kernels alone, replayed as a CUDA graph."""
    found: dict[str, Any] = {}
    transformer = subject.pipe.transformer
    config = TAPConfig(full_steps=(0, 1, 2, 9), hindsight=0.0)
    found["ms"] = (_timed(subject, config, 10)[1] or {})["predicted_step_ms"]
    calls = 0

    def captured(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != 5:  # a predicted one
            return forward(*args, **kwargs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = forward(*args, **kwargs)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(20):
            graph.replay()
        end.record()
        end.synchronize()
        found["graph_ms"] = start.elapsed_time(end) / 20
        return output

    with enabled(subject.pipe, config):
        forward = transformer.forward
        transformer.forward = captured
        try:
            subject.run(10)
        finally:
            transformer.forward = forward
    return found


if __name__ == "__main__":
    app()
