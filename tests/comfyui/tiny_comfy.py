"""Tiny random models of ComfyUI's own transformer classes, built as ComfyUI builds those it loads.

``MODELS`` has each model by the name of its configuration in ``comfy.supported_models``; :func:`build` makes one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import real  # noqa: F401 - finds ComfyUI

# isort: split
import torch
from comfy import supported_models
from comfy.ldm.audio.embedders import NumberConditioner
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

CPU = torch.device("cpu")
Conditioning = list[list[Any]]  # as ComfyUI's nodes pass it: of each condition the text features and all else


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Tiny:
    """A small configuration of one class, and what its models want to see.

    Attributes:
        settings: of the transformer; the names are those ComfyUI reads from a checkpoint.
        latent: shape of a latent, without the batch.
        text: tokens and width of text features.
        rest: makes all else that a condition has, from a seed.
        name: of the class in ``comfy.supported_models``, where the entry is not called like it.
    """

    settings: dict[str, Any]
    latent: tuple[int, ...]
    text: tuple[int, int] = (5, 16)
    rest: Callable[[int], dict[str, Any]] = field(default=lambda seed: {})
    name: str | None = None

    def condition(self, seed: int, tokens: int | None = None) -> Conditioning:
        count, width = self.text
        return [[noise(1, tokens or count, width, seed=seed), self.rest(seed)]]


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, computed_in: torch.dtype | None = None) -> Any:
    """A model patcher of :data:`MODELS`, with random weights.

    Args:
        dtype: of the weights.
        computed_in: dtype in which the model runs, where it is another: ComfyUI casts weights as they are used.
    """
    tiny = MODELS[name]
    settings = dict(tiny.settings)
    config = getattr(supported_models, tiny.name or name)(settings)
    config.set_inference_dtype(dtype, computed_in)
    model = config.get_model(_seconds() if name == "StableAudio" else {}, "")
    if (tiny.name or name) == "WAN22_Animate":
        model.diffusion_model.motion_encoder = _Motion()
    if name == "ACEStep":  # whose encoder of lyrics has one size
        del model.diffusion_model.lyric_encoder.encoders[1:]
    fill(model, seed)
    return ModelPatcher(model, load_device=CPU, offload_device=CPU)


class _Motion(nn.Module):
    """In place of Wan Animate's face encoder, a convolution network which takes seconds for each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 4, 512)

    def get_motion(self, pixels: Tensor) -> Tensor:
        return self.linear(nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1))


