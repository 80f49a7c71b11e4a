"""The paper's three, and two more that much derives from."""

from __future__ import annotations

import dataclasses

import torch

from zoo import CASES, Case

CASES["FluxTransformer2DModel"] = Case(
    config={
        "in_channels": 16, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
    },
    shape=lambda size: (16 * size, 16),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": t.to(z.dtype),
        "encoder_hidden_states": given(6, 16),
        "pooled_projections": given(16),
        "txt_ids": torch.zeros(6, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(z.shape[1] // 4.0), torch.arange(4.0)),
    },
)  # fmt: skip

CASES["QwenImageTransformer2DModel"] = Case(
    config={
        "in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6),
    },
    shape=lambda size: (16 * size, 16),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": t.to(z.dtype),
        "encoder_hidden_states": given(6, 16),
        "encoder_hidden_states_mask": given.constant(lambda: torch.ones(len(z), 6, dtype=torch.bool)),
        "img_shapes": [[(1, z.shape[1] // 4, 4)]] * len(z),
    },
)  # fmt: skip

CASES["HunyuanVideoTransformer3DModel"] = Case(
    config={
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
        "text_embed_dim": 16, "pooled_projection_dim": 16, "rope_axes_dim": (4, 6, 6),
    },
    shape=lambda size: (4, 1 + size, 8, 8),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": 1000 * t,
        "encoder_hidden_states": given(6, 16),
        "encoder_attention_mask": given.constant(lambda: torch.ones(len(z), 6, dtype=torch.bool)),
        "pooled_projections": given(16),
        "guidance": given.constant(lambda: torch.full((len(z),), 6000.0)),
    },
)  # fmt: skip

CASES["HunyuanVideoTransformer3DModel: token_replace"] = dataclasses.replace(
    CASES["HunyuanVideoTransformer3DModel"],
    config=CASES["HunyuanVideoTransformer3DModel"].config | {"image_condition_type": "token_replace"},
)

CASES["SD3Transformer2DModel"] = Case(
    config={
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 32,
        "pooled_projection_dim": 16, "pos_embed_max_size": 16,
    },
    shape=lambda size: (4, 8, 8 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": 1000 * t,
        "encoder_hidden_states": given(6, 16),
        "pooled_projections": given(16),
    },
)  # fmt: skip

CASES["WanTransformer3DModel"] = Case(
    config={
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32,
    },
    shape=lambda size: (4, 1 + size, 8, 8),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": 1000 * t,
        "encoder_hidden_states": given(6, 16),
    },
)  # fmt: skip
