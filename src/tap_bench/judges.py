"""Judges that need no reference picture: does it show what was asked for?

    python -m tap_bench.judges fashion --data /usr/share/datasets/fashion-mnist
    python -m tap_bench.judges sprites --data FOLDER
    python -m tap_bench.judges scenes --data FOLDER
    python -m tap_bench.judges emoji --data FOLDER

Each writes its weights beside the models' (``bench/weights``), small enough to be shipped. ``emoji`` needs no training:
it keeps the training pictures' latents, coarsely, and asks which of them is nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from tap_bench import WEIGHTS, fashion, scenes, sprites
from tap_diffusion.demo import data
from tap_diffusion.demo.train import device, encode
from tap_diffusion_demo import EMOJI

FEATURES = 32  # few enough that 64 samples say something of their covariance
SUBJECTS = (sprites.SPRITES, sprites.MOTIONS, sprites.GROUNDS)

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Data = Annotated[Path, typer.Option("--data", help="Folder of the training pictures.")]
Steps = Annotated[int, typer.Option(min=1)]


def _convolution(kind: Any, inputs: int, outputs: int, stride: Any = 2) -> nn.Module:
    norm = nn.BatchNorm3d if kind is nn.Conv3d else nn.BatchNorm2d
    return nn.Sequential(kind(inputs, outputs, 3, stride, 1, bias=False), norm(outputs), nn.GELU())


class GarmentClassifier(nn.Module):
    """Grey pictures (B, 1, 32, 32) in [0, 1] to features (B, 32); ``head`` makes logits of the ten kinds of them."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 128)
        layers = [_convolution(nn.Conv2d, a, b) for a, b in pairwise(widths)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, FEATURES), nn.GELU())
        self.head = nn.Linear(FEATURES, len(fashion.LABELS))

    def forward(self, pictures: Tensor) -> Tensor:
        """Features."""
        features: Tensor = self.body(pictures)
        return features


