"""What the page of ``tap ui`` shows, as HTML: the table, earlier runs, maps of what each token took."""

from __future__ import annotations

import base64
import math
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

SCALE = (
    (40.0, "hard to tell apart"),
    (30.0, "fine detail differs"),
    (20.0, "you can see differences"),
    (-math.inf, "another picture"),
)
"""From how many dB on a PSNR means what."""


def meaning(psnr_db: float) -> str:
    """A PSNR in decibels, and in words."""
    if psnr_db == math.inf:
        return "<strong>equal</strong>, to the last pixel"
    words = next(words for least, words in SCALE if psnr_db >= least)
    return f"<strong>{psnr_db:.1f} dB</strong>, {words}"


GUIDE = (
    "<p class='guide'>A full step runs the whole model. A predicted step skips most of it.</p>"
    "<p class='guide'>PSNR says how close the accelerated result is to the one with every step full. 40 dB is a typical"
    " difference of 1 % of the brightness range, 30 dB of 3 %, 20 dB of 10 %. Above 40 dB you would hardly see it."
    " From 30 to 40 fine detail differs. Below 20 it is another picture.</p>"
)


def table(account: Report, plain_seconds: float, seconds: float, psnr_db: float, caption: str) -> str:
    """Both runs side by side, as HTML."""
    faster, fewer = plain_seconds / seconds, account.evaluations_speedup
    noise = "<small>More than the steps saved: the machine was busy.</small>" if faster > fewer else ""
    rows = [
        ("Time", f"{plain_seconds:.2f} s", f"{seconds:.2f} s, <strong>{faster:.2f}× faster</strong>{noise}"),
        ("Full steps", str(account.steps), f"{account.full_steps}, {fewer:.2f}× fewer"),
        ("Predicted steps", "0", str(account.predicted_steps)),
        ("Time of a full step", "", f"{account.full_step_ms:.1f} ms"),
        ("Time of a predicted step", "", f"{account.predicted_step_ms:.1f} ms"),
        ("Memory of the cache", "", f"{account.cache_bytes / 1e6:.2f} MB"),
        *((f"Run in full after all: {escape(reason)}", "", f"{count} calls")
          for reason, count in account.fallbacks.items()),
    ]  # fmt: skip
    body = "".join(f'<tr><th scope="row">{name}</th><td>{a}</td><td>{b}</td></tr>' for name, a, b in rows)
    quality = f'<tr><th scope="row">PSNR</th><td colspan="2">{meaning(psnr_db)}</td></tr>'
    return (
        f"<table><caption>{escape(caption)}</caption><thead><tr><th></th><th>Every step full</th><th>Accelerated</th>"
        f"</tr></thead><tbody>{quality}{body}</tbody></table>{GUIDE}"
    )


def history(runs: Sequence[tuple[str, str, str, Image.Image]], shown: int | None) -> str:
    """The runs of a session as buttons, the newest first, as HTML.

    Args:
        runs: title, settings, results and a small picture of each, the oldest first.
        shown: place of the one that is shown now.
    """
    if not runs:
        return "<p>None yet.</p>"
    items = (
        f"<li><button type='button' data-run='{i}' aria-current='{str(i == shown).lower()}'>"
        f"<img src='{_uri(picture)}' alt=''><span><strong>{escape(title)}</strong><small>{escape(settings)}</small>"
        f"</span><span>{escape(results)}</span></button></li>"
        for i, (title, settings, results, picture) in reversed(list(enumerate(runs)))
    )
    return f"<p>Click one to bring it back.</p><ol>{''.join(items)}</ol>"


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
            f"<span {hidden}><strong>Step {choice.step + 1} of {steps}.</strong> Tokens took {shares}. Loss:"
            f" median {10 ** float(loss.median()):.1e}, largest {10 ** float(loss.max()):.1e}.</span>"
        )
    members = sorted({member._replace(horizon=0.0) for choice in chosen for member in choice.candidates})
    legend = "".join(
        f"<li><i style='background:{_css(colour(member))}'></i>{name_of(member)}</li>" for member in members
    )
    ramp = ", ".join(_css(tuple(value)) for value in _heat(np.linspace(0, 1, 9)))
    panels = (
        ("picture", "Accelerated picture", f'<img src="{_uri(picture)}" alt="accelerated picture">'),
        ("taken", "Forecast taken", f"{''.join(frames['taken'])}<ul>{legend}</ul>"),
        ("loss", "Its loss", f"{''.join(frames['loss'])}<div class='scale'>{10**low:.0e}"
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
