"""Data, training, sheets and generation of the embedded model, on pictures made here."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from typer.testing import CliRunner

from tap_bench.emoji_evaluation import retrieved
from tap_diffusion import TAPConfig
from tap_diffusion.apps.generate import Request, generate, psnr
from tap_diffusion.apps.sheets import choices_sheet, sheet, to_image
from tap_diffusion.core.errors import UsageError
from tap_diffusion.core.predictors import Candidate
from tap_diffusion.core.report import Choice
from tap_diffusion.demo import data, train
from tap_diffusion.integrations.diffusers.versions import of_dtype
from tap_diffusion_demo import EMOJI
from tiny import build_pipeline, sample


def encoded(color: tuple[int, int, int, int], kind: str, size: int = 64) -> bytes:
    """A disc on a transparent ground whose hidden colour is green."""
    picture = Image.new("RGBA", (size, size), (0, 255, 0, 0))
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    pixels = np.array(picture)
    pixels[x**2 + y**2 < (size / 4) ** 2] = color
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, lossless=True)
    return stream.getvalue()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both npm packages in small: every captioned emoji, and some that are to be left out."""
    folder = tmp_path_factory.mktemp("data")
    codes = [*data.captions(), "1f1e6-1f1e8", "1f44d-1f3fb", "1f44d"]
    for i, (style, (_, prefix, suffix)) in enumerate(data.PACKAGES.items()):
        with tarfile.open(folder / f"{style}.tgz", "w:gz") as archive:
            for n, code in enumerate(codes):
                name = code.replace("-fe0f", "") if style == "fluent" and n % 2 else code
                content = encoded((n % 256, 50 * i, 255 - n % 256, 255), suffix[1:].upper(), 64 * (1 + i))
                member = tarfile.TarInfo(f"{prefix}{name}{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder


def test_captions_are_unique_and_in_the_model_s_vocabulary() -> None:
    captions = list(data.captions().values())
    others = [other for caption in captions for other in data.synonyms()[caption]]
    assert len(captions) > 200
    assert len({*captions, *others}) == len(captions) + len(others)
    clip, t5 = train.build_tokenizers(captions)
    for caption in [*captions, *others]:
        assert caption == caption.lower()
        assert len(clip(caption).input_ids) <= train.MAX_TOKENS
        assert t5.tokenize(caption) == [f"▁{word}" for word in caption.split()]


def test_words_that_no_caption_has_are_spelled() -> None:
    clip, t5 = train.build_tokenizers(["red apple"])
    assert t5.tokenize("pad") == ["▁", "p", "a", "d"]
    assert "".join(clip.tokenize("pad")) == "pad</w>"


def test_pictures_are_on_white_with_their_captions(packages: Path) -> None:
    pictures, captions, styles = data.load(packages)
    assert pictures.shape == (2 * len(data.captions()), 3, 64, 64)
    assert pictures.dtype == torch.uint8
    assert sorted(captions) == sorted([*data.captions().values()] * 2)
    assert styles.count("noto") == styles.count("fluent")
    assert (pictures[:, :, 0, 0] == 255).all()
    # The hidden green of transparent pixels must not bleed into the edge: no pixel is greener than white over the disc.
    assert (pictures[:, 1].int() - pictures[:, 0].int().maximum(pictures[:, 2].int())).max() <= 2


def test_cutouts_are_premultiplied_and_in_the_order_asked_for(packages: Path) -> None:
    wanted = ["red apple", "laughing face"]
    pictures = data.cutouts(packages, wanted, "fluent", 16)
    assert pictures.shape == (2, 4, 16, 16)
    assert (pictures[:, :, 0, 0] == 0).all()
    order = list(data.captions().values())
    for picture, caption in zip(pictures, wanted, strict=True):
        n = order.index(caption)
        colour = torch.tensor([n % 256, 50, 255 - n % 256, 255]) / 255
        torch.testing.assert_close(picture[:, 8, 8], colour)
        # Premultiplied, every pixel is the disc's colour times the share that it covers, but for clipped overshoot.
        torch.testing.assert_close(picture, colour[:, None, None] * picture[3], atol=0.05, rtol=0)


def test_all_pictures_are_without_flags_and_skin_tones(packages: Path) -> None:
    pictures, captions, _ = data.load(packages, "all")
    assert len(pictures) == 2 * (len(data.captions()) + 1)
    assert captions.count("") == 2


@pytest.mark.slow
def test_training_runs_stops_resumes_and_exports(packages: Path, tmp_path: Path) -> None:
    def call(*arguments: Any) -> Any:
        result = CliRunner().invoke(train.app, [*map(str, arguments), "--work", str(tmp_path)])
        assert result.exit_code == 0, (result.output, result.exception)

    def steps(name: str) -> int:
        return int(torch.load(tmp_path / f"{name}.pt", weights_only=True)["step"])

    call("autoencoder", "--data", packages, "--steps", 3, "--batch", 4, "--minutes", 0)
    assert steps("autoencoder") == 1
    call("autoencoder", "--data", packages, "--steps", 3, "--batch", 4)
    assert steps("autoencoder") == 3
    call("transformer", "--data", packages, "--steps", 2, "--batch", 4, "--minutes", 0)
    call("transformer", "--data", packages, "--steps", 2, "--batch", 4)
    assert steps("transformer") == 2
    assert list(tmp_path.glob("transformer-*.png"))
    call("export", "--data", packages, "--to", tmp_path / "pipeline")

    # Going on from the exported pipeline alone starts from its weights: before any training, they are the same.
    again = tmp_path / "again"
    more = ["--from", tmp_path / "pipeline", "--data", packages]
    arguments = [*map(str, more), "--work", str(again)]
    result = CliRunner().invoke(train.app, ["transformer", *arguments, "--steps", "1", "--batch", "4", "--lr", "0"])
    assert result.exit_code == 0, (result.output, result.exception)
    result = CliRunner().invoke(train.app, ["export", *arguments, "--to", str(again / "pipeline")])
    assert result.exit_code == 0, (result.output, result.exception)
    for part in ("transformer", "text_encoder", "vae"):
        name = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
        assert (again / "pipeline" / part / name).read_bytes() == (tmp_path / "pipeline" / part / name).read_bytes()

    pipe = FluxPipeline.from_pretrained(tmp_path / "pipeline", **of_dtype(torch.float32))
    pipe.set_progress_bar_config(disable=True)
    assert sample(pipe, steps=2, height=64, width=64, max_sequence_length=train.MAX_TOKENS).isfinite().all()


def test_training_stages_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm, for which it is too early to ask
    result = CliRunner().invoke(train.app, ["transformer", "--work", str(tmp_path)])
    assert result.exit_code == 2
    assert "run the stage 'autoencoder' first" in result.output.replace("│", "").replace("\n", " ").replace("  ", " ")


def test_pictures_are_fetched_by_npm_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="npm"):
        data.download(tmp_path / "pictures")


