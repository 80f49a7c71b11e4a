"""Joint-attention models of two streams, image (or video) and text, and of one sequence of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo import CASES, Case, Conditions


def _ids(tokens: int, axes: int = 3) -> Tensor:
    """Positions in images four tokens wide."""
    grid = torch.cartesian_prod(torch.arange(tokens // 4.0), torch.arange(4.0))
    return torch.cat([torch.zeros(tokens, 1), grid, torch.zeros(tokens, axes - 3)], dim=1)


def _mask(z: Tensor, given: Conditions, length: int = 6, dtype: torch.dtype = torch.bool) -> Any:
    """Of a text whose last two tokens are padding."""
    return given.constant(lambda: (torch.arange(length) < length - 2).to(dtype).repeat(len(z), 1))


_HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
_FLUX_LIKE = _HEADS | {
    "in_channels": 16, "num_layers": 3, "num_single_layers": 2, "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def _flux_like(z: Tensor, t: Tensor, given: Conditions) -> dict[str, Any]:
    return {
        "hidden_states": z,
        "timestep": t.to(z.dtype),
        "encoder_hidden_states": given(6, 16),
        "txt_ids": torch.zeros(6, 3),
        "img_ids": _ids(z.shape[1]),
    }


CASES["Flux2Transformer2DModel"] = Case(
    config=_FLUX_LIKE | {"axes_dims_rope": (4, 4, 4, 4)},
    shape=lambda size: (16 * size, 16),
    inputs=lambda z, t, given: _flux_like(z, t, given) | {
        "txt_ids": torch.zeros(len(z), 6, 4),
        "img_ids": _ids(z.shape[1], axes=4).repeat(len(z), 1, 1),
        "guidance": given.constant(lambda: torch.full((len(z),), 4.0)),
    },
)  # fmt: skip

CASES["Flux3Transformer2DModel"] = Case(
    config=_FLUX_LIKE | {"cond_in_channels": 8, "axes_dims_rope": (4, 4, 4, 4)},
    shape=lambda size: (16 * size, 16),
    inputs=lambda z, t, given: _flux_like(z, t, given) | {
        "txt_ids": torch.zeros(6, 4),
        "img_ids": _ids(z.shape[1], axes=4),
        "image_cond_hidden_states": given(8, 8),
        "image_cond_ids": _ids(8, axes=4),
    },
)  # fmt: skip

CASES["ChromaTransformer2DModel"] = Case(
    config=_FLUX_LIKE
    | {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1},
    shape=lambda size: (16 * size, 16),
    inputs=lambda z, t, given: _flux_like(z, t, given) | {
        "attention_mask": torch.cat(
            [_mask(z, given, dtype=z.dtype), torch.ones(z.shape[:2], dtype=torch.bool)], dim=1
        ),
    },
)  # fmt: skip

CASES["LongCatImageTransformer2DModel"] = Case(
    config=_FLUX_LIKE | {"pooled_projection_dim": 16},
    shape=lambda size: (16 * size, 16),
    inputs=_flux_like,
)

CASES["OvisImageTransformer2DModel"] = Case(
    config=_FLUX_LIKE | {"out_channels": 16},
    shape=lambda size: (16 * size, 16),
    inputs=_flux_like,
)

CASES["BriaTransformer2DModel"] = Case(
    config=_FLUX_LIKE,
    shape=lambda size: (16 * size, 16),
    inputs=lambda z, t, given: _flux_like(z, 1000 * t, given) | {"timestep": 1000 * t},
)


def _fibo_mask(z: Tensor, given: Conditions) -> Tensor:
    valid = torch.cat([_mask(z, given), torch.ones(z.shape[:2], dtype=torch.bool)], dim=1)
    pairs = valid[:, None, :, None] & valid[:, None, None, :]
    return torch.zeros(pairs.shape, dtype=z.dtype).masked_fill(~pairs, -1e4)


CASES["BriaFiboTransformer2DModel"] = Case(
    config=_FLUX_LIKE | {"text_encoder_dim": 8},
    shape=lambda size: (16 * size, 16),
    inputs=lambda z, t, given: _flux_like(z, 1000 * t, given) | {
        "text_encoder_layers": [given(6, 8) for _ in range(5)],
        "joint_attention_kwargs": {"attention_mask": _fibo_mask(z, given)},
    },
)  # fmt: skip

CASES["BriaFibo2Transformer2DModel"] = Case(
    config={
        "in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 12,
        "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 2, "max_num_gist_tokens": 4,
        "gist_step": 2, "gist_min_text_len": 2, "gist_max_text_len": 8, "axes_dims": (4, 6, 6),
        "axes_lens": (16, 16, 16),
    },
    shape=lambda size: (4, 8, 8 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": t,
        "encoder_hidden_states": given(2, 6, 12),
        "encoder_attention_mask": _mask(z, given),
        "context_latents": [given(4, 4, 4)],
    },
)  # fmt: skip

CASES["AuraFlowTransformer2DModel"] = Case(
    config=_HEADS | {
        "sample_size": 8, "in_channels": 4, "num_mmdit_layers": 3, "num_single_dit_layers": 2,
        "joint_attention_dim": 16, "caption_projection_dim": 32, "pos_embed_max_size": 64,
    },
    shape=lambda size: (4, 8, 8 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": t.to(z.dtype),
        "encoder_hidden_states": given(6, 16),
    },
)  # fmt: skip

CASES["HiDreamImageTransformer2DModel"] = Case(
    config=_HEADS | {
        "patch_size": 2, "in_channels": 4, "num_layers": 3, "num_single_layers": 2, "caption_channels": (16, 12),
        "text_emb_dim": 16, "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 6, 6),
        "max_resolution": (8, 20), "llama_layers": (0, 1, 2, 2, 1),
    },
    shape=lambda size: (4, 8, 8 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timesteps": 1000 * t,
        "encoder_hidden_states_t5": given(6, 16),
        "encoder_hidden_states_llama3": [given(6, 12) for _ in range(3)],
        "pooled_embeds": given(16),
    },
    velocity=lambda output, z: -output[0],
)  # fmt: skip

_HUNYUAN = _HEADS | {"num_layers": 3, "num_refiner_layers": 1, "text_embed_dim": 16}

CASES["HunyuanImageTransformer2DModel"] = Case(
    config=_HUNYUAN
    | {"in_channels": 4, "out_channels": 4, "num_single_layers": 2, "text_embed_2_dim": 8, "rope_axes_dim": (8, 8)},
    shape=lambda size: (4, 4, 4 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": (1000 * t).to(z.dtype),
        "encoder_hidden_states": given(6, 16),
        "encoder_attention_mask": _mask(z, given, dtype=torch.int64),
        "encoder_hidden_states_2": given(4, 8),
        "encoder_attention_mask_2": _mask(z, given, 4, dtype=torch.int64),
    },
)

CASES["HunyuanVideo15Transformer3DModel"] = Case(
    config=_HUNYUAN | {
        "in_channels": 9, "out_channels": 4, "text_embed_2_dim": 8, "image_embed_dim": 8, "rope_axes_dim": (4, 6, 6),
    },
    shape=lambda size: (4, 1 + size, 4, 4),
    inputs=lambda z, t, given: {
        "hidden_states": torch.cat([z, given(5, *z.shape[2:])], dim=1),
        "timestep": (1000 * t).to(z.dtype),
        "encoder_hidden_states": given(6, 16),
        "encoder_attention_mask": _mask(z, given, dtype=torch.int64),
        "encoder_hidden_states_2": given(4, 8),
        "encoder_attention_mask_2": _mask(z, given, 4, dtype=torch.int64),
        "image_embeds": given(3, 8),
    },
)  # fmt: skip

CASES["HunyuanVideoFramepackTransformer3DModel"] = Case(
    config=_HUNYUAN | {
        "in_channels": 4, "out_channels": 4, "num_single_layers": 2, "pooled_projection_dim": 16,
        "rope_axes_dim": (4, 6, 6), "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True,
    },
    shape=lambda size: (4, 1 + size, 8, 8),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": 1000 * t,
        "encoder_hidden_states": given(6, 16),
        "encoder_attention_mask": _mask(z, given, dtype=z.dtype),
        "pooled_projections": given(16),
        "image_embeds": given(3, 8),
        "guidance": given.constant(lambda: torch.full((len(z),), 6000.0)),
        "indices_latents": 8 + torch.arange(z.shape[2]),
        "latents_clean": given(4, 2, 8, 8),
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": given(4, 2, 8, 8),
        "indices_latents_history_2x": torch.tensor([5, 6]),
        "latents_history_4x": given(4, 4, 8, 8),
        "indices_latents_history_4x": torch.arange(1, 5),
    },
)  # fmt: skip

CASES["MotifVideoTransformer3DModel"] = Case(
    config=_HEADS | {
        "in_channels": 9, "out_channels": 4, "num_layers": 3, "num_single_layers": 4, "num_decoder_layers": 2,
        "text_embed_dim": 16, "rope_axes_dim": (4, 6, 6), "enable_text_cross_attention_dual": True,
        "enable_text_cross_attention_single": True,
    },
    shape=lambda size: (4, 1 + size, 8, 8),
    inputs=lambda z, t, given: {
        "hidden_states": torch.cat([z, given(5, *z.shape[2:])], dim=1),
        "timestep": 1000 * t,
        "encoder_hidden_states": given(6, 16),
        "encoder_attention_mask": _mask(z, given),
    },
)  # fmt: skip

CASES["NucleusMoEImageTransformer2DModel"] = Case(
    config=_HEADS | {
        "in_channels": 16, "out_channels": 4, "num_layers": 5, "num_key_value_heads": 1, "joint_attention_dim": 16,
        "axes_dims_rope": (4, 6, 6), "mlp_ratio": 8.0, "num_experts": 4, "moe_intermediate_dim": 16,
        "capacity_factors": 2.0,
    },
    shape=lambda size: (16 * size, 16),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": t.to(z.dtype),
        "encoder_hidden_states": given(6, 16),
        "encoder_hidden_states_mask": _mask(z, given, dtype=torch.int64),
        "img_shapes": [(1, z.shape[1] // 4, 4)] * len(z),
    },
    velocity=lambda output, z: -output[0],
)  # fmt: skip

CASES["QwenImage21Transformer2DModel"] = Case(
    config=_HEADS | {
        "in_channels": 16, "out_channels": 16, "num_layers": 3, "context_in_dim": 16, "axes_dims_rope": (4, 6, 6),
    },
    shape=lambda size: (16 * size, 16),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": t.to(z.dtype),
        "encoder_hidden_states": given(6, 16),
        "encoder_hidden_states_mask": _mask(z, given, dtype=torch.int64),
        "img_shapes": [[(1, z.shape[1] // 4, 4)]] * len(z),
        "img_mask": (torch.arange(6 + z.shape[1] // 4) >= 6).repeat(len(z), 1),
    },
    velocity=lambda output, z: output[0][:, -z.shape[1] :],
)  # fmt: skip
