"""What has to be known of a transformer class: a few declarative lines each, and nothing else anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class TransformerSpec:
    """How to find the depth of a transformer and its first layer.

    Attributes:
        blocks: attributes that hold the lists of blocks, in the order in which they run.
        block_outputs: what the first block returns, named as its arguments.
        stream: the one of these that reaches the output head; text in a stream of its own is not cached.
        head: the module that receives this stream, as its first argument, after the last block and whatever is
            added behind it.
        modulated_input: (first block, its arguments by name) -> what enters its attention, (B, N, D).
        within_residual: arguments of the transformer that act between the blocks. On predicted steps they are
            withheld, since the residual has their effect already.
        conditioning: argument of the transformer that tells one trajectory's branch from another's.
    """

    blocks: tuple[str, ...]
    block_outputs: tuple[str, ...]
    stream: str
    head: str
    modulated_input: Callable[[nn.Module, Mapping[str, Any]], Tensor]
    within_residual: tuple[str, ...] = ()
    conditioning: str = "encoder_hidden_states"


def _flux_modulated_input(block: Any, arguments: Mapping[str, Any]) -> Tensor:
    modulated: Tensor = block.norm1(arguments["hidden_states"], emb=arguments["temb"])[0]
    return modulated


SPECS: dict[str, TransformerSpec] = {
    "FluxTransformer2DModel": TransformerSpec(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        block_outputs=("encoder_hidden_states", "hidden_states"),
        stream="hidden_states",
        head="norm_out",
        modulated_input=_flux_modulated_input,
        within_residual=("controlnet_block_samples", "controlnet_single_block_samples"),
    ),
}
