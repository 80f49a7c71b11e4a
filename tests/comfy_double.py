"""A double of the parts of ComfyUI that extensions build on, since ComfyUI can't be installed as a package.

Written from what these files of github.com/comfyanonymous/ComfyUI do, read in the versions of 2025:
comfy/patcher_extension.py (wrappers), comfy/model_patcher.py (clones), comfy/samplers.py and comfy/sampler_helpers.py
(guider, batching of conditions), comfy/model_base.py (`apply_model`), comfy/model_sampling.py (CONST),
comfy/k_diffusion/sampling.py, and of the models comfy/ldm/{flux,qwen_image,wan,hunyuan_video}/model.py,
comfy/ldm/flux/layers.py and comfy/ldm/modules/diffusionmodules/mmdit.py. The models have a few thousand parameters, the
same submodules, the same order of calls with the same argument names, `patches_replace` and ControlNet residuals;
positions are left out.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Options = dict[str, Any]
WIDTH, HEADS, CHANNELS, TEXT = 16, 2, 4, 8


# ------------------------------------------------------------------------------------------ comfy.patcher_extension


class WrappersMP:
    OUTER_SAMPLE = "outer_sample"
    PREPARE_SAMPLING = "prepare_sampling"
    SAMPLER_SAMPLE = "sampler_sample"
    PREDICT_NOISE = "predict_noise"
    CALC_COND_BATCH = "calc_cond_batch"
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"


class Executor:
    """Runs wrappers from the outside in; each calls the next by calling the executor that it is given."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: list[Callable[..., Any]]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        rest = Executor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](rest, *args, **kwargs)

    __call__ = execute


def wrapped(place: str, original: Callable[..., Any], owner: Any, transformer_options: Options) -> Executor:
    groups = transformer_options.get("wrappers", {}).get(place, {})
    return Executor(original, owner, [wrapper for group in groups.values() for wrapper in group])


