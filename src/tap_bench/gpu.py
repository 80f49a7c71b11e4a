"""Everything that has to be measured on a GPU, in one go, into one JSON file.

    python -m tap_bench.gpu --out gpu.json
    python -m tap_bench.gpu --smoke --out smoke.json  # tiny, on a CPU, to see that it runs

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
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tap_bench.profile import machine, profile
from tap_bench.profile.loops import Loops, attempted
from tap_bench.profile.subjects import of_size
from tap_diffusion.apps.files import write_json
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.errors import UsageError

SIZES = ("flux", "qwen-image", "hunyuan-video")


def kernels() -> dict[str, Any]:
    """The kernels' tests, which run on the GPU where this is called in a checkout, and their benchmark."""
    found = {}
    tests = Path("tests/core/test_kernels.py")
    if tests.exists():
        found["tests"] = _output("pytest", "-n", "0", "-q", str(tests)).splitlines()[-1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.json"
        _output("tap_bench.kernels", "--out", str(file))
        return found | json.loads(file.read_text(encoding="utf-8"))


def _output(module: str, *arguments: str) -> str:
    """What a Python module prints that is run by itself; RuntimeError where it fails."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tap_bench.gpu", description=__doc__)
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
