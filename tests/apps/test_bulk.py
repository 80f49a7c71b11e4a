"""Many prompts: the manifest, going on after any kind of end, and pictures that depend on their row alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import tap_diffusion as tap
from tap_diffusion.apps import bulk
from tap_diffusion.apps.bulk import MANIFEST, Manifest, Settings, generate_many
from tap_diffusion.apps.cli import app
from tap_diffusion.apps.files import write_whole
from tap_diffusion.apps.generate import load_pipeline
from tap_diffusion.apps.prompts_file import Row, batches, read_rows
from tap_diffusion.core.errors import UsageError
from tiny import build_pipeline

STEPS = 8
CONFIG = tap.TAPConfig(full_steps=6)
ROWS = [
    Row("a", "red apple", 3),
    Row("b", "green frog face", 2**40, width=64, height=32),
    Row("c/é", "blue book", 5),
    Row("d", "", 6),
    Row("e", "red apple", 7),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    build_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(model: str) -> Settings:
    return Settings(model, "float32", STEPS, None, CONFIG)


here = partial(bulk.here, device="cpu")


def pixels(out: Path) -> dict[str, np.ndarray[Any, Any]]:
    entries = pq.read_table(out / "manifest.parquet").to_pylist()
    return {e["id"]: np.asarray(Image.open(out / e["file"])) for e in entries if e["file"] is not None}


def equal(one: dict[str, np.ndarray[Any, Any]], other: dict[str, np.ndarray[Any, Any]]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def write_jsonl(file: Path, rows: Sequence[Row]) -> Path:
    lines = [{k: v for k, v in vars(row).items() if v is not None} for row in rows]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


# --------------------------------------------------------------------------------------------------------- the manifest


def test_manifest_and_pictures(model: str, tmp_path: Path) -> None:
    prompts, out = write_jsonl(tmp_path / "prompts.jsonl", ROWS), tmp_path / "out"
    result = command("--prompts", prompts, "--model", model, "--steps", STEPS, "--full-steps", 6, "--out", out)
    assert result.exit_code == 0, result.output
    assert "steps: 30 full, 10 predicted" in result.output
    assert "5 pictures, 0 failed" in result.output
    assert sorted(file.name for file in out.iterdir()) == ["manifest.parquet", "pictures"]
    table = pq.read_table(out / "manifest.parquet")
    assert table.schema.equals(MANIFEST)
    entries = table.to_pylist()
    assert [Row(**{name: entry[name] for name in vars(ROWS[0])}) for entry in entries] == ROWS
    assert [entry["file"] for entry in entries][2] == "pictures/c%2F%C3%A9.png"
    assert [entry["batch"] for entry in entries] == [4, 1, 4, 4, 4]
    for entry in entries:
        assert entry["error"] is None
        assert entry["seconds"] > 0
        assert (entry["full_steps"], entry["predicted_steps"], entry["device"]) == (6, 2, "cpu")
        assert entry["worker"].endswith(f":{os.getpid()}")
        recorded = json.loads(entry["settings"])
        assert (recorded["model"], recorded["steps"], recorded["dtype"]) == (model, STEPS, "float32")
        assert tap.TAPConfig.from_dict(recorded["config"]) == CONFIG
        assert recorded["versions"]["torch"] == torch.__version__
        assert Image.open(out / entry["file"]).size == (entry["width"] or 32, entry["height"] or 32)


def test_pictures_are_those_of_the_pipeline_called_by_hand(settings: Settings, tmp_path: Path) -> None:
    generate_many(ROWS, settings, tmp_path, here, batch_size=2)
    pipe: Any = load_pipeline(settings.model, torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    with tap.enabled(pipe, CONFIG):
        for row in ROWS:
            (picture,) = pipe(
                row.prompt, generator=torch.Generator().manual_seed(row.seed), num_inference_steps=STEPS,
                height=row.height or 32, width=row.width or 32, max_sequence_length=pipe.tokenizer_2.model_max_length,
                output_type="np",
            ).images  # fmt: skip
            found = pixels(tmp_path)[row.id]
            assert np.abs(found - 255 * picture).max() <= 0.51  # rounded to 8 bits, and up to rounding by the batch


def test_prompts_that_were_cut_off_are_in_the_manifest(settings: Settings, tmp_path: Path) -> None:
    rows = [Row("long", "red apple " * 20, 0), Row("short", "red apple", 1)]
    long, short = generate_many(rows, settings, tmp_path, here)
    assert "(CLIPTokenizer) kept 8 of " in long["cut_off"]
    assert short["cut_off"] is None


def test_batching_changes_no_picture(settings: Settings, tmp_path: Path) -> None:
    for size in (1, 2, 4):
        generate_many(ROWS, settings, tmp_path / str(size), here, batch_size=size)
    one = pixels(tmp_path / "1")
    assert len({picture.tobytes() for picture in one.values()}) == len(ROWS)
    for size in (2, 4):
        found = pixels(tmp_path / str(size))
        assert found.keys() == one.keys()
        for name, picture in one.items():
            # A processor may add up in another order for another batch, and 8 bits then round to the next value.
            assert np.abs(found[name].astype(int) - picture).max() <= 1


@given(st.lists(st.sampled_from([None, 32, 64]), max_size=20), st.integers(1, 7))
def test_batches_are_of_one_size_and_lose_nothing(widths: list[int | None], size: int) -> None:
    rows = [Row(str(place), "", 0, width=width) for place, width in enumerate(widths)]
    made = batches(rows, size)
    assert sorted((row for batch in made for row in batch), key=lambda row: int(row.id)) == rows
    assert all(1 <= len(batch) <= size and len({row.width for row in batch}) == 1 for batch in made)
    firsts = [int(batch[0].id) for batch in made]
    assert firsts == sorted(firsts)


def test_samples_that_depend_on_each_other_are_generated_alone(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubtful(pipe: Any) -> Any:
        report = tap.report(pipe)
        report.fallbacks["non-finite values"] += 1
        return report

    monkeypatch.setattr(bulk, "report", doubtful)
    entries = generate_many(ROWS, settings, tmp_path, here)
    assert [entry["batch"] for entry in entries] == [1] * len(ROWS)


def test_granularity_batch_takes_one_at_a_time(settings: Settings, tmp_path: Path) -> None:
    by_batch = Settings(**vars(settings) | {"config": tap.TAPConfig(granularity="batch")})
    with pytest.raises(UsageError, match="depend on the others in its batch; give --batch-size 1"):
        generate_many(ROWS, by_batch, tmp_path, here)


# ------------------------------------------------------------------------------------------------------------- going on


def counted(calls: list[list[str]], stop: int | None = None) -> bulk.Engine:
    """The engine in this process; notes the ids of each batch, and is interrupted before number ``stop``."""

    def engine(settings: Settings, todo: Sequence[Sequence[Row]]) -> Iterator[Any]:
        calls.extend([row.id for row in batch] for batch in todo)
        for number, results in enumerate(here(settings, todo)):
            if number == stop:
                raise KeyboardInterrupt
            yield results

    return engine


def test_an_interrupted_run_goes_on(settings: Settings, tmp_path: Path) -> None:
    generate_many(ROWS, settings, tmp_path / "whole", here, batch_size=2)
    calls: list[list[str]] = []
    with pytest.raises(KeyboardInterrupt):
        generate_many(ROWS, settings, tmp_path / "cut", counted(calls, stop=1), batch_size=2)
    assert calls == [["a", "c/é"], ["b"], ["d", "e"]]
    assert list(pixels(tmp_path / "cut")) == ["a", "c/é"]
    calls.clear()
    told: list[tuple[int, int]] = []
    generate_many(ROWS, settings, tmp_path / "cut", counted(calls), batch_size=2, progress=lambda *x: told.append(x))
    assert calls == [["b"], ["d", "e"]]
    assert told == [(2, 0), (1, 0), (2, 0)]
    assert equal(pixels(tmp_path / "cut"), pixels(tmp_path / "whole"))
    calls.clear()
    generate_many(ROWS, settings, tmp_path / "cut", counted(calls), batch_size=2)
    assert calls == []


def test_what_a_killed_run_left_is_taken_up(settings: Settings, tmp_path: Path) -> None:
    """SIGKILL leaves parts that nobody merged, and half of a file under another name."""
    results = next(here(settings, batches(ROWS, 2)))
    Manifest(tmp_path).add(results)
    (tmp_path / "pictures" / "b.partial").write_bytes(b"half")
    (tmp_path / "parts" / "0.partial").write_bytes(b"half")
    calls: list[list[str]] = []
    generate_many(ROWS, settings, tmp_path, counted(calls), batch_size=2)
    assert calls == [["b"], ["d", "e"]]
    assert list(pixels(tmp_path)) == [row.id for row in ROWS]


def test_a_picture_that_was_deleted_is_made_again(settings: Settings, tmp_path: Path) -> None:
    entries = generate_many(ROWS, settings, tmp_path, here)
    before = pixels(tmp_path)
    (tmp_path / entries[3]["file"]).unlink()
    calls: list[list[str]] = []
    generate_many(ROWS, settings, tmp_path, counted(calls))
    assert calls == [["d"]]
    assert equal(pixels(tmp_path), before)


def test_more_rows_join_those_that_are_there(settings: Settings, tmp_path: Path) -> None:
    generate_many(ROWS[2:], settings, tmp_path, here)
    calls: list[list[str]] = []
    assert len(generate_many(ROWS[:3], settings, tmp_path, counted(calls))) == 3
    assert calls == [["a"], ["b"]]
    assert list(pixels(tmp_path)) == ["a", "b", "c/é", "d", "e"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 9}, "made with steps 8, not 9; choose another --out"),
        ({"config": tap.TAPConfig(full_steps=7)}, "made with full_steps 6, not 7"),
        ({"guidance": 2.0}, "made with guidance None, not 2.0"),
    ],
)
def test_other_settings_are_refused(settings: Settings, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    generate_many(ROWS[:1], settings, tmp_path, here)
    with pytest.raises(UsageError, match=words):
        generate_many(ROWS, Settings(**vars(settings) | change), tmp_path, here)


def test_another_row_of_the_same_id_is_refused(settings: Settings, tmp_path: Path) -> None:
    generate_many(ROWS[:1], settings, tmp_path, here)
    with pytest.raises(UsageError, match="a picture 'a' with prompt 'red apple', not 'blue book'"):
        generate_many([Row("a", "blue book", 3)], settings, tmp_path, here)


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(file, fail)
    assert not file.exists()
    write_whole(file, lambda partial: partial.write_text("whole"))
    with pytest.raises(OSError, match="disk full"):
        write_whole(file, fail)
    assert file.read_text() == "whole"


# ---------------------------------------------------------------------------------------------------------- bad prompts


def test_a_bad_prompt_is_reported_at_the_end(model: str, tmp_path: Path) -> None:
    bad = [Row("odd size", "red apple", 0, width=33), Row("no effect", "red apple", 0, negative_prompt="blue")]
    prompts, out = write_jsonl(tmp_path / "prompts.jsonl", [*bad, *ROWS]), tmp_path / "out"
    arguments = "--prompts", prompts, "--model", model, "--steps", STEPS, "--full-steps", 6, "--out", out
    result = command(*arguments)
    assert result.exit_code == 1, result.output
    assert "odd size: width 33 can't be done by this model: it must be a multiple of 4" in result.output
    assert "no effect: a negative prompt has no effect here: give a guidance scale above 1" in result.output
    assert "5 pictures, 2 failed" in result.output
    assert list(pixels(out)) == [row.id for row in ROWS]
    assert command(*arguments).exit_code == 1  # tried again, and only they
    entries = pq.read_table(out / "manifest.parquet").to_pylist()
    assert [entry["error"] is None for entry in entries] == [False] * 2 + [True] * 5


def test_rows_of_a_worker_that_always_dies_are_told(settings: Settings, tmp_path: Path) -> None:
    entries = generate_many(ROWS, settings, tmp_path, lambda settings, todo: here(settings, todo[1:]), batch_size=2)
    assert [entry["error"] is None for entry in entries] == [False, True, False, True, True]
    assert "died, 3 times in a row" in entries[0]["error"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "\ufeffred apple\r\n\r\n  blue book \n",
         [Row("000000", "red apple", 7), Row("000001", "blue book", 8)]),
        ("a.jsonl", '{"prompt": "a\u2028b", "id": 4, "width": 8}\n\n{"prompt": "", "seed": 2.0}\n',
         [Row("4", "a\u2028b", 7, width=8), Row("000001", "", 2)]),
    ],
)  # fmt: skip
def test_text_and_json_lines(tmp_path: Path, name: str, content: str, expected: list[Row]) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_rows(tmp_path / name, seed=7) == (expected, [])


def test_parquet(tmp_path: Path) -> None:
    columns = {"prompt": ["a", "b"], "seed": [5.0, float("nan")], "caption": ["x", "y"], "height": [None, 16]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows, ignored = read_rows(tmp_path / "a.parquet", seed=7, width=64, height=8)
    assert rows == [Row("000000", "a", 5, width=64, height=8), Row("000001", "b", 8, width=64, height=16)]
    assert ignored == ["caption"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("{", "line 1 is not JSON"),
        ("3", "line 1 is not a JSON object"),
        ('{"seed": 3}', "row 1: it has no prompt"),
        ('{"prompt": 3}', "row 1: its prompt is 3, not a string"),
        ('{"prompt": "a", "seed": 0.5}', "its seed is 0.5, not an integer of at least 0"),
        ('{"prompt": "a", "seed": -1}', "its seed is -1"),
        ('{"prompt": "a", "width": true}', "its width is True"),
        ('{"prompt": "a", "height": 0}', "its height is 0, not an integer of at least 1"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}', "rows 1 and 2: both have the id '1'"),
        ('{"prompt": "a", "id": [1]}', "its id is [1], not a string or an integer"),
        (json.dumps({"prompt": "a", "id": "é" * 40}), "its id is too long for a file's name"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as raised:
        read_rows(file, seed=0)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "local"], "--prompts is missing"),
        (["--engine", "local", "--prompts", "x.txt", "--workers", 2], "--workers is for --engine ray"),
        (["--engine", "local", "--prompts", "x.txt", "--address", "auto"], "--address is for --engine ray"),
        (["--prompts", "x.jsonl", "--compare"], "--compare can't be combined with --engine"),
        (["--prompts", "x.jsonl", "red apple"], "a prompt can't be combined with --engine"),
        (["--prompts", "x.jsonl"], "can't read the prompt file x.jsonl"),
        (["--prompts", "MISSING", "--model", "nonsense"], "unknown model 'nonsense'"),
    ],
)
def test_bad_options(tmp_path: Path, arguments: list[Any], words: str) -> None:
    if "MISSING" in arguments:
        arguments = [write_jsonl(tmp_path / "a.jsonl", ROWS) if a == "MISSING" else a for a in arguments]
    result = command(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert words in result.stderr


# ------------------------------------------------------------------------------------------------------------------ Ray


def test_shares_of_a_cluster() -> None:
    small, large, no_cpu = {"CPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}, {"memory": 1.0}
    assert bulk._shares([small, large, no_cpu], "cpu", None) == (2, {"num_cpus": 4})
    assert bulk._shares([large], "cpu", 5) == (5, {"num_cpus": 3})
    assert bulk._shares([small], "cpu", 8) == (8, {"num_cpus": 0.5})
    assert bulk._shares([small, large], "cuda", None) == (2, {"num_gpus": 1})
    with pytest.raises(UsageError, match="3 workers on GPUs, and the cluster has 2"):
        bulk._shares([small, large], "cuda", 3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_a_worker_on_ray_that_is_killed_loses_nothing(cluster: None, settings: Settings, tmp_path: Path) -> None:
    rows = [*ROWS, *(Row(str(seed), "green frog face", seed) for seed in range(7))]
    killed: list[str] = []

    def kill_the_first(done: int, _: int) -> None:
        if done and not killed:
            killed.extend(entry["worker"] for entry in Manifest(tmp_path / "ray").entries().values())
            os.kill(int(killed[0].rpartition(":")[2]), signal.SIGKILL)

    engine = partial(bulk.on_ray, device="cpu", workers=2)
    entries = generate_many(rows, settings, tmp_path / "ray", engine, batch_size=2, progress=kill_the_first)
    assert [entry["error"] for entry in entries] == [None] * len(rows)
    workers = {entry["worker"] for entry in entries}
    assert killed
    assert len(workers - {killed[0]}) >= 1
    assert f":{os.getpid()}" not in "".join(workers)
    generate_many(rows, settings, tmp_path / "here", here, batch_size=2)
    assert equal(pixels(tmp_path / "ray"), pixels(tmp_path / "here"))


@pytest.mark.slow
def test_the_command_on_ray(cluster: None, model: str, tmp_path: Path) -> None:
    prompts, out = write_jsonl(tmp_path / "prompts.jsonl", ROWS), tmp_path / "out"
    options = "--prompts", prompts, "--steps", STEPS, "--out", out, "--engine", "ray", "--workers", 1
    result = command(*options, "--model", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "a worker could not start: there is no folder" in result.stderr
    result = command(*options, "--model", model)
    assert result.exit_code == 0, result.output
    assert "5 pictures, 0 failed" in result.output


def test_without_ray_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    result = command("--prompts", write_jsonl(tmp_path / "a.jsonl", ROWS), "--engine", "ray", "--out", tmp_path)
    assert result.exit_code == 2
    assert "pip install 'tap-diffusion[ray]'" in result.stderr
