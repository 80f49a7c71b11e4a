"""The folder that ``tap generate`` fills: pictures as they are done, and ``report.json``, by which a run goes on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tap_diffusion.apps import media
from tap_diffusion.apps.files import FPS, difference, write_json, write_whole
from tap_diffusion.apps.sheets import sheet, stack
from tap_diffusion.core.errors import UsageError

COLUMNS = 8  # of compare.png
SHEET = 64  # pictures or videos on it, at most
SIZE = 160  # pixels there of a picture's side, at least
SHEETS = ("compare.png", "compare.gif", "choices.png")


class Results:
    """Pictures or videos of one run, and ``report.json``, which is written anew after each batch.

    Args:
        out: the folder.
        settings: everything that results depend on, as JSON takes it, the ``prompts`` among it.
        overwrite: delete what an earlier run left there, instead of going on with it.

    Attributes:
        report: what ``report.json`` holds.

    Raises:
        UsageError: the folder holds results of other settings.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.out = out
        self._file = out / "report.json"
        self.report: dict[str, Any] = {**settings, "files": [], "seconds": {}, "psnr_db_each": []}
        before = self._before()
        if before is None:
            return
        if overwrite:
            self._delete(before)
            return
        same = {name: before.get(name) for name in settings}
        if same != (wanted := json.loads(json.dumps(settings))):
            name, old, new = difference(same, wanted)
            raise UsageError(
                f"{out} holds results with {name} {_short(old)}, not {_short(new)}; choose another --out, or give"
                " --overwrite to delete them"
            )
        missing = [name for names in before["files"] for name in names if not (out / name).exists()]
        if missing:
            raise UsageError(f"{missing[0]} is missing from {out}; give --overwrite to begin again")
        self.report = before

    def _before(self) -> dict[str, Any] | None:
        if not self._file.exists():
            return None
        try:
            before = json.loads(self._file.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if not isinstance(before, dict) or "files" not in before:
            raise UsageError(f"{self._file} is not of this command; choose another --out")
        return before

    def _delete(self, before: dict[str, Any]) -> None:
        for name in [name for names in before["files"] for name in names]:
            (self.out / name).unlink(missing_ok=True)
        for name in (*SHEETS, "report.json"):
            (self.out / name).unlink(missing_ok=True)

    @property
    def done(self) -> int:
        """How many prompts, the first of them, are done."""
        return len(self.report["files"])

    def add(
        self, samples: Mapping[str, Tensor], seconds: Mapping[str, Sequence[float]], account: Mapping[str, Any],
        psnr: Sequence[float] = (), fps: int = FPS,
    ) -> None:  # fmt: skip
        """Write a batch.

        Args:
            samples: ``full`` where it was drawn, and ``tap``: (B, 3, H, W), or videos (B, F, 3, H, W), in [-1, 1].
            seconds: of each, one for each repetition.
            account: of the last trajectory; replaces that of the batch before.
            psnr: of each sample, dB.
            fps: frames a second of videos.
        """
        report, prompts = self.report, self.report["prompts"]
        files = []
        for i in range(len(samples["tap"])):
            number = self.done + i
            names = []
            for kind, batch in samples.items():
                suffix, content = media.encoded(batch[i], fps)
                names.append(f"{number:03d}-{_slug(prompts[number])}-{kind}{suffix}")
                write_whole(self.out / names[-1], methodcaller("write_bytes", content))
            files.append(names)
        for kind, times in seconds.items():
            before = report["seconds"].get(kind) or [0.0] * len(times)
            report["seconds"][kind] = [total + time for total, time in zip(before, times, strict=True)]
        report.update(account)
        report["files"] += files
        report["psnr_db_each"] += psnr
        if report["psnr_db_each"]:
            values = [math.inf if value is None else value for value in report["psnr_db_each"]]
            times = report["seconds"]
            report["time_speedup"] = median(times["full"]) / median(times["tap"])
            report["psnr_db"], report["psnr_db_worst"] = sum(values) / len(values), min(values)
        self.report = _without_nan(report)
        write_json(self._file, self.report)

    def compare(self) -> None:
        """Write ``compare.png``: full results over TAP's, and their seconds. Each picture has a column; of videos some
        frames are shown, and ``compare.gif`` plays the first few."""
        prompts, shown = self.report["prompts"], range(min(self.done, SHEET))
        samples = [[media.decoded(self.out / name) for name in self.report["files"][i]] for i in shown]
        scale = max(1, SIZE // samples[0][0].shape[-1])
        seconds = self.report["seconds"]
        labels = [f"{title}\n{median(seconds[kind]):.3g} s" for kind, title in (("full", "full"), ("tap", "TAP"))]
        batches = [shown[i : i + COLUMNS] for i in range(0, len(shown), COLUMNS)]

        def side_by_side(batch: range, frame: Any = ...) -> Image.Image:
            rows = [
                torch.stack([sample[frame] for sample in row])
                for row in zip(*samples[batch.start : batch.stop], strict=True)
            ]
            return sheet(rows, labels, [prompts[i] for i in batch], scale)

        if samples[0][0].ndim == 4:
            rows = [[video[_evenly(len(video))] for video in samples[i]] for i in shown]
            parts = [sheet(rows[i], labels, [prompts[i]], scale) for i in shown]
            frames = [side_by_side(shown[: COLUMNS // 2], frame) for frame in range(len(samples[0][0]))]
            frames[0].save(
                self.out / "compare.gif", save_all=True, append_images=frames[1:], loop=0,
                duration=1000 // self.report.get("fps", FPS),
            )  # fmt: skip
        else:
            parts = [side_by_side(batch) for batch in batches]
        stack(parts).save(self.out / "compare.png")


def _evenly(frames: int) -> Tensor:
    """Which of a video's frames are shown."""
    return torch.linspace(0, frames - 1, min(COLUMNS, frames)).round().long()


def _slug(prompt: str) -> str:
    """A prompt as a part of a file's name: its letters and digits, of any script."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60] or "picture"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _without_nan(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
