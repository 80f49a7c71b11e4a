"""Transformers of true size with random weights: what time and memory depend on, without a download.

``SIZES`` holds the published configurations and the shapes of what their pipelines pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import psutil
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from tap_diffusion.core.errors import UsageError


@dataclass(frozen=True)
class Grid:
    """What conditions are made for: a batch of latents, 8 times smaller than pixels, on a device."""

    batch: int
    height: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def randn(self, *shape: int) -> Tensor:
        """Normal, (batch, *shape)."""
        return torch.randn(self.batch, *shape, dtype=self.dtype, device=self.device)

    def full(self, value: float, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Constant, (batch, *shape)."""
        return torch.full((self.batch, *shape), value, dtype=dtype or self.dtype, device=self.device)

    @property
    def positions(self) -> Tensor:
        """Of FLUX's packed tokens, (height · width / 4, 3)."""
        axes = [
            torch.arange(size, dtype=self.dtype, device=self.device) for size in (self.height // 2, self.width // 2)
        ]
        return torch.cartesian_prod(torch.zeros_like(axes[0][:1]), *axes)


def _packed(frames: int, height: int, width: int) -> tuple[int, ...]:
    return height * width // 4, 64


def _video(frames: int, height: int, width: int) -> tuple[int, ...]:
    return 16, frames, height, width


@dataclass(frozen=True)
class Size:
    """A transformer and what it is called with.

    Attributes:
        transformer: its class in diffusers.
        config: arguments of its constructor that differ from diffusers' defaults.
        blocks: those that count blocks, and how many there are.
        latents: (frames, height, width) of the latents -> shape of one sample's, without batch.
        conditions: arguments of forward that stay the same along a trajectory.
        time: what the transformer is passed at noise alone.
        height, width: in pixels.
        frames: of a video; 1 for images.
        batch: 2 where pipelines run both branches of guidance in one call.
        square: whether it takes nothing but squares.
    """

    transformer: str
    config: dict[str, Any]
    blocks: dict[str, int]
    latents: Callable[[int, int, int], tuple[int, ...]]
    conditions: Callable[[Grid], dict[str, Any]]
    time: float = 1000.0
    height: int = 1024
    width: int = 1024
    frames: int = 1
    batch: int = 1
    square: bool = False


SIZES = {
    "flux": Size(  # FLUX.1-dev
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        {"num_layers": 19, "num_single_layers": 38},
        _packed,
        lambda grid: {
            "encoder_hidden_states": grid.randn(512, 4096), "pooled_projections": grid.randn(768),
            "guidance": grid.full(3.5, dtype=torch.float32), "img_ids": grid.positions,
            "txt_ids": grid.positions.new_zeros(512, 3),
        },
        time=1.0,
    ),
    "qwen-image": Size(  # prompts are not padded: the length is one of many
        "QwenImageTransformer2DModel",
        {},
        {"num_layers": 60},
        _packed,
        lambda grid: {
            "encoder_hidden_states": grid.randn(128, 3584), "encoder_hidden_states_mask": None,
            "img_shapes": [[(1, grid.height // 2, grid.width // 2)]] * grid.batch,
        },
        time=1.0,
    ),
    "hunyuan-video": Size(
        "HunyuanVideoTransformer3DModel",
        {},
        {"num_layers": 20, "num_single_layers": 40},
        _video,
        lambda grid: {
            "encoder_hidden_states": grid.randn(256, 4096), "pooled_projections": grid.randn(768),
            "encoder_attention_mask": grid.full(1, 256, dtype=torch.bool), "guidance": grid.full(6000.0),
        },
        height=480, width=640, frames=65,
    ),
    "dit-xl": Size(  # DiT-XL/2
        "DiTTransformer2DModel",
        {"out_channels": 8, "sample_size": 32},
        {"num_layers": 28},
        lambda _, height, width: (4, height, width),
        lambda grid: {"class_labels": grid.full(207, dtype=torch.long)},
        height=256, width=256, batch=2, square=True,
    ),
    "pixart-sigma": Size(
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False, "sample_size": 128},
        {"num_layers": 28},
        lambda _, height, width: (4, height, width),
        lambda grid: {
            "encoder_hidden_states": grid.randn(300, 4096), "encoder_attention_mask": grid.full(1, 300),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        batch=2, square=True,
    ),
    "sd3-medium": Size(
        "SD3Transformer2DModel",
        {"num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        {"num_layers": 24},
        lambda _, height, width: (16, height, width),
        lambda grid: {"encoder_hidden_states": grid.randn(333, 4096), "pooled_projections": grid.randn(2048)},
        batch=2,
    ),
    "wan-1.3b": Size(
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960},
        {"num_layers": 30},
        _video,
        lambda grid: {"encoder_hidden_states": grid.randn(512, 4096)},
        height=480, width=832, frames=81,
    ),
    "tiny": Size(  # no model, but a FLUX that is small enough to try things out
        "FluxTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 16, "pooled_projection_dim": 16,
         "axes_dims_rope": (4, 6, 6)},
        {"num_layers": 2, "num_single_layers": 2},
        _packed,
        lambda grid: {
            "encoder_hidden_states": grid.randn(6, 16), "pooled_projections": grid.randn(16),
            "img_ids": grid.positions, "txt_ids": grid.positions.new_zeros(6, 3),
        },
        time=1.0, height=64, width=64, batch=2,
    ),
}  # fmt: skip


class RandomPipeline(DiffusionPipeline):
    """A denoising loop around a transformer with random weights: Euler steps of flow matching, from noise.

    What it returns means nothing. What it costs is what the denoising loop of a real pipeline costs.
    """

    model_cpu_offload_seq = "transformer"
    shape: tuple[int, ...]  # of the latents, with batch
    branches: tuple[str, ...] = ("cond",)  # with "uncond" guidance takes two calls a step
    conditions: dict[str, Any]
    time: float

    def __init__(self, transformer: nn.Module, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self,
        num_inference_steps: int = 50,
        generator: Any = None,
        output_type: str = "latent",  # noqa: ARG002
    ) -> ImagePipelineOutput:
        """Run one trajectory; ``output_type`` is what other pipelines have, and is ignored."""
        transformer, scheduler = self.transformer, self.scheduler
        z = randn_tensor(self.shape, generator=generator, device=transformer.device, dtype=transformer.dtype)
        scheduler.set_timesteps(num_inference_steps, device=z.device)
        scheduler.set_begin_index(0)  # else its first step waits for the device
        for t in self.progress_bar(scheduler.timesteps):
            time = (t * (self.time / 1000)).expand(len(z)).to(z.dtype)
            given = {"hidden_states": z, "timestep": time, "return_dict": False} | self.conditions
            output, *other = (self._call(branch, **given)[0] for branch in self.branches)
            if other:
                output = other[0] + 5.0 * (output - other[0])
            # DiT and PixArt give a variance as well.
            z = scheduler.step(output[:, : z.shape[1]], t, z, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=z)

    def _call(self, branch: str, **arguments: Any) -> Any:
        if not hasattr(self.transformer, "cache_context"):
            return self.transformer(**arguments)
        with self.transformer.cache_context(branch):
            return self.transformer(**arguments)


def build(
    name: str,
    dtype: torch.dtype,
    device: str,
    blocks: int | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    batch: int | None = None,
) -> RandomPipeline:
    """A pipeline around one of ``SIZES``, its weights made in their dtype on the device.

    Args:
        blocks: of each kind at most, at true width; None makes all.
        height, width: in pixels, multiples of 16.
        frames: of a video, 4 n + 1.
        batch: samples.

    Raises:
        UsageError: there is no such size, it can't be had in this shape, or its weights don't fit in memory.
    """
    size = get(name)
    height, width, frames = height or size.height, width or size.width, frames or size.frames
    if height % 16 or width % 16:
        raise UsageError(f"{height}x{width} can't be done by {name}: height and width must be multiples of 16")
    if size.square and height != width:
        raise UsageError(f"{height}x{width} can't be done by {name}, which makes squares")
    if frames % 4 != 1 or (frames > 1 and size.frames == 1):
        raise UsageError(f"{frames} frames can't be done by {name}: give {'1' if size.frames == 1 else '4 n + 1'}")
    place = torch.device(device)
    transformer = _transformer(name, size, dtype, place, blocks, height)
    pipe = RandomPipeline(transformer, FlowMatchEulerDiscreteScheduler())
    grid = Grid(batch or size.batch, height // 8, width // 8, dtype, place)
    pipe.shape = (grid.batch, *size.latents((frames - 1) // 4 + 1, grid.height, grid.width))
    pipe.conditions, pipe.time = size.conditions(grid), size.time
    return pipe


def get(name: str) -> Size:
    """One of ``SIZES``. Raises UsageError where there is none of this name."""
    if name not in SIZES:
        raise UsageError(f"unknown size '{name}': give one of {', '.join(SIZES)}")
    return SIZES[name]


def skeleton(name: str, blocks: int | None = None, height: int | None = None) -> Any:
    """The transformer of a size without its weights: parameters on the meta device, buffers as they are."""
    size = get(name)
    config = size.config | {kind: min(count, blocks or count) for kind, count in size.blocks.items()}
    if "sample_size" in config and height is not None:
        config["sample_size"] = height // 8  # other sizes make positions anew at each step
    with init_empty_weights():
        return getattr(diffusers, size.transformer)(**config)


def _transformer(
    name: str, size: Size, dtype: torch.dtype, device: torch.device, blocks: int | None, height: int
) -> Any:
    model = skeleton(name, blocks, height).eval().requires_grad_(False)
    dtypes = {key: _stored(model, key, dtype) for key, _ in model.named_parameters()}
    needed = sum(parameter.numel() * dtypes[key].itemsize for key, parameter in model.named_parameters())
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        raise UsageError(
            f"the weights of {name} take {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, and {device} has"
            f" {free / 1e9:.1f} GB free; give fewer --blocks (it has {' and '.join(map(str, size.blocks.values()))}),"
            " or a smaller --dtype"
        )
    generator = torch.Generator(device).manual_seed(0)
    for key, parameter in list(model.named_parameters()):
        parent, _, leaf = key.rpartition(".")
        weight = torch.empty(parameter.shape, dtype=dtypes[key], device=device)
        weight.normal_(std=(weight[0].numel() if weight.ndim > 1 else 100) ** -0.5, generator=generator)
        setattr(model.get_submodule(parent), leaf, nn.Parameter(weight, requires_grad=False))
    return model.to(device)  # the buffers


def _stored(model: Any, key: str, dtype: torch.dtype) -> torch.dtype:
    """What diffusers would load a parameter in."""
    kept = set(model._keep_in_fp32_modules or ())
    return torch.float32 if kept & set(key.split(".")) else dtype
