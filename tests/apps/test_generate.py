"""What ``tap generate`` asks of pipelines of many kinds, and what it makes of their results."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import imageio
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from test_sprites import PROMPTS
from test_sprites import build as build_sprites
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from typer.testing import CliRunner

import tap_diffusion as tap
from tap_bench.fashion import LABELS
from tap_bench.models import BenchModel
from tap_bench.models import draw as bench_draw
from tap_diffusion.apps import generate as generate_module
from tap_diffusion.apps import media, pipelines
from tap_diffusion.apps.cli import app
from tap_diffusion.apps.cut_off import watched
from tap_diffusion.apps.generate import Request, draw, generate, load_pipeline, prompt_for, psnr, run
from tap_diffusion.apps.lora import Lora
from tap_diffusion.core.errors import UsageError, told_by
from tap_diffusion.demo.train import build_tokenizers
from tiny import WORDS, Operations, build_pipeline, counted_forward
from zoo import build

TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def t5(words: list[str] = WORDS) -> tuple[T5EncoderModel, Any]:
    _, tokenizer = build_tokenizers(words)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), tokenizer


def sd3() -> Any:
    """Stable Diffusion 3: both branches of guidance in one batch."""
    torch.manual_seed(0)
    clip_tokenizer, _ = build_tokenizers(WORDS)
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer), projection_dim=8, max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
        pad_token_id=1, **TEXT,
    )  # fmt: skip
    encoder, tokenizer = t5()
    pipe = StableDiffusion3Pipeline(
        transformer=build("SD3Transformer2DModel", joint_attention_dim=32, pooled_projection_dim=16),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            latent_channels=4, norm_num_groups=4, block_out_channels=(8,), shift_factor=0.0, scaling_factor=1.0
        ).eval(),
        text_encoder=CLIPTextModelWithProjection(clip).eval(), tokenizer=clip_tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip).eval(), tokenizer_2=clip_tokenizer,
        text_encoder_3=T5EncoderModel(encoder.config.__class__(**encoder.config.to_dict() | {"d_model": 32})).eval(),
        tokenizer_3=tokenizer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan() -> Any:
    """Wan 2.1: videos, and a call of the transformer for each branch."""
    torch.manual_seed(0)
    encoder, tokenizer = t5()
    pipe = diffusers.WanPipeline(
        transformer=build("WanTransformer3DModel", in_channels=4, out_channels=4, text_dim=16),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        ).eval(),
        text_encoder=encoder, tokenizer=tokenizer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit() -> Any:
    pipe = diffusers.DiTPipeline(
        transformer=build("DiTTransformer2DModel", num_embeds_ada_norm=1000),
        vae=AutoencoderKL(latent_channels=4, norm_num_groups=32).eval(),
        scheduler=diffusers.DDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_sd3(tmp_path: Path) -> None:
    pipe, request = sd3(), Request(WORDS, steps=8, height=16, width=16, batch_size=2, guidance=3.0)
    result = generate(pipe, "tiny", request, tap.TAPConfig(full_steps=4), tmp_path, compare=True)
    assert (result["full_steps"], result["predicted_steps"], result["batch_size"]) == (4, 4, 2)
    assert {file.name for file in tmp_path.iterdir()} >= {"000-red-apple-tap.png", "compare.png", "choices.png"}
    with tap.enabled(pipe, tap.TAPConfig(full_steps=4)):
        expected = pipe(
            WORDS, num_inference_steps=8, height=16, width=16, guidance_scale=3.0, output_type="pt",
            generator=[torch.Generator().manual_seed(i) for i in range(3)],
        ).images  # fmt: skip
    saved = np.asarray(Image.open(tmp_path / "002-blue-book-tap.png"))
    assert np.abs(saved - 255 * expected[2].permute(1, 2, 0).numpy()).max() < 1.5
    with pytest.raises(UsageError, match="height 17 can't be done by this model: it must be a multiple of 2"):
        Request(WORDS, height=17).check(pipe)
    with pytest.raises(UsageError, match="StableDiffusion3Pipeline takes no number of frames"):
        Request(WORDS, frames=2).check(pipe)


def test_a_negative_prompt_has_an_effect_or_is_refused() -> None:
    pipe, request = sd3(), Request((), steps=3, height=16, width=16)
    plain, other = (draw(pipe, request, WORDS[:1], [0], [negative]) for negative in (None, "blue"))
    assert not torch.equal(plain, other)
    with pytest.raises(UsageError, match="no effect here: give a guidance scale above 1"):
        draw(pipe, Request((), steps=3, height=16, width=16, guidance=1.0), WORDS[:1], [0], ["blue"])
    with pytest.raises(UsageError, match="DiTPipeline takes no negative prompt"):
        draw(dit(), Request((), steps=3), ["1"], [0], ["2"])


def test_wan(tmp_path: Path) -> None:
    pipe = wan()
    request = Request(WORDS[:2], steps=8, height=32, width=48, frames=5, guidance=4.0)
    result = generate(pipe, "tiny", request, tap.TAPConfig(full_steps=4), tmp_path, compare=True, fps=5)
    assert (result["frames"], result["height"], result["width"], result["batch_size"]) == (5, 32, 48, 1)
    assert {file.name for file in tmp_path.iterdir()} == {
        "compare.gif", "compare.png", "report.json", *(f"00{i}-{name}-{kind}.mp4" for kind in ("full", "tap")
        for i, name in enumerate(("red-apple", "green-frog-face"))),
    }  # fmt: skip
    reader: Any = imageio.get_reader(tmp_path / "000-red-apple-tap.mp4")
    assert reader.get_meta_data()["fps"] == 5
    assert np.shape(imageio.mimread(tmp_path / "000-red-apple-tap.mp4")) == (5, 32, 48, 3)
    played: Any = Image.open(tmp_path / "compare.gif")
    with played:  # two rows of two videos
        assert (played.n_frames, played.info["duration"], played.info["loop"]) == (5, 200, 0)
        assert played.width > 2 * 48 * 3
        assert played.height > 2 * 32 * 3
    full, _ = run(pipe, request, "")
    with tap.enabled(pipe, tap.TAPConfig(full_steps=4)):
        accelerated, _ = run(pipe, request, "")
    assert result["psnr_db_each"] == pytest.approx(psnr(accelerated, full))


LONG = ["red apple " * 60, "red apple"]


def test_prompts_that_were_cut_off_are_told(tmp_path: Path) -> None:
    """Stable Diffusion 3 takes fewer tokens in CLIP than in T5."""
    pipe = sd3()
    pipe.tokenizer.model_max_length = pipe.tokenizer_max_length = 8
    told: list[str] = []
    request = Request(LONG, steps=3, height=16, width=16, negative_prompt="blue book " * 5, guidance=2.0, batch_size=1)
    kinds = [type(part) for part in pipe.components.values()]
    with told_by(told.append):
        generate(pipe, "tiny", request, tap.TAPConfig(full_steps=2), tmp_path)
    clip = len(pipe.tokenizer(LONG[0]).input_ids)
    apple, book = dict.fromkeys(line for line in told if "cut off" in line)  # the second in both batches
    assert apple.startswith('the prompt "red apple red apple')
    assert "…" in apple
    assert apple.endswith(f"cut off: tokenizer (CLIPTokenizer) kept 8 of {clip} tokens")  # and T5's 256, thus all
    assert 'the prompt "blue book blue book' in book
    assert [type(part) for part in pipe.components.values()] == kinds


def test_what_a_pipeline_cuts_behind_its_tokenizer_is_told_too() -> None:
    """As Qwen-Image does: the tokenizer keeps a thousand tokens, and the pipeline ``max_sequence_length`` of them."""
    _, tokenizer = t5()
    pipe = SimpleNamespace(components={"tokenizer": tokenizer})
    with watched(pipe, LONG, 50) as cut:
        tokenizer([f"Draw this: {prompt}" for prompt in LONG], truncation=True, max_length=500)
    own = len(tokenizer(LONG[0], add_special_tokens=False).input_ids)
    assert own == 120
    assert cut.of(LONG[0]) == f"tokenizer ({type(tokenizer).__name__}) kept 50 of 120 tokens"
    assert cut.of(LONG[1]) is None
    assert len(cut.messages()) == 1
    with watched(pipe, LONG, 120) as cut:
        tokenizer(LONG, truncation=True, max_length=500)
    assert cut.messages() == []


def test_classes_have_names() -> None:
    pipe = load_pipeline("fashion", torch.float32, "cpu")
    assert [pipelines.class_number(pipe, name) for name in LABELS] == list(range(10))
    assert pipelines.class_number(pipe, "Dress") == pipelines.class_number(pipe, "3") == 3
    request = Request((), steps=3)
    assert torch.equal(draw(pipe, request, ["Dress"], [0]), draw(pipe, request, ["3"], [0]))
    for wrong in ("boot", "10", "-1", ""):
        with pytest.raises(
            UsageError, match=f"'{wrong}' is none of them: give 0 t-shirt, 1 trousers, .*, 9 ankle boot"
        ):
            Request([wrong]).check(pipe)


def test_many_classes_are_not_all_listed() -> None:
    pipe = dit()
    pipe.labels = {f"kind {i}": i for i in range(1000)}
    with pytest.raises(
        UsageError, match=r"'tree' is none of them: give 0 kind 0, 1 kind 1, 2 kind 2, …, 999 kind 999$"
    ):
        pipelines.class_number(pipe, "tree")
    with pytest.raises(UsageError, match=r"give .*77 kind 77, .*…$"):
        pipelines.class_number(pipe, "kind77")
    del pipe.labels
    with pytest.raises(UsageError, match=r"'tree' is none of them: give 0 to 999$"):
        pipelines.class_number(pipe, "tree")


def test_dit_draws_classes(tmp_path: Path) -> None:
    pipe, request = dit(), Request(["3", "7"], steps=8)
    result = generate(pipe, "tiny", request, tap.TAPConfig(full_steps=4), tmp_path)
    with tap.enabled(pipe, tap.TAPConfig(full_steps=4)):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        expected = pipe([3, 7], num_inference_steps=8, generator=generators, output_type="np").images
    assert result["width"] == expected.shape[2]
    saved = np.asarray(Image.open(tmp_path / "001-7-tap.png"))
    assert np.abs(saved - 255 * expected[1]).max() < 1.5
    with pytest.raises(UsageError, match="DiTPipeline draws classes, and 'boot' is none of them: give 0 to 999"):
        Request(["boot"]).check(pipe)
    with pytest.raises(UsageError, match="has one size only"):
        Request(["3"], height=64).check(pipe)


def test_the_bench_draws_with_dit() -> None:
    """By class labels, from a pipeline with an autoencoder."""
    model = BenchModel("dit", dit, [3], [7], lambda labels: {"class_labels": list(labels)})
    pictures = bench_draw(dit(), model, [3], 0, num_inference_steps=3).pictures
    assert pictures.shape[:2] == (1, 3)
    assert 0 <= pictures.min() < pictures.max() <= 1


def test_steps_of_a_scheduler_that_does_not_count_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tap_diffusion.core.engine.Engine.checks_late", staticmethod(lambda _: True))
    monkeypatch.setattr("tap_diffusion.core.doubts.LateFlag.is_raised", lambda _: False)
    pipe, counter = dit(), Operations()
    with tap.enabled(pipe, tap.TAPConfig(full_steps=4)):
        counted_forward(pipe.transformer, counter, set(range(1, 8)))
        draw(pipe, Request((), steps=8), ["3"], [0])
        assert tap.report(pipe).predicted_steps == 4
    assert counter.count > 0
    assert counter.reads == []


def test_what_a_pipeline_finds_wrong_is_told_in_a_line() -> None:
    with pytest.raises(UsageError, match=r"WanPipeline: `height` and `width` have to be divisible by 16"):
        draw(wan(), Request((), steps=3, height=24, width=24), WORDS[:1], [0])


@contextmanager
def described(monkeypatch: pytest.MonkeyPatch, name: str, **config: Any) -> Iterator[Any]:
    """A pipeline of a class of diffusers without its parts, but for the transformer's configuration."""
    pipe: Any = object.__new__(getattr(diffusers, name))
    with monkeypatch.context() as patch:
        patch.setattr(pipelines, "transformers", lambda _: [SimpleNamespace(config=config)])
        patch.setattr("tap_diffusion.apps.generate.supported", lambda _: None)
        yield pipe


