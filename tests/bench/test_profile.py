"""tap profile: true sizes against published figures, the floor against formulas, bookkeeping on a clock of blocks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import tap_diffusion as tap
from tap_bench import gpu, gpu_page
from tap_bench.profile import profile, scaling
from tap_bench.profile.floor import Rates, Work, count, floor, measured_rates
from tap_bench.profile.loops import METHODS
from tap_bench.profile.sizes import SIZES, Grid, build, skeleton
from tap_bench.profile.subjects import Subject, of_model, of_size
from tap_bench.profile.timing import measure
from tap_bench.profile.watching import watched
from tap_diffusion import TAPConfig
from tap_diffusion.apps.cli import app

CONFIG = TAPConfig(full_steps=5)
BATCH, TOKENS, TEXT, WIDTH = 2, 16, 6, 32  # of "tiny"
NUMBERS = BATCH * TOKENS * WIDTH


def tiny(**shape: Any) -> Subject:
    return of_size("tiny", torch.float32, "cpu", **shape)


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes a second."""
    monkeypatch.setattr("tap_bench.profile.measured_rates", lambda _: Rates(copy=1e10, matmul=1e11))


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


def error_of(*arguments: Any) -> str:
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


# ---------------------------------------------------------------------------------------------------------- true sizes

PARAMETERS = {  # billions, of the published checkpoints
    "flux": 11.90, "qwen-image": 20.43, "hunyuan-video": 12.82, "pixart-sigma": 0.611, "sd3-medium": 2.03,
    "wan-1.3b": 1.42,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_published_models(name: str) -> None:
    count = sum(parameter.numel() for parameter in skeleton(name).parameters())
    assert count / 1e9 == pytest.approx(PARAMETERS[name], rel=2e-3)


def on_meta(name: str, blocks: int | None = None) -> tuple[torch.Size, torch.Size, int]:
    """One call without any memory: shapes of latents and output, floating-point operations."""
    size = SIZES[name]
    model = skeleton(name, blocks, size.height).to("meta").eval()
    for module in model.modules():  # tables that are no buffers
        vars(module).update({k: v.to("meta") for k, v in vars(module).items() if isinstance(v, torch.Tensor)})
    grid = Grid(size.batch, size.height // 8, size.width // 8, torch.float32, torch.device("meta"))
    z = grid.randn(*size.latents((size.frames - 1) // 4 + 1, grid.height, grid.width))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(hidden_states=z, timestep=grid.full(1), return_dict=False, **size.conditions(grid))[0]
    return z.shape, output.shape, counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_each_size_takes_its_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "sd3-medium":  # its table of positions takes seconds
        size = SIZES[name]
        monkeypatch.setitem(SIZES, name, replace(size, config=size.config | {"pos_embed_max_size": 64}))
    z, output, _ = on_meta(name, blocks=1)
    variance = 2 if name in ("dit-xl", "pixart-sigma") else 1
    assert output == (z[0], variance * z[1], *z[2:])


@pytest.mark.slow
def test_operations_of_the_published_models() -> None:
    """118.64 G multiply-adds per picture (DiT, arXiv 2212.09748, table 4); 3719.5 T for 50 steps (arXiv 2503.06923)."""
    one, two = (on_meta("dit-xl", blocks)[2] for blocks in (1, 2))
    assert (one + 27 * (two - one)) / 4e9 == pytest.approx(118.64, rel=1e-3)
    assert 50 * on_meta("flux")[2] / 1e12 == pytest.approx(3719.5, rel=1e-3)


def test_weights_are_made_in_the_dtypes_that_diffusers_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "freq_dim": 16, "text_dim": 16}
    wan = replace(SIZES["wan-1.3b"], config=small, blocks={"num_layers": 2}, conditions=lambda _: {})
    monkeypatch.setitem(SIZES, "small-wan", wan)
    built = build("small-wan", torch.bfloat16, "cpu").transformer
    WanTransformer3DModel(**small, num_layers=2).save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    of = {name: (value.shape, value.dtype) for name, value in loaded.named_parameters()}
    assert {name: (value.shape, value.dtype) for name, value in built.named_parameters()} == of
    assert {dtype for _, dtype in of.values()} == {torch.bfloat16, torch.float32}
    assert all(value.isfinite().all() and value.std() > 0 for value in built.parameters() if value.numel() > 1)


def test_blocks_and_pixels_are_as_asked() -> None:
    subject = tiny(blocks=1, height=96, width=32, batch=3)
    assert subject.blocks == {"transformer_blocks": 1, "single_transformer_blocks": 1}
    assert subject.pipe.shape == (3, 12, 64)
    assert tiny(blocks=9).blocks == {"transformer_blocks": 2, "single_transformer_blocks": 2}
    dit = skeleton("dit-xl", 1, height=512)
    assert dit.pos_embed.height == dit.pos_embed.width == 32  # else it would make the table anew at each step


def test_the_loop_is_that_of_the_scheduler() -> None:
    subject = tiny()
    pipe: Any = subject.pipe
    result = pipe(num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    z = torch.randn(pipe.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            time = (t / 1000).expand(BATCH)
            velocity = pipe.transformer(hidden_states=z, timestep=time, return_dict=False, **pipe.conditions)[0]
            z = scheduler.step(velocity, t, z, return_dict=False)[0]
    torch.testing.assert_close(result, z, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ the floor


@pytest.fixture(scope="module")
def work() -> Work:
    return count(tiny(), CONFIG)


def test_work_by_formula(work: Work) -> None:
    linears = {  # rows, in, out
        "embedders": [(BATCH * TOKENS, 64, 32), (BATCH, 256, 32), (BATCH, 32, 32), (BATCH, 16, 32), (BATCH, 32, 32)],
        "probe": [(BATCH, 32, 6 * 32)],
        "head": [(BATCH, 32, 2 * 32), (BATCH * TOKENS, 32, 64)],
    }  # fmt: skip
    guidance = [(BATCH, 256, 32), (BATCH, 32, 32)] if SIZES["tiny"].config.get("guidance_embeds") else []
    linears["embedders"] += guidance
    for part, shapes in linears.items():
        assert work.flops[part] == sum(2 * rows * i * o for rows, i, o in shapes), part
        assert work.weights[part] == sum(4 * (i + 1) * o for _, i, o in shapes), part
    assert work.weights["selection"] == work.weights["rest"] == 0
    # h, its three differences, those of r, the hidden states and the output; the cache is six of these.
    assert work.moved == 4 * 9 * NUMBERS
    assert work.cache == 4 * 6 * NUMBERS
    assert (work.tokens, work.width) == (TOKENS, WIDTH)
    # Attention and feed-forward of both streams, and attention of the single ones: in all two lists of two blocks.
    assert work.layers == 4 * BATCH * WIDTH * (2 * 2 * (TOKENS + TEXT) + 2 * (TOKENS + TEXT))


def test_full_operations_are_those_of_the_plain_model(work: Work) -> None:
    subject = tiny()
    with FlopCounterMode(display=False) as counter:
        subject.run(3)
    own = 3 * (work.full_flops - work.flops["probe"]) - counter.get_total_flops()
    assert 0 <= own <= 3 * work.flops["selection"]  # whether the past explains the anchor


def test_floor_is_the_longer_of_products_and_weights() -> None:
    work = Work(moved=3000, full_flops=1)
    work.flops.update(embedders=10_000, probe=10, head=500)
    work.weights.update(embedders=1000, probe=2000, head=500)
    assert floor(work, Rates(copy=1e6, matmul=1e6)) == {
        "embedders": 10.0, "probe": 2.0, "selection": 3.0, "head": 0.5, "rest": 0.0
    }  # fmt: skip


def test_fixed_predictors_move_no_probe() -> None:
    work = count(tiny(), replace(CONFIG, orders=(1,)))
    assert work.moved == 4 * 4 * NUMBERS  # two differences of r, the hidden states and the output
    assert work.flops["probe"] == 0


class Ticking:
    """A stopwatch on which all that was timed took a given number of milliseconds."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds = milliseconds

    def __call__(self) -> Callable[[], Callable[[], float]]:
        return lambda: lambda: self.milliseconds


def test_rates_are_bytes_and_operations_per_second() -> None:
    subject: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, stopwatch=Ticking(2.0))
    assert measured_rates(subject, copied=1000, width=10) == Rates(copy=2 * 1000 / 0.002, matmul=2 * 10**3 / 0.002)


# ------------------------------------------------------------------------------------------------------------ the times


class ByBlocks(Subject):
    """A subject whose clock goes on by one millisecond with each block that runs to its end."""

    clock = 0

    def stopwatch(self) -> Callable[[], Callable[[], float]]:
        start = self.clock

        def stop() -> Callable[[], float]:
            elapsed = self.clock - start
            return lambda: elapsed

        return stop


def by_blocks(**shape: Any) -> Subject:
    made = tiny(**shape)
    subject = ByBlocks(made.name, made.pipe, made.run)

    def tick(*_: Any) -> None:
        ByBlocks.clock += 1

    for name in subject.blocks:
        for block in subject.pipe.transformer.get_submodule(name):
            block.register_forward_hook(tick)
    return subject


def test_time_is_ascribed_where_it_is_spent() -> None:
    result = measure(by_blocks(), CONFIG, steps=20, repeats=2)
    assert (result["plain_ms"], result["full_ms"], result["predicted_ms"]) == (4, 4, 0)
    loop = result["loop"]
    assert loop["plain_ms"] == 20 * 4
    assert loop["tap_ms_each"] == [5 * 4, 5 * 4]
    assert (loop["speedup"], loop["limit"], loop["share_of_limit"]) == (4, 4, 1)
    # The whole first block is the probe, and nothing else of a predicted call is a block.
    result = measure(by_blocks(), replace(CONFIG, probe="first_block"), steps=20, repeats=1)
    assert result["parts_ms"] == {"embedders": 0, "probe": 1, "selection": 0, "head": 0, "rest": 0}
    assert result["predicted_ms"] == 1


def test_fallbacks_count_as_full() -> None:
    subject = by_blocks()
    norm, calls = subject.pipe.transformer.transformer_blocks[0].norm1, 0

    def poison(_: Any, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return (output[0] * (float("nan") if calls == 12 else 1), *output[1:])

    norm.register_forward_hook(poison)
    result = measure(subject, TAPConfig(full_steps=(0, 1, 2)), steps=12, repeats=1)
    assert result["fallbacks"]["non-finite values"] == 1
    assert result["full_ms"] == 4
    assert result["predicted_ms"] == 0


def test_the_cache_grows_with_tokens_and_not_with_depth() -> None:
    points = scaling("tiny", torch.float32, "cpu", CONFIG, predicted=2)
    depth = [point for point in points if point["against"] == "depth"]
    tokens = [point for point in points if point["against"] == "tokens"]
    assert [point["blocks"] for point in depth] == [2, 4]
    assert len({point["cache_bytes"] for point in depth}) == 1
    assert [point["tokens"] for point in tokens] == [32, 72, 128]
    per_token = [point["cache_bytes"] / point["tokens"] for point in points]
    assert max(per_token) < 1.01 * min(per_token)  # a mean token is kept, too
    assert min(per_token) >= 6 * 4 * WIDTH


def test_nothing_is_left_behind() -> None:
    subject = tiny()
    hidden = torch.Generator().manual_seed(3)
    before = subject.pipe(num_inference_steps=4, generator=hidden).images

    class Failing:
        def begin(self) -> None: ...
        def step(self) -> None: ...
        def enter(self, part: str) -> None: ...
        def end(self, full: bool, plain: Callable[[], Any]) -> None:
            if not full:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(subject.pipe, CONFIG, Failing()):
        subject.run(20)
    profile(subject, CONFIG, 8, repeats=1)
    hidden.manual_seed(3)
    assert torch.equal(subject.pipe(num_inference_steps=4, generator=hidden).images, before)
    for module in subject.pipe.transformer.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    assert "step" not in vars(subject.pipe.scheduler)


def test_watching_changes_no_result() -> None:
    subject = tiny()

    def sample() -> torch.Tensor:
        images: torch.Tensor = subject.pipe(20, torch.Generator().manual_seed(0)).images
        return images

    with tap.enabled(subject.pipe, CONFIG):
        expected = sample()
    seen: list[torch.Tensor] = []
    measure(replace(subject, run=lambda _: seen.append(sample())), CONFIG, 20, 1)
    assert torch.equal(seen[0], expected)


# ---------------------------------------------------------------------------------------------------------- the command


def test_profile_of_a_size(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    result = command("--size", "tiny", "--blocks", 1, "--full-steps", 4, "--steps", 14, "--repeats", 1, "--out", out)
    assert result.exit_code == 0, result.output
    assert "14 steps, 4 full" in result.output
    written = json.loads((out / "profile.json").read_text())
    parts = ["embedders", "probe", "selection", "head", "rest"]
    assert list(written["floor_ms"]) == list(written["parts_ms"]) == parts
    assert written["blocks"] == {"transformer_blocks": 1, "single_transformer_blocks": 1}
    assert (written["steps"], written["full_steps"], written["branches"]) == (14, 4, 1)
    assert written["cache"]["computed_bytes"] == 4 * 6 * NUMBERS <= written["cache"]["measured_bytes"]
    assert written["cache"]["taylorseer_per_layer_bytes"] == 3 * 4 * BATCH * WIDTH * 3 * (TOKENS + TEXT)
    assert written["predicted_over_plain"] == written["predicted_ms"] / written["plain_ms"]
    assert written["loop"]["limit"] == 14 / 4
    assert TAPConfig.from_dict(written["config"]) == TAPConfig(full_steps=4)
    assert written["peak_bytes"].keys() == {"plain", "tap"}
    assert Image.open(out / "profile.png").size[0] > 400


def test_profile_of_a_model_with_two_branches() -> None:
    result = profile(of_model("emoji", torch.float32, "cpu", batch=1), TAPConfig(full_steps=4), 8, repeats=1)
    assert (result["transformer"], result["branches"], result["tokens"]) == ("FluxTransformer2DModel", 2, 64)
    assert result["cache"]["computed_bytes"] == 2 * 6 * 64 * 192 * 4 <= result["cache"]["measured_bytes"]


def test_scaling_and_processor_time(tmp_path: Path) -> None:
    result = command("--size", "tiny", "--scaling", "--processor-time", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert len(json.loads((tmp_path / "scaling.json").read_text())) == 5
    assert Image.open(tmp_path / "scaling.png").size[0] > 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "flux2"], r"unknown size 'flux2': give one of flux, qwen-image, .*, tiny"),
        ([], "give a --size or a --model, and not both"),
        (["--size", "tiny", "--model", "emoji"], "give a --size or a --model, and not both"),
        (
            ["--model", "emoji", "--blocks", "2"],
            "--blocks, --resolution, --frames, --scaling and --peers go with --size",
        ),
        (["--size", "tiny", "--scaling", "--peers"], "give --scaling or --peers, and not both"),
        (["--size", "tiny", "--resolution", "100"], "100x100 can't be done by tiny: .* multiples of 16"),
        (["--size", "tiny", "--resolution", "big"], "resolution 'big' is not like 1024 or 480x832"),
        (["--size", "dit-xl", "--resolution", "256x512"], "256x512 can't be done by dit-xl, which makes squares"),
        (["--size", "tiny", "--frames", "5"], "5 frames can't be done by tiny: give 1"),
        (["--size", "wan-1.3b", "--frames", "6"], r"6 frames can't be done by wan-1.3b: give 4 n \+ 1"),
        (["--size", "tiny", "--steps", "8", "--full-steps", "8"], "8 full steps leave none of 8 to predict"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert re.search(message, error_of(*arguments, "--out", tmp_path))


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20e9))
    found = error_of("--size", "flux", "--device", "cpu", "--dtype", "bfloat16", "--out", tmp_path)
    assert "the weights of flux take 23.8 GB in bfloat16, and cpu has 20.0 GB free" in found
    assert "fewer --blocks (it has 19 and 38)" in found


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_later(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("tap_bench.profile.report.profile", run)
    assert "out of memory; give fewer --blocks" in error_of("--size", "tiny", "--out", tmp_path)
    error.args = ("something else",)
    if not isinstance(error, torch.OutOfMemoryError):
        assert isinstance(command("--size", "tiny", "--out", tmp_path).exception, RuntimeError)


# ----------------------------------------------------------------------------------------------------- the GPU's script


@pytest.mark.slow
def test_peers_beside_tap(tmp_path: Path) -> None:
    shape = ["--steps", "12", "--full-steps", "4", "--repeats", "1"]
    result = command("--size", "tiny", *shape, "--processor-time", "--peers", "--out", tmp_path)
    assert result.exit_code == 0
    found = json.loads((tmp_path / "peers.json").read_text())
    assert found["limit"] == 3
    assert found["processor_time"]
    loops = found["loops"]
    assert loops.keys() == {"plain", *METHODS}
    assert loops["plain"]["full_steps"] == 12
    assert {loops[name]["full_steps"] for name in METHODS if name != "diffusers-first-block"} == {4}
    assert loops["plain"]["speedup"] == 1
    assert all(f"{row['speedup']:.2f}x" in result.stdout for row in loops.values())


# ------------------------------------------------------------------------------------------------------------- on a GPU


def run_part(name: str, file: Path) -> Any:
    return CliRunner().invoke(gpu.app, [name, "--tiny", "--out", str(file)])


@pytest.mark.slow
def test_parts_for_a_gpu(tmp_path: Path) -> None:
    """On a CPU, with a tiny model: what they count is right, and what they time is there."""
    found = {}
    for name in ("flux", "peers", "others", "memory"):
        result = run_part(name, tmp_path / f"{name}.json")
        assert result.exit_code == 0, result.output
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert found[name]["tiny"] is True
    flux = found["flux"]
    assert [flux["off"][name] for name in ("interval_1_equal", "disabled_equal", "finite")] == [True] * 3
    assert flux["profile"]["full_steps"] == 2
    assert flux["12 steps"].keys() == {"plain", "5x", "6.25x", "took_s"}
    for title, steps in (("12 steps", 12), ("9 steps", 9)):
        for name, row in flux[title].items():
            if name != "took_s":
                assert row["seconds"] > 0
                assert row.get("full_steps", 2) == 2
                if "full_steps" in row:
                    assert row["share_of_limit"] == pytest.approx(row["speedup"] * 2 / steps)
    loops = found["peers"]["loops"]
    assert {loops[name]["full_steps"] for name in METHODS if name != "diffusers-first-block"} == {4}
    assert found["others"]["wan-1.3b"]["5x"]["full_steps"] == 2
    assert all(found["memory"][name]["full_steps"] == 4 for name in ("tap", "tap-offload"))

    page = gpu_page.shown(tmp_path, tiny=True)
    assert "outputs are the plain model's to the bit" in page
    for name in ("| FLUX.1-dev, 12 steps | 6.25x |", "| wan-1.3b | plain |", "| cache-dit |", "| FLUX.1-dev, memory |"):
        assert name in page
    assert page.count("<svg") == 1
    assert gpu_page.shown(tmp_path) == gpu_page.NOT_RUN  # of tiny models nothing is shown


def test_a_section_that_fails_is_told_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_waits", lambda *_: 1 / 0)
    monkeypatch.setattr(gpu, "_loops", lambda *_, **__: {"seconds": 1.0})
    result = run_part("flux", tmp_path / "flux.json")
    assert result.exit_code == 1
    assert "failed: waits" in result.output
    found = json.loads((tmp_path / "flux.json").read_text())
    assert found["waits"]["error"] == "ZeroDivisionError: division by zero"
    assert found["12 steps"]["seconds"] == 1.0
    assert "Failed in `flux`: waits: ZeroDivisionError: division by zero" in gpu_page.shown(tmp_path, tiny=True)


def test_kernels_are_timed_and_their_tests_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command[2])
        if "--out" in command:
            Path(command[command.index("--out") + 1]).write_text('{"rows": []}')
        return SimpleNamespace(returncode=int(command[2] == failing), stdout="1 failed\n60 passed in 9s\n", stderr="")

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.chdir(tmp_path)
    failing = ""
    assert run_part("kernels", tmp_path / "kernels.json").exit_code == 0
    assert commands == ["tap_bench.kernels"]  # not in a checkout
    gpu.TESTS[0].parent.mkdir(parents=True)
    gpu.TESTS[0].touch()
    assert run_part("kernels", tmp_path / "kernels.json").exit_code == 0
    assert json.loads((tmp_path / "kernels.json").read_text())["tests"]["passed"] == "60 passed in 9s"
    failing = "pytest"
    assert run_part("kernels", tmp_path / "kernels.json").exit_code == 1
    assert "RuntimeError: pytest failed" in (tmp_path / "kernels.json").read_text()


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(gpu.app, ["flux", "--out", str(tmp_path / "flux.json")])
    assert result.exit_code == 2
    assert "there is no GPU; --tiny runs on the CPU" in result.stderr
