"""What has to be known of ComfyUI's transformer classes, and why others are refused."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from tap_diffusion.core.errors import UnsupportedModelError
from tap_diffusion.integrations.specs import Stream, TransformerSpec

# ComfyUI's classes, comfy/ldm/**. Of some attentions only the parts are called: there the modulated input is what
# enters the first linear layer.
_spec = TransformerSpec
_DOUBLE_SINGLE: dict[str, Any] = {
    "blocks": ("double_blocks", "single_blocks"), "streams": (Stream("img", "final_layer"),),
    "outputs": ("img", "txt"), "attention": "img_attn.qkv",
}  # fmt: skip
_wan = partial(_spec, ("blocks",), (Stream("x", "head"),), attention="self_attn")
SPECS: dict[str, TransformerSpec] = {
    "Flux": _spec(**_DOUBLE_SINGLE),
    "Chroma": _spec(**_DOUBLE_SINGLE),
    # Its head is a small network that takes the stream in the second place.
    "ChromaRadiance": _spec(**_DOUBLE_SINGLE | {"streams": (Stream("img", behind_text=True),)}),
    "HunyuanVideo": _spec(**_DOUBLE_SINGLE),
    "Hunyuan3Dv2": _spec(**_DOUBLE_SINGLE),
    "QwenImageTransformer2DModel": _spec(
        ("transformer_blocks",), (Stream("hidden_states", "norm_out"),),
        outputs=("encoder_hidden_states", "hidden_states"), attention="attn",
    ),
    "NextDiT": _spec(("layers",), (Stream("x", "final_layer"),), attention="attention.qkv"),
    "HiDreamImageTransformer2DModel": _spec(
        ("double_stream_blocks", "single_stream_blocks"), (Stream("image_tokens", "final_layer"),),
        outputs=("image_tokens", "text_tokens"), attention="block.attn1",
    ),
    "OmniGen2Transformer2DModel": _spec(("layers",), (Stream("hidden_states", "norm_out"),), attention="attn"),
    "OpenAISignatureMMDITWrapper": _spec(  # SD3
        ("joint_blocks",), (Stream("x", "final_layer"),), arguments=("context", "x"), outputs=("context", "x"),
        attention="x_block.attn.qkv",
    ),
    "MMDiT": _spec(  # AuraFlow, where a modulation comes before the first layer of the head
        ("double_layers", "single_layers"), (Stream("x", behind_text=True),), outputs=("c", "x"), attention="attn.w2q",
    ),
    "PixArtMS": _spec(("blocks",), (Stream("x", "final_layer"),), attention="attn"),
    "HunYuanDiT": _spec(
        ("blocks",), (Stream("x", "final_layer"),), attention="attn1", full_only=("control",),
    ),
    "HunYuanDiTPlain": _spec(("blocks",), (Stream("hidden_states", "final_layer"),), attention="attn1"),
    "WanModel": _wan(),
    "VaceWanModel": _wan(bypassed={"vace_blocks": ("c", "c")}),
    "CameraWanModel": _wan(),
    "HumoWanModel": _wan(),
    "AnimateWanModel": _wan(full_only=("face_pixel_values",)),
    "WanModel_S2V": _wan(full_only=("audio_embed",)),
    "LTXVModel": _spec(("transformer_blocks",), (Stream("x", "norm_out"),), attention="attn1"),
    "MiniTrainDIT": _spec(("blocks",), (Stream("x_B_T_H_W_D", "final_layer"),), attention="self_attn"),
    "AsymmDiTJoint": _spec(
        ("blocks",), (Stream("x", "final_layer"),), outputs=("x", "y"), attention="attn.qkv_x",
    ),
    "ACEStepTransformer2DModel": _spec(
        ("transformer_blocks",), (Stream("hidden_states", "final_layer"),), attention="attn",
    ),
    "AudioDiffusionTransformer": _spec(
        ("transformer.layers",), (Stream("x", "transformer.project_out"),), attention="self_attn",
    ),
}  # fmt: skip

_NO_TRANSFORMER = "TAP needs a transformer, whose blocks share one residual stream"
REFUSED: dict[str, str] = {
    "GeneralDIT": "the blocks of Cosmos 1 are no list, and its tokens come before the samples of a batch",
    "UNetModel": f"it is a U-Net; {_NO_TRANSFORMER}",
    "StageB": f"Stable Cascade is a U-Net; {_NO_TRANSFORMER}",
    "StageC": f"Stable Cascade is a U-Net; {_NO_TRANSFORMER}",
}


def spec_of(module: nn.Module) -> TransformerSpec:
    """Of a diffusion model. Raises UnsupportedModelError where TAP does not know its class, or why it can't."""
    name = type(module).__name__
    if name in REFUSED:
        raise UnsupportedModelError(f"TAP can't accelerate {name}: {REFUSED[name]}")
    if name not in SPECS:
        raise UnsupportedModelError(
            f"TAP does not know this model's class, {name}; of ComfyUI's it knows {', '.join(sorted(SPECS))}"
        )
    return SPECS[name]
