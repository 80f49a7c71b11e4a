"""Audio models, and image and video models that stand apart."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from zoo import CASES, Case, Conditions


def _ones(z: Tensor, length: int) -> Tensor:
    return torch.ones(len(z), length, dtype=torch.bool)


CASES["Kandinsky5Transformer3DModel"] = Case(
    config={
        "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16, "time_dim": 16,
        "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (4, 6, 6),
    },
    shape=lambda size: (1 + size, 8, 8, 4),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": (1000 * t).to(z.dtype),
        "encoder_hidden_states": given(6, 16),
        "pooled_projections": given(16),
        "visual_rope_pos": [torch.arange(n) for n in (z.shape[1], 4, 4)],
        "text_rope_pos": torch.arange(6),
    },
    velocity=lambda output, z: output,
)  # fmt: skip


def _with_anchor(z: Tensor) -> Tensor:
    """Latents, latents of the condition, and its mask, which are zero where there is none."""
    return torch.cat([z, torch.zeros_like(z), torch.zeros_like(z[..., :1])], dim=-1)


CASES["Kandinsky6SRTransformer3DModel"] = Case(
    config={
        "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 32, "ff_dim": 32,
        "num_visual_blocks": 3, "axes_dims": (4, 6, 6), "nabla_window": (1, 1, 1),
    },
    shape=lambda size: (size, 8, 16, 4),
    inputs=lambda z, t, given: {"hidden_states": _with_anchor(z), "timestep": 1000 * t},
)  # fmt: skip

_SOUND = 6  # rows of the latents that are sound


def _kandinsky6(z: Tensor, t: Tensor, given: Conditions) -> dict[str, Any]:
    return {
        "hidden_states": _with_anchor(z[:, _SOUND:].unflatten(1, (-1, 8, 8))),
        "audio_hidden_states": z[:, :_SOUND],
        "encoder_hidden_states": given(6, 16),
        "pooled_projections": given(16),
        "timestep": 1000 * t,
        "encoder_attention_mask": given.constant(lambda: _ones(z, 6)),
    }


CASES["Kandinsky6Transformer3DModel"] = Case(
    config={
        "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16, "time_dim": 16,
        "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (4, 6, 6),
        "in_audio_dim": 4, "out_audio_dim": 4, "model_dim_a": 16, "axes_dims_a": (2, 2, 4),
        "ca_rope": False, "cross_gates": True, "fix_modulation": True,
    },
    shape=lambda size: (_SOUND + 64 * size, 4),
    inputs=_kandinsky6,
    velocity=lambda output, z: torch.cat([output[1], output[0].flatten(1, 3)], dim=1),
)  # fmt: skip

CASES["SanaVideoTransformer3DModel"] = Case(
    config={
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
        "caption_channels": 16, "sample_size": 8, "rope_max_seq_len": 32,
    },
    shape=lambda size: (4, 1 + size, 8, 8),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": 1000 * t,
        "encoder_hidden_states": given(6, 16),
        "encoder_attention_mask": given.constant(lambda: _ones(z, 6)),
    },
)  # fmt: skip


def _sana_wm(z: Tensor, t: Tensor, given: Conditions) -> dict[str, Any]:
    frames = z.shape[2]
    # The model cuts fractions off: not where a rounding error would make a whole unit.
    time = 1000 * t[:, None, None].repeat(1, 1, frames) + 0.5
    time[:, :, 0] = 0  # the first frame is given
    poses = torch.eye(4).repeat(len(z), frames, 1, 1)
    poses[:, :, 2, 3] = 0.1 * torch.arange(frames)
    camera = torch.cat([poses.flatten(2), torch.tensor([4.0, 4, 2, 2]).expand(len(z), frames, 4)], dim=-1)
    return {
        "hidden_states": z,
        "timestep": time,
        "encoder_hidden_states": given(1, 6, 16),
        "mask": given.constant(lambda: _ones(z, 6)),
        "camera_conditions": given.constant(lambda: camera.to(z.dtype)),
        "chunk_plucker": given(6, *z.shape[2:]),
    }


CASES["SanaWMTransformer3DModel"] = Case(
    config={
        "in_channels": 4, "num_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "softmax_every_n": 2,
        "linear_head_dim": 16, "chunk_plucker_channels": 6, "caption_channels": 16, "mlp_ratio": 1.0,
    },
    shape=lambda size: (4, 1 + size, 4, 4),
    inputs=_sana_wm,
    velocity=lambda output, z: -output[0],
    dtypes=(torch.float64,),  # its camera geometry rejects bfloat16 on a CPU
)  # fmt: skip

CASES["StableAudioDiTModel"] = Case(
    config={
        "sample_size": 32, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16,
        "num_attention_heads": 2, "num_key_value_attention_heads": 1, "cross_attention_dim": 16, "time_proj_dim": 16,
        "global_states_input_dim": 16, "cross_attention_input_dim": 16,
    },
    shape=lambda size: (4, 16 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": t[:1],
        "encoder_hidden_states": given(6, 16),
        "global_hidden_states": given(1, 16),
        "rotary_embedding": get_1d_rotary_pos_embed(8, z.shape[2] + 1, use_real=True, repeat_interleave_real=False),
    },
)  # fmt: skip

CASES["StableAudio3DiTModel"] = Case(
    config={
        "io_channels": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "cond_token_dim": 16, "global_cond_dim": 16,
        "local_add_cond_dim": 5, "timestep_features_dim": 16, "ff_mult": 1.0, "num_memory_tokens": 4,
    },
    shape=lambda size: (4, 16 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": t,
        "encoder_hidden_states": given(6, 16),
        "global_hidden_states": given(16),
        "encoder_attention_mask": given.constant(lambda: _ones(z, 6)),
        "local_add_cond": given(5, z.shape[2]),
    },
)  # fmt: skip

CASES["AceStepTransformer1DModel"] = Case(
    config={
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "in_channels": 12, "audio_acoustic_hidden_dim": 4,
        "encoder_hidden_size": 16, "sliding_window": 4,
    },
    shape=lambda size: (32 * size, 4),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": t.to(z.dtype),
        "timestep_r": t.to(z.dtype),
        "encoder_hidden_states": given(6, 16),
        "context_latents": given(z.shape[1], 8),
    },
)  # fmt: skip

CASES["LongCatAudioDiTTransformer"] = Case(
    config={"dit_dim": 32, "dit_depth": 3, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 4, "ff_mult": 1.0},
    shape=lambda size: (16 * size, 4),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": t.to(z.dtype),
        "encoder_hidden_states": given(6, 16),
        "encoder_attention_mask": given.constant(lambda: _ones(z, 6)),
        "attention_mask": given.constant(lambda: _ones(z, z.shape[1])),
        "latent_cond": torch.zeros_like(z),
    },
)


def _minimax_h3(z: Tensor, t: Tensor, given: Conditions) -> dict[str, Any]:
    text, rows = 6, z.shape[1]
    sigma = t[0]
    times = torch.where(torch.arange(text + rows) < text + _SOUND, 3 * sigma / (1 + 2 * sigma), sigma)
    timestep, indices = torch.unique(1 - times, return_inverse=True)  # sound has a schedule of its own
    order = torch.arange(text + rows)
    return {
        "hidden_states": z[:, _SOUND:],
        "audio_hidden_states": z[:, :_SOUND],
        "encoder_hidden_states": given(text, 16),
        "timestep": timestep,
        "timestep_indices": indices,
        "token_tags": torch.tensor([1] * text + [2] * _SOUND + [0] * (rows - _SOUND)),
        "position_ids": torch.stack([order // 8, order % 8, order % 3], dim=1),
        "text_indices": order[:text],
        "audio_indices": order[text : text + _SOUND],
        "video_indices": order[text + _SOUND :],
    }


CASES["MiniMaxH3Transformer3DModel"] = Case(
    config={
        "num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 32, "num_layers": 3,
        "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 16, "text_dim": 16,
        "freq_dim": 16, "time_embed_hidden_dim": 16, "time_embed_dim": 16, "rope_freq_dim": 2,
    },
    shape=lambda size: (_SOUND + 16 * size, 16),
    inputs=_minimax_h3,
    velocity=lambda output, z: -torch.cat([output[1], output[0]], dim=1),
)  # fmt: skip

CASES["MiniMaxMusic3Transformer1DModel"] = Case(
    config={
        "in_channels": 4, "condition_dim": 16, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16,
        "ff_inner_dim": 32, "rotary_dim": 8, "fourier_embedding_dim": 16,
    },
    shape=lambda size: (4, 16 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": (1 - t).to(z.dtype),
        "encoder_hidden_states": given(z.shape[2], 16),
    },
    velocity=lambda output, z: -output[0],
)  # fmt: skip