@contextmanager
def installed() -> Iterator[None]:
    """``import comfy.patcher_extension`` finds this, within a ``with`` block."""
    package, extension = ModuleType("comfy"), ModuleType("comfy.patcher_extension")
    extension.WrappersMP = WrappersMP  # type: ignore[attr-defined]
    package.patcher_extension = extension  # type: ignore[attr-defined]
    modules = {"comfy": package, "comfy.patcher_extension": extension}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def copied(value: Any) -> Any:
    """Dictionaries and lists anew, all else shared."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------- model and model patcher


class CONST:
    """Flow matching: x = (1 - σ) x₀ + σ ε."""

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma

    def denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - output * sigma.reshape(-1, *[1] * (x.ndim - 1))

    def noised(self, sigma: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
        return sigma * noise + (1 - sigma) * latent


class ModelSamplingFlux(CONST):
    pass


class BaseModel(nn.Module):
    def __init__(self, diffusion_model: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        self.model_sampling = ModelSamplingFlux()

    def apply_model(self, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
                    transformer_options: Options | None = None, **kwargs: Any) -> Tensor:  # fmt: skip
        options = transformer_options or {}
        executor = wrapped(WrappersMP.APPLY_MODEL, self._apply_model, self, options)
        return executor.execute(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _apply_model(self, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Any, control: Any,
                     transformer_options: Options, **kwargs: Any) -> Tensor:  # fmt: skip
        timestep = self.model_sampling.timestep(t).float()
        output = self.diffusion_model(
            x, timestep, context=c_crossattn, control=control, transformer_options=transformer_options, **kwargs
        ).float()
        return self.model_sampling.denoised(t, output, x)


class ModelPatcher:
    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.model_options: Options = {"transformer_options": {}}
        self.object_patches: Options = {}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.attachments: Options = {}

    def clone(self) -> ModelPatcher:
        clone = ModelPatcher(self.model)
        clone.model_options, clone.wrappers = copied(self.model_options), copied(self.wrappers)
        clone.object_patches, clone.attachments = dict(self.object_patches), dict(self.attachments)
        return clone

    def get_model_object(self, name: str) -> Any:
        return self.object_patches[name] if name in self.object_patches else getattr(self.model, name)

    def add_object_patch(self, name: str, value: Any) -> None:
        self.object_patches[name] = value

    def add_wrapper_with_key(self, place: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(place, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, place: str, key: str) -> None:
        self.wrappers.get(place, {}).pop(key, None)

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)

    def set_model_patch_replace(self, patch: Any, name: str, block: str, number: int) -> None:
        replace = self.model_options["transformer_options"].setdefault("patches_replace", {})
        replace.setdefault(name, {})[block, number] = patch


# ------------------------------------------------------------------------------------------------ guider and samplers


class CFGGuider:
    """Conditions are dictionaries: ``context``, maybe ``area`` (h, w, y, x), ``control``, ``start``, ``end`` (σ)."""

    def __init__(self, patcher: ModelPatcher, positive: list[Options], negative: list[Options], cfg: float,
                 together: Callable[[], bool] = lambda: True) -> None:  # fmt: skip
        self.model_patcher, self.cfg, self.together = patcher, cfg, together
        self.model_options = patcher.model_options
        self.conds = [[dict(cond, uuid=uuid.uuid4()) for cond in conds] for conds in (positive, negative)]

    def sample(self, noise: Tensor, latent: Tensor, sampler: KSAMPLER, sigmas: Tensor, callback: Any = None) -> Tensor:
        options = self.model_options
        self.model_options = copied(options)
        self.model_options["transformer_options"]["wrappers"] = copied(self.model_patcher.wrappers)
        try:
            executor = wrapped(WrappersMP.OUTER_SAMPLE, self.outer_sample, self, self._transformer_options)
            return executor.execute(noise, latent, sampler, sigmas, None, callback, True, 0)
        finally:
            self.model_options = options

    @property
    def _transformer_options(self) -> Options:
        options: Options = self.model_options["transformer_options"]
        return options

    def outer_sample(self, noise: Tensor, latent: Tensor, sampler: KSAMPLER, sigmas: Tensor, denoise_mask: Any = None,
                     callback: Any = None, disable_pbar: bool = False, seed: Any = None) -> Tensor:  # fmt: skip
        self.inner_model = self.model_patcher.model
        own = {name: getattr(self.inner_model, name) for name in self.model_patcher.object_patches}
        for name, value in self.model_patcher.object_patches.items():
            setattr(self.inner_model, name, value)
        try:
            model_options = copied(self.model_options)
            model_options["transformer_options"]["sample_sigmas"] = sigmas
            extra = {"model_options": model_options, "seed": seed}
            return sampler.sample(self, sigmas, extra, callback, noise, latent)
        finally:
            for name, value in own.items():
                setattr(self.inner_model, name, value)

    def __call__(self, x: Tensor, timestep: Tensor, model_options: Options, seed: Any = None) -> Tensor:
        executor = wrapped(WrappersMP.PREDICT_NOISE, self.predict_noise, self, self._transformer_options)
        return executor.execute(x, timestep, model_options, seed)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Options, seed: Any = None) -> Tensor:
        positive, negative = self.conds
        groups = [positive, negative if self.cfg != 1.0 else []]
        cond, uncond = calc_cond_batch(self.inner_model, groups, x, timestep, model_options, self.together())
        result = cond if self.cfg == 1.0 else uncond + (cond - uncond) * self.cfg
        for function in model_options.get("sampler_post_cfg_function", []):
            result = function({"denoised": result, "cond": positive, "model": self.inner_model, "sigma": timestep,
                               "input": x, "cond_denoised": cond, "model_options": model_options})  # fmt: skip
        return result


def calc_cond_batch(model: BaseModel, groups: list[list[Options]], x: Tensor, timestep: Tensor,
                    model_options: Options, together: bool = True) -> list[Tensor]:  # fmt: skip
    """What the model denoises x to for each group of conditions, which count by their areas."""
    waiting: list[tuple[Options, int, Tensor]] = []
    for kind, conds in enumerate(groups):
        for cond in conds:
            if cond.get("end", 0.0) <= float(timestep[0]) <= cond.get("start", 1.0):
                h, w, top, left = cond.get("area", (*x.shape[-2:], 0, 0))
                waiting.append((cond, kind, x[..., top : top + h, left : left + w]))
    outputs, counts = [torch.zeros_like(x) for _ in groups], [torch.full_like(x, 1e-37) for _ in groups]
    while waiting:
        first = waiting[0]
        batch = [item for item in waiting if _can_concat(item, first)][:: -1 if together else 1]
        batch = batch if together else batch[:1]
        waiting = [item for item in waiting if all(item is not other for other in batch)]
        options = dict(model_options["transformer_options"])
        options["cond_or_uncond"] = [kind for _, kind, _ in batch]
        options["uuids"] = [cond["uuid"] for cond, _, _ in batch]
        options["sigmas"] = timestep
        denoised = model.apply_model(
            torch.cat([part for *_, part in batch]),
            torch.cat([timestep] * len(batch)),
            c_crossattn=torch.cat([cond["context"].expand(len(x), -1, -1) for cond, *_ in batch]),
            control=batch[0][0].get("control"),
            transformer_options=options,
        )
        for (cond, kind, _), part in zip(batch, denoised.chunk(len(batch)), strict=True):
            h, w, top, left = cond.get("area", (*x.shape[-2:], 0, 0))
            outputs[kind][..., top : top + h, left : left + w] += part
            counts[kind][..., top : top + h, left : left + w] += 1
    return [output / count for output, count in zip(outputs, counts, strict=True)]


def _can_concat(one: tuple[Options, int, Tensor], other: tuple[Options, int, Tensor]) -> bool:
    return (
        one[2].shape == other[2].shape
        and one[0]["context"].shape == other[0]["context"].shape
        and one[0].get("control") is other[0].get("control")
    )


class KSAMPLER:
    def __init__(self, sampler_function: Callable[..., Tensor], extra_options: Options | None = None) -> None:
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, guider: CFGGuider, sigmas: Tensor, extra_args: Options, callback: Any, noise: Tensor,
               latent: Tensor) -> Tensor:  # fmt: skip
        x = guider.inner_model.model_sampling.noised(sigmas[0], noise, latent)
        return self.sampler_function(guider, x, sigmas, extra_args=extra_args, callback=callback, **self.extra_options)


def _velocity(model: Any, x: Tensor, sigma: Tensor, extra_args: Options) -> Tensor:
    return (x - model(x, sigma * x.new_ones(len(x)), **extra_args)) / sigma


def sample_euler(model: Any, x: Tensor, sigmas: Tensor, extra_args: Options, callback: Any = None) -> Tensor:
    for i in range(len(sigmas) - 1):
        d = _velocity(model, x, sigmas[i], extra_args)
        if callback is not None:
            callback(i)
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


def sample_heun(model: Any, x: Tensor, sigmas: Tensor, extra_args: Options, callback: Any = None) -> Tensor:
    for i in range(len(sigmas) - 1):
        d, dt = _velocity(model, x, sigmas[i], extra_args), sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] > 0:
            d = (d + _velocity(model, x + d * dt, sigmas[i + 1], extra_args)) / 2
        x = x + d * dt
    return x


def sample_dpm_2(model: Any, x: Tensor, sigmas: Tensor, extra_args: Options, callback: Any = None) -> Tensor:
    for i in range(len(sigmas) - 1):
        d = _velocity(model, x, sigmas[i], extra_args)
        if sigmas[i + 1] == 0:
            x = x + d * (sigmas[i + 1] - sigmas[i])
        else:
            middle = sigmas[i].log().lerp(sigmas[i + 1].log(), 0.5).exp()
            trial = x + d * (middle - sigmas[i])
            x = x + _velocity(model, trial, middle, extra_args) * (sigmas[i + 1] - sigmas[i])
    return x


def sample_dpmpp_2m(model: Any, x: Tensor, sigmas: Tensor, extra_args: Options, callback: Any = None) -> Tensor:
    """As ComfyUI runs it on flow models too: λ = -log σ."""
    old = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        t, t_next = -sigmas[i].log(), -sigmas[i + 1].log()
        h = t_next - t
        mixed = denoised
        if old is not None and sigmas[i + 1] > 0:
            r = (t + sigmas[i - 1].log()) / h
            mixed = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
        x = sigmas[i + 1] / sigmas[i] * x - (-h).expm1() * mixed
        old = denoised
    return x


def sample_euler_ancestral(model: Any, x: Tensor, sigmas: Tensor, extra_args: Options, callback: Any = None) -> Tensor:
    """Its form for flow matching: past the next σ, and back by noise."""
    generator = torch.Generator().manual_seed(0)
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        if sigmas[i + 1] == 0:
            return denoised
        down = sigmas[i + 1] * (1 + sigmas[i + 1] / sigmas[i] - 1)
        alpha, alpha_down = 1 - sigmas[i + 1], 1 - down
        renoise = (sigmas[i + 1] ** 2 - (down * alpha / alpha_down) ** 2).clamp_min(0).sqrt()
        x = down / sigmas[i] * x + (1 - down / sigmas[i]) * denoised
        x = alpha / alpha_down * x + torch.randn(x.shape, generator=generator) * renoise
    return x


def sample_restarting(model: Any, x: Tensor, sigmas: Tensor, extra_args: Options, callback: Any = None) -> Tensor:
    """Euler, which goes back to a noisier step once (an extension's Restart sampler)."""
    back, at = len(sigmas) // 3, 2 * len(sigmas) // 3
    x = sample_euler(model, x, sigmas[: at + 1], extra_args)
    keep = (1 - sigmas[back]) / (1 - sigmas[at])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    x = keep * x + (sigmas[back] ** 2 - (keep * sigmas[at]) ** 2).sqrt() * noise
    return sample_euler(model, x, sigmas[back:], extra_args)


def sample_dpm_adaptive(model: Any, x: Tensor, sigmas: Tensor, extra_args: Options, callback: Any = None) -> Tensor:
    return sample_euler(model, x, sigmas, extra_args)


def flow_sigmas(steps: int, denoise: float = 1.0, shift: float = 3.0) -> Tensor:
    """σ of a run, with the last part of a longer one where ``denoise`` is less than 1, as KSampler does."""
    t = torch.linspace(1, 0, int(steps / denoise) + 1)
    return (shift * t / (1 + (shift - 1) * t))[-(steps + 1) :]


# --------------------------------------------------------------------------------------------------------- the models


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _mlp(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))


