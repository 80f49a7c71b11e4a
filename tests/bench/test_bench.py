"""The bench's measures against independent references, and its runs on the tiny FLUX."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import imageio
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torchmetrics.functional.image.lpips as torchmetrics_lpips
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from test_sprites import PROMPTS
from test_sprites import build as build_sprites
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor
from typer.testing import CliRunner

from ssim import ssim_by_hand
from tap_bench import judges, metrics, recipes, scores
from tap_bench.bench import Bench, Suite
from tap_bench.calibration import SEED, Calibration
from tap_bench.counting import counted, flops, live_bytes
from tap_bench.method import Method, Setting, schedules
from tap_bench.methods import load, planned, registry
from tap_bench.methods.solvers import AdamsBashforth2Scheduler
from tap_bench.methods.spectrum import growing
from tap_bench.models import BenchModel, any_pipeline, draw
from tap_bench.report import write_report
from tap_bench.variant import Variant, on_engine
from tap_diffusion.apps.cli import app
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.errors import UsageError
from tiny import TOKENS, WORDS, build_pipeline

STEPS = 12
SUITE = Suite(samples=3, tuned_on=2, budgets=(4,), methods=None, timed=1, repeats=2)


def tiny_model(load: Callable[[], Any] = build_pipeline, **changes: Any) -> BenchModel:
    def arguments(prompts: Any) -> dict[str, Any]:
        return {
            "prompt": list(prompts), "negative_prompt": [""] * len(prompts), "true_cfg_scale": 2.0, "height": 32,
            "width": 32, "max_sequence_length": TOKENS,
        }  # fmt: skip

    return replace(BenchModel("tiny", load, WORDS, ["red book", "blue frog"], arguments, batch=2), **changes)


# --------------------------------------------------------------------------------------------------------- measures


def test_psnr_is_ten_times_the_logarithm_of_peak_over_error() -> None:
    reference = torch.rand(2, 3, 8, 8)
    pictures = reference.clone()
    pictures[0] += 0.1
    assert metrics.psnr(pictures, reference).tolist() == pytest.approx([20.0, metrics.CEILING_DB], abs=1e-4)


def test_ssim_of_a_video_is_the_mean_over_its_frames() -> None:
    torch.manual_seed(0)
    videos, reference = torch.rand(2, 2, 3, 4, 16, 16).unbind()
    videos = videos.transpose(1, 2)  # (B, F, C, H, W)
    reference = reference.transpose(1, 2)
    expected = [
        np.mean([ssim_by_hand(a.numpy(), b.numpy()) for a, b in zip(video, other, strict=True)])
        for video, other in zip(videos, reference, strict=True)
    ]
    assert metrics.ssim(videos, reference).tolist() == pytest.approx(expected, abs=1e-4)


def test_latent_error_is_relative() -> None:
    reference = torch.randn(3, 4, 5)
    assert metrics.latent_error(1.25 * reference, reference).tolist() == pytest.approx([0.25] * 3)


def test_bootstrap_interval_is_that_of_a_mean_of_normal_values() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = metrics.bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_frechet_distance_of_normal_distributions_whose_covariances_commute() -> None:
    """Then it is ‖μ - μ'‖² + Σ (√λ - √λ')²."""
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    one, other = torch.rand(2, 5, dtype=torch.float64).unbind()
    expected = 5 * 0.3**2 + float((one.sqrt() - other.sqrt()).square().sum())
    covariances = [basis @ eigenvalues.diag() @ basis.T for eigenvalues in (one, other)]
    mean = torch.zeros(5, dtype=torch.float64)
    assert judges.frechet_distance(mean, covariances[0], mean + 0.3, covariances[1]) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------- counting


def test_full_evaluations_are_counted_from_outside() -> None:
    pipe, model = build_pipeline(), tiny_model()
    with counted(pipe) as counts:
        draw(pipe, model, WORDS[:1], 0, num_inference_steps=STEPS)
    assert (counts.all, counts.full) == (2 * STEPS, 2 * STEPS)
    variant = on_engine("", TAPConfig.paper(full_steps=(0, 1, 5, 9)))
    with variant.applied(pipe), counted(pipe) as counts:
        draw(pipe, model, WORDS[:1], 0, num_inference_steps=STEPS)
    assert (counts.all, counts.full) == (2 * STEPS, 2 * 4)


def test_flops_of_a_run_fall_with_its_full_steps() -> None:
    pipe, model = build_pipeline(), tiny_model()
    totals = []
    with on_engine("", TAPConfig.paper(full_steps=(0,))).applied(pipe):
        for _ in range(3):  # first runs try out the scheduler
            draw(pipe, model, WORDS[:1], 0, num_inference_steps=4)
    for full in ((0,), (0, 1), (0, 1, 2)):
        with on_engine("", TAPConfig.paper(full_steps=full, orders=(0,))).applied(pipe), flops() as counter:
            draw(pipe, model, WORDS[:1], 0, num_inference_steps=4)
        totals.append(counter.get_total_flops())
    assert totals[1] - totals[0] == totals[2] - totals[1] > 0


def test_live_bytes_sees_what_is_kept() -> None:
    pipe, model = build_pipeline(), tiny_model()
    hoard = [torch.zeros(1 << 20)]
    found = []
    for size in (0, 1 << 20):
        with live_bytes(pipe, every=4) as seen:
            hoard.append(torch.zeros(size, dtype=torch.uint8))
            draw(pipe, model, WORDS[:1], 0, num_inference_steps=4)
        found.append(max(seen))
    assert found[1] - found[0] == pytest.approx(1 << 20, rel=0.01)


# ----------------------------------------------------------------------------------------------------------- solvers


def integrated(scheduler: Any, steps: int) -> float:
    """x at σ = 0, of dx/dσ = -x with x = 1 at σ = 1, whose solution is e."""
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    x = torch.ones(1, dtype=torch.float32)
    for t in scheduler.timesteps:
        x = scheduler.step(-x, t, x, return_dict=False)[0]
    return float(x)


def test_adams_bashforth_by_hand() -> None:
    """Three steps of 1/3: Euler's, then x' = x + h (3/2 v - 1/2 v₋) with h = -1/3 and v = -x."""
    x0 = 1.0
    x1 = x0 + x0 / 3
    x2 = x1 + (3 * x1 - x0) / 6
    x3 = x2 + (3 * x2 - x1) / 6
    assert integrated(AdamsBashforth2Scheduler(), 3) == pytest.approx(x3, rel=1e-6)


def test_adams_bashforth_is_of_second_order_and_eulers_rule_of_first() -> None:
    for scheduler, order in ((AdamsBashforth2Scheduler(), 2), (FlowMatchEulerDiscreteScheduler(), 1)):
        coarse, fine = (abs(integrated(scheduler, steps) - math.e) for steps in (40, 80))
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", ["euler", "adams-bashforth-2", "dpm-solver++", "unipc"])
def test_solvers_approach_the_full_result_and_leave_the_scheduler(name: str) -> None:
    pipe, model = build_pipeline(), tiny_model()
    own = pipe.scheduler
    calibration = Calibration(pipe, model, steps=48)
    quality = []
    for budget in (4, 24):
        (variant,) = registry()[name].variants(setting(calibration, budget))
        psnr, full_steps = calibration.quality(variant)
        assert full_steps == budget
        quality.append(psnr)
    assert quality[1] > quality[0] + 6
    assert pipe.scheduler is own


def setting(calibration: Calibration, budget: int) -> Any:
    return Setting(calibration.pipe, calibration.steps, budget, calibration)


# ----------------------------------------------------------------------------------------------------------- methods


def test_every_schedule_has_no_more_full_steps_than_the_budget() -> None:
    calibration = Calibration(build_pipeline(), tiny_model(), 50)
    for budget in (14, 10, 8, 6, 3):
        for full in [
            *schedules(setting(calibration, budget)).values(),
            *growing(50, budget).values(),
        ]:
            assert len(full) <= budget
            assert full[0] == 0
    assert growing(50, 14)["growing windows after 5"][:6] == (0, 1, 2, 3, 4, 6)


@pytest.mark.parametrize("name", [m.name for m in registry().values() if m.kind in ("tap", "rival")])
def test_methods_on_the_engine_keep_to_the_budget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "EVALUATIONS", 3)
    pipe = build_pipeline()
    calibration = Calibration(pipe, tiny_model(calibration=["red book"]), STEPS)
    plain = calibration.full
    variants = list(registry()[name].variants(setting(calibration, 4)))
    assert variants
    for variant in variants[:2]:
        _, full_steps = calibration.run(variant)
        assert full_steps == pytest.approx(4, abs=1)
    again, _ = calibration.run(None)
    assert torch.equal(again.pictures, plain.pictures)


@pytest.mark.parametrize("confirmed", [True, False])
def test_a_plan_that_other_samples_do_not_confirm_gives_way(confirmed: bool) -> None:
    """The samples that are searched on want full steps late; those apart from them want them late or early."""

    class Wanted:
        timeline = None

        def __init__(self, late: bool, apart: Any = None) -> None:
            self.sign, self.apart = (1 if late else -1), apart
            self.asked: list[tuple[int, ...]] = []

        def quality(self, variant: Variant) -> tuple[float, float]:
            self.asked.append(tuple(variant.settings["full_steps"]))
            return float(self.sign * sum(self.asked[-1])), 4.0

    def asked(apart: Wanted | None) -> Setting:
        calibration: Any = Wanted(late=True, apart=apart)
        return Setting(None, 20, 4, calibration)

    early, apart = (0, 1, 2, 3), Wanted(late=confirmed)
    late = planned.plan(asked(None), TAPConfig)
    assert sum(late) > sum(early)
    assert planned.plan(asked(apart), TAPConfig, recommended=early) == (late if confirmed else early)
    assert apart.asked == [early, late]
    best_start = max(schedules(asked(None)).values(), key=sum)
    assert planned.plan(asked(apart), TAPConfig) == (late if confirmed else best_start)


def test_the_bench_keeps_samples_apart_where_there_are_more(tmp_path: Path) -> None:
    run = bench(tmp_path / "two", "tap")
    assert run.calibration.apart is None
    more = tiny_model(calibration=["red book", "blue frog", "green leaf"])
    run = Bench(more, {"tap": registry()["tap"]}, SUITE, (4,), tmp_path / "three", STEPS)
    assert run.calibration.apart is not None
    assert list(run.calibration.apart.model.calibration) == ["green leaf"]
    assert run.calibration.apart.seed == SEED + 2


def test_a_threshold_is_found_for_a_budget() -> None:
    calibration = Calibration(build_pipeline(), tiny_model(calibration=["red book"]), STEPS)

    def of(threshold: float) -> Variant:
        full = tuple(range(0, STEPS, max(1, round(threshold))))
        return on_engine(f"{threshold}", TAPConfig.paper(full_steps=full, orders=(0,)))

    threshold = calibration.threshold("test", of, budget=4, low=1.0, high=12.0)
    assert calibration.run(of(threshold))[1] == 4


def test_methods_of_somebodys_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from tap_bench.method import forecaster\n"
        "METHODS = [forecaster('mine', 'rival', 'me', orders=(1,), horizon_span=0.0)]\n"
    )
    assert list(load(file)) == ["mine"]
    file.write_text("METHODS = 3\n")
    with pytest.raises(UsageError, match=r"mine\.py has no list METHODS"):
        load(file)
    with pytest.raises(UsageError, match="no Python file"):
        load(tmp_path / "absent.py")


# ----------------------------------------------------------------------------------------------------------- the run


def bench(out: Path, *names: str, **more: Any) -> Bench:
    methods = registry()
    return Bench(tiny_model(), {name: methods[name] for name in names}, SUITE, (4,), out, STEPS, **more)


@pytest.mark.slow
def test_a_run_measures_what_it_says(tmp_path: Path) -> None:
    cells = {cell["method"]: cell for cell in bench(tmp_path, "tap", "fora", "euler").run()}
    assert list(cells) == ["full", "tap", "fora", "euler"]
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(list(cells.values())))
    for name, family in (("tap", "tap"), ("fora", "rival"), ("euler", "solver")):
        cell = cells[name]
        assert cell["family"] == family
        assert cell["full_steps"] == 4
        assert cell["evaluations_speedup"] == 3.0
        assert cell["time_speedup"] > 0
        assert cell["psnr_ci"][0] <= cell["psnr_db"] <= cell["psnr_ci"][1]
    assert cells["tap"]["memory_bytes"] > cells["fora"]["memory_bytes"] > 1000 > cells["euler"]["memory_bytes"]
    assert cells["fora"]["difference_db"] == pytest.approx(cells["fora"]["psnr_db"] - cells["tap"]["psnr_db"])

    # What Parquet holds is what the pictures say.
    samples = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    row = next(row for row in samples if row["method"] == "euler" and row["seed"] == 2)
    pipe, model = build_pipeline(), tiny_model()
    full, few = (draw(pipe, model, WORDS[2:], 2, num_inference_steps=steps) for steps in (STEPS, 4))
    assert row["psnr_db"] == pytest.approx(float(metrics.psnr(few.pictures, full.pictures)[0]), abs=1e-3)
    assert row["condition"] == WORDS[2]
    lowest, second, *others = sorted(row["psnr_db"] for row in samples if row["method"] == "euler")
    share = 0.1 * (len(others) + 1)  # of the way from the lowest to the second, as the tenth lies among so few
    assert cells["euler"]["psnr_p10_db"] == pytest.approx(lowest + share * (second - lowest))
    tried = json.loads((tmp_path / "tuning" / "fora-4.json").read_text())
    assert {entry["schedule"] for entry in tried} == {"paper", "even", "even after 2", "even on the clock", "growing"}
    best = max(tried, key=lambda entry: entry["psnr_db"])
    assert cells["fora"]["schedule"] == best["schedule"]


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    @contextmanager
    def interrupted(_: Any) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    def stops(_: Any) -> list[Variant]:
        return [Variant("never", interrupted)]

    methods = {name: registry()[name] for name in ("tap", "fora")}
    broken = methods | {"zz": Method("zz", "rival", "", stops)}
    with pytest.raises(KeyboardInterrupt):
        Bench(tiny_model(), broken, SUITE, (4,), tmp_path / "a", STEPS).run()
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "a").rglob("*-4.*") if "zz" not in file.name}
    assert done
    resumed = bench(tmp_path / "a", "tap", "fora").run()
    assert {file: file.stat().st_mtime_ns for file in done} == done
    fresh = bench(tmp_path / "b", "tap", "fora").run()
    timed = ("time_speedup", "time_speedup_range", "memory_bytes")
    for one, other in zip(resumed, fresh, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


@pytest.mark.slow
def test_a_run_need_not_be_timed(tmp_path: Path) -> None:
    suite = replace(SUITE, samples=1, repeats=0)
    cells = Bench(tiny_model(), {"tap": registry()["tap"]}, suite, (4,), tmp_path, STEPS).run()
    assert [cell["time_speedup"] for cell in cells[1:]] == [None]
    assert cells[1]["psnr_db"] > 0


def test_methods_that_can_do_nothing_here_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none of ddim can do 4 full evaluations on tiny"):
        bench(tmp_path, "ddim").run()


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    bench(tmp_path, "tap")
    with pytest.raises(UsageError, match="holds a run with dtype float32, not bfloat16"):
        Bench(replace(tiny_model(), dtype="bfloat16"), {}, SUITE, (4,), tmp_path, STEPS)
    with pytest.raises(UsageError, match="holds a run with steps 12, not 20"):
        Bench(tiny_model(), {}, SUITE, (4,), tmp_path, 20)


def test_calibration_and_measured_seeds_are_apart() -> None:
    assert SEED > 1000


# ------------------------------------------------------------------------------------------------------- any pipeline


@pytest.mark.slow
def test_a_folder_is_run_by_a_recipe(tmp_path: Path) -> None:
    build_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("red apple\nblue book\ngreen frog face\n")
    call = {"height": 32, "width": 32, "max_sequence_length": TOKENS}
    recipe = {"model": str(tmp_path / "model"), "dtype": "float32", "steps": STEPS, "budgets": [4], "call": call}
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    options = ["--recipe", f"{tmp_path}/mine.json", "--prompts", f"{tmp_path}/prompts.txt", "--out", f"{tmp_path}/out"]
    result = CliRunner().invoke(app, ["bench", *options, "--methods", "tap,euler"])
    assert result.exit_code == 0, result.output
    cells = {cell["method"]: cell for cell in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert cells["tap"]["samples"] == 2  # the first prompt is for calibration
    assert cells["tap"]["full_steps"] == cells["euler"]["full_steps"] == 4
    assert cells["full"]["full_steps"] == STEPS
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_fit_their_pipelines(name: str) -> None:
    kinds = {
        "flux": "FluxPipeline",
        "qwen": "QwenImagePipeline",
        "hunyuan": "HunyuanVideoPipeline",
        "dit": "DiTPipeline",
    }
    recipe = recipes.load(name)
    known = inspect.signature(getattr(diffusers, kinds[name.split("-")[0]]).__call__).parameters
    assert {recipe.argument, "num_inference_steps", "output_type", *recipe.call} <= set(known)
    assert recipe.budgets
    assert all(2 <= budget < recipe.steps for budget in recipe.budgets)


def test_recipes_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text('{"model": "x", "stepz": 3}')
    with pytest.raises(UsageError, match="found stepz"):
        recipes.load(str(file))
    with pytest.raises(UsageError, match=r"no recipe 'nothing': give a FILE\.json or one of dit-xl-imagenet"):
        recipes.load("nothing")


def test_one_prompt_is_too_few() -> None:
    with pytest.raises(UsageError, match="at least 2 prompts"):
        any_pipeline(recipes.Recipe("x"), ["one"], torch.float32, "cpu")


IMAGE_MEAN, IMAGE_STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def tiny_clip() -> tuple[CLIPModel, Any]:
    torch.manual_seed(0)
    tokenizer = build_pipeline().tokenizer
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    size = {"height": 32, "width": 32}
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=size, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
    )
    return model, CLIPProcessor(pictures, tokenizer)


def test_clip_score_is_a_hundred_times_the_cosine(tmp_path: Path) -> None:
    model, processor = tiny_clip()
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    pictures = torch.rand(2, 3, 32, 32).mul(255).round() / 255
    found = scores.clip_score(pictures, WORDS[:2], str(tmp_path))["clip_score"]
    for picture, prompt, score in zip(pictures, WORDS, found, strict=False):
        mean, spread = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
        tokens = processor.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(((picture - mean) / spread)[None]).pooler_output)
            said = model.text_projection(model.text_model(tokens).pooler_output)
        assert score == pytest.approx(100 * float(torch.cosine_similarity(seen, said)), abs=1e-3)


def test_image_reward_is_asked_of_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """A double of the package, which can't be had here: its documented ``load`` and ``score(prompt, picture)``."""

    class Model:
        def score(self, prompt: str, picture: Image.Image) -> float:
            return len(prompt) + np.asarray(picture)[0, 0, 0] / 255

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=lambda name: Model()))
    scores._reward.cache_clear()
    pictures = torch.zeros(2, 3, 4, 4)
    pictures[1, 0] = 1.0
    assert scores.image_reward(pictures, ["a", "bcd"]) == {"image_reward": [1.0, 4.0]}
    scores._reward.cache_clear()


