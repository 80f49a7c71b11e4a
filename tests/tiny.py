"""A FLUX pipeline of a few thousand parameters with random weights, and ways to run it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tap_diffusion.core.engine import Engine
from tap_diffusion.demo.train import build_tokenizers

WORDS = ["red apple", "green frog face", "blue book"]
TOKENS = 6  # of a caption


def build_transformer(**changes: Any) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    }
    return FluxTransformer2DModel(**config | changes).eval()


def build_pipeline(pipeline: type = FluxPipeline, **transformer: Any) -> Any:
    """The pipeline class, on tiny parts with random weights: 32×32 pixels, 64 tokens of width 32."""
    torch.manual_seed(1)
    clip_tokenizer, t5_tokenizer = build_tokenizers(WORDS)
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer), hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(t5_tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe = pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            sample_size=32,
            shift_factor=0.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(clip),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=t5_tokenizer,
        transformer=build_transformer(**transformer),
    )
    for name in ("vae", "text_encoder", "text_encoder_2"):
        getattr(pipe, name).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(
    pipe: Any, prompt: str | list[str] | None = "red apple", seed: int = 0, steps: int = 20, **more: Any
) -> Tensor:
    """Final latents of one run."""
    arguments = {
        "height": 32, "width": 32, "num_inference_steps": steps, "max_sequence_length": TOKENS,
        "output_type": "latent", "generator": torch.Generator().manual_seed(seed),
    }  # fmt: skip
    result: Tensor = pipe(prompt=prompt, **arguments | more).images
    return result


def engine_of(transformer: Any) -> Engine:
    """TAP's engine on a transformer where it is enabled."""
    engine: Engine = transformer._diffusers_hook.get_hook("tap_diffusion").engine
    return engine


def interrupt_at(step: int) -> Any:
    """A pipeline's ``callback_on_step_end`` that raises KeyboardInterrupt."""

    def callback(_: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if i == step:
            raise KeyboardInterrupt
        return values

    return callback


def count_calls(module: torch.nn.Module) -> list[int]:
    """A list whose only item counts the calls of ``module`` from now on."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    module.register_forward_hook(count)
    return calls


class Operations(TorchDispatchMode):
    """Counts operations, and those that read a value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.reads: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        reads = function is torch.ops.aten._local_scalar_dense.default or "nonzero" in str(function)
        # Coefficients come from the host in the first place: they are float64 and never on the device.
        if reads and not (isinstance(args[0], Tensor) and args[0].dtype == torch.float64):
            self.reads.append(str(function))
        return function(*args, **(kwargs or {}))


def counted_forward(transformer: Any, counter: Operations, steps: set[int]) -> None:
    """Count within the calls of the transformer at these steps."""
    forward, calls = transformer.forward, [-1]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] not in steps:
            return forward(*args, **kwargs)
        with counter:
            return forward(*args, **kwargs)

    transformer.forward = counted
