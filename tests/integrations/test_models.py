"""What is supported, what is refused, and modules from outside diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel
from typer.testing import CliRunner

import popular_models
import tap_diffusion as tap
from tap_diffusion.apps import cli
from tap_diffusion.apps.cli import app
from tap_diffusion.integrations.diffusers import catalog
from tap_diffusion.integrations.diffusers.versions import VERSION
from tap_diffusion.integrations.specs import REFUSED, SPECS
from tap_diffusion_demo import EMOJI


class TestCatalog:
    def test_every_class_of_diffusers_has_a_verdict(self) -> None:
        unknown = [entry.name for entry in catalog.catalog() if entry.status == "unknown"]
        assert not unknown

    def test_the_json_lists_what_works(self) -> None:
        result = CliRunner().invoke(app, ["models", "--json"])
        assert result.exit_code == 0
        entries = json.loads(result.stdout)
        assert sum(entry["status"] == "works" for entry in entries) == len(SPECS.keys() - catalog.absent()) >= 46
        assert all(entry["note"] for entry in entries if entry["status"] == "refused")

    def test_markdown_keeps_to_the_word(self) -> None:
        result = CliRunner().invoke(app, ["models", "flux", "--markdown"])
        assert result.exit_code == 0
        assert "- `FluxTransformer2DModel`: Flux" in result.stdout
        assert "Wan" not in result.stdout

    def test_the_list_is_by_pipeline_with_notes_and_reasons(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cli.models, "console", Console(width=80))
        result = CliRunner().invoke(app, ["models"])
        assert result.exit_code == 0
        assert max(map(len, result.stdout.splitlines())) <= 80 or catalog.absent()
        lines = {tuple(line.split()) for line in result.stdout.splitlines()}
        entries = catalog.catalog()
        assert {(pipeline, entry.name) for entry in entries for pipeline in entry.pipelines} <= lines
        text = " ".join(result.stdout.split())
        for words in (SPECS["PriorTransformer"].note, REFUSED["UVit2DModel"], *catalog.absent()):
            assert words in text
        works = [entry for entry in entries if entry.name in SPECS]
        assert f"{sum(len(entry.pipelines) for entry in works)} pipelines." in text
        assert f"{len(works)} of {len(entries)} transformer classes work" in text

    def test_a_word_finds_pipelines_and_transformers(self) -> None:
        def names(*arguments: str) -> set[str]:
            result = CliRunner().invoke(app, ["models", *arguments], env={"COLUMNS": "80"})
            assert result.exit_code == 0, result.output
            return {line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ") and line[2] != " "}

        assert {"WanPipeline", "WanVACEPipeline"} <= names("wan") == names("WAN")
        assert "FluxPipeline" not in names("wan")
        assert names("stable diffusion 3 pag") == {"StableDiffusion3PAGImg2ImgPipeline", "StableDiffusion3PAGPipeline"}
        assert names("UVit2D") == {"AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline"}
        (entry,) = json.loads(CliRunner().invoke(app, ["models", "FluxFill", "--json"]).stdout)
        assert (entry["name"], entry["pipelines"]) == ("FluxTransformer2DModel", ["FluxFillPipeline"])

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "did you mean Wan?"),
            ("quen", "did you mean Qwen"),
            ("xyzzy", "no pipeline or transformer with 'xyzzy' in its name; tap models lists all"),
            ("StableDiffusionXLImg2Img", "StableDiffusionXLImg2ImgPipeline: no transformer for TAP to accelerate"),
        ],
    )
    def test_a_word_that_finds_nothing(self, word: str, message: str) -> None:
        result = CliRunner().invoke(app, ["models", word])
        assert result.exit_code == 2
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1

    def test_pipelines_are_found(self) -> None:
        entries = {entry.name: entry for entry in catalog.catalog()}
        assert {"FluxPipeline", "FluxFillPipeline"} <= set(entries["FluxTransformer2DModel"].pipelines)
        assert "WanPipeline" in entries["WanTransformer3DModel"].pipelines

    @pytest.mark.skipif(bool(catalog.absent()), reason="the page is of a newer diffusers")
    def test_the_page_is_up_to_date(self) -> None:
        page = popular_models.PAGE.read_text(encoding="utf-8")
        assert page == popular_models.filled(page), "run: python docs/popular_models.py"

    @pytest.mark.skipif(bool(catalog.absent()), reason="the page is of a newer diffusers")
    def test_popular_pipelines_are_accelerated_and_their_ids_are_those_of_diffusers(self) -> None:
        entries = [entry for entry in catalog.catalog() if entry.status == "works"]
        pipelines = {name for entry in entries for name in entry.pipelines}
        files = Path(diffusers.__file__).parent.rglob("*.py")
        source = "\n".join(file.read_text(encoding="utf-8") for file in files)
        tests = "\n".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py"))
        rows = [row for rows in popular_models.POPULAR.values() for row in rows]
        assert {row.pipeline for row in rows} <= pipelines
        assert {row.hub_id for row in rows if row.hub_id not in source} == {  # which its docstrings leave out
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        }  # fmt: skip
        assert {name for name in popular_models.RANDOM if name not in tests} == set()


def test_no_class_is_both_supported_and_refused() -> None:
    assert not SPECS.keys() & REFUSED.keys()


@pytest.mark.skipif(VERSION < (0, 42), reason="classes came with later versions")
def test_the_newest_diffusers_has_every_class() -> None:
    assert not catalog.absent()
    assert all(hasattr(diffusers, name) for name in [*SPECS, *REFUSED])


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - catalog.absent()))
def test_refusals_tell_the_reason(name: str) -> None:
    module = getattr(diffusers, name).__new__(getattr(diffusers, name))
    nn.Module.__init__(module)
    with pytest.raises(tap.UnsupportedModelError) as raised:
        tap.enable(module)
    assert name in str(raised.value)
    assert REFUSED[name] in str(raised.value)


# ---------------------------------------------------------------------------- a DiT in the manner of facebook's, ours


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attn(h, h, h, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.embed, self.time, self.label = nn.Linear(4, width), nn.Linear(1, width), nn.Embedding(10, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.time(t[:, None]) + self.label(y)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, c)
        head: Tensor = self.head(x)
        return head


class TestModuleOutsideDiffusers:
    CONFIG = tap.TAPConfig.paper(interval=4)

    @pytest.fixture
    def dit(self) -> DiT:
        torch.manual_seed(0)
        return DiT().eval().requires_grad_(False)

    def sample(self, dit: DiT, steps: int = 20) -> Tensor:
        x = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
        y = torch.tensor([1, 7])
        for step in range(steps):
            x = x - dit(x, torch.full((2,), 1 - step / steps), y) / steps
        return x

    @pytest.mark.parametrize("probe", [None, "attn", "mlp"])
    def test_blocks_by_name(self, dit: DiT, probe: str | None) -> None:
        plain, calls = self.sample(dit), [0]

        def count(*_: Any) -> None:
            calls[0] += 1

        dit.blocks[2].register_forward_hook(count)
        tap.apply_tap(dit, self.CONFIG, blocks="blocks", probe=probe)
        accelerated = self.sample(dit)
        report = tap.report(dit)
        assert calls[0] == report.full_steps == 3 + len(range(6, 20, 4))
        assert report.predicted_steps == 20 - report.full_steps
        assert 0 < (accelerated - plain).norm() / plain.norm() < 0.05
        assert torch.equal(self.sample(dit), accelerated)
        tap.disable(dit)
        assert torch.equal(self.sample(dit), plain)

    def test_blocks_exchanged_while_enabled_are_noticed(self, dit: DiT) -> None:
        torch.manual_seed(1)
        others = DiT().eval().requires_grad_(False).blocks
        tap.apply_tap(dit, self.CONFIG, blocks="blocks")
        before = self.sample(dit)
        dit.blocks[2] = others[2]
        after = self.sample(dit)
        assert not torch.equal(after, before)
        tap.apply_tap(dit, self.CONFIG, blocks="blocks")
        assert torch.equal(self.sample(dit), after)

    def test_a_probe_of_other_tokens_and_a_missing_time_are_named(self, dit: DiT) -> None:
        tap.apply_tap(dit, self.CONFIG, blocks="blocks", probe="modulation")  # (B, D)
        with pytest.raises(tap.UnsupportedModelError, match=r"DiT: the probe has \(1, 2\).*\(2, 16\).*first_block"):
            self.sample(dit)
        with pytest.raises(ValueError, match="DiT got no t"):
            dit(torch.zeros(1, 16, 4), t=None, y=torch.tensor([1]))

    def test_what_does_not_fit_is_named(self, dit: DiT) -> None:
        with pytest.raises(tap.UnsupportedModelError, match=r"DiT is not known to TAP.*blocks="):
            tap.enable(dit)
        with pytest.raises(tap.UnsupportedModelError, match=r"no nn\.ModuleList named 'layers'"):
            tap.apply_tap(dit, blocks="layers")
        with pytest.raises(tap.UnsupportedModelError, match="no child named 'attention'"):
            tap.apply_tap(dit, blocks="blocks", probe="attention")
        dit.blocks = nn.ModuleList()
        with pytest.raises(tap.UnsupportedModelError, match="empty"):
            tap.apply_tap(dit, blocks="blocks")
        with pytest.raises(tap.UnsupportedModelError, match="tells the time"):
            tap.apply_tap(nn.Sequential(nn.ModuleList([nn.Linear(1, 1)])), blocks="0")


@pytest.mark.parametrize(("part", "kind"), [("text_encoder", CLIPTextModel), ("text_encoder_2", T5EncoderModel)])
def test_the_embedded_model_loads_whole(part: str, kind: Any) -> None:
    """transformers names CLIP's weights now so, now otherwise; what it doesn't find it draws at random, and goes on."""
    _, found = kind.from_pretrained(EMOJI / part, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
