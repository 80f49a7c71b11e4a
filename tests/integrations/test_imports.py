"""What an import of the package brings with it, and what is put off until it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Slow to import, or not there in every host.
HEAVY = (
    "accelerate", "diffusers", "gradio", "matplotlib", "pandas", "PIL", "pyarrow", "ray", "rich", "sympy",
    "torch._dynamo", "torch._inductor", "transformers", "triton", "typer",
)  # fmt: skip


def run(code: str, *args: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORTS = """
import importlib, importlib.util, sys
import numpy, torch
before = set(sys.modules)
if sys.argv[1].endswith(".py"):
    spec = importlib.util.spec_from_file_location("a node", sys.argv[1])
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
else:
    importlib.import_module(sys.argv[1])
print(*sorted(set(sys.modules) - before))
"""


@pytest.mark.parametrize("what", ["tap_diffusion", "tap_diffusion.integrations.comfyui", "comfyui/__init__.py"])
def test_nothing_heavy_is_imported(what: str) -> None:
    """In a host that has torch already, the import takes well under 0.3 s: which modules come decides."""
    found = run(IMPORTS, what).split()
    assert any(name.startswith("tap_diffusion") for name in found)
    assert [name for name in HEAVY if any(f"{module}.".startswith(f"{name}.") for module in found)] == []


def test_the_command_s_help_needs_no_torch() -> None:
    found = run("import sys; from tap_diffusion.apps.cli import app; print(*sys.modules)").split()
    assert "typer" in found
    assert [name for name in ("torch", "diffusers", "transformers", "matplotlib") if name in found] == []


WITHOUT_DIFFUSERS = """
import sys
for name in ("accelerate", "diffusers", "transformers", "rich", "typer", "tap_diffusion_demo"):
    sys.modules[name] = None  # an import of it fails
import pytest
options = ["-q", "-n0", "-p", "no:cacheprovider"]
collected = pytest.main([*options, "--collect-only", "tests/core"])
sys.exit(collected or pytest.main([*options, "tests/core/test_engine.py"]))
"""


@pytest.mark.slow
def test_the_core_s_tests_do_without_diffusers() -> None:
    assert " passed" in run(WITHOUT_DIFFUSERS)


COMPILED = """
import sys, warnings
import torch
from tap_diffusion.core.compiling import uncompiled, uncompiled_itself

eagerly = sys.argv[1] == "eagerly"
if eagerly:  # as torch itself does it
    def uncompiled(function):
        return torch.compiler.disable(function)

    def uncompiled_itself(function):
        return torch.compiler.disable(function, recursive=False)

assert ("torch._dynamo" in sys.modules) == False
warnings.simplefilter("error")
traced = []

def callee(x, name):
    if torch.compiler.is_compiling():
        traced.append(name)
    return x.sin() + 1

class Host:
    def __init__(self):
        self.calls = 0

    @uncompiled
    def with_all(self, x):
        self.calls += 1
        return callee(x, "with all") * self.calls

    @uncompiled_itself
    def itself(self, x):
        self.calls += 1
        return callee(x, "itself") * self.calls

def closures(count):
    made = []
    for number in range(count):
        @uncompiled
        def closure(x):
            return callee(x, "closure") + number
        made.append(closure)
    return made

host, many = Host(), closures(20)
def forward(x):
    x = x.cos()
    x = host.with_all(x)
    x = x.exp()
    x = host.itself(x)
    return x.cos()

def all_of_them(x):
    for function in many:
        x = function(x.cos())
    return x

x = torch.linspace(0, 1, 7)
assert ("torch._dynamo" in sys.modules) == eagerly
plain = [forward(x) for _ in range(3)], all_of_them(x)
assert ("torch._dynamo" in sys.modules) == eagerly  # calls don't bring it either

try:
    torch.compile(forward, backend="eager", fullgraph=True)(x)
except Exception as error:
    print(type(error).__name__, eagerly or "compile_repeated_blocks" in str(error))

from torch._dynamo.utils import counters
for turn in range(2):  # again, since at the first call what was put off is done
    torch._dynamo.reset()
    counters.clear()
    host.calls = 0
    compiled = torch.compile(forward, backend="eager")
    results = [compiled(x) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(results, plain[0]))
    print(host.calls, sorted(set(traced)))
    assert torch.equal(torch.compile(all_of_them, backend="eager")(x), plain[1])
    print(sorted(set(traced)), counters["stats"]["unique_graphs"], *[counters["frames"]["total"]] * turn)
"""


def test_compiled_code_is_left_in_the_same_way_without_that_import() -> None:
    """As with torch's own decorator: the same results, graphs and refusals, also where torch.compile comes later."""
    found = run(COMPILED, "put off")
    assert found == run(COMPILED, "eagerly")
    assert found.splitlines()[0] == "Unsupported True"
    assert "'itself'" in found
    assert "with all" not in found
    assert "closure" not in found
