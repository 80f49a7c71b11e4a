"""What has to be known of a transformer class: a few declarative lines each, and nothing else anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stream:
    """A sequence of tokens that goes through all blocks to an output of the model.

    Attributes:
        argument: the first block's argument that carries it, (B, N, D) or with several token axes.
        head: submodule (or ModuleDict of alternatives) that receives it as first argument, behind the last block and
            all that is done there. None: the last block returns it, and nothing is added to it between blocks.
        behind_text: the head receives text in front of it, in one sequence; without a head the last block returns it
            so, where it returns one tensor.
    """

    argument: str = "hidden_states"
    head: str | None = None
    behind_text: bool = False


@dataclass(frozen=True)
class TransformerSpec:
    """How to find the depth of a transformer and its first layer.

    Attributes:
        blocks: lists of blocks that take part in the residual, in the order in which they run.
        streams: nearly always one; text in a stream of its own is not cached.
        arguments: names of the first block's positional arguments, where its forward doesn't tell (`*args`).
        outputs: what the first block returns, named as its arguments; empty where it returns a single tensor.
        bypassed: lists of blocks that run beside these, such as a control branch. On predicted steps one block that
            returns these of its arguments takes the place of all.
        modulated_norm: child of the first block whose (first) output is the modulated input; None: what enters the
            attention is.
        attention: this child of the first block; None: the first to run whose name or class says attention.
        probe: False where what enters the attention can't be compared token by token with the stream: the change by
            the whole first block is the probe then, whatever the configuration says.
        tokens_first: the stream is (N, B, D), unlike what enters the attention.
        timestep: argument of the transformer that tells the time.
        rising: it rises along a trajectory.
        conditioning: argument of the transformer that tells one trajectory's branch from another's.
        full_only: arguments of the transformer that predicted steps go without, since its blocks have to use them up.
        unread: submodules (or lists of them), mostly embeddings of text and of positions, whose output reaches neither
            the stream nor the modulated input nor the head. Predicted steps go without them.
        note: for users, in the table of models.
    """

    blocks: tuple[str, ...]
    streams: tuple[Stream, ...] = (Stream(),)
    arguments: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    bypassed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    modulated_norm: str | None = None
    attention: str | None = None
    probe: bool = True
    tokens_first: bool = False
    timestep: str = "timestep"
    rising: bool = False
    conditioning: str = "encoder_hidden_states"
    full_only: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    note: str = ""

    @property
    def leaves_by_block(self) -> bool:
        """Whether the last block's output is where the streams are read and predicted."""
        return any(stream.head is None for stream in self.streams)


_TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
_TEXT_LAST = ("hidden_states", "encoder_hidden_states")
_DUAL_SINGLE = ("transformer_blocks", "single_transformer_blocks")
_WAN_EMBEDDERS = ("condition_embedder.text_embedder", "condition_embedder.image_embedder", "rope")
_TO_NORM_OUT = (Stream(head="norm_out"),)

