"""The tables of docs/models.md: `python docs/popular_models.py` writes them there."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import diffusers

from tap_diffusion import TAPConfig
from tap_diffusion.core.schedule import plan
from tap_diffusion.integrations.diffusers.catalog import as_markdown, catalog

PAGE = Path(__file__).with_name("models.md")
FEW = 10  # steps; with fewer there is next to nothing to predict

# Pipelines that tests run, on small models trained here or around tiny transformers with random weights. Of the others
# the conformance suite runs the transformer alone.
TRAINED = {"DiTPipeline", "FluxPipeline", "WanPipeline"}
RANDOM = {
    "CogVideoXPipeline", "FluxFillPipeline", "FluxKontextPipeline", "HunyuanVideoPipeline", "LTXPipeline",
    "PixArtSigmaPipeline", "QwenImagePipeline", "SanaPipeline", "StableDiffusion3Pipeline", "ZImagePipeline",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A model on the hub.

    Attributes:
        steps: as its card asks for, where that isn't the pipeline's default.
        trained: False where the pipeline was run on trained weights, and is called in another way for this model.
    """

    pipeline: str
    hub_id: str
    steps: int | None = None
    trained: bool = True

    def cells(self) -> list[str]:
        """What to load, how many of its steps the default leaves full, and what was run."""
        call = inspect.signature(getattr(diffusers, self.pipeline).__call__)
        steps = self.steps or call.parameters["num_inference_steps"].default
        full = sum(map(plan(TAPConfig(), steps, None), range(steps)))
        setting = f"{full} of {steps}, {steps / full:.1f}×" if steps >= FEW else f"{steps} steps: leave TAP out"
        if self.pipeline in TRAINED and self.trained:
            run = "small, trained"
        else:
            run = "pipeline" if self.pipeline in TRAINED | RANDOM else "transformer"
        return [f"`{self.pipeline}`<br>`{self.hub_id}`", setting, run]


POPULAR = {
    "images": (
        Row("FluxPipeline", "black-forest-labs/FLUX.1-dev"),
        Row("FluxPipeline", "black-forest-labs/FLUX.1-schnell", 4),
        Row("FluxKontextPipeline", "black-forest-labs/FLUX.1-Kontext-dev"),
        Row("FluxFillPipeline", "black-forest-labs/FLUX.1-Fill-dev"),
        Row("Flux2Pipeline", "black-forest-labs/FLUX.2-dev"),
        Row("Flux2KleinPipeline", "black-forest-labs/FLUX.2-klein-base-9B"),
        Row("QwenImagePipeline", "Qwen/Qwen-Image"),
        Row("QwenImage21Pipeline", "Qwen/Qwen-Image-2.1"),
        Row("QwenImageEditPlusPipeline", "Qwen/Qwen-Image-Edit-2509"),
        Row("StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3.5-medium"),
        Row("StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3.5-large"),
        Row("ZImagePipeline", "Tongyi-MAI/Z-Image"),
        Row("ZImagePipeline", "Tongyi-MAI/Z-Image-Turbo", 9),
        Row("ChromaPipeline", "lodestones/Chroma1-HD"),
        Row("HunyuanImagePipeline", "hunyuanvideo-community/HunyuanImage-2.1-Diffusers"),
        Row("HiDreamImagePipeline", "HiDream-ai/HiDream-I1-Full"),
        Row("CogView4Pipeline", "THUDM/CogView4-6B"),
        Row("GlmImagePipeline", "zai-org/GLM-Image"),
        Row("Lumina2Pipeline", "Alpha-VLLM/Lumina-Image-2.0"),
        Row("SanaPipeline", "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"),
        Row("PixArtSigmaPipeline", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
        Row("AuraFlowPipeline", "fal/AuraFlow"),
        Row("OmniGenPipeline", "Shitao/OmniGen-v1-diffusers"),
        Row("DiTPipeline", "facebook/DiT-XL-2-256"),
    ),
    "videos": (
        Row("WanPipeline", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        Row("WanPipeline", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        Row("WanPipeline", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", trained=False),
        Row("WanPipeline", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", trained=False),
        Row("WanImageToVideoPipeline", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
        Row("WanVACEPipeline", "Wan-AI/Wan2.1-VACE-1.3B-diffusers"),
        Row("WanAnimatePipeline", "Wan-AI/Wan2.2-Animate-14B-Diffusers"),
        Row("HunyuanVideoPipeline", "hunyuanvideo-community/HunyuanVideo"),
        Row("HunyuanVideo15Pipeline", "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v"),
        Row("LTXPipeline", "Lightricks/LTX-Video"),
        Row("LTX2Pipeline", "Lightricks/LTX-2"),
        Row("CogVideoXPipeline", "THUDM/CogVideoX-5b"),
        Row("MochiPipeline", "genmo/mochi-1-preview"),
        Row("SkyReelsV2Pipeline", "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers"),
        Row("Cosmos2VideoToWorldPipeline", "nvidia/Cosmos-Predict2-2B-Video2World"),
        Row("Kandinsky5T2VPipeline", "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"),
        Row("SanaVideoPipeline", "Efficient-Large-Model/SANA-Video_2B_480p_diffusers"),
    ),
    "sound": (
        Row("StableAudioPipeline", "stabilityai/stable-audio-open-1.0", 100),
        Row("AceStepPipeline", "ACE-Step/acestep-v15-xl-turbo-diffusers"),
    ),
}


def popular(rows: tuple[Row, ...]) -> str:
    """A table by pipeline."""
    head = ["pipeline and hub id", "full steps", "tests ran"]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * 3, *(row.cells() for row in rows)])


def filled(page: str) -> str:
    """The page with its tables as they have to be. Raises ValueError where it has no place for one."""
    tables = {name: popular(rows) for name, rows in POPULAR.items()} | {"classes": as_markdown(catalog())}
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(start)
        _, after = rest.split(end)
        page = before + start + table + end + after
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
