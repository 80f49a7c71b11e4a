"""Video models."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from torch import Tensor

from zoo import CASES, Case, Conditions


def _attends(given: Conditions, tokens: int = 6, dtype: torch.dtype = torch.bool) -> Tensor:
    """A mask of the text, whose last two tokens are padding."""
    mask: Tensor = given.constant(lambda: (torch.arange(tokens) < tokens - 2).repeat(given.batch, 1).to(dtype))
    return mask


_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 3, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32,
}  # fmt: skip


def _wan_shape(size: int) -> tuple[int, ...]:
    return (4, 1 + size, 8, 8)


CASES["WanVACETransformer3DModel"] = Case(
    config=_WAN | {"vace_layers": [0, 2], "vace_in_channels": 8},
    shape=_wan_shape,
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": 1000 * t,
        "encoder_hidden_states": given(6, 16),
        "control_hidden_states": given(8, *z.shape[2:]),
        "control_hidden_states_scale": given.constant(lambda: torch.tensor([1.0, 0.7]).to(z.dtype)),
    },
)

CASES["WanAnimateTransformer3DModel"] = Case(
    config=_WAN | {
        "in_channels": 12, "latent_channels": 4, "num_layers": 4, "image_dim": 16, "added_kv_proj_dim": 36,
        "motion_encoder_channel_sizes": {"4": 4, "8": 4}, "motion_encoder_size": 8, "motion_style_dim": 8,
        "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    },
    shape=_wan_shape,
    inputs=lambda z, t, given: {
        "hidden_states": torch.cat([z, given(8, *z.shape[2:])], dim=1),
        "timestep": 1000 * t,
        "encoder_hidden_states": given(6, 16),
        "encoder_hidden_states_image": given(3, 16),
        "pose_hidden_states": given(4, z.shape[2] - 1, 8, 8),
        "face_pixel_values": given(3, 4 * (z.shape[2] - 2) + 1, 8, 8),
    },
)  # fmt: skip

CASES["SkyReelsV2Transformer3DModel"] = Case(  # as diffusion forcing does: each frame has a time, here the same
    config=_WAN,
    shape=_wan_shape,
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": 1000 * t[:, None].repeat(1, z.shape[2]),
        "encoder_hidden_states": given(6, 16),
        "enable_diffusion_forcing": True,
    },
)

CASES["ChronoEditTransformer3DModel"] = Case(
    config=_WAN | {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 36},
    shape=_wan_shape,
    inputs=lambda z, t, given: {
        "hidden_states": torch.cat([z, given(8, *z.shape[2:])], dim=1),
        "timestep": 1000 * t,
        "encoder_hidden_states": given(6, 16),
        "encoder_hidden_states_image": given(3, 16),
    },
)

CASES["AnyFlowTransformer3DModel"] = Case(
    config=_WAN,
    shape=lambda size: (1 + size, 4, 8, 8),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": 1000 * t[:, None].repeat(1, z.shape[1]),
        "r_timestep": 1000 * (t[:, None] - 1 / 12).clamp(min=0).repeat(1, z.shape[1]),
        "encoder_hidden_states": given(6, 16),
    },
)

CASES["HeliosTransformer3DModel"] = Case(
    config={
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 16,
        "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_dim": (4, 6, 6),
    },
    shape=_wan_shape,
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": 1000 * t,
        "encoder_hidden_states": given(6, 16),
        "indices_hidden_states": 8 + torch.arange(z.shape[2])[None],
        "indices_latents_history_short": torch.tensor([[0, 7]]),
        "indices_latents_history_mid": torch.tensor([[5, 6]]),
        "indices_latents_history_long": torch.arange(1, 5)[None],
        "latents_history_short": given(4, 2, 8, 8),
        "latents_history_mid": given(4, 2, 8, 8),
        "latents_history_long": given(4, 4, 8, 8),
    },
)  # fmt: skip

CASES["LTXVideoTransformer3DModel"] = Case(  # from an image: the first frame is given
    config={
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
        "cross_attention_dim": 32, "num_layers": 3, "caption_channels": 16,
    },
    shape=lambda size: (12 * size, 8),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "encoder_hidden_states": given(6, 16),
        "timestep": 1000 * t[:, None] * (torch.arange(z.shape[1]) >= z.shape[1] // 3),
        "encoder_attention_mask": _attends(given),
        "num_frames": 3,
        "height": z.shape[1] // 6,
        "width": 2,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    },
)  # fmt: skip

_LTX2_TAKES_SIGMA = "sigma" in inspect.signature(LTX2VideoTransformer3DModel.forward).parameters  # LTX-2.3 wants it

CASES["LTX2VideoTransformer3DModel"] = Case(  # the last 5 tokens are sound
    config={
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
        "cross_attention_dim": 32, "audio_in_channels": 8, "audio_out_channels": 8, "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "num_layers": 3, "caption_channels": 16,
    },
    shape=lambda size: (12 * size + 5, 8),
    inputs=lambda z, t, given: {
        "hidden_states": z[:, :-5],
        "audio_hidden_states": z[:, -5:],
        "encoder_hidden_states": given(6, 16),
        "audio_encoder_hidden_states": given(6, 16),
        "timestep": 1000 * t,
        **({"sigma": 1000 * t} if _LTX2_TAKES_SIGMA else {}),
        "encoder_attention_mask": _attends(given),
        "audio_encoder_attention_mask": _attends(given),
        "num_frames": 3,
        "height": (z.shape[1] - 5) // 6,
        "width": 2,
        "audio_num_frames": 5,
    },
    velocity=lambda output, z: torch.cat(output, dim=1),
)  # fmt: skip


def _cogvideox_rotary(z: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = get_3d_rotary_pos_embed(
        16, ((0, 0), (4, 4)), (z.shape[3] // 2, z.shape[4] // 2), temporal_size=z.shape[1]
    )
    return cos, sin


_COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 8, "out_channels": 4, "time_embed_dim": 16,
    "text_embed_dim": 16, "num_layers": 4, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
    "max_text_seq_length": 6, "use_rotary_positional_embeddings": True,
}  # fmt: skip


def _cogvideox_inputs(z: Tensor, t: Tensor, given: Conditions) -> dict[str, Any]:
    return {
        "hidden_states": torch.cat([z, given(*z.shape[1:])], dim=2),
        "encoder_hidden_states": given(6, 16),
        "timestep": 1000 * t,
        "image_rotary_emb": _cogvideox_rotary(z),
    }


CASES["CogVideoXTransformer3DModel"] = Case(
    config=_COGVIDEOX, shape=lambda size: (2, 4, 8, 8 * size), inputs=_cogvideox_inputs
)

CASES["ConsisIDTransformer3DModel"] = Case(
    config=_COGVIDEOX | {
        "is_train_face": True, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2, "LFE_id_dim": 16,
        "LFE_vit_dim": 16, "LFE_depth": 2, "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 2,
        "LFE_num_querie": 4, "LFE_output_dim": 32, "LFE_num_scale": 2,
    },
    shape=lambda size: (2, 4, 8, 8 * size),
    inputs=lambda z, t, given: _cogvideox_inputs(z, t, given) | {
        "id_cond": given(16), "id_vit_hidden": [given(5, 16), given(5, 16)],
    },
)  # fmt: skip

CASES["MochiTransformer3DModel"] = Case(
    config={
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "pooled_projection_dim": 16,
        "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 16, "max_sequence_length": 6,
    },
    shape=lambda size: (4, 1 + size, 8, 8),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "encoder_hidden_states": given(6, 16),
        "timestep": (1000 * (1 - t)).to(z.dtype),
        "encoder_attention_mask": _attends(given),
    },
)  # fmt: skip

CASES["CosmosTransformer3DModel"] = Case(  # from an image: the first frame is given
    config={
        "in_channels": 5, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3,
        "text_embed_dim": 16, "adaln_lora_dim": 8, "max_size": (4, 16, 16), "concat_padding_mask": False,
    },
    shape=lambda size: (4, 1 + size, 8, 8),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": torch.where(torch.arange(z.shape[2]) > 0, t[:, None], 1e-4)[:, None, :, None, None].to(z.dtype),
        "encoder_hidden_states": given(6, 16),
        "fps": 16,
        "condition_mask": (torch.arange(z.shape[2]) == 0)[:, None, None].expand(len(z), 1, -1, 8, 8).to(z.dtype),
    },
)  # fmt: skip


def _allegro_rotary(frames: int, height: int, width: int) -> Any:
    *frequencies, t, h, w = get_3d_rotary_pos_embed_allegro(
        12, ((0, 0), (height, width)), (height, width), frames, (2.2, 2.0, 2.0)
    )
    return tuple(frequencies), torch.cartesian_prod(t, h, w).long().T[:, None].contiguous()


CASES["AllegroTransformer3DModel"] = Case(
    config={
        "num_attention_heads": 3, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "cross_attention_dim": 36, "sample_height": 8, "sample_width": 8, "sample_frames": 2, "caption_channels": 16,
    },
    shape=lambda size: (4, 2, 8, 8 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "encoder_hidden_states": given(6, 16),
        "timestep": 1000 * t,
        "encoder_attention_mask": _attends(given, dtype=torch.int64),
        "image_rotary_emb": _allegro_rotary(z.shape[2], z.shape[3] // 2, z.shape[4] // 2),
    },
)  # fmt: skip

CASES["LatteTransformer3DModel"] = Case(
    config={
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 3,
        "cross_attention_dim": 32, "attention_bias": True, "sample_size": 8, "patch_size": 2,
        "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 16, "video_length": 3,
    },
    shape=lambda size: (4, 3, 8, 8 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": 1000 * t,
        "encoder_hidden_states": given(6, 16),
    },
    velocity=lambda output, z: output[0].chunk(2, dim=1)[0],
)  # fmt: skip

CASES["EasyAnimateTransformer3DModel"] = Case(
    config={
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2,
        "num_layers": 3, "mmdit_layers": 2, "time_embed_dim": 16, "text_embed_dim": 16,
    },
    shape=lambda size: (4, 1 + size, 8, 8),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": (1000 * t).to(z.dtype),
        "encoder_hidden_states": given(6, 16),
    },
)  # fmt: skip


def _cosmos3_inputs(z: Tensor, t: Tensor, given: Conditions) -> dict[str, Any]:
    """Text and all videos in one sequence, without a batch."""
    text, frames, height, width = 6, z.shape[2], z.shape[3] // 2, z.shape[4] // 2
    count = len(z) * frames * height * width
    tokens = torch.arange(text, text + count)
    ids = given.integers(64, text)
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width)).T + text
    return {
        "input_ids": given.constant(lambda: ids[0]),
        "text_indexes": torch.arange(text),
        "position_ids": torch.cat([torch.arange(text).expand(3, -1), grid.repeat(1, len(z))], dim=1),
        "und_len": text,
        "sequence_length": text + count,
        "vision_tokens": list(z.split(1)),
        "vision_token_shapes": [(frames, height, width)] * len(z),
        "vision_sequence_indexes": tokens,
        "vision_mse_loss_indexes": tokens,
        "vision_timesteps": (1000 * t).repeat_interleave(count // len(z)),
        "vision_noisy_frame_indexes": [torch.arange(frames)] * len(z),
    }


CASES["Cosmos3OmniTransformer"] = Case(
    config={
        "head_dim": 16, "hidden_size": 32, "intermediate_size": 32, "latent_channel": 4, "latent_patch_size": 2,
        "num_attention_heads": 2, "num_hidden_layers": 3, "num_key_value_heads": 1, "patch_latent_dim": 16,
        "vocab_size": 64, "rope_axes_dim": (4, 2, 2),
    },
    shape=lambda size: (4, 1 + size, 8, 8),
    inputs=_cosmos3_inputs,
    velocity=lambda output, z: torch.cat(output[0]),
)  # fmt: skip