class VideoClassifier(nn.Module):
    """Videos (B, F, 3, 32, 32) in [0, 1] to logits of the sprite, its motion and the ground."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(nn.Conv3d, 3, 24, (1, 2, 2)),
            _convolution(nn.Conv3d, 24, 48, (1, 2, 2)),
            _convolution(nn.Conv3d, 48, 96, (2, 2, 2)),
            nn.AdaptiveAvgPool3d((4, 2, 2)),
            nn.Flatten(),
        )
        self.heads = nn.ModuleList(nn.Linear(96 * 16, len(names)) for names in SUBJECTS)

    def forward(self, videos: Tensor) -> list[Tensor]:
        """Three tensors of logits."""
        features = self.body(videos.transpose(1, 2))
        return [head(features) for head in self.heads]


class SceneClassifier(nn.Module):
    """Pictures (B, 3, 128, 128) in [0, 1] to logits of each kind of object, (B, 40), and of the place, (B, 19)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 160)
        self.body = nn.Sequential(*(_convolution(nn.Conv2d, a, b) for a, b in pairwise(widths)))
        self.kinds = nn.Conv2d(widths[-1], len(scenes.OBJECTS), 1)
        self.place = nn.Linear(4 * widths[-1], len(scenes.PLACES))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Two tensors of logits. An object may be anywhere, so its logit is the highest of all places."""
        features = self.body(pictures)
        return [self.kinds(features).amax((2, 3)), self.place(F.adaptive_avg_pool2d(features, 2).flatten(1))]


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """‖μ - μ'‖² + tr(Σ + Σ' - 2 (ΣΣ')^½), float64 (Heusel et al., arXiv 1706.08500, eq. 6).

    ΣΣ' is similar to a positive semi-definite matrix, so the trace of its root is the sum of its eigenvalues' roots.
    """
    roots = torch.linalg.eigvals((covariance @ other_covariance).double()).real.clamp_min(0).sqrt().sum()
    traces = covariance.double().trace() + other_covariance.double().trace()
    return float((mean - other_mean).double().square().sum() + traces - 2 * roots)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    return features.mean(0), features.T.cov()


@cache
def _load(name: str, build: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A judge's network, and what else its file holds."""
    tensors = load_file(WEIGHTS / f"{name}-judge.safetensors")
    more = {key: tensors.pop(key) for key in list(tensors) if key.startswith("real_")}
    judge = build()
    judge.load_state_dict(tensors)
    return judge.eval().requires_grad_(False), more


@torch.no_grad()
def kind_of_garment(pictures: Tensor, labels: Sequence[int]) -> dict[str, list[float]]:
    """Whether the classifier sees the kind that was asked for: 1 or 0 for each picture (B, 1, 32, 32) in [0, 1]."""
    judge: Any = _load("fashion", GarmentClassifier)[0]
    seen = judge.head(judge(pictures)).argmax(1)
    return {"classifier_accuracy": (seen == torch.tensor(labels)).float().tolist()}


@torch.no_grad()
def distance_of_garments(pictures: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Fréchet distance to the real test pictures in the classifier's features; of few samples it is biased upward."""
    judge, real = _load("fashion", GarmentClassifier)
    return {
        "frechet_distance": frechet_distance(*_moments(judge(pictures)), real["real_mean"], real["real_covariance"])
    }


@torch.no_grad()
def caption_of_sprite(videos: Tensor, captions: Sequence[str]) -> dict[str, list[float]]:
    """Share of sprite, motion and ground that the classifier sees as the caption says, for each video."""
    judge = _load("sprites", VideoClassifier)[0]
    asked = torch.tensor([sprites.meaning(caption) for caption in captions])
    seen = torch.stack([logits.argmax(1) for logits in judge(videos)], dim=1)
    return {"caption_accuracy": (seen == asked).float().mean(1).tolist()}


@torch.no_grad()
def caption_of_scene(pictures: Tensor, captions: Sequence[str]) -> dict[str, list[float]]:
    """Share of what a caption names, kinds of objects and the place if any, that the classifier sees in its picture.

    It may name as many kinds as the caption does, those that it is surest of.
    """
    kinds, places = _load("scenes", SceneClassifier)[0](pictures)
    shares = []
    for caption, logits, place in zip(captions, kinds, places.argmax(1).tolist(), strict=True):
        asked, told = scenes.meaning(caption)
        right = [kind in asked for kind in logits.topk(len(asked)).indices.tolist()]
        if told:
            right.append(told in (scenes.PLACES[place], scenes.ground_of(scenes.PLACES[place])))
        shares.append(sum(right) / len(right))
    return {"caption_accuracy": shares}


@torch.no_grad()
def caption_of_emoji(pictures: Tensor, captions: Sequence[str]) -> dict[str, list[float]]:
    """Whether the training picture with the nearest latents bears the caption: 1 or 0 for each picture in [0, 1]."""
    kept = load_file(WEIGHTS / "emoji-judge.safetensors")
    names = sorted(set(data.captions().values()))
    nearest = torch.cdist(_coarse((255 * pictures).round()), kept["latents"].float()).argmin(1)
    seen = kept["captions"][nearest].tolist()
    hits = [float(names[i] == caption) for i, caption in zip(seen, captions, strict=True)]
    return {"caption_retrieval": hits}


def _coarse(pictures: Tensor) -> Tensor:
    """Latents of uint8 pictures (B, 3, 64, 64), averaged over 2×2: (B, 512)."""
    return F.avg_pool2d(encode(_autoencoder(), pictures), 2).flatten(1)


@cache
def _autoencoder() -> Any:
    return AutoencoderKL.from_pretrained(EMOJI, subfolder="vae", dtype=torch.float32)


# ----------------------------------------------------------------------------------------------------- their training


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Of classes, or, where targets are as many as logits, of each for itself, added up."""
    if targets.ndim == logits.ndim:
        return F.binary_cross_entropy_with_logits(logits, targets) * logits.shape[1]
    return F.cross_entropy(logits, targets)


def _fit(judge: nn.Module, batch: Callable[[], tuple[Tensor, list[Tensor]]], logits: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    progress = tqdm(range(steps))
    for _ in progress:
        x, targets = batch()
        loss = torch.stack([_loss(*pair) for pair in zip(logits(x), targets, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    judge.eval().requires_grad_(False)


def _save(name: str, tensors: dict[str, Tensor]) -> None:
    WEIGHTS.mkdir(exist_ok=True)
    file = WEIGHTS / f"{name}-judge.safetensors"
    save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, file)
    typer.echo(f"{file}: {file.stat().st_size / 1e6:.2f} MB")


@app.command("fashion")
def train_fashion(folder: Data, steps: Steps = 2500) -> None:
    """Train the classifier of garments, and keep mean and covariance of its features on the real test pictures."""
    torch.manual_seed(0)
    pictures, labels = fashion.load(folder, "train")
    judge = GarmentClassifier().to(device())

    def batch() -> tuple[Tensor, list[Tensor]]:
        rows = torch.randint(len(pictures), (128,))
        x = pictures[rows].float() / 255
        shift = torch.randint(-2, 3, (2,)).tolist()
        x = torch.where(torch.rand(128, 1, 1, 1) < 0.5, x.flip(3), x).roll(shift, (2, 3))
        return x.to(device()), [labels[rows].to(device())]

    _fit(judge, batch, lambda x: [judge.head(judge(x))], steps)
    pictures, labels = fashion.load(folder, "t10k")
    features = torch.cat([judge(part.float().to(device()) / 255) for part in pictures.split(500)]).cpu()
    accuracy = (judge.cpu().head(features).argmax(1) == labels).float().mean()
    typer.echo(f"accuracy on the real test pictures: {accuracy:.1%}")
    mean, covariance = _moments(features)
    _save("fashion", judge.state_dict() | {"real_mean": mean, "real_covariance": covariance})


@app.command("sprites")
def train_sprites(folder: Data, steps: Steps = 1500) -> None:
    """Train the classifier of videos on freshly rendered ones."""
    torch.manual_seed(0)
    pictures = sprites.load(folder)
    captions = sprites.captions("train") + sprites.captions("test")
    judge = VideoClassifier().to(device())

    def batch() -> tuple[Tensor, list[Tensor]]:
        chosen = [captions[i] for i in torch.randint(len(captions), (64,)).tolist()]
        videos = torch.stack([sprites.render(caption, pictures) for caption in chosen]).transpose(1, 2)
        noisy = (videos + 0.2 * torch.rand(64, 1, 1, 1, 1) * torch.randn(videos.shape)) / 2 + 0.5
        targets = torch.tensor([sprites.meaning(caption) for caption in chosen]).to(device())
        return noisy.to(device()), list(targets.unbind(1))

    _fit(judge, batch, judge, steps)
    x, targets = batch()
    right = [(seen.argmax(1) == asked).float().mean() for seen, asked in zip(judge(x), targets, strict=True)]
    typer.echo("accuracy on other videos, of sprite, motion, ground: " + ", ".join(f"{share:.1%}" for share in right))
    _save("sprites", judge.state_dict())


@app.command("scenes")
def train_scenes(folder: Data, steps: Steps = 2000) -> None:
    """Train the classifier of scenes on freshly rendered ones."""
    torch.manual_seed(0)
    cutouts = scenes.load(folder)
    judge = SceneClassifier().to(device())

    def batch() -> tuple[Tensor, list[Tensor]]:
        shown = [scenes.scene() for _ in range(48)]
        pictures = scenes.pictures(cutouts, scenes.SIZE // scenes.TOKEN, shown).float() / 255
        noisy = pictures + 0.1 * torch.rand(len(shown), 1, 1, 1) * torch.randn(pictures.shape)
        kinds = torch.zeros(len(shown), len(scenes.OBJECTS))
        for row, one in zip(kinds, shown, strict=True):
            row[[kind for kind, *_ in one.objects]] = 1
        places = torch.tensor([scenes.PLACES.index(one.place) for one in shown])
        return noisy.to(device()), [kinds.to(device()), places.to(device())]

    _fit(judge, batch, judge, steps)
    held = [scenes.scene(split="test") for _ in range(256)]
    pictures = scenes.pictures(cutouts, scenes.SIZE // scenes.TOKEN, held).float() / 255
    _save("scenes", judge.cpu().state_dict())
    shares = caption_of_scene(pictures, [one.caption for one in held])["caption_accuracy"]
    typer.echo(f"share of held-out captions that it sees: {sum(shares) / len(shares):.1%}")


@app.command("emoji")
def keep_emoji(folder: Data) -> None:
    """Keep the coarse latents of the training pictures and the numbers of their captions."""
    pictures, captions, _ = data.load(folder)
    names = sorted(set(data.captions().values()))
    numbers = torch.tensor([names.index(caption) for caption in captions])
    _save("emoji", {"latents": _coarse(pictures).to(torch.bfloat16), "captions": numbers})


if __name__ == "__main__":
    app()