def _modulation(parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, parts * WIDTH))


def _parts(modulation: nn.Module, vec: Tensor, parts: int) -> tuple[Tensor, ...]:
    return modulation(vec).unsqueeze(1).chunk(parts, dim=-1)


def _norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)


class TimeEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.reshape(-1, 1) * torch.logspace(0, 1.5, WIDTH // 2)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


def _patches(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(B, C, …, H, W) as tokens of 2×2 pixels, (B, N, 4C), and the way back."""
    b, c, *frames, h, w = x.shape
    t = frames[0] if frames else 1
    tokens = x.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(b, -1, 4 * c)

    def back(tokens: Tensor) -> Tensor:
        pixels = tokens.reshape(b, t, h // 2, w // 2, c, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
        return pixels.reshape(x.shape)

    return tokens, back


class SelfAttention(nn.Module):
    """Only its parts are called."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)


class DoubleStreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_mod, self.img_norm1, self.img_attn = _modulation(6), _norm(), SelfAttention()
        self.img_norm2, self.img_mlp = _norm(), _mlp()
        self.txt_mod, self.txt_norm1, self.txt_attn = _modulation(6), _norm(), SelfAttention()
        self.txt_norm2, self.txt_mlp = _norm(), _mlp()

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Any, attn_mask: Any = None,
                modulation_dims_img: Any = None, modulation_dims_txt: Any = None,
                transformer_options: Options = {}) -> tuple[Tensor, Tensor]:  # noqa: B006  # fmt: skip
        m, n = _parts(self.img_mod, vec, 6), _parts(self.txt_mod, vec, 6)
        img_qkv = self.img_attn.qkv(self.img_norm1(img) * (1 + m[1]) + m[0]).chunk(3, dim=-1)
        txt_qkv = self.txt_attn.qkv(self.txt_norm1(txt) * (1 + n[1]) + n[0]).chunk(3, dim=-1)
        joint = _attention(*(torch.cat(pair, dim=1) for pair in zip(txt_qkv, img_qkv, strict=True)))
        txt_out, img_out = joint[:, : txt.shape[1]], joint[:, txt.shape[1] :]
        img = img + m[2] * self.img_attn.proj(img_out)
        img = img + m[5] * self.img_mlp(self.img_norm2(img) * (1 + m[4]) + m[3])
        txt = txt + n[2] * self.txt_attn.proj(txt_out)
        txt = txt + n[5] * self.txt_mlp(self.txt_norm2(txt) * (1 + n[4]) + n[3])
        return img, txt


class SingleStreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.pre_norm = _modulation(3), _norm()
        self.linear1, self.linear2 = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor, vec: Tensor, pe: Any, attn_mask: Any = None, modulation_dims: Any = None,
                transformer_options: Options = {}) -> Tensor:  # noqa: B006  # fmt: skip
        shift, scale, gate = _parts(self.modulation, vec, 3)
        *qkv, mlp = self.linear1(self.pre_norm(x) * (1 + scale) + shift).split([WIDTH] * 3 + [2 * WIDTH], dim=-1)
        return x + gate * self.linear2(torch.cat([_attention(*qkv), F.gelu(mlp, approximate="tanh")], dim=-1))


