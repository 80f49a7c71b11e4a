"""The command as a person calls it: good runs, and one clear line with exit status 2 for bad values."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import re
import subprocess
import sys
import termios
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tap_diffusion
from tap_diffusion import TAPConfig
from tap_diffusion.apps.cli import app
from tap_diffusion.apps.cli.told import told
from tap_diffusion.apps.generate import draw
from tap_diffusion.core.errors import UsageError, warn
from tap_diffusion.core.schedule import spaced_steps
from tap_diffusion.core.timeline import Timeline
from tiny import build_pipeline


def run(*arguments: Any, command: str = "generate") -> Any:
    return CliRunner().invoke(app, [command, *map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline."""
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder)
    return folder


def test_generates_and_reports(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("green frog face\n\n  blue book \n")
    out = tmp_path / "new" / "out"
    result = run(
        "red apple", "--prompts", prompts, "--model", model, "--steps", 20, "--interval", 8, "--compare", "--out", out,
        "--batch-size", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "5 full, 15 predicted" in result.output
    report = json.loads((out / "report.json").read_text())
    assert report["prompts"] == ["red apple", "green frog face", "blue book"]
    assert (report["steps"], report["full_steps"], report["predicted_steps"]) == (20, 5, 15)
    assert report["evaluations_speedup"] == 4.0
    assert report["model"] == str(model)
    for name in ("full_step_ms", "predicted_step_ms", "time_speedup", "psnr_db", "cache_bytes"):
        assert report[name] > 0
    assert TAPConfig.from_dict(report["config"]) == TAPConfig(interval=8)
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(
        ["report.json", "compare.png", "choices.png"]
        + [
            f"{n}-{kind}.png"
            for n in ("000-red-apple", "001-green-frog-face", "002-blue-book")
            for kind in ("full", "tap")
        ]
    )
    assert Image.open(out / "000-red-apple-tap.png").size == (32, 32)


def test_pictures_depend_on_the_seed_and_not_on_the_batch(model: Path, tmp_path: Path) -> None:
    def pixels(out: str, *arguments: Any) -> list[bytes]:
        result = run("red apple", "blue book", "--model", model, "--steps", 8, "--out", tmp_path / out, *arguments)
        assert result.exit_code == 0, result.output
        return [(tmp_path / out / name).read_bytes() for name in ("000-red-apple-tap.png", "001-blue-book-tap.png")]

    one = pixels("a", "--seed", 5)
    assert pixels("b", "--seed", 5, "--batch-size", 1) == one
    assert pixels("c", "--seed", 6) != one


def test_a_run_that_was_interrupted_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["red apple", "blue book", "green frog face", "--model", model, "--steps", 8, "--batch-size", 1]
    assert run(*arguments, "--compare", "--out", tmp_path / "whole").exit_code == 0
    drawn: list[str] = []

    def stopping(after: int) -> None:
        def draw_or_stop(pipe: Any, request: Any, prompts: Any, *rest: Any, **more: Any) -> Any:
            if request.steps == 8:  # not the warm-up
                drawn.append(prompts[0])
            if len(drawn) > after:
                raise KeyboardInterrupt
            return draw(pipe, request, prompts, *rest, **more)

        monkeypatch.setattr("tap_diffusion.apps.generate.draw", draw_or_stop)

    stopping(after=3)
    parts = tmp_path / "parts"
    result = run(*arguments, "--compare", "--out", parts)
    assert result.exit_code == 130
    assert "Interrupted. What is done is in" in result.stderr
    assert sorted(file.name for file in parts.iterdir()) == [
        "000-red-apple-full.png", "000-red-apple-tap.png", "choices.png", "report.json",
    ]  # fmt: skip
    drawn.clear()
    stopping(after=99)
    assert run(*arguments, "--compare", "--out", parts).exit_code == 0
    assert drawn == ["blue book"] * 2 + ["green frog face"] * 2
    names = {file.name for file in parts.iterdir()}
    assert names == {file.name for file in (tmp_path / "whole").iterdir()}
    for name in names - {"report.json", "compare.png"}:  # which tell times
        assert (parts / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    one, two = (json.loads((tmp_path / out / "report.json").read_text()) for out in ("whole", "parts"))
    assert one["psnr_db_each"] == two["psnr_db_each"]
    drawn.clear()
    again = run(*arguments, "--compare", "--out", parts).output.replace("\n", " ")
    assert "3 pictures (3 of an earlier run), compare.png" in again
    assert drawn == []


def test_a_folder_with_results_of_other_settings_is_not_mixed_up(model: Path, tmp_path: Path) -> None:
    arguments = ["--model", model, "--steps", 8, "--out", tmp_path]
    assert run("red apple", "blue book", *arguments).exit_code == 0
    other = run("red apple", "blue book", *arguments, "--seed", 3)
    assert other.exit_code == 2
    assert "holds results with seed 0, not 3; choose another --out, or give --overwrite" in other.stderr
    assert 'prompts ["red apple", "blue book"], not ["黄色い本"]' in run("黄色い本", *arguments).stderr
    assert run("黄色い本", *arguments, "--overwrite").exit_code == 0
    assert {file.name for file in tmp_path.iterdir()} == {"000-黄色い本-tap.png", "choices.png", "report.json"}
    (tmp_path / "000-黄色い本-tap.png").unlink()
    assert "000-黄色い本-tap.png is missing" in run("黄色い本", *arguments).stderr
    (tmp_path / "report.json").write_text("[]")
    assert "report.json is not of this command" in run("red apple", *arguments).stderr


def test_a_negative_prompt_is_for_all(tmp_path: Path) -> None:
    arguments = ["red apple", "--steps", 3, "--full-steps", 2, "--height", 32, "--width", 32]
    for name, more in (("plain", []), ("negative", ["--negative-prompt", "green"])):
        assert run(*arguments, *more, "--out", tmp_path / name).exit_code == 0
    plain, other = ((tmp_path / name / "000-red-apple-tap.png").read_bytes() for name in ("plain", "negative"))
    assert plain != other


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.output.strip() == tap_diffusion.__version__


def test_options_make_the_configuration(model: Path, tmp_path: Path) -> None:
    TAPConfig(interval=7, orders=(0, 1), loss="l2").save(tmp_path / "tap.json")
    cases: list[tuple[list[Any], TAPConfig]] = [
        (["--paper", "--interval", 5], TAPConfig.paper(5)),
        (["--config", tmp_path / "tap.json", "--warmup", 2], TAPConfig(interval=7, warmup=2, orders=(0, 1), loss="l2")),
        (["--config", tmp_path / "tap.json", "--speedup", 3], TAPConfig(speedup=3.0, orders=(0, 1), loss="l2")),
        (["--paper"], TAPConfig.paper(6)),
        (["--paper", "--full-steps", 4], TAPConfig.paper(full_steps=4)),
        ([], TAPConfig()),
    ]
    for arguments, expected in cases:
        result = run("red apple", "--model", model, "--steps", 8, "--out", tmp_path / "out", "--overwrite", *arguments)
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert TAPConfig.from_dict(report["config"]) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nonsense"], "unknown model 'nonsense': give emoji, fashion, sprites, scenes, a folder"),
        (["--model", "somebody/something"], "the hub could not be reached to load 'somebody/something'"),
        (["--model", "EMPTY"], "holds no pipeline: it has no model_index.json"),
        (["--model", "BROKEN"], "could not load"),
        (["--interval", 0], "TAPConfig.interval is 0; it must be None or a whole number of at least 1"),
        (["--warmup", 0, "--paper"], "TAPConfig.warmup is 0"),
        (["--warmup", 9, "--steps", 8, "--interval", 2], "warmup is 9, more than the 8 steps"),
        (["--warmup", 2], "--warmup goes with --interval"),
        (["--speedup", 0.5], "TAPConfig.speedup is 0.5; it must be a number ≥ 1"),
        (["--full-steps", 9], "full_steps is 9, more than the 8 steps"),
        (["--config", "NINE.json"], "full_steps is 9, more than the 8 steps"),
        (["--model", "./NOTHERE"], "there is no folder ./NOTHERE"),
        (["red apple", "--prompts", "EMPTY.txt"], "is empty"),
        (["--speedup", 5, "--full-steps", 4], "speedup and full_steps both say how many steps are full"),
        (["--prompts", "EMPTY.txt"], "is empty"),
        (["--prompts", "MISSING.txt"], "can't read the prompt file MISSING.txt: [Errno 2]"),
        (["--config", "MISSING.json"], "can't read the configuration"),
        (["--config", "EMPTY.txt"], "not JSON"),
        (["--out", "EMPTY.txt/out"], "can't write to the folder"),
        (["--height", 33], "height 33 can't be done by this model: it must be a multiple of 4"),
        (["--width", 2], "width 2 can't be done by this model"),
        (["--guidance", 2, "--height", 3], "height 3 can't be done"),
        (["--device", "cuda:77"], "device 'cuda:77' is not available"),
        (["--device", "toaster"], "device 'toaster' is not available"),
        (["--lora", "./NOTHERE"], "there is no LoRA ./NOTHERE: give a folder, a .safetensors file, or a hub id"),
        (["--lora", "EMPTY"], "could not load 'EMPTY': "),
        (["--lora", "x:inf"], "the scale of the LoRA x is inf; give a number, such as x:0.8"),
        (["--engine", "local"], "a prompt can't be combined with --engine"),
        (["--workers", 2], "--workers is for --engine ray"),
        (["--offload"], "offloading is for a GPU"),
    ],
)
def test_a_bad_value_gives_one_line_and_status_2(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    Path("EMPTY").mkdir()
    Path("BROKEN").mkdir()
    Path("BROKEN/model_index.json").write_text("{")
    Path("EMPTY.txt").write_text("\n \n")
    Path("NINE.json").write_text('{"full_steps": 9}')
    prompts = [] if "--prompts" in arguments else ["red apple"]
    defaults = [] if "--model" in arguments else ["--model", model]
    result = run(*prompts, *defaults, *([] if "--steps" in arguments else ["--steps", 8]), *arguments)
    assert result.exit_code == 2
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.strip() and "it/s" not in line]  # loading shows bars
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert words in lines[0]


def test_no_prompt_at_all() -> None:
    result = run()
    assert result.exit_code == 2
    assert "no prompt" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = run("red apple", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "can't write to the folder" in result.stderr


def test_another_pipeline_is_refused_by_name(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(8, 3, 3, norm_num_groups=4, layers_per_block=1, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    result = run("red apple", "--model", tmp_path / "ddpm", "--steps", 8, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "DDPMPipeline has a UNet; TAP needs a transformer" in result.stderr


def test_help_names_every_option() -> None:
    result = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    text = re.sub(r"\s+", " ", result.output)
    for option in ("--interval", "--steps", "--seed", "--compare", "--model", "--prompts", "--out", "--dtype"):
        assert option in text


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, tap_diffusion.apps.cli; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_without_predicted_steps_warns(model: Path, tmp_path: Path) -> None:
    result = run("red apple", "blue book", "--model", model, "--steps", 3, "--batch-size", 1, "--out", tmp_path)
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]  # once, for both batches
    assert "TAP predicted no step of this trajectory: of its 3 steps speedup=5 leaves none to skip" in line
    assert json.loads((tmp_path / "report.json").read_text())["predicted_step_ms"] is None
    assert not (tmp_path / "choices.png").exists()
    assert torch.is_grad_enabled()


def test_warnings_are_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = of_diffusers.get_verbosity(), of_transformers.get_verbosity(), warnings.showwarning

    @told()
    def failing() -> None:
        for _ in range(2):
            warn("of TAP")
            warnings.warn("of Python,\nin two lines", UserWarning, stacklevel=1)
        warnings.warn("for developers", FutureWarning, stacklevel=1)
        of_diffusers.get_logger("diffusers.x").warning("of diffusers [8]")
        of_diffusers.get_logger("diffusers.x").info("no warning")
        of_transformers.get_logger("transformers.x").warning("of transformers " + "x" * 400)
        of_transformers.get_logger("transformers.x").warning("`A` requires torchvision (not installed)")
        raise UsageError("warnings are told where a command fails too")

    with pytest.raises(UsageError):
        failing()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Warning: ")]
    assert lines[:3] == ["Warning: of TAP", "Warning: of Python, in two lines", "Warning: of diffusers [8]"]
    assert lines[3].startswith("Warning: of transformers xxx")
    assert (len(lines), lines[3][-1]) == (4, "…")
    assert before == (of_diffusers.get_verbosity(), of_transformers.get_verbosity(), warnings.showwarning)


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals_and_warnings_below_them(tmp_path: Path, terminal: bool) -> None:
    call = [sys.executable, "-c", "from tap_diffusion.apps.cli import app; app()", "generate", "red apple " * 5]
    call += ["--steps", "8", "--height", "32", "--width", "32", "--out", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("VERBOSITY")} | {
        "COLUMNS": "80"
    }
    if not terminal:
        done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
        warned = done.stderr.splitlines()
        assert "1 picture" in done.stdout
    else:
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 80))  # bars take none of a size of nothing
        with subprocess.Popen(call, env=environment | {"TERM": "xterm"}, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            parts = []
            with contextlib.suppress(OSError):  # Linux's sign of the end
                while part := os.read(ours, 65536):
                    parts.append(part)
        os.close(ours)
        assert process.returncode == 0
        output = re.sub(r"\x1b\[[\d;?]*\w", "", b"".join(parts).decode())
        assert "Loading pipeline components" in output
        assert "TAP  1 of 1:" in output
        assert "Loading weights" not in output
        warned = output[output.index("1 picture") :].splitlines()[1:]
    assert len(warned) == 2
    assert warned[0].startswith(
        "Warning: TAP ran 6 of 8 steps in full, 1.33x fewer evaluations where speedup=5 is asked"
    )
    assert warned[1].startswith('Warning: the prompt "red apple red apple')
    assert "kept 8 of 10 tokens" in warned[1]


# ----------------------------------------------------------------------------------------------------------------- tune


def test_tune_writes_a_preset_that_generate_takes(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\ngreen frog face\nblue book\n")
    arguments = ["--steps", 8, "--full-steps", 3, "--samples", 1, "--verified", 1, "--evaluations", 3]
    result = run("--model", model, "--prompts", prompts, *arguments, "--out", tmp_path / "presets", command="tune")
    assert result.exit_code == 0, result.output
    assert "presets 3.json in" in result.output.replace("\n", " ")
    preset = tmp_path / "presets" / "3.json"
    out = tmp_path / "out"
    result = run("red apple", "--model", model, "--steps", 8, "--config", preset, "--out", out)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "report.json").read_text())["full_steps"] == 3
    result = run("red apple", "--model", model, "--steps", 9, "--config", preset, "--out", tmp_path / "other")
    assert result.exit_code == 2
    assert "these full steps are for trajectories of 8 steps, and this one has 9" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--full-steps", "8,x"], "'8,x' is not a list of whole numbers with commas"),
        (["--full-steps", "50"], "50 full steps are not between 2 and 49"),
        (["--model", "nonsense"], "unknown model 'nonsense'"),
        (["--prompts", "x.txt"], "--prompts is for a folder or hub id"),
    ],
)
def test_tune_refuses_what_it_can_t_do(arguments: list[Any], words: str) -> None:
    result = run(*arguments, command="tune")
    assert result.exit_code == 2
    assert words in result.stderr


