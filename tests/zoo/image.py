"""Image models of one stream."""

from __future__ import annotations

import dataclasses

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from torch import Tensor

from zoo import CASES, Case, Conditions


def _ones(given: Conditions, *shape: int, padding: int = 0) -> Tensor:
    """Attention mask (batch, *shape) whose last positions are padding."""

    def make() -> Tensor:
        mask = torch.ones(given.batch, *shape, dtype=torch.int64)
        mask[..., shape[-1] - padding :] = 0
        return mask

    mask: Tensor = given.constant(make)
    return mask


def _same(given: Conditions, *values: float) -> Tensor:
    """The same numbers for each sample, such as the size of the image."""
    tensor: Tensor = given.constant(lambda: torch.tensor([values] * given.batch).to(given.dtype))
    return tensor


def _grid(height: int, width: int, first: int = 0) -> Tensor:
    """(time, row, column) of each token."""
    return torch.cartesian_prod(torch.tensor([first]), torch.arange(height), torch.arange(width))


CASES["PixArtTransformer2DModel"] = Case(
    config={
        "num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 3,
        "cross_attention_dim": 48, "sample_size": 8, "use_additional_conditions": True, "caption_channels": 16,
    },
    shape=lambda size: (4, 8, 8 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "encoder_hidden_states": given(6, 16),
        "timestep": 1000 * t,
        "added_cond_kwargs": {"resolution": _same(given, 64, 64), "aspect_ratio": _same(given, 1)},
        "encoder_attention_mask": _ones(given, 6, padding=2),
    },
    velocity=lambda output, z: output[0].chunk(2, dim=1)[0],
)  # fmt: skip

CASES["DiTTransformer2DModel"] = Case(
    config={
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 3,
        "sample_size": 8, "num_embeds_ada_norm": 10,
    },
    shape=lambda size: (4, 8 * size, 8 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": 1000 * t,
        "class_labels": given.integers(10),
    },
    velocity=lambda output, z: output[0].chunk(2, dim=1)[0],
)  # fmt: skip

CASES["SanaTransformer2DModel"] = Case(
    config={
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
        "caption_channels": 16, "sample_size": 4,
    },
    shape=lambda size: (4, 4, 4 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "encoder_hidden_states": given(6, 16),
        "timestep": 1000 * t,
        "encoder_attention_mask": _ones(given, 6, padding=2),
        "controlnet_block_samples": (given(z[0, 0].numel(), 32), given(z[0, 0].numel(), 32)),
    },
)  # fmt: skip

CASES["Lumina2Transformer2DModel"] = Case(
    config={
        "sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 3, "num_refiner_layers": 1,
        "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (4, 6, 6),
        "axes_lens": (16, 16, 16), "cap_feat_dim": 16,
    },
    shape=lambda size: (4, 8, 8 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": 1 - t,
        "encoder_hidden_states": given(6, 16),
        "encoder_attention_mask": _ones(given, 6, padding=2),
    },
    velocity=lambda output, z: -output[0],
)  # fmt: skip


def _z_image(z: Tensor, t: Tensor, given: Conditions) -> dict[str, object]:
    text = given(6, 16)
    return {"x": list(z), "t": 1 - t, "cap_feats": given.constant(lambda: list(text))}


CASES["ZImageTransformer2DModel"] = Case(
    config={
        "in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 16, "axes_dims": (4, 6, 6), "axes_lens": (80, 32, 32),
    },
    shape=lambda size: (4, 1, 8, 16 * size),
    inputs=_z_image,
    velocity=lambda output, z: -torch.stack(output[0]),
)  # fmt: skip


def _z_image_omni(z: Tensor, t: Tensor, given: Conditions) -> dict[str, object]:
    text, picture, seen = given(6, 16), given(*z.shape[1:]), given(1, 3, 16)
    return {
        "x": [list(pair) for pair in zip(picture, z, strict=True)],  # a picture to edit, and the new one
        "t": 1 - t,
        "cap_feats": given.constant(lambda: [[part] * 3 for part in text]),
        "siglip_feats": [[part, None] for part in seen],
        "image_noise_mask": [[0, 1]] * len(z),
    }


CASES["ZImageTransformer2DModel: omni"] = dataclasses.replace(
    CASES["ZImageTransformer2DModel"],
    config=CASES["ZImageTransformer2DModel"].config | {"siglip_feat_dim": 16},
    inputs=_z_image_omni,
)

CASES["CogView4Transformer2DModel"] = Case(
    config={
        "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
        "text_embed_dim": 16, "time_embed_dim": 32, "condition_dim": 8, "sample_size": 8, "rope_axes_dim": (8, 8),
    },
    shape=lambda size: (4, 8, 8 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "encoder_hidden_states": given(6, 16),
        "timestep": 1000 * t,
        "original_size": _same(given, 64, 64),
        "target_size": _same(given, 64, 64),
        "crop_coords": _same(given, 0, 0),
    },
)  # fmt: skip