class LastLayer(nn.Module):
    def __init__(self, out: int = 4 * CHANNELS) -> None:
        super().__init__()
        self.norm_final, self.linear, self.adaLN_modulation = _norm(), nn.Linear(WIDTH, out), _modulation(2)

    def forward(self, x: Tensor, vec: Tensor, modulation_dims: Any = None) -> Tensor:
        shift, scale = _parts(self.adaLN_modulation, vec, 2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Model(nn.Module):
    """Wraps its ``_forward`` for extensions, as ComfyUI's models do."""

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, control: Any = None,
                transformer_options: Options = {}, **kwargs: Any) -> Tensor:  # noqa: B006  # fmt: skip
        executor = wrapped(WrappersMP.DIFFUSION_MODEL, self._forward, self, transformer_options)
        return executor.execute(x, timestep, context, control, transformer_options, **kwargs)

    def _forward(self, x: Tensor, timestep: Tensor, context: Tensor, control: Any, options: Options) -> Tensor:
        raise NotImplementedError


def _add(control: Any, kind: str, i: int, x: Tensor, start: int = 0) -> None:
    """A ControlNet's residual, in place."""
    residuals = (control or {}).get(kind, [])
    if i < len(residuals) and residuals[i] is not None:
        x[:, start : start + residuals[i].shape[1]] += residuals[i]