SPECS: dict[str, TransformerSpec] = {
    "FluxTransformer2DModel": TransformerSpec(
        _DUAL_SINGLE, _TO_NORM_OUT, outputs=_TEXT_FIRST, modulated_norm="norm1",
        unread=("context_embedder", "pos_embed"),
    ),
    "QwenImageTransformer2DModel": TransformerSpec(
        ("transformer_blocks",), _TO_NORM_OUT, outputs=_TEXT_FIRST, unread=("txt_norm", "txt_in", "pos_embed"),
    ),
    "HunyuanVideoTransformer3DModel": TransformerSpec(
        _DUAL_SINGLE, _TO_NORM_OUT, outputs=_TEXT_LAST, modulated_norm="norm1", unread=("context_embedder", "rope"),
    ),
    "SD3Transformer2DModel": TransformerSpec(
        ("transformer_blocks",), _TO_NORM_OUT, outputs=_TEXT_FIRST, modulated_norm="norm1",
        unread=("context_embedder",),
    ),
    "WanTransformer3DModel": TransformerSpec(("blocks",), unread=_WAN_EMBEDDERS),
    # Video
    "WanVACETransformer3DModel": TransformerSpec(
        ("blocks",), _TO_NORM_OUT, bypassed={"vace_blocks": ("control_hidden_states", "control_hidden_states")},
        unread=(*_WAN_EMBEDDERS, "vace_patch_embedding"),
    ),
    "WanAnimateTransformer3DModel": TransformerSpec(
        ("blocks",), _TO_NORM_OUT, bypassed={"face_adapter": ("hidden_states",)},
        unread=(*_WAN_EMBEDDERS, "motion_encoder", "face_encoder"),
    ),
    "LTXVideoTransformer3DModel": TransformerSpec(("transformer_blocks",), unread=("caption_projection", "rope")),
    "LTX2VideoTransformer3DModel": TransformerSpec(
        ("transformer_blocks",), (Stream(), Stream("audio_hidden_states")),
        outputs=("hidden_states", "audio_hidden_states"), probe=False,
    ),
    "CogVideoXTransformer3DModel": TransformerSpec(
        ("transformer_blocks",), outputs=_TEXT_LAST, unread=("patch_embed.text_proj",),
    ),
    "SkyReelsV2Transformer3DModel": TransformerSpec(
        ("blocks",), note="With `ar_step`, steps are predicted only after the last frames have begun.",
        unread=_WAN_EMBEDDERS,
    ),
    "ChronoEditTransformer3DModel": TransformerSpec(("blocks",), unread=_WAN_EMBEDDERS),
    "MochiTransformer3DModel": TransformerSpec(
        ("transformer_blocks",), outputs=_TEXT_LAST, modulated_norm="norm1", rising=True,
        unread=("time_embed.caption_proj", "rope"),
    ),
    "CosmosTransformer3DModel": TransformerSpec(("transformer_blocks",), unread=("rope",)),
    "AllegroTransformer3DModel": TransformerSpec(("transformer_blocks",), unread=("caption_projection",)),
    "LatteTransformer3DModel": TransformerSpec(
        ("transformer_blocks",), _TO_NORM_OUT, bypassed={"temporal_transformer_blocks": ("hidden_states",)},
        unread=("caption_projection",),
    ),
    "EasyAnimateTransformer3DModel": TransformerSpec(
        ("transformer_blocks",), outputs=_TEXT_LAST, unread=("text_proj", "rope_embedding"),
    ),
    "ConsisIDTransformer3DModel": TransformerSpec(
        ("transformer_blocks",), (Stream(head="norm_final", behind_text=True),), outputs=_TEXT_LAST,
        unread=("patch_embed.text_proj", "local_facial_extractor", "perceiver_cross_attention"),
    ),
    "HeliosTransformer3DModel": TransformerSpec(("blocks",), unread=("condition_embedder.text_embedder", "rope")),
    "AnyFlowTransformer3DModel": TransformerSpec(("blocks",), unread=("condition_embedder.text_embedder", "rope")),
    "Cosmos3OmniTransformer": TransformerSpec(
        ("layers",), (Stream("gen_seq", head="norm_moe_gen"),), outputs=("und_seq", "gen_seq"),
        modulated_norm="input_layernorm_moe_gen", timestep="vision_timesteps", conditioning="input_ids",
        unread=("rotary_emb",),
    ),
    # Audio, and image and video models that stand apart. Some reorder or cut the stream in front of the head, or add
    # to it there what entered the first block (LongCat): for those, and wherever nothing is added, the last block.
    "Kandinsky5Transformer3DModel": TransformerSpec(
        ("visual_transformer_blocks",), (Stream("visual_embed"),),
        unread=("text_embeddings", "text_transformer_blocks", "text_rope_embeddings", "visual_rope_embeddings"),
    ),
    "Kandinsky6SRTransformer3DModel": TransformerSpec(
        ("visual_transformer_blocks",), unread=("visual_rope_embeddings",),
    ),
    "Kandinsky6Transformer3DModel": TransformerSpec(
        ("visual_transformer_blocks",), (Stream("vis", "out_layer"), Stream("aud", "audio_out_layer")),
        outputs=("vis", "aud"), probe=False,
    ),
    "SanaVideoTransformer3DModel": TransformerSpec(
        ("transformer_blocks",), _TO_NORM_OUT, unread=("caption_projection", "caption_norm", "rope"),
    ),
    "SanaWMTransformer3DModel": TransformerSpec(
        ("blocks",), (Stream("x"),), unread=("y_embedder", "attention_y_norm", "plucker_embedder", "rope"),
    ),
    "StableAudioDiTModel": TransformerSpec(("transformer_blocks",), unread=("cross_attention_proj",)),
    "StableAudio3DiTModel": TransformerSpec(("transformer_blocks",), unread=("to_cond_embed", "rotary_pos_emb")),
    "AceStepTransformer1DModel": TransformerSpec(("layers",), unread=("condition_embedder",)),
    "LongCatAudioDiTTransformer": TransformerSpec(("blocks",), unread=("rotary_embed",)),
    "MiniMaxH3Transformer3DModel": TransformerSpec(("transformer_blocks",), rising=True, unread=("rope",)),
    "MiniMaxMusic3Transformer1DModel": TransformerSpec(("transformer_blocks",), rising=True, unread=("rotary_emb",)),
    # joint attention of two streams
    **dict.fromkeys(
        (
            "BriaFiboTransformer2DModel", "BriaTransformer2DModel", "ChromaTransformer2DModel",
            "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel",
        ),
        TransformerSpec(
            _DUAL_SINGLE, _TO_NORM_OUT, outputs=_TEXT_FIRST, modulated_norm="norm1",
            unread=("context_embedder", "context_embedder_norm", "caption_projection", "pos_embed"),
        ),
    ),
    "HunyuanImageTransformer2DModel": TransformerSpec(
        _DUAL_SINGLE, _TO_NORM_OUT, outputs=_TEXT_LAST, modulated_norm="norm1",
        unread=("context_embedder", "context_embedder_2", "rope"),
    ),
    "MotifVideoTransformer3DModel": TransformerSpec(
        _DUAL_SINGLE, _TO_NORM_OUT, outputs=_TEXT_LAST, modulated_norm="norm1", unread=("context_embedder", "rope"),
    ),
    "AuraFlowTransformer2DModel": TransformerSpec(
        ("joint_transformer_blocks", "single_transformer_blocks"), _TO_NORM_OUT, outputs=_TEXT_FIRST,
        modulated_norm="norm1", unread=("context_embedder",),
    ),
    "BriaFibo2Transformer2DModel": TransformerSpec(("layers",), (Stream("x"),)),
    "Flux2Transformer2DModel": TransformerSpec(
        _DUAL_SINGLE, _TO_NORM_OUT, outputs=_TEXT_FIRST,
        unread=("context_embedder", "pos_embed", "double_stream_modulation_txt", "single_stream_modulation"),
    ),
    "Flux3Transformer2DModel": TransformerSpec(
        ("mode_blocks.image", "single_transformer_blocks"), _TO_NORM_OUT,
        bypassed={"txt_mode_blocks": ("hidden_states",), "mode_blocks.image_cond": ("hidden_states",)},
        unread=("context_embedder", "pos_embed", "early_stream_modulations.txt", "single_stream_modulations"),
    ),
    "HiDreamImageTransformer2DModel": TransformerSpec(
        ("double_stream_blocks", "single_stream_blocks"), (Stream(head="final_layer"),), outputs=_TEXT_LAST,
        timestep="timesteps", conditioning="encoder_hidden_states_t5", unread=("caption_projection", "pe_embedder"),
    ),
    "HunyuanVideo15Transformer3DModel": TransformerSpec(
        ("transformer_blocks",), _TO_NORM_OUT, outputs=_TEXT_LAST, modulated_norm="norm1",
        unread=("context_embedder", "context_embedder_2", "image_embedder", "cond_type_embed", "rope"),
    ),
    # No head: only the tokens of the new frames go there, without those of the history.
    "HunyuanVideoFramepackTransformer3DModel": TransformerSpec(
        _DUAL_SINGLE, outputs=_TEXT_LAST, modulated_norm="norm1",
        unread=("context_embedder", "image_projection", "rope"),
    ),
    "NucleusMoEImageTransformer2DModel": TransformerSpec(
        ("transformer_blocks",), _TO_NORM_OUT, unread=("txt_norm", "pos_embed"),
    ),
    "QwenImage21Transformer2DModel": TransformerSpec(("transformer_blocks",), _TO_NORM_OUT, unread=("pos_embed",)),
    # Images, one stream
    "PixArtTransformer2DModel": TransformerSpec(("transformer_blocks",), unread=("caption_projection",)),
    "DiTTransformer2DModel": TransformerSpec(("transformer_blocks",), conditioning="class_labels"),
    "SanaTransformer2DModel": TransformerSpec(
        ("transformer_blocks",), _TO_NORM_OUT, unread=("caption_projection", "caption_norm"),
    ),
    "Lumina2Transformer2DModel": TransformerSpec(("layers",), rising=True),
    "ZImageTransformer2DModel": TransformerSpec(
        ("layers",), (Stream("x", "all_final_layer"),), timestep="t", rising=True, conditioning="cap_feats"
    ),
    "CogView4Transformer2DModel": TransformerSpec(
        ("transformer_blocks",), outputs=_TEXT_LAST, unread=("patch_embed.text_proj", "rope"),
    ),
    "CogView3PlusTransformer2DModel": TransformerSpec(
        ("transformer_blocks",), outputs=_TEXT_LAST, unread=("patch_embed.text_proj",),
    ),
    "OmniGenTransformer2DModel": TransformerSpec(("layers",), rising=True, conditioning="input_ids", unread=("rope",)),
    "HunyuanDiT2DModel": TransformerSpec(
        ("blocks",), full_only=("controlnet_block_samples",), unread=("text_embedder",),
    ),
    "LuminaNextDiT2DModel": TransformerSpec(("layers",), rising=True),
    "PRXTransformer2DModel": TransformerSpec(("blocks",), unread=("txt_in", "pe_embedder")),
    "ErnieImageTransformer2DModel": TransformerSpec(
        ("layers",), (Stream("x"),), tokens_first=True, conditioning="text_bth", unread=("pos_embed",),
    ),
    "GlmImageTransformer2DModel": TransformerSpec(
        ("transformer_blocks",), outputs=_TEXT_LAST, unread=("glyph_projector", "rope"),
    ),
    "Krea2Transformer2DModel": TransformerSpec(("transformer_blocks",), unread=("rotary_emb",)),
    "Ideogram4Transformer2DModel": TransformerSpec(("layers",), rising=True, unread=("rotary_emb",)),
    "JoyImageEditTransformer3DModel": TransformerSpec(
        ("double_blocks",), outputs=_TEXT_LAST, unread=("condition_embedder.text_embedder",),
    ),
    "JoyImageEditPlusTransformer3DModel": TransformerSpec(
        ("double_blocks",), outputs=_TEXT_LAST, unread=("condition_embedder.text_embedder",),
    ),
    "PriorTransformer": TransformerSpec(
        ("transformer_blocks",), conditioning="proj_embedding",
        note="A pipeline's UNet, where there is one behind the prior, runs in full.",
    ),
}  # fmt: skip

