"""Everything that has to be measured on a GPU, in one go, into one JSON file.

    python -m tap_diffusion.bench.gpu --out gpu.json
    python -m tap_diffusion.bench.gpu --smoke --out smoke.json  # tiny, on a CPU, to see that it runs

The kernels by themselves; then, for FLUX.1-dev, Qwen-Image and HunyuanVideo at true size with random weights, the
profile of a predicted step, whole denoising loops of TAP and of other packages' caches with as many full steps, TAP
with its cache in host memory, and compiled. A run that was stopped goes on where it was when it is called again.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tap_diffusion.bench.bench import write_json
from tap_diffusion.bench.calibration import Calibration, run
from tap_diffusion.bench.counting import counted
from tap_diffusion.bench.methods import Method, Setting, Variant, on_engine, registry
from tap_diffusion.bench.models import BenchModel
from tap_diffusion.bench.profile import machine, profile
from tap_diffusion.bench.profile.subjects import Subject, of_size
from tap_diffusion.bench.profile.timing import peak_memory
from tap_diffusion.config import TAPConfig
from tap_diffusion.errors import UsageError

SIZES = ("flux", "qwen-image", "hunyuan-video")
METHODS = (
    "tap", "tap-offload", "diffusers-taylorseer-1", "diffusers-taylorseer-lite-1", "diffusers-first-block", "cache-dit",
    "cache-dit-taylorseer-1",
)  # fmt: skip


class Loops:
    """Denoising loops of one pipeline, accelerated or not, one beside the other.

    Args:
        subject: a transformer of true size.
        steps: of a trajectory.
        full_steps: how many are full, of every method.
        repeats: timed runs of each; medians count.
    """

    def __init__(self, subject: Subject, steps: int, full_steps: int, repeats: int) -> None:
        self.subject, self.steps, self.full_steps, self.repeats = subject, steps, full_steps, repeats
        self.samples = [0] * subject.pipe.shape[0]
        self.model = BenchModel(
            subject.name, lambda: subject.pipe, self.samples, self.samples, lambda _: {}, batch=len(self.samples)
        )

    def methods(self) -> dict[str, Any]:
        """Seconds, speed-up over the plain loop, full steps and peak memory of each method; null where it can't run."""
        known = registry() | {"tap-offload": Method("tap-offload", "tap", "TAPConfig(offload='cpu')", self._offload)}
        setting = Setting(
            self.subject.pipe, self.steps, self.full_steps, _Quicker(self.subject.pipe, self.model, self.steps)
        )
        variants: dict[str, Variant | None] = {"plain": None}
        missing = []
        for name in METHODS:
            variant = next(iter(known[name].variants(setting)), None)
            if variant is None:
                missing.append(name)
            else:
                variants[name] = variant
        return self._compared(variants) | dict.fromkeys(missing)

    def compiled(self, backend: str) -> dict[str, Any]:
        """The plain loop and TAP's after the model's repeated blocks have been compiled."""
        transformer: Any = self.subject.pipe.transformer
        transformer.compile_repeated_blocks(backend=backend)
        tap = on_engine("TAP's", TAPConfig(full_steps=self.full_steps))
        return self._compared({"plain": None, "tap": tap}, counting=False)

    def _offload(self, setting: Setting) -> Iterator[Variant]:
        yield on_engine("TAP's", TAPConfig(full_steps=setting.budget, offload="cpu"))

    def _compared(self, variants: dict[str, Variant | None], counting: bool = True) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = {}
        for name, variant in variants.items():
            rows[name] = attempted(partial(self._warm_up, variant, counting))
        for _ in range(self.repeats):
            for name, row in rows.items():
                if "error" not in row:
                    row.setdefault("seconds_each", []).append(self._seconds(variants[name]))
        for row in rows.values():
            if "error" not in row:
                row["seconds"] = median(row["seconds_each"])
                row["speedup"] = median(rows["plain"]["seconds_each"]) / row["seconds"]
        return rows

    def _warm_up(self, variant: Variant | None, counting: bool) -> dict[str, Any]:
        with peak_memory(self.subject.device) as peak:
            if not counting:  # which would compile anew at each call
                self._seconds(variant)
                return {"peak_bytes": peak()}
            with counted(self.subject.pipe) as counts:
                self._seconds(variant)
            return {"full_steps": counts.full, "peak_bytes": peak()}

    def _seconds(self, variant: Variant | None) -> float:
        start = time.perf_counter()
        run(self.subject.pipe, self.model, variant, self.samples, 0, self.steps)  # ends with a copy to the host
        return time.perf_counter() - start


def attempted(section: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """What a section returns, or what went wrong: the others are to run nevertheless."""
    try:
        return section() or {}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


class _Quicker(Calibration):
    """Thresholds in fewer rounds: a full step more or less does not change what a step costs."""

    def threshold(
        self, name: str, of: Callable[[float], Variant], budget: int, low: float, high: float, rounds: int = 5
    ) -> float:
        return super().threshold(name, of, budget, low, high, rounds)


def kernels() -> dict[str, Any]:
    """The kernels' tests, which run on the GPU where this is called in a checkout, and their benchmark."""
    found = {}
    tests = Path("tests/test_kernels.py")
    if tests.exists():
        found["tests"] = _output("pytest", "-n", "0", "-q", str(tests)).splitlines()[-1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.json"
        _output("tap_diffusion.kernels.benchmark", "--out", str(file))
        return found | json.loads(file.read_text(encoding="utf-8"))


def _output(module: str, *arguments: str) -> str:
    """What a Python module prints that is run by itself; RuntimeError where it fails."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tap_diffusion.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file to write")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES, help="all, where none are given")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--full-steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each; medians count")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU: the figures mean nothing")
    given = parser.parse_args(arguments)
    if not given.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU; --smoke runs on the CPU")
    device, dtype = ("cpu", torch.float32) if given.smoke else ("cuda", torch.bfloat16)
    known: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    known |= {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(torch.device(device)),
        "smoke": given.smoke,
    }

    def do(name: str, section: Callable[[], dict[str, Any]]) -> None:
        if "error" in known.get(name, {"error": "not done yet"}):
            print(f"{name} ...", flush=True)
            known[name] = attempted(section)
            write_json(given.out, known)

    if not given.smoke:
        do("kernels", kernels)
    for size in ["tiny"] if given.smoke else given.sizes:
        known.pop(size, None)
        try:
            subject = of_size(size, dtype, device)
        except UsageError as error:  # it does not fit
            known[size] = {"error": str(error)}
            continue
        loops = Loops(subject, given.steps, given.full_steps, given.repeats)
        config = TAPConfig(full_steps=given.full_steps)
        do(f"{size}: profile", partial(profile, subject, config, given.steps, given.repeats))
        do(f"{size}: loops", loops.methods)
        do(f"{size}: compiled", partial(loops.compiled, "eager" if given.smoke else "inductor"))
        del subject, loops
        gc.collect()  # hooks are in cycles with the model
        if not given.smoke:
            torch.cuda.empty_cache()
    write_json(given.out, known)
    failed = [name for name, section in known.items() if isinstance(section, dict) and "error" in section]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
