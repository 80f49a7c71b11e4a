"""What the page of ``tap ui`` shows, as HTML: the table, maps of what each token took, a bench run's frontier."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tap_diffusion.apps import pipelines
from tap_diffusion.apps.sheets import colour, png
from tap_diffusion.core.predictors import Candidate
from tap_diffusion.core.report import Choice, Report


def table(account: Report, plain_seconds: float, seconds: float, psnr_db: float) -> str:
    """Both runs side by side, as HTML."""
    rows = [
        ("Time", f"{plain_seconds:.2f} s",
         f"{seconds:.2f} s, <strong>{plain_seconds / seconds:.2f}× faster</strong>"),
        ("PSNR", "", f"<strong>{psnr_db:.1f} dB</strong>"),
        ("Full steps", str(account.steps), f"{account.full_steps}, {account.evaluations_speedup:.2f}× fewer"),
        ("Predicted steps", "0", str(account.predicted_steps)),
        ("Per full step", "", f"{account.full_step_ms:.1f} ms"),
        ("Per predicted step", "", f"{account.predicted_step_ms:.1f} ms"),
        ("Cache", "", f"{account.cache_bytes / 1e6:.2f} MB"),
        *((f"Full again: {escape(reason)}", "", f"{count} calls") for reason, count in account.fallbacks.items()),
    ]  # fmt: skip
    body = "".join(f'<tr><th scope="row">{name}</th><td>{a}</td><td>{b}</td></tr>' for name, a, b in rows)
    return f"<table><thead><tr><th></th><th>every step full</th><th>accelerated</th></tr></thead><tbody>{body}</table>"


def maps(account: Report, steps: int, picture: Image.Image) -> tuple[int, str]:
    """What each token took and its proxy loss, one frame for each predicted step of the first branch.

    Of several branches in one batch it is that of the last, which has the prompt.

    Args:
        account: of a run of one sample by :class:`RecordingEngine`.
        steps: of the trajectory.
        picture: to show beside the maps.

    Returns:
        Number of frames, and HTML, in which all but the first are hidden.
    """
    chosen = [choice for choice in account.choices if choice.branch == account.choices[0].branch]
    if not chosen:
        return 0, "<p>All took the same: there was one predictor, and so nothing to choose.</p>"
    grid = pipelines.grid(chosen[0].index.shape[1], picture.height, picture.width)
    if grid is None:
        return 0, "<p>This model has other tokens among those of the picture, which can't be drawn on it.</p>"
    lags = any(candidate.lag for choice in chosen for candidate in choice.candidates)

    def name_of(candidate: Candidate) -> str:
        return str(candidate) if lags else f"order {candidate.order}"

    losses = torch.stack([_loss(choice) for choice in chosen]).log10()
    low, high = (float(losses.quantile(q)) for q in (0.01, 0.99))
    frames: dict[str, list[str]] = {"taken": [], "loss": [], "words": []}
    for i, (choice, loss) in enumerate(zip(chosen, losses, strict=True)):
        palette = np.array([colour(candidate) for candidate in choice.candidates])
        taken = choice.index[-1].cpu().long()
        share = (loss - low) / max(high - low, 1e-9)
        hidden = f'data-frame="{i + 1}"' + (" hidden" if i else "")
        for name, colours in (("taken", palette[taken.numpy()]), ("loss", _heat(share.numpy()))):
            pixels = Image.fromarray((255 * colours.reshape(*grid, 3)).round().astype(np.uint8))
            frames[name].append(f'<img src="{_uri(pixels)}" alt="step {choice.step + 1}" {hidden}>')
        counts = taken.bincount(minlength=len(choice.candidates)) / len(taken)
        most = sorted(zip(counts.tolist(), map(name_of, choice.candidates), strict=True), reverse=True)[:3]
        shares = ", ".join(f"{name} {100 * share:.0f} %" for share, name in most if share)
        frames["words"].append(
            f"<span {hidden}><strong>Step {choice.step + 1} of {steps}.</strong> Tokens took {shares}. Proxy loss:"
            f" median {10 ** float(loss.median()):.1e}, largest {10 ** float(loss.max()):.1e}.</span>"
        )
    members = sorted({member._replace(horizon=0.0) for choice in chosen for member in choice.candidates})
    legend = "".join(
        f"<li><i style='background:{_css(colour(member))}'></i>{name_of(member)}</li>" for member in members
    )
    ramp = ", ".join(_css(tuple(value)) for value in _heat(np.linspace(0, 1, 9)))
    panels = (
        ("picture", "Accelerated picture", f'<img src="{_uri(picture)}" alt="accelerated picture">'),
        ("taken", "Predictor", f"{''.join(frames['taken'])}<ul>{legend}</ul>"),
        ("loss", "Its proxy loss", f"{''.join(frames['loss'])}<div class='scale'>{10**low:.0e}"
         f"<b style='background:linear-gradient(90deg, {ramp})'></b>{10**high:.0e}</div>"),
    )  # fmt: skip
    figures = (
        f"<figure class='{name}'><figcaption>{title}</figcaption>{body}</figure>" for name, title, body in panels
    )
    return len(chosen), f"<div class='panels'>{''.join(figures)}</div><p class='words'>{''.join(frames['words'])}</p>"


def _loss(choice: Choice) -> Tensor:
    assert choice.loss is not None
    # Of a token that is not finite, which a GPU tells of one step late, as large as it can get.
    return choice.loss[-1].float().cpu().nan_to_num(2.0, 2.0).clamp(1e-12, 2.0)


_HEAT = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]) / 255  # viridis


def _heat(share: Any) -> Any:
    """Colours (…, 3) of shares from 0 to 1."""
    at = np.clip(share, 0, 1) * (len(_HEAT) - 1)
    return np.stack([np.interp(at, range(len(_HEAT)), channel) for channel in _HEAT.T], axis=-1)


def _css(parts: Sequence[float]) -> str:
    return f"rgb({', '.join(str(round(255 * part)) for part in parts)})"


def _uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()