REFUSED: dict[str, str] = {
    # Video
    "AnyFlowFARTransformer3DModel":
        "it generates chunk by chunk from a key-value cache, not by denoising a whole sample",
    "WanAnimate2Transformer3DModel":
        "its blocks fill a key-value cache in calls that look like denoising steps",
    # Audio, and image and video models that stand apart.
    "SanaWMLTX2RefinerTransformer3DModel": (
        "it refines a video chunk by chunk in a few steps, and every layer keeps keys and values of a chunk for the"
        " next ones"
    ),
    "RFD4ProteinaTransformer": (
        "it designs proteins, and within a step its blocks run several times over, each time on the features of pairs"
        " that they left"
    ),
    "Transformer2DModel": (
        "it is a part of UNets; for checkpoints of DiT and PixArt, load the DiTTransformer2DModel or the"
        " PixArtTransformer2DModel"
    ),
    "TransformerTemporalModel": "it is a part of UNets, which have no residual stream that all blocks share",
    "DreamLiteTransformer2DModel": (
        "it is a part of the DreamLiteUNetModel, and UNets have no residual stream that all blocks share"
    ),
    "UVit2DModel": (
        "it is a UNet that predicts the masked tokens of an image, with no residual stream that all blocks share"
    ),
}  # fmt: skip