class Flux(Model):
    text_first = True

    def __init__(self, double: int = 2, single: int = 3) -> None:
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(4 * CHANNELS, WIDTH), nn.Linear(TEXT, WIDTH)
        self.time_in = TimeEmbedding()
        self.double_blocks = nn.ModuleList(DoubleStreamBlock() for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleStreamBlock() for _ in range(single))
        self.final_layer = LastLayer()

    def _forward(self, x: Tensor, timestep: Tensor, context: Tensor, control: Any, options: Options) -> Tensor:
        tokens, back = _patches(x)
        img, vec, txt = self.img_in(tokens), self.time_in(timestep), self.txt_in(context)
        replaced = options.get("patches_replace", {}).get("dit", {})
        for i, block in enumerate(self.double_blocks):
            if ("double_block", i) in replaced:

                def block_wrap(args: Options, block: nn.Module = block) -> Options:
                    img, txt = block(img=args["img"], txt=args["txt"], vec=args["vec"], pe=args["pe"],
                                     attn_mask=args.get("attn_mask"))  # fmt: skip
                    return {"img": img, "txt": txt}

                args = {"img": img, "txt": txt, "vec": vec, "pe": None, "attn_mask": None}
                out = replaced["double_block", i](args, {"original_block": block_wrap})
                img, txt = out["img"], out["txt"]
            else:
                img, txt = block(img=img, txt=txt, vec=vec, pe=None, attn_mask=None, transformer_options=options)
            _add(control, "input", i, img)
        start = txt.shape[1] if self.text_first else 0
        count = img.shape[1]
        img = torch.cat((txt, img) if self.text_first else (img, txt), 1)
        for i, block in enumerate(self.single_blocks):
            img = block(img, vec=vec, pe=None, attn_mask=None, transformer_options=options)
            _add(control, "output", i, img, start)
        return back(self.final_layer(img[:, start : start + count], vec))


class HunyuanVideo(Flux):
    text_first = False


class QwenAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_add_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_mask: Any = None,
                image_rotary_emb: Any = None,
                transformer_options: Options = {}) -> tuple[Tensor, Tensor]:  # noqa: B006  # fmt: skip
        image = (self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states))
        text = (m(encoder_hidden_states) for m in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        joint = _attention(*(torch.cat(pair, dim=1) for pair in zip(text, image, strict=True)))
        count = encoder_hidden_states.shape[1]
        return self.to_out(joint[:, count:]), self.to_add_out(joint[:, :count])


class QwenImageTransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = _modulation(6), _modulation(6)
        self.img_norm1, self.img_norm2, self.txt_norm1, self.txt_norm2 = _norm(), _norm(), _norm(), _norm()
        self.img_mlp, self.txt_mlp, self.attn = _mlp(), _mlp(), QwenAttention()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_mask: Any,
                temb: Tensor, image_rotary_emb: Any = None,
                transformer_options: Options = {}) -> tuple[Tensor, Tensor]:  # noqa: B006  # fmt: skip
        m, n = _parts(self.img_mod, temb, 6), _parts(self.txt_mod, temb, 6)
        image, text = self.attn(
            hidden_states=self.img_norm1(hidden_states) * (1 + m[1]) + m[0],
            encoder_hidden_states=self.txt_norm1(encoder_hidden_states) * (1 + n[1]) + n[0],
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            transformer_options=transformer_options,
        )
        hidden_states = hidden_states + m[2] * image
        encoder_hidden_states = encoder_hidden_states + n[2] * text
        hidden_states = hidden_states + m[5] * self.img_mlp(self.img_norm2(hidden_states) * (1 + m[4]) + m[3])
        text = self.txt_mlp(self.txt_norm2(encoder_hidden_states) * (1 + n[4]) + n[3])
        return encoder_hidden_states + n[5] * text, hidden_states


class QwenImageTransformer2DModel(Model):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(4 * CHANNELS, WIDTH), nn.Linear(TEXT, WIDTH)
        self.time_text_embed = TimeEmbedding()
        self.transformer_blocks = nn.ModuleList(QwenImageTransformerBlock() for _ in range(layers))
        self.norm_out, self.proj_out = LastLayer(WIDTH), nn.Linear(WIDTH, 4 * CHANNELS)

    def _forward(self, x: Tensor, timestep: Tensor, context: Tensor, control: Any, options: Options) -> Tensor:
        tokens, back = _patches(x)
        hidden_states, encoder_hidden_states = self.img_in(tokens), self.txt_in(context)
        temb = self.time_text_embed(timestep)
        for i, block in enumerate(self.transformer_blocks):
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states,
                encoder_hidden_states_mask=None, temb=temb, image_rotary_emb=None, transformer_options=options,
            )  # fmt: skip
            _add(control, "input", i, hidden_states)
        return back(self.proj_out(self.norm_out(hidden_states, temb)))


class WanAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))


class WanSelfAttention(WanAttention):
    def forward(self, x: Tensor, freqs: Any, transformer_options: Options = {}) -> Tensor:  # noqa: B006
        return self.o(_attention(self.q(x), self.k(x), self.v(x)))


class WanT2VCrossAttention(WanAttention):
    def forward(self, x: Tensor, context: Tensor, transformer_options: Options = {}, **_: Any) -> Tensor:  # noqa: B006
        return self.o(_attention(self.q(x), self.k(context), self.v(context)))


class WanAttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = _norm(), _norm(), nn.LayerNorm(WIDTH)
        self.self_attn, self.cross_attn, self.ffn = WanSelfAttention(), WanT2VCrossAttention(), _mlp()
        self.modulation = nn.Parameter(torch.randn(1, 6, WIDTH) / 4)

    def forward(self, x: Tensor, e: Tensor, freqs: Any, context: Tensor, context_img_len: Any = 257,
                transformer_options: Options = {}) -> Tensor:  # noqa: B006  # fmt: skip
        m = (self.modulation + e).chunk(6, dim=1)
        x = x + m[2] * self.self_attn(self.norm1(x) * (1 + m[1]) + m[0], freqs, transformer_options=transformer_options)
        x = x + self.cross_attn(self.norm3(x), context, context_img_len=context_img_len)
        return x + m[5] * self.ffn(self.norm2(x) * (1 + m[4]) + m[3])


class WanModel(Model):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.patch_embedding, self.text_embedding = nn.Linear(4 * CHANNELS, WIDTH), nn.Linear(TEXT, WIDTH)
        self.time_embedding = TimeEmbedding()
        self.time_projection = _modulation(6)
        self.blocks = nn.ModuleList(WanAttentionBlock() for _ in range(layers))
        self.head = LastLayer()

    def _forward(self, x: Tensor, timestep: Tensor, context: Tensor, control: Any, options: Options) -> Tensor:
        tokens, back = _patches(x)
        hidden, e = self.patch_embedding(tokens), self.time_embedding(timestep)
        e0 = self.time_projection(e).unflatten(1, (6, WIDTH))
        context = self.text_embedding(context)
        for block in self.blocks:
            hidden = block(hidden, e=e0, freqs=None, context=context, context_img_len=None, transformer_options=options)
        return back(self.head(hidden, e))


