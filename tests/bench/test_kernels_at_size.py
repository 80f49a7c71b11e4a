"""The benchmark of the kernels, and the kernels at its sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from test_kernels import DEVICE, DTYPES, needs_gpu, needs_triton, tolerance
from typer.testing import CliRunner

from tap_bench import kernels as benchmark
from tap_diffusion.core import kernels


@needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_true_sizes_on_a_gpu(dtype: torch.dtype) -> None:
    inputs = benchmark.arguments(benchmark.SIZES["flux"], 11, dtype, DEVICE)
    x, h, past, gram, residuals, coefficients = inputs
    found = kernels.predict(x, h, past, gram, residuals, coefficients, "cosine")
    expected = benchmark.reference(*inputs)
    same = found.choice == expected[1]
    assert same.float().mean() > 0.999
    torch.testing.assert_close(
        found.hidden_states[same], expected[0][same], rtol=tolerance(dtype), atol=tolerance(dtype)
    )


# ----------------------------------------------------------------------------------------------------------- benchmark


def test_benchmark(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(benchmark.main)
    file = tmp_path / "kernels.json"
    result = CliRunner().invoke(
        app, ["--size", "2x5x16", "--candidates", "4", "--device", "cpu", "--rounds", "1", "--out", str(file)]
    )
    assert result.exit_code == 0, result.output
    rows = {row["form"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    assert set(rows) == {"copy", "reference", "torch"}
    # x, h, three of each history, the result: 9 tensors in bfloat16; a float32 gram matrix, a byte and a float32
    # error for each token.
    assert rows["torch"]["bytes"] == 2 * 5 * (9 * 16 * 2 + 3 * 3 * 4 + 1 + 4)
    assert rows["copy"]["of_copy"] == 1
    wrong = CliRunner().invoke(app, ["--size", "huge"])
    assert wrong.exit_code == 2
    assert "1x4096x3072" in wrong.output


def test_the_benchmark_compares_like_with_like() -> None:
    inputs = benchmark.arguments(benchmark.Size(2, 5, 16), 4, torch.float32, torch.device("cpu"))
    expected = benchmark.reference(*inputs)
    for name, form in benchmark.forms(torch.device("cpu"), compiled=False).items():
        torch.testing.assert_close(form(*inputs)[0], expected[0], msg=name)