def test_retrieval_counts_the_nearest_caption() -> None:
    pipe = build_pipeline()
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    training = train.encode(pipe.vae, ((pictures + 1) * 127.5).round())
    assert retrieved(pictures, ["a", "b", "c"], pipe, training, ["a", "b", "c"]) == 1
    assert retrieved(pictures, ["a", "b", "c"], pipe, training, ["a", "x", "c"]) == pytest.approx(2 / 3)


def test_psnr_of_a_known_error() -> None:
    a, b = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.2)
    assert psnr(a, b) == pytest.approx([20.0, 20.0], abs=1e-4)  # 10 log10(2² / 0.2²)


def test_sheet_places_pictures() -> None:
    rows = [torch.full((2, 3, 8, 8), value) for value in (-1.0, 1.0)]
    page = np.asarray(sheet(rows, scale=3))
    assert page.shape == (2 * (24 + 4), 2 * (24 + 4), 3)
    assert (page[:24, :24] == 0).all()
    assert (page[28:52, :24] == 255).all()
    assert np.asarray(to_image(rows[0][0])).dtype == np.uint8


def test_choices_sheet_colours_each_token_by_its_choice() -> None:
    members = [Candidate(0, 3.0), Candidate(1, 3.0), Candidate(1, 2.0, 1.0)]
    index = torch.tensor([[0, 1, 2, 1]], dtype=torch.uint8)
    page = choices_sheet([Choice(3, "a", members, index)], torch.full((1, 3, 4, 4), -1.0), (2, 2), ["x"], scale=8)
    pixels = np.asarray(page)
    row = pixels[-90:]
    colours = {tuple(c) for c in row.reshape(-1, 3)}
    assert len({c for c in colours if len(set(c)) > 1}) >= 4  # two hues on the map, two in the legend


def test_choices_belong_to_the_last_batch(tmp_path: Path) -> None:
    pipe = build_pipeline()
    request = Request(["red apple", "blue book", "green frog face"], steps=8, batch_size=2)
    result = generate(pipe, "tiny", request, TAPConfig.paper(interval=3), tmp_path)
    assert result["predicted_steps"] == 4
    assert (tmp_path / "choices.png").exists()
    assert json.loads((tmp_path / "report.json").read_text())["batch_size"] == 2


class TestShippedModel:
    def test_is_a_complete_pipeline_within_its_size(self) -> None:
        files = [path for path in EMOJI.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= 40e6
        index = json.loads((EMOJI / "model_index.json").read_text())
        assert index["_class_name"] == "FluxPipeline"
        assert {path.suffix for path in files if path.stat().st_size > 1e6} == {".safetensors"}

    def test_is_what_the_training_script_builds(self, emoji: Any) -> None:
        captions = list(data.captions().values())
        built = train.build_pipeline(train.build_autoencoder(), captions)
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            expected = {k: v.shape for k, v in getattr(built, name).state_dict().items()}
            assert {k: v.shape for k, v in getattr(emoji, name).state_dict().items()} == expected
        assert emoji.tokenizer.get_vocab() == built.tokenizer.get_vocab()
        assert emoji.tokenizer_2.get_vocab() == built.tokenizer_2.get_vocab()
        config = emoji.transformer.config
        assert config.num_layers >= 2
        assert config.num_single_layers > config.num_layers
        assert config.num_layers + config.num_single_layers >= 12