@pytest.mark.parametrize(
    ("name", "embeds", "condition", "guidance", "frames"),
    [
        ("FluxPipeline", True, "prompt", "guidance_scale", None),
        ("FluxPipeline", False, "prompt", "true_cfg_scale", None),
        ("Flux2Pipeline", True, "prompt", "guidance_scale", None),
        ("QwenImagePipeline", False, "prompt", "true_cfg_scale", None),
        ("StableDiffusion3Pipeline", False, "prompt", "guidance_scale", None),
        ("PixArtSigmaPipeline", False, "prompt", "guidance_scale", None),
        ("ZImagePipeline", False, "prompt", "guidance_scale", None),
        ("Kandinsky5T2IPipeline", False, "prompt", "guidance_scale", None),
        ("HunyuanImagePipeline", False, "prompt", None, None),
        ("DiTPipeline", False, "class_labels", "guidance_scale", None),
        ("WanPipeline", False, "prompt", "guidance_scale", "num_frames"),
        ("HunyuanVideoPipeline", True, "prompt", "guidance_scale", "num_frames"),
        ("LTXPipeline", False, "prompt", "guidance_scale", "num_frames"),
        ("SanaVideoPipeline", False, "prompt", "guidance_scale", "frames"),
        ("LattePipeline", False, "prompt", "guidance_scale", "video_length"),
    ],
)
def test_arguments(
    name: str, embeds: bool, condition: str, guidance: str | None, frames: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with described(monkeypatch, name, guidance_embeds=embeds) as pipe:
        assert pipelines.condition(pipe) == condition
        assert pipelines.guidance_argument(pipe) == guidance
        assert pipelines.frames_argument(pipe) == frames
        if guidance is None:
            with pytest.raises(UsageError, match="HunyuanImagePipeline takes no guidance scale"):
                Request(["x"], guidance=2.0).check(pipe)


@pytest.mark.parametrize(
    ("name", "needed"),
    [("WanImageToVideoPipeline", "image"), ("Kandinsky6SRPipeline", "video"), ("HeliosPyramidPipeline", "its own")],
)
def test_pipelines_that_need_more_than_prompts_are_refused(
    name: str, needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        described(monkeypatch, name) as pipe,
        pytest.raises(UsageError, match=rf"{name} needs more than prompts \({needed}.*with tap.enable"),
    ):
        Request(["x"]).check(pipe)


@pytest.mark.parametrize(
    ("scales", "vae", "transformer", "expected"),
    [
        ({"vae_scale_factor": 8}, {"latent_channels": 16}, {"in_channels": 64, "patch_size": 1}, 16),  # FLUX.1
        ({"vae_scale_factor": 8}, {"latent_channels": 32}, {"in_channels": 128, "patch_size": 1}, 16),  # FLUX.2
        ({"vae_scale_factor": 8}, {"z_dim": 16}, {"in_channels": 64, "patch_size": 2}, 16),  # Qwen-Image
        ({"vae_scale_factor": 8}, {"latent_channels": 16}, {"in_channels": 16, "patch_size": 2}, 16),  # SD3
        ({"vae_scale_factor": 32}, {"latent_channels": 32}, {"in_channels": 32, "patch_size": 1}, 32),  # Sana
        ({"vae_scale_factor_spatial": 8}, {"z_dim": 16}, {"in_channels": 16, "patch_size": (1, 2, 2)}, 16),  # Wan
        (
            {"vae_spatial_compression_ratio": 32}, {"latent_channels": 128}, {"in_channels": 128, "patch_size": 1}, 32,
        ),  # LTX
    ],
)  # fmt: skip
def test_sizes_are_multiples_of_a_token(
    scales: dict[str, int], vae: dict[str, int], transformer: dict[str, Any], expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The configurations are those that these models are published with."""
    monkeypatch.setattr(pipelines, "transformers", lambda _: [SimpleNamespace(config=transformer)])
    assert pipelines.multiple(SimpleNamespace(vae=SimpleNamespace(config=vae), **scales)) == expected


@pytest.mark.parametrize(
    ("tokens", "height", "width", "expected"),
    [(64, 32, 32, (8, 8)), (24, 32, 48, (4, 6)), (64 + 7, 32, 32, None), (1, 16, 1024, None), (64, 16, 1024, (1, 64))],
)
def test_tokens_of_a_picture_form_a_grid(
    tokens: int, height: int, width: int, expected: tuple[int, int] | None
) -> None:
    assert pipelines.grid(tokens, height, width) == expected


@pytest.mark.parametrize("model", ["emoji", "sprites"])
def test_embedded_models_read_capitals(model: str) -> None:
    tokenizers = load_pipeline(model, torch.float32, "cpu").components
    tokenizer = tokenizers.get("tokenizer_2", tokenizers["tokenizer"])
    assert tokenizer(prompt_for(model, "Fox Face")).input_ids == tokenizer("fox face").input_ids
    assert tokenizer("Fox Face").input_ids != tokenizer("fox face").input_ids
    assert prompt_for("some/model", "Fox Face") == "Fox Face"


def test_results_without_pictures_are_named() -> None:
    with pytest.raises(UsageError, match="returns SimpleNamespace makes neither"):
        pipelines.drawn(SimpleNamespace(audios=torch.zeros(1, 2, 3)))


class TestFiles:
    def test_a_video_keeps_its_frames(self, tmp_path: Path) -> None:
        ramp = torch.linspace(-1, 1, 32)
        video = torch.stack([ramp.roll(shift).expand(3, 32, 32) for shift in range(0, 12, 4)])
        suffix, content = media.encoded(video, fps=8)
        assert suffix == ".mp4"
        (tmp_path / "x.mp4").write_bytes(content)
        frames = np.stack(imageio.mimread(tmp_path / "x.mp4"))
        decoded = torch.from_numpy(frames).movedim(-1, 1) / 127.5 - 1
        assert min(psnr(decoded, video)) > 25

    def test_one_frame_is_a_picture(self) -> None:
        picture = torch.rand(3, 8, 8)
        assert media.encoded(picture[None]) == media.encoded(picture)
        assert media.encoded(picture)[0] == ".png"

    def test_without_imageio_videos_are_refused_before_they_are_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "imageio" else find(name))
        with pytest.raises(UsageError, match=r"videos need imageio: pip install 'tap-diffusion\[video\]'"):
            Request(PROMPTS).check(build_sprites())
        Request(WORDS).check(build_pipeline())


class TestCommand:
    def test_videos_of_the_embedded_model(self, tmp_path: Path) -> None:
        arguments = ["--model", "sprites", "--steps", "7", "--full-steps", "3", "--out", str(tmp_path)]
        result = CliRunner().invoke(app, ["generate", PROMPTS[0], *arguments])
        assert result.exit_code == 0, result.output
        assert "1 video, report.json" in result.output
        report = json.loads((tmp_path / "report.json").read_text())
        assert (report["frames"], report["full_steps"], report["height"]) == (8, 3, 32)
        assert len(imageio.mimread(tmp_path / "000-red-apple-moves-left-over-grass-tap.mp4")) == 8

    def test_classes_of_the_embedded_model(self, tmp_path: Path) -> None:
        arguments = ["--model", "fashion", "--steps", "7", "--full-steps", "3", "--out", str(tmp_path)]
        result = CliRunner().invoke(app, ["generate", "3", "7", *arguments])
        assert result.exit_code == 0, result.output
        assert "2 pictures, choices.png, report.json" in result.output
        assert Image.open(tmp_path / "001-7-tap.png").size == (32, 32)
        other = CliRunner().invoke(app, ["generate", "boot", *arguments])
        assert other.exit_code == 2
        assert "'boot' is none of them: give 0 t-shirt, 1 trousers, 2 pullover" in other.stderr

    def test_many_videos(self, tmp_path: Path) -> None:
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
        out = tmp_path / "out"
        arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--engine", "local", "--model", "sprites"]
        given = [*arguments, "--steps", "7", "--full-steps", "3", "--fps", "4", "--out", str(out)]
        result = CliRunner().invoke(app, ["generate", *given])
        assert result.exit_code == 0, result.output
        assert "2 videos, 0 failed" in result.output
        entries = pq.read_table(out / "manifest.parquet").to_pylist()
        assert [entry["predicted_steps"] for entry in entries] == [4, 4]
        assert len(imageio.mimread(out / entries[1]["file"])) == 8
        reader: Any = imageio.get_reader(out / entries[1]["file"])
        assert reader.get_meta_data()["fps"] == 4

    def test_a_folder_whose_pipeline_diffusers_does_not_have(self, tmp_path: Path) -> None:
        build_sprites().save_pretrained(tmp_path)
        result = CliRunner().invoke(app, ["generate", "x", "--model", str(tmp_path), "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert "has no attribute PixelWanPipeline" in " ".join(result.output.split())


def test_offloading_needs_a_device_and_is_diffusers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def noted(name: str) -> Any:
        def note(pipe: Any, device: str) -> Any:
            asked.append((name, device))
            return pipe

        return note

    for name in ("to", "enable_model_cpu_offload"):
        monkeypatch.setattr(diffusers.DiffusionPipeline, name, noted(name))
    with pytest.raises(UsageError, match="offloading is for a GPU"):
        load_pipeline("fashion", torch.float32, "cpu", offload=True)
    load_pipeline("fashion", torch.float32, "cuda:1", offload=True)
    load_pipeline("fashion", torch.float32, "cpu")
    assert asked == [("enable_model_cpu_offload", "cuda:1"), ("to", "cpu")]


class TestLora:
    @pytest.fixture(scope="class")
    @staticmethod
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A LoRA for the embedded model, as diffusers saves it."""
        folder = tmp_path_factory.mktemp("lora")
        torch.manual_seed(0)
        pipe: Any = load_pipeline("emoji", torch.float32, "cpu")
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
        return folder

    @pytest.mark.parametrize("by", ["folder", "file"])
    def test_the_picture_is_that_of_the_pipeline_with_the_lora_loaded_by_hand(
        self, folder: Path, tmp_path: Path, by: str
    ) -> None:
        source = str(folder if by == "folder" else folder / "pytorch_lora_weights.safetensors")
        arguments = ["red apple", "--steps", "4", "--full-steps", "2", "--guidance", "1", "--out", str(tmp_path)]
        result = CliRunner().invoke(app, ["generate", *arguments, "--lora", f"{source}:0.5"])
        assert result.exit_code == 0, result.output
        pipe: Any = load_pipeline("emoji", torch.float32, "cpu")
        pipe.set_progress_bar_config(disable=True)
        size = {"height": 64, "width": 64, "max_sequence_length": 8}

        def drawn_by_hand() -> Any:
            generator = [torch.Generator().manual_seed(0)]
            more = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np", **size}
            return pipe(["red apple"], generator=generator, **more).images[0]

        with tap.enabled(pipe, full_steps=2):
            plain = drawn_by_hand()
            pipe.load_lora_weights(str(folder), adapter_name="mine")
            pipe.set_adapters(["mine"], [0.5])
            expected = drawn_by_hand()
        saved = np.asarray(Image.open(tmp_path / "000-red-apple-tap.png"))
        assert np.abs(saved - 255 * expected).max() < 0.51
        assert np.abs(saved - 255 * plain).max() > 5
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["loras"] == [{"source": source, "scale": 0.5}]
        if by == "folder":
            for more in (["--lora", source], []):
                other = CliRunner().invoke(app, ["generate", *arguments, *more])
                assert other.exit_code == 2
                assert "holds results with loras" in other.stderr

    def test_two_act_together(self, folder: Path) -> None:
        pipe: Any = load_pipeline(
            "emoji", torch.float32, "cpu", loras=[Lora(str(folder), 0.5), Lora(str(folder), 0.25)]
        )
        one: Any = load_pipeline("emoji", torch.float32, "cpu", loras=[Lora(str(folder), 0.75)])
        request = Request((), steps=2, height=32, width=32)
        torch.testing.assert_close(draw(pipe, request, WORDS[:1], [0]), draw(one, request, WORDS[:1], [0]))

    def test_many_pictures(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "prompts.txt").write_text("red apple\n")
        sampling = ["--steps", "3", "--full-steps", "2", "--height", "32", "--width", "32", "--lora", f"{folder}:2"]
        few, many = tmp_path / "few", tmp_path / "many"
        for more in (
            ["red apple", "--out", few],
            ["--prompts", tmp_path / "prompts.txt", "--engine", "local", "--out", many],
        ):
            result = CliRunner().invoke(app, ["generate", *map(str, more), *sampling])
            assert result.exit_code == 0, result.output
        (entry,) = pq.read_table(many / "manifest.parquet").to_pylist()
        assert (many / entry["file"]).read_bytes() == (few / "000-red-apple-tap.png").read_bytes()
        assert json.loads(entry["settings"])["loras"] == [{"source": str(folder), "scale": 2.0}]

    def test_what_can_t_be_is_told_in_a_line(self, folder: Path, tmp_path: Path) -> None:
        build_pipeline().save_pretrained(tmp_path / "tiny")  # of another width

        def load(model: str, source: str) -> None:
            load_pipeline(model, torch.float32, "cpu", loras=[Lora(source)])

        with pytest.raises(UsageError, match="PixelDiTPipeline takes no LoRA"):
            load("fashion", str(folder))
        with pytest.raises(UsageError, match=r"there is no LoRA \./nothere: give a folder"):
            load("emoji", "./nothere")
        with pytest.raises(UsageError, match="the hub could not be reached to load 'some/thing'"):
            load("emoji", "some/thing")
        with pytest.raises(UsageError, match=f"could not load '{folder}': .*size mismatch"):
            load(str(tmp_path / "tiny"), str(folder))
        (tmp_path / "empty").mkdir()
        with pytest.raises(UsageError, match=f"could not load '{tmp_path}/empty'"):
            load("emoji", str(tmp_path / "empty"))
        save_file({"unet.nothing.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "x.safetensors")
        with pytest.raises(UsageError, match="has no weights for FluxPipeline"):
            load("emoji", str(tmp_path / "x.safetensors"))

    def test_scales_stand_behind_a_colon(self) -> None:
        assert Lora.parse("some/thing:0.8") == Lora("some/thing", 0.8)
        assert Lora.parse("some/thing:-1") == Lora("some/thing", -1.0)
        assert Lora.parse("./a:b") == Lora("./a:b", 1.0)
        with pytest.raises(UsageError, match="the scale of the LoRA x is nan"):
            Lora.parse("x:nan")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.parametrize("model", ["flux", "dit"])
def test_compiled_blocks_give_the_same(model: str, tmp_path: Path) -> None:
    """diffusers names the blocks of FLUX, and not those of DiT."""
    pipe, kind = (build_pipeline(), FluxTransformerBlock) if model == "flux" else (dit(), BasicTransformerBlock)
    request = Request(WORDS[:2] if model == "flux" else ["1", "2"], steps=6, batch_size=1)
    expected, _ = run(pipe, request, "")
    with tap.enabled(pipe, full_steps=3):
        accelerated, _ = run(pipe, request, "")
    pipelines.compile_blocks(pipe)
    compiled = [module for module in pipe.transformer.modules() if module._compiled_call_impl is not None]
    assert sum(isinstance(module, kind) for module in compiled) == len(pipe.transformer.transformer_blocks)
    counters.clear()
    graphs = []
    run_plain = generate_module.run

    def counting(*arguments: Any) -> Any:
        graphs.append(counters["stats"]["unique_graphs"])
        return run_plain(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_module, "run", counting)
        result = generate(pipe, "tiny", request, tap.TAPConfig(full_steps=3), tmp_path, compare=True)
    assert graphs[0] == 0
    assert graphs[2:] == [counters["stats"]["unique_graphs"]] * 4 != [0] * 4  # nothing is compiled behind the warm-up
    assert result["psnr_db_each"] == pytest.approx(psnr(accelerated, expected), abs=0.1)


def as_pictures(values: Tensor) -> Any:
    return SimpleNamespace(images=values)


@pytest.mark.parametrize("kind", ["tensor", "array", "list"])
def test_kinds_of_results(kind: str) -> None:
    values = torch.rand(2, 3, 4, 5)
    given: Any = {"tensor": values, "array": values.movedim(1, -1).numpy(), "list": list(values)}[kind]
    assert torch.equal(pipelines.drawn(as_pictures(given)), values)