# ----------------------------------------------------------------------------------------------------------------- plan


def full_steps_in(output: str) -> list[int]:
    return [int(step) for step in re.findall(r"(?m)^│ +(\d+) │", output)]


@pytest.mark.parametrize(
    ("arguments", "tokens", "shift"),
    [
        (("flux",), 4096, 3.16),
        (("flux", "--width", 512, "--height", 768), 1536, 2.05),
        (("qwen-image",), 6889, 2.3),
        (("sd3", "--steps", 28), 4096, 3),
        (("wan-1.3b", "--frames", 65), 26520, 5),
        (("hunyuan-video", "--width", 640, "--height", 480, "--frames", 65), 20400, 7),
        (("1024x512",), 2048, 1),
        (("832x480x81", "--shift", 4), 32760, 4),
        (("flux", "--tokens", 64, "--shift", 1), 64, 1),
    ],
)
def test_plan_shows_the_steps_that_would_be_full(arguments: tuple[Any, ...], tokens: int, shift: float) -> None:
    result = run(*arguments, "--full-steps", 9, command="plan")
    assert result.exit_code == 0, result.output
    assert f"{tokens} tokens" in result.output
    steps = arguments[arguments.index("--steps") + 1] if "--steps" in arguments else 50
    told = float(re.search(r"shift ([\d.]+)", result.output)[1])  # type: ignore[index]
    assert told == pytest.approx(shift, rel=0.01)
    noise = (math.inf, *(told * (steps - step) / step for step in range(1, steps)))
    known = Timeline(noise, "flow", tokens=tokens)
    found = full_steps_in(result.output)
    assert len(found) == 9
    assert all(abs(a - b) <= 1 for a, b in zip(found, spaced_steps(TAPConfig(), steps, 9, known), strict=True))


def test_plan_names_what_a_search_found() -> None:
    found = "0, 1, 2, 3, 5, 8, 13, 27, 49"
    output = run("flux", "--full-steps", 9, command="plan").output
    assert found in output
    assert 'TAPConfig.preset("flux.1-dev", full_steps=9)' in " ".join(output.split())
    assert found not in run("flux", "--full-steps", 9, "--steps", 40, command="plan").output
    assert len(full_steps_in(run("flux", command="plan").output)) == 10  # by the default's speedup
    assert len(full_steps_in(run("flux", "--speedup", 2, command="plan").output)) == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("flux-9",), "tap plan doesn't know 'flux-9'; give flux,"),
        (("flux", "--shift", 0), "--shift is 0"),
        (
            ("flux", "--speedup", 4, "--full-steps", 9),
            "TAPConfig.speedup is 4.0; it must be left out beside full_steps",
        ),
        (("8x8",), "8x8 is smaller than a token of 16 pixels"),
    ],
)
def test_plan_refuses_in_one_line(arguments: tuple[Any, ...], message: str) -> None:
    result = run(*arguments, command="plan")
    assert result.exit_code == 2
    assert message in result.stderr
