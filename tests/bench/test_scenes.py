"""The scenes, the training script and the weights of the model ``scenes``, and the search for full steps on it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from tap_bench import scenes, search
from tap_bench.calibration import Calibration
from tap_bench.models import MODELS
from tap_diffusion.apps.generate import load_pipeline
from tap_diffusion.demo import data

COUNT = len(scenes.OBJECTS)
MIDDLES = (torch.arange(96) + 0.5) / 48 - 1
DISC = (MIDDLES[:, None] ** 2 + MIDDLES**2 < 1).float()
DISCS = torch.cat([torch.ones(3, 96, 96) * DISC, DISC[None]]).expand(COUNT, -1, -1, -1)  # white
NOTHING = torch.zeros(COUNT, 4, 96, 96)


def some(count: int, split: Any = "train") -> list[scenes.Scene]:
    generator = torch.Generator().manual_seed(3)
    return [scenes.scene(generator, split) for _ in range(count)]


def test_scenes_are_deterministic_and_differ() -> None:
    assert some(20) == some(20)
    assert len({shown.caption for shown in some(20)}) > 15
    shown = some(1)[0]
    assert torch.equal(scenes.render(shown, DISCS), scenes.render(shown, DISCS))


def test_captions_say_what_there_is() -> None:
    for shown in some(200):
        kinds = [kind for kind, *_ in shown.objects]
        assert 2 <= len(kinds) <= 5
        assert len(set(kinds)) <= 3
        objects, on, place = shown.caption.partition(" on ")
        if shown.told == "nothing":
            assert not on
        elif shown.told == "place" or "wall" not in shown.place:
            assert shown.place.startswith(f"on {place}")
        else:
            assert place == "a wall"
        named = objects.split(" and ")
        assert len(named) == len(set(kinds))
        counted = {}
        for phrase in named:
            number, name = phrase.split(" ", 1)
            counted[name] = {"a": 1, "an": 1, "two": 2, "three": 3}[number]
        for kind in set(kinds):
            count = kinds.count(kind)
            name = scenes.OBJECTS[kind]
            assert counted[name if count == 1 else scenes._plural(name)] == count


@pytest.mark.parametrize(
    ("place", "told", "objects", "caption"),
    [
        ("on grass at night", "place", (10, 0, 10), "a red apple and two frog faces on grass at night"),
        ("on a black wall", "ground", (39, 20, 20, 20), "three butterflies and an alien on a wall"),
        ("on water by day", "ground", (0,), "a red apple on water"),
        ("on a blue wall", "nothing", (13, 13, 34), "two fox faces and a blue heart"),
    ],
)
def test_captions_are_english(place: str, told: str, objects: tuple[int, ...], caption: str) -> None:
    free = (0.5,) * 32
    assert scenes.Scene(place, told, tuple((kind, 0.5, 0.5, 0.3) for kind in objects), free).caption == caption


def test_captions_are_understood() -> None:
    for shown in some(200):
        kinds, told = scenes.meaning(shown.caption)
        assert kinds == sorted({kind for kind, *_ in shown.objects})
        assert told == {"place": shown.place, "ground": scenes.ground_of(shown.place), "nothing": ""}[shown.told]


def test_training_leaves_captions_out() -> None:
    train, test = scenes.captions(300, "train"), scenes.captions(300, "test")
    assert not any(map(scenes.held_out, train))
    assert all(map(scenes.held_out, test))
    assert test == scenes.captions(300, "test")
    assert set(scenes.OBJECTS) <= set(data.captions().values())


def covered(shown: scenes.Scene, size: int) -> Tensor:
    """Where white discs cover a dark ground, (size, size)."""
    return (scenes.render(shown, DISCS, size) > 150).all(0)


@pytest.mark.parametrize("size", [64, 128, 192])
def test_objects_are_where_the_scene_has_them_at_any_size(size: int) -> None:
    shown = scenes.Scene("on a black wall", "place", ((0, 0.3, 0.25, 0.3), (5, 0.7, 0.6, 0.4)), (0.5,) * 32)
    at = (torch.arange(size) + 0.5) / size
    left = covered(shown, size) & (at < 0.475)
    for seen, x, y, side in ((left, 0.3, 0.25, 0.3), (covered(shown, size) & (at > 0.475), 0.7, 0.6, 0.4)):
        mass = seen.sum()
        assert float((seen.sum(0) * at).sum() / mass) == pytest.approx(x, abs=1 / size)
        assert float((seen.sum(1) * at).sum() / mass) == pytest.approx(y, abs=1 / size)
        assert float(mass) / size**2 == pytest.approx(math.pi / 4 * side**2, rel=0.15)


def test_places_look_different_and_grounds_are_free() -> None:
    means = []
    for place in scenes.PLACES:
        shown = [scenes.Scene(place, "place", (), tuple(torch.rand(32).tolist())) for _ in range(2)]
        pictures = [scenes.render(each, NOTHING).float() / 255 for each in shown]
        assert (pictures[0] - pictures[1]).abs().mean() > 0.005
        middle = scenes.render(scenes.Scene(place, "place", (), (0.5,) * 32), NOTHING).float() / 255
        means.append(torch.cat([middle[:, :64].mean((1, 2)), middle[:, 64:].mean((1, 2))]))
    assert torch.pdist(torch.stack(means)).min() > 0.05


def test_words_are_single_tokens() -> None:
    pipe: Any = load_pipeline("scenes", torch.float32, "cpu")
    for caption in scenes.captions(100, "train") + scenes.captions(100, "test"):
        assert len(pipe.tokenizer(caption).input_ids) == len(caption.split()) + 2 <= scenes.MAX_TOKENS
        assert pipe.tokenizer_2.tokenize(caption) == [f"▁{word}" for word in caption.split()]


def test_the_model_draws_at_several_sizes() -> None:
    model = MODELS["scenes"]()
    assert len(model.measured) == 256
    assert all(map(scenes.held_out, model.measured))
    assert not any(map(scenes.held_out, model.calibration))
    pipe = model.load()
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.use_dynamic_shifting
    assert sum(weight.numel() for weight in pipe.transformer.parameters()) < 5e6
    # A quarter of FLUX's shift for 16 times as many tokens: exp(0.5) at 256 tokens, exp(1.15) at 4096.
    shifts = [4 * math.exp(scenes.shift(pipe, tokens)) for tokens in (16, 256)]
    assert shifts == pytest.approx([math.exp(0.5), math.exp(1.15)])
    for size in (64, 128):
        arguments = scenes.arguments(["a star on snow by day", "a star on a black wall"], size)
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        bright, dark = pipe(**arguments, num_inference_steps=8, generator=generators, output_type="pt").images
        assert bright.shape == dark.shape == (3, size, size)
        assert bright.mean() > dark.mean() + 0.15


def call(app: Any, *arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_training_stops_resumes_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "load", lambda folder: DISCS)
    for steps in (1, 2):
        for stage, name in (("autoencoder", "autoencoder"), ("train", "scenes")):
            call(scenes.app, stage, "--work", tmp_path, "--steps", steps, "--batch", 1)
            assert torch.load(tmp_path / f"{name}.pt", weights_only=True)["step"] == steps
            assert (tmp_path / f"{name}-{steps:06d}.png").exists()
    call(scenes.app, "export", "--work", tmp_path, "--to", tmp_path / "model")
    clip = load_file(tmp_path / "model" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in clip)  # else transformers 5.0 would draw weights of its own
    pipe: Any = load_pipeline(str(tmp_path / "model"), torch.bfloat16, "cpu")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(**scenes.arguments(["a star on a blue wall"]), num_inference_steps=2).images[0].size == (128, 128)


def test_search_goes_on_and_says_what_it_found(tmp_path: Path) -> None:
    small = ["--model", "scenes", "--steps", 5, "--call", json.dumps({"height": 32, "width": 32})]
    out = tmp_path / "climb.json"
    climb = ["climb", *small, "--full-steps", 3, "--samples", 1, "--confirm", 1, "--out", out]
    said = call(search.app, *climb)
    kept = json.loads(out.read_text())
    assert {row["title"].split(" ")[0] for row in kept["rows"]} == {"start:", "found"}
    for row in kept["rows"]:
        assert row["full_steps"][0] == 0
        assert len(row["full_steps"]) == 3
        assert row["early"] == 3
    by_title = {row["title"]: row["climbed_db"] for row in kept["rows"]}
    for start in ("even", "growing"):
        assert by_title[f"found from {start}"] >= by_title[f"start: {start}"]
    # All schedules: 4 over 2. What has been asked is not asked again.
    assert len(kept["climbed_on"]) <= 6
    kept["climbed_on"] = {full: [7.0] for full in kept["climbed_on"]}
    out.write_text(json.dumps(kept))
    assert " 7.00 climbed" in call(search.app, *climb) != said
    assert "other settings" in str(CliRunner().invoke(search.app, [*map(str, climb), "--fast"]).output)

    said = call(search.app, "score", *small, "--samples", 1, "--schedule", "0 1 2 3", "--out", tmp_path / "score.json")
    assert "dB  4 of the first 8  [0, 1, 2, 3]" in said

    out = tmp_path / "sensitivity.json"
    call(search.app, "sensitivity", *small, "--samples", 1, "--out", out)
    assert set(json.loads(out.read_text())["psnr_db"]) == {"1", "2", "3", "4"}
    assert out.with_suffix(".png").exists()
    call(search.app, "curves", out, out, "--to", tmp_path / "both.svg")
    assert "<svg" in (tmp_path / "both.svg").read_text()

    # Of steps that cost the less the later they are, by the textbook's formula of the changes of each branch's probe.
    kept = json.loads(out.read_text())
    kept["psnr_db"] = {step: [10.0 * int(step)] for step in kept["psnr_db"]}
    out.write_text(json.dumps(kept))
    model = MODELS["scenes"]()
    size = {"height": 32, "width": 32}
    arguments = model.arguments
    model = replace(
        model, calibration=model.measured[:1], batch=1, arguments=lambda conditions: arguments(conditions) | size
    )
    pipe = model.load()
    pipe.set_progress_bar_config(disable=True)
    probes = Calibration(pipe, model, 5, seed=0).trajectories().probe
    changes = [sum(float((h[t] - h[t - 1]).abs().sum() / h[t - 1].abs().sum()) for h in probes) for t in (1, 2, 3, 4)]
    apart = sum(
        (sorted(changes).index(change) - place) ** 2 for change, place in zip(changes, (3, 2, 1, 0), strict=True)
    )
    said = call(search.app, "rank", out)
    assert f"all (4 steps): as it is {1 - apart / 10:+.2f}, filtered " in said
    assert "steps from the end +1.00\nsecond half (3 steps): as it is " in said
    assert "first half" not in said