class MMDiTAttention(SelfAttention):
    def pre_attention(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).chunk(3, dim=-1)


class DismantledBlock(nn.Module):
    def __init__(self, pre_only: bool) -> None:
        super().__init__()
        self.pre_only, self.norm1, self.attn = pre_only, _norm(), MMDiTAttention()
        self.adaLN_modulation = _modulation(2 if pre_only else 6)
        if not pre_only:
            self.norm2, self.mlp = _norm(), _mlp()

    def pre_attention(self, x: Tensor, c: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        m = _parts(self.adaLN_modulation, c, 2 if self.pre_only else 6)
        return self.attn.pre_attention(self.norm1(x) * (1 + m[1]) + m[0]), (x, *m[2:])

    def post_attention(self, attn: Tensor, x: Tensor, gate: Tensor, *m: Tensor) -> Tensor:
        x = x + gate * self.attn.proj(attn)
        return x + m[2] * self.mlp(self.norm2(x) * (1 + m[1]) + m[0])


def block_mixing(context: Tensor, x: Tensor, context_block: Any, x_block: Any, c: Tensor,
                 use_checkpoint: bool = True) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    context_qkv, context_rest = context_block.pre_attention(context, c)
    x_qkv, x_rest = x_block.pre_attention(x, c)
    joint = _attention(*(torch.cat(pair, dim=1) for pair in zip(context_qkv, x_qkv, strict=True)))
    count = context.shape[1]
    after = None if context_block.pre_only else context_block.post_attention(joint[:, :count], *context_rest)
    return after, x_block.post_attention(joint[:, count:], *x_rest)


class JointBlock(nn.Module):
    def __init__(self, pre_only: bool) -> None:
        super().__init__()
        self.context_block, self.x_block = DismantledBlock(pre_only), DismantledBlock(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        blocks = {"context_block": self.context_block, "x_block": self.x_block}
        return block_mixing(*args, **blocks, **kwargs)


class OpenAISignatureMMDITWrapper(nn.Module):
    """SD3, which asks for its blocks by number."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.x_embedder, self.context_embedder = nn.Linear(4 * CHANNELS, WIDTH), nn.Linear(TEXT, WIDTH)
        self.t_embedder = TimeEmbedding()
        self.joint_blocks = nn.ModuleList(JointBlock(pre_only=i == depth - 1) for i in range(depth))
        self.final_layer = LastLayer()

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Any = None, control: Any = None,
                transformer_options: Options = {}, **kwargs: Any) -> Tensor:  # noqa: B006  # fmt: skip
        tokens, back = _patches(x)
        x, c, context = self.x_embedder(tokens), self.t_embedder(timesteps), self.context_embedder(context)
        for i in range(len(self.joint_blocks)):
            context, x = self.joint_blocks[i](context, x, c=c, use_checkpoint=False)
            _add(control, "output", i, x)
        return back(self.final_layer(x, c))


MODELS: dict[str, type[nn.Module]] = {
    "Flux": Flux,
    "Qwen-Image": QwenImageTransformer2DModel,
    "Wan": WanModel,
    "HunyuanVideo": HunyuanVideo,
    "SD3": OpenAISignatureMMDITWrapper,
}


def build(kind: str = "Flux") -> ModelPatcher:
    """A tiny model with random weights, behind a patcher."""
    torch.manual_seed(0)
    return ModelPatcher(BaseModel(MODELS[kind]()).eval())


def latent_shape(kind: str, size: int = 8) -> tuple[int, ...]:
    """Of a latent with two samples: pictures, or for the video models two frames."""
    return (2, CHANNELS, 2, size, size) if kind in ("Wan", "HunyuanVideo") else (2, CHANNELS, size, size)


class DiffusersFlux(Model):
    """A FluxTransformer2DModel of diffusers, for trained weights. The last token of a context is the pooled one."""

    def __init__(self, transformer: nn.Module, image_ids: Tensor) -> None:
        super().__init__()
        self.transformer, self.image_ids = transformer, image_ids

    def _forward(self, x: Tensor, timestep: Tensor, context: Tensor, control: Any, options: Options) -> Tensor:
        output: Tensor = self.transformer(
            hidden_states=x, timestep=timestep, pooled_projections=context[:, -1], img_ids=self.image_ids,
            encoder_hidden_states=context[:, :-1], txt_ids=x.new_zeros(context.shape[1] - 1, 3), return_dict=False,
        )[0]  # fmt: skip
        return output