CASES["CogView3PlusTransformer2DModel"] = Case(
    config={
        "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
        "text_embed_dim": 16, "time_embed_dim": 32, "condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8,
    },
    shape=lambda size: (4, 8, 8 * size),
    inputs=CASES["CogView4Transformer2DModel"].inputs,
)  # fmt: skip


def _omnigen(z: Tensor, t: Tensor, given: Conditions) -> dict[str, object]:
    text, total = 8, 8 + 1 + z[0, 0].numel() // 4  # between text and image there is a token for the time

    def mask() -> Tensor:  # text looks back, the image at everything
        seen = torch.ones(given.batch, total, total).tril()
        seen[:, text + 1 :] = 1
        return seen

    return {
        "hidden_states": z,
        "timestep": 1 - t,
        "input_ids": given.integers(20, text),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": given.constant(mask),
        "position_ids": given.constant(lambda: torch.arange(total).expand(given.batch, -1)),
    }


CASES["OmniGenTransformer2DModel"] = Case(
    config={
        "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 64, "num_layers": 3, "pad_token_id": 0, "vocab_size": 20, "pos_embed_max_size": 16,
        "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
    },
    shape=lambda size: (4, 8, 8 * size),
    inputs=_omnigen,
)  # fmt: skip

CASES["HunyuanDiT2DModel"] = Case(
    config={
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "patch_size": 2, "sample_size": 8,
        "hidden_size": 32, "num_layers": 4, "cross_attention_dim": 16, "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 16, "text_len": 6, "text_len_t5": 6,
    },
    shape=lambda size: (4, 8, 8 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": (1000 * t).to(z.dtype),
        "encoder_hidden_states": given(6, 16),
        "text_embedding_mask": _ones(given, 6, padding=2),
        "encoder_hidden_states_t5": given(6, 16),
        "text_embedding_mask_t5": _ones(given, 6),
        "image_meta_size": _same(given, 64, 64, 64, 64, 0, 0),
        "style": given.constant(lambda: torch.zeros(len(z), dtype=torch.int64)),
        "image_rotary_emb": get_2d_rotary_pos_embed(
            16, ((0, 0), (4, z.shape[-1] // 2)), (4, z.shape[-1] // 2), output_type="pt"
        ),
        "controlnet_block_samples": [given(z[0, 0].numel() // 4, 32)],  # the model empties the list
    },
    velocity=lambda output, z: output[0].chunk(2, dim=1)[0],
)  # fmt: skip

CASES["LuminaNextDiT2DModel"] = Case(
    config={
        "sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 2,
        "num_kv_heads": 1, "multiple_of": 16, "cross_attention_dim": 16,
    },
    shape=lambda size: (4, 8, 8 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": 1 - t,
        "encoder_hidden_states": given(6, 16),
        "encoder_mask": _ones(given, 6, padding=2),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 16, 16),
        "cross_attention_kwargs": {},
    },
    velocity=lambda output, z: -output[0].chunk(2, dim=1)[0],
)  # fmt: skip

CASES["PRXTransformer2DModel"] = Case(
    config={
        "in_channels": 4, "context_in_dim": 16, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 3,
        "axes_dim": [8, 8],
    },
    shape=lambda size: (4, 8, 8 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": t,
        "encoder_hidden_states": given(6, 16),
        "attention_mask": _ones(given, 6, padding=2),
    },
)  # fmt: skip

CASES["ErnieImageTransformer2DModel"] = Case(
    config={
        "hidden_size": 32, "num_attention_heads": 2, "num_layers": 3, "ffn_hidden_size": 64, "in_channels": 4,
        "out_channels": 4, "text_in_dim": 16, "rope_axes_dim": (4, 6, 6),
    },
    shape=lambda size: (4, 4, 4 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": (1000 * t).to(z.dtype),
        "text_bth": given(6, 16),
        "text_lens": given.constant(lambda: torch.full((len(z),), 4)),
    },
)  # fmt: skip

CASES["GlmImageTransformer2DModel"] = Case(
    config={
        "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
        "text_embed_dim": 16, "time_embed_dim": 32, "condition_dim": 8, "prior_vq_quantizer_codebook_size": 20,
    },
    shape=lambda size: (4, 8, 8 * size),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "encoder_hidden_states": given(6, 16),
        "prior_token_id": given.integers(20, z[0, 0].numel() // 4),
        "prior_token_drop": given.constant(lambda: torch.zeros(len(z), z[0, 0].numel() // 4, dtype=torch.bool)),
        "timestep": 1000 * t - 1,
        "target_size": _same(given, 64, 64),
        "crop_coords": _same(given, 0, 0),
        "kv_caches": given.constant(lambda: GlmImageKVCache(num_layers=3)),
    },
)  # fmt: skip

CASES["Krea2Transformer2DModel"] = Case(
    config={
        "in_channels": 16, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 64, "timestep_embed_dim": 32, "text_hidden_dim": 16,
        "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
        "text_intermediate_size": 32, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    },
    shape=lambda size: (16 * size, 16),
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "encoder_hidden_states": given(6, 2, 16),
        "timestep": t.to(z.dtype),
        "position_ids": torch.cat([torch.zeros(6, 3, dtype=torch.int64), _grid(z.shape[1] // 4, 4)]),
        "encoder_attention_mask": _ones(given, 6, padding=2).bool(),
    },
)  # fmt: skip


def _ideogram(z: Tensor, t: Tensor, given: Conditions) -> dict[str, object]:
    padding, text, image = 2, 6, z.shape[1]

    def per_token(*values: int) -> Tensor:
        kinds = torch.tensor(values).repeat_interleave(torch.tensor([padding, text, image]))
        return kinds.expand(given.batch, -1)

    def positions() -> Tensor:
        words = torch.arange(padding + text)[:, None].expand(-1, 3)
        return torch.cat([words, 2**16 + _grid(image // 4, 4)]).expand(given.batch, -1, -1)

    return {
        "hidden_states": torch.nn.functional.pad(z, (0, 0, padding + text, 0)),
        "timestep": (1 - t).to(z.dtype),
        "encoder_hidden_states": given(padding + text + image, 16),
        "position_ids": given.constant(positions),
        "segment_ids": given.constant(lambda: per_token(-1, 1, 1)),
        "indicator": given.constant(lambda: per_token(0, 3, 2)),
    }


CASES["Ideogram4Transformer2DModel"] = Case(
    config={
        "in_channels": 16, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
        "intermediate_size": 64, "adaln_dim": 16, "llm_features_dim": 16, "mrope_section": (4, 2, 2),
    },
    shape=lambda size: (16 * size, 16),
    inputs=_ideogram,
    velocity=lambda output, z: -output[0][:, -z.shape[1] :],
)  # fmt: skip

CASES["JoyImageEditTransformer3DModel"] = Case(
    config={
        "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 3,
        "rope_dim_list": [4, 6, 6],
    },
    shape=lambda size: (4, 1, 8, 8 * size),
    inputs=lambda z, t, given: {  # a picture to edit, and the new one
        "hidden_states": torch.stack([given(*z.shape[1:]), z], dim=1),
        "timestep": 1000 * t,
        "encoder_hidden_states": given(6, 16),
    },
    velocity=lambda output, z: output[0][:, -1],
)  # fmt: skip

CASES["JoyImageEditPlusTransformer3DModel"] = Case(
    config=CASES["JoyImageEditTransformer3DModel"].config,
    shape=lambda size: (16 * size, 4, 1, 2, 2),
    inputs=lambda z, t, given: {
        "hidden_states": torch.cat([z, given(16, *z.shape[2:])], dim=1),
        "timestep": 1000 * t,
        "encoder_hidden_states": given(6, 16),
        "encoder_hidden_states_mask": _ones(given, 6, padding=2),
        "shape_list": [[(1, 4, z.shape[1] // 4), (1, 4, 4)]] * len(z),
    },
    velocity=lambda output, z: output[0][:, : z.shape[1]],
)

CASES["PriorTransformer"] = Case(
    config={
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "embedding_dim": 16, "num_embeddings": 6,
    },
    shape=lambda size: (16,),  # one embedding of an image; there are always as many tokens
    inputs=lambda z, t, given: {
        "hidden_states": z,
        "timestep": 1000 * t[0],
        "proj_embedding": given(16),
        "encoder_hidden_states": given(6, 16),
        "attention_mask": _ones(given, 6, padding=2).bool(),
    },
    velocity=lambda output, z: z - output[0],  # it predicts the clean embedding
)  # fmt: skip

CASES["PriorTransformer: Shap-E"] = Case(
    config={
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "embedding_dim": 16,
        "num_embeddings": 16, "additional_embeddings": 0, "norm_in_type": "layer", "encoder_hid_proj_type": None,
        "embedding_proj_norm_type": "layer", "added_emb_type": None,
    },
    shape=lambda size: (16, 16),  # always as many tokens, again
    inputs=lambda z, t, given: {"hidden_states": z, "timestep": 1000 * t[0], "proj_embedding": given(16)},
    velocity=lambda output, z: z - output[0],
)  # fmt: skip