def alexnet() -> nn.Sequential:
    """AlexNet's features as torchvision builds them, with random weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip


def lpips_by_hand(picture: Tensor, other: Tensor) -> float:
    """The paper's formula (1), with the heads of its authors, which torchmetrics brings."""
    heads = torch.load(Path(torchmetrics_lpips.__file__).parent / "lpips_models" / "alex.pth", map_location="cpu")
    shift, scale = (torch.tensor(v)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    x = torch.stack([(2 * one.expand(3, -1, -1) - 1 - shift) / scale for one in (picture, other)])
    total, layer = 0.0, 0
    for module in alexnet().requires_grad_(False):
        x = module(x)
        if isinstance(module, nn.ReLU):
            one, two = x / x.norm(dim=1, keepdim=True)
            total += float(((one - two).square() * heads[f"lin{layer}.model.1.weight"][0]).sum(0).mean())
            layer += 1
    return total


class TestLPIPS:
    @pytest.fixture(autouse=True)
    def torchvision(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """A double of the one network of torchvision that is needed: the package can't be had here."""
        monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", True)
        monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_: alexnet())
        monkeypatch.delitem(scores.PACKAGES, "lpips")
        scores._lpips.cache_clear()
        yield
        scores._lpips.cache_clear()

    def test_it_is_the_paper_s_formula(self) -> None:
        pictures, others = torch.rand(2, 2, 3, 64, 64)
        found = scores.lpips(pictures, others)["lpips"]
        assert found == pytest.approx([lpips_by_hand(*pair) for pair in zip(pictures, others, strict=True)], rel=1e-4)
        assert min(found) > 0.01
        assert scores.lpips(pictures, pictures)["lpips"] == [0.0, 0.0]

    def test_of_a_video_it_is_the_mean_and_gray_has_three_channels(self) -> None:
        videos, others = torch.rand(2, 1, 2, 1, 64, 64)
        each = [lpips_by_hand(*pair) for pair in zip(videos[0], others[0], strict=True)]
        assert scores.lpips(videos, others)["lpips"] == pytest.approx([sum(each) / 2], rel=1e-4)

    def test_it_is_measured_and_reported(self, tmp_path: Path) -> None:
        model = tiny_model(arguments=lambda prompts: tiny_model().arguments(prompts) | {"height": 64, "width": 64})
        judged = replace(model.judged_by(["lpips"]), measured=WORDS[:2])
        suite = replace(SUITE, samples=2, repeats=0)
        cells = Bench(judged, {"fora": registry()["fora"]}, suite, (4,), tmp_path, 6).run()
        assert "lpips" not in cells[0]["scores"]
        assert 0 < cells[1]["scores"]["lpips"] < 1
        assert "to full" in write_report(tmp_path).read_text(encoding="utf-8")
        with pytest.raises(UsageError, match=r"holds a run with scores \['lpips'\], not \[\]"):
            Bench(model, {}, suite, (4,), tmp_path, 6)


@pytest.mark.parametrize(("name", "package"), [("lpips", "torchvision"), ("image_reward", "image-reward")])
def test_a_missing_package_is_named_before_anything_is_drawn(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=f"the score {name} needs its package: pip install {package}"):
        tiny_model().judged_by(["clip_score", name])


def test_samples_are_kept_by_prompt(tmp_path: Path) -> None:
    """As VBench wants them: prompt, number of the sample, suffix."""
    model, suite = tiny_model(measured=["red apple", "blue/book", "red apple"]), replace(SUITE, repeats=0)
    for keep in (False, True):  # what had been measured without is drawn again
        Bench(model, {"fora": registry()["fora"]}, suite, (4,), tmp_path, STEPS, keep).run()
        assert (tmp_path / "samples").exists() == keep
    for name in ("fora-4", "full"):
        files = sorted(file.name for file in (tmp_path / "samples" / name).iterdir())
        assert files == ["blue book-0.png", "red apple-0.png", "red apple-1.png"]
    picture = np.asarray(Image.open(tmp_path / "samples" / "full" / "red apple-1.png"))
    drawn = draw(build_pipeline(), model, ["red apple"], 2, num_inference_steps=STEPS).pictures[0]
    assert np.abs(picture - 255 * drawn.permute(1, 2, 0).numpy()).max() < 1


def test_samples_kept_by_a_run_that_stopped_before_their_cell_was_written(tmp_path: Path) -> None:
    model, suite = tiny_model(measured=["red apple"]), replace(SUITE, samples=1, repeats=0)
    for _ in range(2):
        cells = Bench(model, {"fora": registry()["fora"]}, suite, (4,), tmp_path, STEPS, keep=True).run()
        assert len(cells) == 2
        assert [file.name for file in (tmp_path / "samples" / "fora-4").iterdir()] == ["red apple-0.png"]
        (tmp_path / "cells" / "fora-4.parquet").unlink()


def test_videos_are_kept_as_videos(tmp_path: Path) -> None:
    model = BenchModel("tiny", build_sprites, PROMPTS[:1], PROMPTS[1:], lambda prompts: {"prompt": list(prompts)})
    suite = replace(SUITE, samples=1, repeats=0)
    Bench(model, {"fora": registry()["fora"]}, suite, (4,), tmp_path, 6, keep=True).run()
    assert len(imageio.mimread(tmp_path / "samples" / "fora-4" / f"{PROMPTS[0]}-0.mp4")) == 3


def test_an_unknown_score_is_named() -> None:
    with pytest.raises(UsageError, match="no score is named 'beauty'; there are clip_score, image_reward, lpips"):
        any_pipeline(recipes.Recipe("x", scores=["beauty"]), ["a", "b"], torch.float32, "cpu")