def _seconds() -> dict[str, Tensor]:
    """What a checkpoint of Stable Audio must have beside the transformer."""
    prefix, weights = "conditioner.conditioners.seconds_", NumberConditioner(768).state_dict()
    return {f"{prefix}{end}.{key}": value for end in ("start", "total") for key, value in weights.items()}


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Random weights, for ComfyUI leaves them as memory was. Those that training begins with at 0 are filled, too."""
    generator = torch.Generator().manual_seed(seed)
    # Other buffers are computed.
    read = [
        (name, value)
        for name, value in model.named_buffers()
        if name.endswith(("pos_embed", "y_embedding", "rotary_pos_emb.inv_freq"))
    ]
    for name, value in (*model.named_parameters(), *read):
        random = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            value.copy_(random / math.sqrt(math.prod(value.shape[1:])))
        elif name.endswith(("weight", "scale", "gamma")):
            value.copy_(1 + 0.1 * random)
        else:
            value.copy_(0.1 * random)


def pooled(width: int, **more: Callable[[int], Any]) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {"pooled_output": noise(1, width, seed=seed + 100)} | {k: f(seed) for k, f in more.items()}


def given(**more: Callable[[int], Any]) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {k: f(seed) for k, f in more.items()}


# Of the same for all conditions, as pictures, sound and the like are.
def same(*shape: int, seed: int = 50) -> Callable[[int], Tensor]:
    return lambda _: noise(*shape, seed=seed)


def listed(*shape: int) -> Callable[[int], list[Tensor]]:
    return lambda _: [noise(*shape, seed=50)]


def vision(*shape: int) -> Callable[[int], Any]:
    features = noise(*shape, seed=51)
    return lambda _: SimpleNamespace(penultimate_hidden_states=features, last_hidden_state=features)


_FLUX: dict[str, Any] = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 16,
    "hidden_size": 48, "mlp_ratio": 2.0, "num_heads": 4, "depth": 3, "depth_single_blocks": 3, "axes_dim": [4, 4, 4],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
_CHROMA: dict[str, Any] = {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "context_in_dim": 16, "hidden_size": 48,
    "mlp_ratio": 2.0, "num_heads": 4, "depth": 3, "depth_single_blocks": 3, "axes_dim": [4, 4, 4], "theta": 10000,
    "patch_size": 2, "qkv_bias": True, "in_dim": 64, "out_dim": 48, "hidden_dim": 32, "n_layers": 2,
}  # fmt: skip
_HUNYUAN: dict[str, Any] = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 16,
    "hidden_size": 48, "mlp_ratio": 2.0, "num_heads": 4, "depth": 3, "depth_single_blocks": 3, "axes_dim": [4, 4, 4],
    "theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False,
    "use_cond_type_embedding": False, "vision_in_dim": None,
}  # fmt: skip
_HUNYUAN_15 = _HUNYUAN | {
    "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None, "guidance_embed": False,
    "depth": 5, "depth_single_blocks": 0, "byt5": True, "use_cond_type_embedding": True, "vision_in_dim": 1152,
}  # fmt: skip
_HUNYUAN_IMAGE = _HUNYUAN | {"in_channels": 64, "out_channels": 64, "vec_in_dim": None, "byt5": True}
_WAN: dict[str, Any] = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "out_dim": 16, "num_heads": 4, "ffn_dim": 64,
    "num_layers": 5, "patch_size": (1, 2, 2), "freq_dim": 32, "text_dim": 16, "in_dim": 16, "eps": 1e-6,
}  # fmt: skip
_COSMOS: dict[str, Any] = {
    "image_model": "cosmos", "max_img_h": 64, "max_img_w": 64, "max_frames": 16, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "model_channels": 64, "block_config": "FA-CA-MLP",
    "concat_padding_mask": True, "pos_emb_cls": "rope3d", "pos_emb_learnable": False, "pos_emb_interpolation": "crop",
    "block_x_format": "THWBD", "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 16,
    "num_blocks": 5, "num_heads": 4, "crossattn_emb_channels": 16, "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
_COSMOS_2: dict[str, Any] = {
    "image_model": "cosmos_predict2", "max_img_h": 64, "max_img_w": 64, "max_frames": 16, "in_channels": 16,
    "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 64, "concat_padding_mask": True,
    "crossattn_emb_channels": 16, "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop",
    "use_adaln_lora": True, "adaln_lora_dim": 16, "num_blocks": 5, "num_heads": 4,
    "extra_per_block_abs_pos_emb": False, "rope_enable_fps_modulation": False,
}  # fmt: skip
_LUMINA: dict[str, Any] = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 48, "cap_feat_dim": 16, "n_layers": 5,
    "n_refiner_layers": 2, "qk_norm": True, "n_heads": 4, "n_kv_heads": 2, "axes_dims": [4, 4, 4],
    "axes_lens": [64, 64, 64], "multiple_of": 16, "ffn_dim_multiplier": 1.0,
}  # fmt: skip
_HUNYUAN_3D: dict[str, Any] = {
    "image_model": "hunyuan3d2", "in_channels": 64, "context_in_dim": 16, "hidden_size": 48, "mlp_ratio": 2.0,
    "num_heads": 4, "depth": 3, "depth_single_blocks": 3, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
_PIXART: dict[str, Any] = {
    "image_model": "pixart_alpha", "num_heads": 4, "patch_size": 2, "hidden_size": 48, "in_channels": 4, "depth": 5,
    "caption_channels": 16, "model_max_length": 5, "micro_condition": True, "input_size": 40, "pe_interpolation": 1,
}  # fmt: skip
_HYDIT: dict[str, Any] = {
    "image_model": "hydit", "hidden_size": 64, "depth": 6, "num_heads": 4, "mlp_ratio": 2.0, "text_states_dim": 16,
    "text_states_dim_t5": 24, "text_len": 5, "text_len_t5": 6, "size_cond": True, "use_style_cond": True,
}  # fmt: skip
_HYDIT_REST = given(
    attention_mask=lambda _: torch.ones(1, 5),
    conditioning_mt5xl=lambda seed: noise(1, 6, 24, seed=seed + 100),
    attention_mask_mt5xl=lambda _: torch.ones(1, 6),
)
_PICTURE, _VIDEO = (16, 8, 8), (16, 3, 8, 8)
_BYT5 = {"conditioning_byt5small": same(1, 4, 1472)}

MODELS: dict[str, Tiny] = {
    "Flux": Tiny(_FLUX, _PICTURE, rest=pooled(8)),
    "Flux, references": Tiny(_FLUX, _PICTURE, rest=pooled(8, reference_latents=listed(1, 16, 4, 4)), name="Flux"),
    "FluxInpaint": Tiny(_FLUX | {"in_channels": 96}, _PICTURE, rest=pooled(8)),
    "FluxSchnell": Tiny(_FLUX | {"guidance_embed": False}, _PICTURE, rest=pooled(8)),
    "Flux2": Tiny(
        _FLUX | {
            "image_model": "flux2", "in_channels": 128, "out_channels": 128, "axes_dim": [2, 2, 4, 4], "patch_size": 1,
            "vec_in_dim": None, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False,
            "default_ref_method": "index", "ref_index_scale": 10.0,
        },
        (128, 4, 4), rest=pooled(8),
    ),
    "Chroma": Tiny(_CHROMA, _PICTURE, rest=pooled(8)),
    "ChromaRadiance": Tiny(
        _CHROMA | {
            "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 8,
            "nerf_hidden_size": 16, "nerf_mlp_ratio": 2, "nerf_depth": 2, "nerf_max_freqs": 4, "nerf_tile_size": 8,
            "nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32,
        },
        (3, 32, 32), rest=pooled(8),
    ),
    "HunyuanVideo": Tiny(_HUNYUAN, _VIDEO, rest=pooled(8)),
    "HunyuanVideoI2V": Tiny(_HUNYUAN | {"in_channels": 33}, _VIDEO, rest=pooled(8)),
    "HunyuanVideoSkyreelsI2V": Tiny(_HUNYUAN | {"in_channels": 32}, _VIDEO, rest=pooled(8)),
    "HunyuanVideo15": Tiny(
        _HUNYUAN_15, (32, 3, 4, 4), rest=pooled(8, clip_vision_output=vision(1, 4, 1152), **_BYT5)
    ),
    "HunyuanVideo15_SR_Distilled": Tiny(
        _HUNYUAN_15 | {"in_channels": 98}, (32, 3, 4, 4), rest=pooled(8, clip_vision_output=vision(1, 4, 1152), **_BYT5)
    ),
    "HunyuanImage21": Tiny(
        _HUNYUAN_IMAGE | {"patch_size": [1, 1], "axes_dim": [6, 6], "meanflow": True}, (64, 4, 4), rest=given(**_BYT5)
    ),
    "HunyuanImage21Refiner": Tiny(
        _HUNYUAN_IMAGE | {"in_channels": 128, "patch_size": [1, 1, 1], "byt5": False}, (64, 2, 4, 4)
    ),
    "SD3": Tiny(
        {
            "in_channels": 16, "pos_embed_scaling_factor": None, "input_size": None, "patch_size": 2, "depth": 4,
            "num_blocks": 4, "adm_in_channels": 8, "pos_embed_max_size": 16, "num_patches": 256, "context_size": 16,
            "qk_norm": "rms", "x_block_self_attn_layers": [0, 1],
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 256},
            },
        },
        _PICTURE, rest=pooled(8),
    ),
    "AuraFlow": Tiny(
        {"dim": 48, "n_heads": 4, "n_layers": 5, "n_double_layers": 2, "cond_seq_dim": 16, "max_seq": 64,
         "global_conddim": 48},
        (4, 8, 8),
    ),
    "PixArtAlpha": Tiny(_PIXART, (4, 40, 40), rest=given(width=lambda _: 320, height=lambda _: 320)),
    "PixArtSigma": Tiny(_PIXART | {"image_model": "pixart_sigma", "micro_condition": False}, (4, 40, 40)),
    "HunyuanDiT": Tiny(_HYDIT, (4, 8, 8), rest=_HYDIT_REST),
    "HunyuanDiT1": Tiny(
        _HYDIT | {"image_model": "hydit1", "size_cond": False, "use_style_cond": False}, (4, 8, 8), rest=_HYDIT_REST
    ),
    "GenmoMochi": Tiny(
        {"image_model": "mochi_preview", "depth": 5, "patch_size": 2, "num_heads": 4, "hidden_size_x": 48,
         "hidden_size_y": 32, "mlp_ratio_x": 256.0, "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12,
         "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True,
         "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False,
         "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 16, "t5_token_length": 5, "rope_theta": 10000.0},
        (12, 3, 8, 8), rest=given(attention_mask=lambda _: torch.ones(1, 5, dtype=torch.long)),
    ),
    "LTXV": Tiny(
        {"image_model": "ltxv", "num_layers": 5, "attention_head_dim": 12, "num_attention_heads": 4,
         "cross_attention_dim": 48, "caption_channels": 16, "in_channels": 128},
        (128, 3, 4, 4), rest=given(attention_mask=lambda _: torch.ones(1, 5, dtype=torch.long)),
    ),
    "CosmosT2V": Tiny(_COSMOS, _VIDEO),
    "CosmosI2V": Tiny(_COSMOS | {"in_channels": 17}, _VIDEO),
    "CosmosT2IPredict2": Tiny(_COSMOS_2, _VIDEO),
    "CosmosI2VPredict2": Tiny(_COSMOS_2 | {"in_channels": 17}, _VIDEO),
    "Lumina2": Tiny(_LUMINA, _PICTURE),
    "ZImage": Tiny(
        _LUMINA | {
            "dim": 256, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 12, 12], "z_image_modulation": True,
            "time_scale": 1000.0, "pad_tokens_multiple": 8,
        },
        _PICTURE,
    ),
    "WAN21_T2V": Tiny(_WAN, _VIDEO),
    "WAN22_T2V": Tiny(_WAN | {"in_dim": 48, "out_dim": 48}, (48, 3, 8, 8)),
    "WAN21_I2V": Tiny(
        _WAN | {"model_type": "i2v", "in_dim": 36}, _VIDEO, rest=given(clip_vision_output=vision(1, 257, 1280))
    ),
    "WAN21_FunControl2V": Tiny(
        _WAN | {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16}, _VIDEO,
        rest=given(clip_vision_output=vision(1, 257, 1280), reference_latents=listed(1, 16, 1, 8, 8)),
    ),
    "WAN21_Vace": Tiny(
        _WAN | {"model_type": "vace", "num_layers": 6, "vace_in_dim": 96, "vace_layers": 3}, _VIDEO,
        rest=given(vace_frames=listed(1, 32, 3, 8, 8)),
    ),
    "WAN21_Camera": Tiny(
        _WAN | {"model_type": "camera", "in_dim": 32}, _VIDEO,
        rest=given(clip_vision_output=vision(1, 257, 1280), camera_conditions=same(1, 24, 3, 64, 64)),
    ),
    "WAN22_Camera": Tiny(
        _WAN | {"model_type": "camera_2.2", "in_dim": 36}, _VIDEO, rest=given(camera_conditions=same(1, 24, 3, 64, 64))
    ),
    "WAN22_S2V": Tiny(
        _WAN | {"model_type": "s2v", "audio_dim": 32, "num_audio_token": 4, "cond_dim": 16,
                "audio_inject_layers": [0, 2, 4]},
        _VIDEO,
        rest=given(
            audio_embed=same(1, 25, 32, 12), reference_latents=listed(1, 16, 1, 8, 8),
            control_video=same(1, 16, 3, 8, 8),
        ),
    ),
    "WAN21_HuMo": Tiny(
        _WAN | {"model_type": "humo"}, _VIDEO,
        rest=given(audio_embed=same(1, 3, 8, 5, 1280), reference_latents=listed(1, 16, 1, 8, 8)),
    ),
    "WAN22_Animate": Tiny(
        _WAN | {"model_type": "animate", "in_dim": 36, "num_layers": 10}, _VIDEO,
        rest=given(
            clip_vision_output=vision(1, 257, 1280), pose_video_latent=same(1, 16, 2, 8, 8),
            face_video_pixels=same(1, 3, 8, 16, 16),
        ),
    ),
    "Hunyuan3Dv2": Tiny(_HUNYUAN_3D, (64, 20)),
    "Hunyuan3Dv2mini": Tiny(_HUNYUAN_3D | {"depth": 8}, (64, 20)),
    "Hunyuan3Dv2_1": Tiny(
        {"image_model": "hunyuan3d2_1", "in_channels": 64, "context_dim": 16, "hidden_size": 48, "mlp_ratio": 2.0,
         "num_heads": 4, "depth": 6, "qkv_bias": False, "guidance_cond_proj_dim": None, "num_moe_layers": 2},
        (64, 20),
    ),
    "HiDream": Tiny(
        {"image_model": "hidream", "attention_head_dim": 12, "axes_dims_rope": [4, 4, 4], "caption_channels": [16, 16],
         "max_resolution": [32, 32], "in_channels": 16, "llama_layers": [0, 1, 2, 1, 0], "num_attention_heads": 4,
         "num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 2, "num_single_layers": 3,
         "out_channels": 16, "patch_size": 2, "text_emb_dim": 8},
        _PICTURE, rest=pooled(8, conditioning_llama3=lambda seed: noise(1, 3, 6, 16, seed=seed + 200)),
    ),
    "ACEStep": Tiny(
        {"audio_model": "ace", "attention_head_dim": 12, "in_channels": 8, "inner_dim": 48, "max_height": 16,
         "max_position": 64, "max_width": 64, "mlp_ratio": 2.0, "num_attention_heads": 4, "num_layers": 5,
         "out_channels": 8, "patch_size": [16, 1], "rope_theta": 1000000.0, "speaker_embedding_dim": 512,
         "text_embedding_dim": 16, "lyric_encoder_vocab_size": 20, "lyric_hidden_size": 1024},
        (8, 16, 12), rest=given(conditioning_lyrics=lambda seed: torch.arange(7)[None] + seed),
    ),
    "Omnigen2": Tiny(
        {"image_model": "omnigen2", "axes_dim_rope": [4, 4, 4], "axes_lens": [64, 64, 64], "hidden_size": 48,
         "in_channels": 16, "multiple_of": 16, "norm_eps": 1e-5, "num_attention_heads": 4, "num_kv_heads": 2,
         "num_layers": 5, "num_refiner_layers": 2, "out_channels": None, "patch_size": 2, "text_feat_dim": 16,
         "timestep_scale": 1000.0},
        _PICTURE,
        rest=given(attention_mask=lambda _: torch.ones(1, 5, dtype=torch.long), reference_latents=listed(1, 16, 8, 8)),
    ),
    "QwenImage": Tiny(
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 5, "attention_head_dim": 12,
         "num_attention_heads": 4, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4)},
        (16, 1, 8, 8),
    ),
    "QwenImage, references": Tiny(
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 5, "attention_head_dim": 12,
         "num_attention_heads": 4, "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 4)},
        (16, 1, 8, 8), rest=given(reference_latents=listed(1, 16, 1, 4, 4)), name="QwenImage",
    ),
    "StableAudio": Tiny(
        {"audio_model": "dit1.0", "io_channels": 64, "embed_dim": 128, "cond_token_dim": 768, "global_cond_dim": 1536,
         "depth": 5, "num_heads": 2},
        (64, 24), (5, 768),
    ),
}  # fmt: skip


def _variant(name: str, **more: Callable[[int], Any]) -> Tiny:
    """The same model, of which the conditions have more; those that give None have it not."""
    known = MODELS[name]

    def rest(seed: int) -> dict[str, Any]:
        found = known.rest(seed) | {key: make(seed) for key, make in more.items()}
        return {key: value for key, value in found.items() if value is not None}

    return Tiny(known.settings, known.latent, known.text, rest, name)


def _nothing(_: int) -> None:
    return None


MODELS |= {
    "LTXV, keyframes": _variant("LTXV", keyframe_idxs=lambda _: torch.arange(48).reshape(1, 3, 16)),
    "HiDream, picture": _variant("HiDream", concat_latent_image=same(1, 16, 8, 8)),
    "Omnigen2, no references": _variant("Omnigen2", reference_latents=_nothing),
    "WAN21_T2V, more frames": _variant("WAN21_T2V", time_dim_concat=same(1, 16, 1, 8, 8)),
    "WAN21_Vace, twice": _variant(
        "WAN21_Vace", vace_frames=lambda _: [noise(1, 32, 3, 8, 8, seed=seed) for seed in (50, 52)],
        vace_mask=lambda _: [noise(1, 64, 3, 8, 8, seed=seed) for seed in (53, 54)], vace_strength=lambda _: [1.0, 0.5],
    ),
    "WAN22_S2V, motion": _variant("WAN22_S2V", reference_motion=same(1, 16, 19, 8, 8)),
    "WAN22_Animate, no face": _variant("WAN22_Animate", face_video_pixels=_nothing),
}  # fmt: skip
