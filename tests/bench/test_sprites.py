"""The video pipeline in pixel space, and the videos and the training script of the model ``sprites``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor
from transformers import T5Config, T5EncoderModel
from typer.testing import CliRunner

import tap_diffusion as tap
from tap_bench import sprites
from tap_bench.pixels import PixelWanPipeline
from tap_diffusion.core.schedule import full_steps
from tap_diffusion.demo import data
from tap_diffusion.demo.train import MAX_TOKENS, build_tokenizers
from tiny import count_calls

PROMPTS = ["red apple moves left over grass", "star spins over wood"]


def build(num_frames: int = 3, size: int = 8, patch: int = 4) -> PixelWanPipeline:
    """A pipeline with random weights, on videos of ``num_frames``·(size/patch)² tokens."""
    torch.manual_seed(0)
    _, tokenizer = build_tokenizers(sprites.captions("train"))
    text = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    transformer = WanTransformer3DModel(
        patch_size=(1, patch, patch), num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = PixelWanPipeline(
        transformer.eval(), T5EncoderModel(text).eval(), tokenizer, scheduler, num_frames, size, size
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> PixelWanPipeline:
    return build()


def sample(pipe: PixelWanPipeline, prompts: list[str], steps: int = 12, **more: Any) -> Tensor:
    generator = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
    arguments: dict[str, Any] = {"num_inference_steps": steps, "generator": generator, "output_type": "latent"}
    frames: Tensor = pipe(prompts, **arguments | more).frames
    return frames


def test_guidance_is_the_textbook_s(pipe: PixelWanPipeline) -> None:
    """One Euler step from σ = 1 to 0 by hand: x - v, with v = v(none) + s · (v(prompt) - v(none))."""
    video = pipe(PROMPTS[0], negative_prompt="sand", guidance_scale=2.5, num_inference_steps=1, output_type="latent",
                 generator=torch.Generator().manual_seed(0)).frames  # fmt: skip
    x = torch.randn(1, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    velocities = []
    with torch.no_grad():
        for text in (PROMPTS[0], "sand"):
            tokens = pipe.tokenizer(text).input_ids
            padded = torch.tensor([tokens + [pipe.tokenizer.pad_token_id] * (MAX_TOKENS - len(tokens))])
            velocities.append(pipe.transformer(x, torch.tensor([1000.0]), pipe.text_encoder(padded)[0]).sample)
    conditional, none = velocities
    torch.testing.assert_close(video, x - (none + 2.5 * (conditional - none)))
    assert not torch.allclose(conditional, none, atol=1e-3)


def test_a_video_does_not_depend_on_its_batch(pipe: PixelWanPipeline) -> None:
    together = sample(pipe, PROMPTS)
    torch.testing.assert_close(together, torch.cat([sample(pipe, [prompt]) for prompt in PROMPTS]))


def test_kinds_of_output(pipe: PixelWanPipeline) -> None:
    latent = sample(pipe, PROMPTS)
    assert latent.shape == (2, 3, 3, 8, 8)
    assert latent.abs().max() > 1
    frames = sample(pipe, PROMPTS, output_type="pt")
    torch.testing.assert_close(frames, (latent.transpose(1, 2) / 2 + 0.5).clamp(0, 1))
    pictures: Any = sample(pipe, PROMPTS, output_type="pil")
    assert [len(video) for video in pictures] == [3, 3]
    assert pictures[1][2].size == (8, 8)
    assert pictures[1][2].getpixel((4, 5)) == tuple((255 * frames[1, 2, :, 5, 4]).round().int().tolist())


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_other_solvers_solve_the_same_equation(pipe: PixelWanPipeline, name: str) -> None:
    exact = sample(pipe, PROMPTS, steps=200)
    pipe.scheduler = getattr(diffusers, name)(use_flow_sigmas=True, prediction_type="flow_prediction")
    # What 20 steps leave, with Euler 0.007; one step leaves 0.14.
    assert (sample(pipe, PROMPTS, steps=20) - exact).abs().mean() < 0.01


def test_a_saved_pipeline_is_the_same(pipe: PixelWanPipeline, tmp_path: Path) -> None:
    plain = sample(pipe, PROMPTS)
    pipe.save_pretrained(tmp_path)
    loaded = PixelWanPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, PROMPTS), plain)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_with_tap(pipe: PixelWanPipeline, scheduler: str, guidance: float) -> None:
    if scheduler == "UniPCMultistepScheduler":
        pipe.scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    plain = sample(pipe, PROMPTS, guidance_scale=guidance)
    calls = count_calls(pipe.transformer.blocks[1])
    with tap.enabled(pipe, tap.TAPConfig.paper(interval=4, warmup=2)):
        accelerated = sample(pipe, PROMPTS, guidance_scale=guidance)
        full = len(full_steps(12, 4, 2))
        assert calls[0] == full * (2 if guidance > 1 else 1)
        report = tap.report(pipe)
        assert (report.steps, report.full_steps) == (12, full)
        assert not report.fallbacks
        assert torch.equal(sample(pipe, PROMPTS, guidance_scale=guidance), accelerated)
    assert not torch.equal(accelerated, plain)
    assert torch.equal(sample(pipe, PROMPTS, guidance_scale=guidance), plain)


def test_captions() -> None:
    train, test = sprites.captions("train"), sprites.captions("test")
    assert (len(train), len(test)) == (32 * 8 * 6 - 64, 64)
    assert not set(train) & set(test)
    assert test == sprites.captions("test")
    seen = {word for caption in train for word in caption.split()}
    assert {word for caption in test for word in caption.split()} <= seen
    assert set(sprites.SPRITES) <= set(data.captions().values())
    tokenizer = build().tokenizer
    for caption in [*train, *test]:
        assert tokenizer.tokenize(caption) == [f"▁{word}" for word in caption.split()]
        assert len(tokenizer(caption).input_ids) <= tokenizer.model_max_length


# ------------------------------------------------------------------------------------------------------- the videos

_MIDDLES = (torch.arange(32) + 0.5) / 16 - 1
DISC = (_MIDDLES[:, None] ** 2 + _MIDDLES**2 < 0.8).float()
RIGHT_HALF = DISC * (_MIDDLES > 0)


def coverage(shape: Tensor, motion: str, seed: int) -> Tensor:
    """Which share of each pixel (F, 32, 32) the sprite of this shape covers: what is white with one of two sprites
    that differ in colour alone."""
    videos = []
    for colour in (1.0, 0.0):
        cutout = torch.cat([colour * shape.expand(3, -1, -1), shape[None]]).expand(32, -1, -1, -1)
        generator = torch.Generator().manual_seed(seed)
        videos.append(sprites.render(f"alien {motion} over bricks", cutout, generator))
    return ((videos[0] - videos[1]) / 2).mean(0)


def centres(share: Tensor) -> Tensor:
    """Centre of mass (F, 2) of each frame, x and y in pixels."""
    at = torch.arange(32) + 0.5
    mass = share.sum((1, 2))
    return torch.stack([(share * at).sum((1, 2)), (share * at[:, None]).sum((1, 2))], dim=1) / mass[:, None]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("motion", "dx", "dy"),
    [("moves left", -2, 0), ("moves right", 2, 0), ("moves up", 0, -2), ("moves down", 0, 2), ("spins", 0, 0)],
)
def test_sprites_move_as_the_caption_says(motion: str, dx: float, dy: float, seed: int) -> None:
    moved = centres(coverage(DISC, motion, seed)).diff(dim=0)
    torch.testing.assert_close(moved, torch.tensor([[float(dx), float(dy)]]).expand(7, 2), atol=0.02, rtol=0)


def test_sprites_bounce() -> None:
    x, y = centres(coverage(DISC, "bounces", 0)).unbind(1)
    torch.testing.assert_close(x, x[:1].expand(8), atol=0.02, rtol=0)
    torch.testing.assert_close(y[[0, 1, 2, 3]], y[[4, 5, 6, 7]], atol=0.02, rtol=0)
    assert y[0] > y[1] > y[2] < y[3] < y[4]


def test_sprites_circle_clockwise() -> None:
    x, y = (centres(coverage(DISC, "circles", 0)) - 16).unbind(1)
    torch.testing.assert_close(torch.hypot(x, y), torch.full((8,), 7.0), atol=0.02, rtol=0)
    turns = torch.atan2(y, x).diff() % (2 * math.pi)  # y grows downwards
    torch.testing.assert_close(turns, torch.full((7,), math.pi / 4), atol=0.01, rtol=0)


def test_sprites_spin_clockwise() -> None:
    offset = centres(coverage(RIGHT_HALF, "spins", 0)) - centres(coverage(DISC, "spins", 0))
    turns = torch.atan2(offset[:, 1], offset[:, 0])
    torch.testing.assert_close(turns[0], torch.tensor(0.0), atol=0.01, rtol=0)
    expected = torch.full((7,), math.pi / 4)
    torch.testing.assert_close(turns.diff() % (2 * math.pi), expected, atol=0.02, rtol=0)


def test_sprites_grow() -> None:
    share = coverage(DISC, "grows", 0)
    mass = share.sum((1, 2)).sqrt()
    torch.testing.assert_close(mass / mass[0], torch.linspace(0.5, 1.375, 8) / 0.5, atol=0, rtol=0.03)
    torch.testing.assert_close(centres(share).diff(dim=0), torch.zeros(7, 2), atol=0.05, rtol=0)


@pytest.mark.parametrize("motion", sprites.MOTIONS)
def test_sprites_stay_within_the_frame(motion: str) -> None:
    whole = DISC.sum() / 4
    for seed in range(20):
        x, y, magnification, _ = sprites.path(motion, torch.Generator().manual_seed(seed))
        assert ((x - 8 * magnification > -0.01) & (x + 8 * magnification < 32.01)).all()
        assert ((y - 8 * magnification > -0.01) & (y + 8 * magnification < 32.01)).all()
    if motion != "grows":
        mass = coverage(DISC, motion, 0).sum((1, 2))
        torch.testing.assert_close(mass, whole.expand(8), atol=0, rtol=0.02)


@pytest.mark.parametrize("ground", sprites.GROUNDS)
def test_grounds_are_still_and_have_detail(ground: str) -> None:
    def render(cutout: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sprites.render(f"alien moves up over {ground}", cutout.expand(32, -1, -1, -1), generator)

    nothing, grey = torch.zeros(4, 32, 32), torch.cat([0.5 * DISC.expand(3, -1, -1), DISC[None]])
    bare = render(nothing, 0)
    assert torch.equal(bare, bare[:, :1].expand(-1, 8, -1, -1))
    assert bare[:, 0].std((1, 2)).max() > 0.1
    free = coverage(DISC, "moves up", 0) == 0
    assert 0.75 < free.float().mean() < 0.9
    assert torch.equal(render(grey, 0)[:, free], bare[:, free])
    assert not torch.equal(bare, render(nothing, 1))
    torch.testing.assert_close(bare[:, :, 16:, 16:], bare[:, :, :16, :16])


def test_each_caption_has_its_sprite_and_ground() -> None:
    brightness = torch.linspace(0.1, 0.9, 32)
    cutouts = torch.cat([brightness[:, None, None, None].expand(-1, 3, 32, 32), torch.ones(32, 1, 32, 32)], dim=1)
    for name, bright in zip(sprites.SPRITES, brightness.tolist(), strict=True):
        video = sprites.render(f"{name} circles over water", cutouts)
        assert ((video - (2 * bright - 1)).abs() < 1e-5).all(0).float().mean() > 0.2
    means = torch.stack([sprites.texture(ground).mean((1, 2)) for ground in sprites.GROUNDS])
    assert torch.pdist(means).min() > 0.1
    with pytest.raises(ValueError, match="lemon"):
        sprites.render("lemon circles over water", cutouts)


# ----------------------------------------------------------------------------------------------------- the training


@pytest.mark.slow
def test_training_stops_resumes_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*arguments: Any) -> None:
        result = CliRunner().invoke(sprites.app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output

    cutouts = torch.cat([DISC.expand(3, -1, -1), DISC[None]]).expand(32, -1, -1, -1)
    monkeypatch.setattr(sprites, "load", lambda folder: cutouts)
    monkeypatch.setattr(sprites, "build", lambda: build(sprites.FRAMES, sprites.SIZE, patch=16))
    work = tmp_path / "work"
    for steps in (1, 2):
        call("train", "--work", work, "--steps", steps, "--batch", 2)
        assert torch.load(work / "sprites.pt", weights_only=True)["step"] == steps
        assert (work / f"sprites-{steps:06d}.png").exists()
    call("export", "--work", work, "--to", tmp_path / "model")
    pipe = PixelWanPipeline.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    video = pipe(PROMPTS[0], num_inference_steps=2).frames[0]
    assert (len(video), video[0].size) == (8, (32, 32))


def test_the_model_is_small_and_begins_with_no_velocity() -> None:
    pipe = sprites.build()
    model = sprites.trained_part(pipe)
    assert sum(parameter.numel() for parameter in model.parameters()) < 5e6
    torch.manual_seed(0)
    cutouts = torch.zeros(32, 4, 32, 32)
    with torch.no_grad():
        begin = float(sprites.loss(pipe, cutouts, ["alien spins over tiles"], batch=2)())
    tiles = 2 * sprites.texture("tiles") - 1
    # The loss of no velocity at all: the mean square of the noise and of the video.
    assert begin == pytest.approx(1 + float(tiles.square().mean()), rel=0.02)
