"""The ablations: what each changes of TAP, and what a look-ahead and the fidelity of probes say, by brute force."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tap_bench import truth
from tap_bench.ablation_page import write_page
from tap_bench.ablations import (
    Ablations,
    ChangedEngine,
    ChangedTimeline,
    ShiftedEngine,
    ShuffledEngine,
    ablations,
    beyond,
)
from tap_bench.calibration import _Recorder, run
from tap_bench.models import BenchModel, draw
from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.errors import UsageError
from tap_diffusion.core.schedule import even_steps
from tap_diffusion.core.timeline import Timeline
from tap_diffusion.integrations.diffusers.api import enabled, hooks
from tiny import TOKENS, WORDS, build_pipeline, sample

STEPS = 12
FULL = (0, 1, 2, 5, 9)
CONFIG = TAPConfig.paper(full_steps=FULL)


def tiny_model() -> BenchModel:
    def arguments(prompts: Any) -> dict[str, Any]:
        return {
            "prompt": list(prompts), "negative_prompt": [""] * len(prompts), "true_cfg_scale": 2.0, "height": 32,
            "width": 32, "max_sequence_length": TOKENS,
        }  # fmt: skip

    return BenchModel("tiny", lambda: build_pipeline(num_layers=3), WORDS, ["red book"], arguments, batch=2)


def call_at(step: int) -> Call:
    return Call(step, "cond", starts_trajectory=step == 0, is_last_step=None)


# ------------------------------------------------------------------------------------------------------------- engines


def test_shuffling_keeps_the_shares_of_each_sample_and_changes_places() -> None:
    losses = torch.rand(11, 3, 64)
    plain, shuffled = Engine(CONFIG)._choose(losses), ShuffledEngine(CONFIG)._choose(losses)
    assert not torch.equal(plain, shuffled)
    for before, after in zip(plain, shuffled, strict=True):
        assert torch.equal(before.sort().values, after.sort().values)
    assert torch.equal(shuffled, ShuffledEngine(CONFIG)._choose(losses))


def test_a_shifted_window_predicts_by_taylor_at_the_shifted_horizons() -> None:
    class Fixed(ShiftedEngine):
        wanted = 0
        checks_past = False  # the features are noise

        def _choose(self, losses: Tensor) -> Tensor:
            return torch.full(losses.shape[1:], self.wanted)

    torch.manual_seed(0)
    r0, r1, r2 = torch.randn(3, 1, 5, 4)
    x, h = torch.randn(2, 1, 5, 4)
    slope, older = (r2 - r1) / 2, (r1 - r0) / 1
    curve = (slope - older) / 2  # over the newest span, as the paper's recursion has it
    for shift in (1, 2, 4):
        engine = Fixed(TAPConfig.paper(full_steps=(0, 1, 3), orders=(1, 2)), shift)
        for step, residual in ((0, r0), (1, r1), (3, r2)):
            engine.begin(call_at(step))
            engine.record(call_at(step), torch.zeros_like(residual), residual, residual)
        for lag in range(5):
            horizon = 3 + shift - lag  # at step 6, k = 3
            for order in (1, 2):
                expected = x + r2 + slope * horizon + (order == 2) * curve * horizon**2 / 2
                engine.wanted = 5 * (order - 1) + lag
                torch.testing.assert_close(engine.predict(call_at(6), x, lambda: h), expected)


# -------------------------------------------------------------------------------------------------------- looking ahead


def test_an_oracle_takes_the_best_candidate_of_each_token() -> None:
    torch.manual_seed(0)
    x, *residuals, truly = torch.randn(5, 2, 16, 8)
    for loss in ("l2", "cosine"):
        engine = truth.DeepProbeEngine(replace(CONFIG, loss=loss), lambda residual, _: residual)
        for step, residual in enumerate(residuals):
            engine.begin(call_at(step))
            engine.record(call_at(step), torch.zeros_like(residual), residual, None)
        engine.look(truly, "")
        found = engine.predict(call_at(4), x, pytest.fail) - x

        # By hand: differences over spans of 1, orders 0 to 2, horizons 2 to -2.
        r2, r1, r0 = reversed(residuals)
        slope, curve = r2 - r1, (r2 - r1) - (r1 - r0)
        candidates = torch.stack(
            [r2]
            + [r2 + slope * k for k in (2, 1, 0, -1, -2)]
            + [r2 + slope * k + curve * k * k / 2 for k in (2, 1, 0, -1, -2)]
        )

        def distance(predicted: Tensor, loss: str = loss) -> Tensor:
            if loss == "l2":
                return (predicted - truly).norm(dim=-1)
            return 1 - torch.cosine_similarity(predicted.double(), truly.double(), dim=-1)

        errors = distance(candidates)
        assert (distance(found) <= errors + 1e-5).all()
        best = candidates.gather(0, errors.argmin(0)[None, ..., None].expand(1, -1, -1, 8))[0]
        torch.testing.assert_close(found, best)


def test_a_look_ahead_disturbs_nothing(pipe: Any) -> None:
    drawn: list[float] = []
    pipe.transformer.single_transformer_blocks[0].register_forward_hook(lambda *_: drawn.append(torch.rand(1).item()))
    runs = []
    for look in (False, True):
        looks: list[Tensor] = []

        def found(residual: Tensor, stream: str, looks: list[Tensor] = looks) -> None:
            looks.append(residual)

        torch.manual_seed(3)
        with enabled(pipe, CONFIG):
            (hook,) = hooks(pipe)
            with truth.looking_ahead(hook, found) if look else nullcontext():
                latents = sample(pipe, steps=STEPS)
            assert "_predict" not in vars(hook)
            runs.append((latents, hook.engine.report, torch.rand(3)))
        assert len(looks) == look * (STEPS - len(FULL))
    (plain, before, random), (looked, after, same_random) = runs
    assert torch.equal(looked, plain)
    assert torch.equal(same_random, random)
    assert len(drawn) == len(FULL) + STEPS
    assert [call[:2] for call in after.calls] == [call[:2] for call in before.calls]
    assert (after.fallbacks, after.cache_bytes) == (before.fallbacks, before.cache_bytes)
    assert len(after.choices) == STEPS - len(FULL)
    for one, other in zip(after.choices, before.choices, strict=True):
        assert torch.equal(one.index, other.index)


@contextmanager
def _outputs_of_blocks(pipe: Any, seen: list[list[Tensor]]) -> Iterator[None]:
    """Image tokens before the first block and behind each of the first list, call by call."""
    blocks = pipe.transformer.transformer_blocks
    handles = [
        blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append([kwargs["hidden_states"]]), with_kwargs=True
        )
    ]
    handles += [block.register_forward_hook(lambda _, args, output: seen[-1].append(output[1])) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_deeper_probes_are_what_the_blocks_of_the_plain_model_add(blocks: int) -> None:
    """On full steps, and on one that is predicted after full ones only, whose hidden states are the plain model's."""
    pipe = build_pipeline(num_layers=3)
    seen: list[list[Tensor]] = []
    with _outputs_of_blocks(pipe, seen):
        sample(pipe, steps=STEPS)
    with truth.deep_probe(TAPConfig.paper(full_steps=tuple(range(STEPS - 1))), blocks).applied(pipe):
        found = spied(hooks(pipe)[0].engine, "_features")
        sample(pipe, steps=STEPS)
    assert len(found) == len(seen) == STEPS
    for probe, outputs in zip(found, seen, strict=True):
        assert torch.equal(probe, outputs[blocks] - outputs[0])
    assert not pipe.transformer.transformer_blocks[0]._forward_hooks


def test_an_oracle_sees_the_residual_at_the_current_hidden_states(pipe: Any) -> None:
    with truth.oracle(TAPConfig.paper(full_steps=tuple(range(STEPS - 1)))).applied(pipe):
        found = spied(hooks(pipe)[0].engine, "_features")
        sample(pipe, steps=STEPS)
    with enabled(pipe, TAPConfig.paper(full_steps=tuple(range(STEPS + 1)))):
        hook = hooks(pipe)[0]
        hook.engine = recorder = _Recorder(hook.engine.config)
        sample(pipe, steps=STEPS)
    (residuals,) = recorder.residuals.values()
    assert len(found) == len(residuals) == STEPS
    for seen, true in zip(found, residuals, strict=True):
        assert torch.equal(seen, true)


def spied(target: Any, name: str) -> list[Any]:
    """What a method returns from now on."""
    method, returned = getattr(target, name), []

    def spy(*args: Any) -> Any:
        returned.append(method(*args))
        return returned[-1]

    setattr(target, name, spy)
    return returned


def test_a_probe_of_one_block_seen_ahead_is_that_of_the_configuration() -> None:
    pipe = build_pipeline()
    results = []
    for variant in (truth.deep_probe(CONFIG, 1), on_engine("", replace(CONFIG, probe="first_block"))):
        with variant.applied(pipe):
            results.append(sample(pipe, steps=STEPS))
    torch.testing.assert_close(*results)


def test_a_probe_deeper_than_the_model_is_refused() -> None:
    with (
        pytest.raises(UsageError, match="has 2 transformer_blocks, not the 3"),
        truth.deep_probe(CONFIG, 3).applied(build_pipeline()),
    ):
        pass


# ------------------------------------------------------------------------------------------------------------- fidelity


def spearman(x: Any, y: Any) -> float:
    """Pearson's correlation of ranks, equal values sharing their mean rank."""

    def ranks(values: Any) -> list[float]:
        rising = sorted(values)
        return [rising.index(v) + (rising.count(v) - 1) / 2 for v in values]

    return float(np.corrcoef(ranks(list(x)), ranks(list(y)))[0, 1])


def test_rank_correlation_by_hand() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, (2, 7, 3, 4))
    found = truth.rank_correlation(torch.tensor(x), torch.tensor(y))
    for b, n in np.ndindex(3, 4):
        assert found[b, n].item() == pytest.approx(spearman(x[:, b, n], y[:, b, n]))
    # Without ties it is 1 - 6 Σd² / K(K² - 1): ranks 0 1 2 3 against 1 0 2 3.
    swapped = truth.rank_correlation(torch.tensor([0.1, 0.2, 0.3, 0.9]), torch.tensor([5.0, 4.0, 6.0, 7.0]))
    assert swapped.item() == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert truth.rank_correlation(torch.ones(4), torch.rand(4)).isnan()


def test_fidelity_by_hand() -> None:
    losses = torch.tensor([[[0.1, 0.9]], [[0.2, 0.3]], [[0.3, 0.2]]])  # 3 candidates, 1 sample, 2 tokens
    errors = torch.tensor([[[2.0, 8.0]], [[1.0, 4.0]], [[4.0, 2.0]]])
    found = truth.fidelity(losses, errors, fixed=1)
    first, second = 0.5, 1.0  # rank correlations of the tokens
    assert found["rank_correlation"].tolist() == pytest.approx([(first + second) / 2])
    assert found["rank_spread"].tolist() == pytest.approx([0.25])
    assert found["best_share"].tolist() == [0.5]
    assert found["log_to_best"].tolist() == pytest.approx([math.log(2) / 2])
    assert found["log_to_fixed"].tolist() == pytest.approx([(math.log(2) + math.log(2 / 4)) / 2])


def test_a_probe_that_is_the_truth_is_entirely_true(pipe: Any) -> None:
    seen: dict[str, Tensor] = {}

    class Truthful(truth.FidelityEngine):
        def record(self, call: Call, before: Tensor, after: Tensor, probe: Tensor | None, stream: str = "") -> None:
            seen["residual"] = after - before
            super().record(call, before, after, probe, stream)

    config = replace(CONFIG, loss="l2")
    with enabled(pipe, config):
        (hook,) = hooks(pipe)
        hook.engine = engine = Truthful(config, lambda *_: seen["residual"], {"own": 0, "truth": 1})
        found = sample(pipe, ["red apple", "blue book"], generator=None, steps=STEPS)
    assert found.shape[0] == 2
    by_probe = {name: [row for row in engine.rows if row["probe"] == name] for name in ("own", "truth")}
    for rows in by_probe.values():
        assert len(rows) == 2 * (STEPS - len(FULL))
        assert sorted({row["step"] for row in rows}) == [step for step in range(STEPS) if step not in FULL]
    for row in by_probe["truth"]:
        assert row["rank_correlation"] == pytest.approx(1, abs=5e-3)  # but for losses closer than float32 tells
        assert row["log_to_best"] == pytest.approx(0, abs=1e-4)
    assert all(row["log_to_best"] >= 0 for row in by_probe["own"])
    # One step after an anchor the horizons 1, 0, …, -3 make 11 candidates, 3 of which are the same at horizon 0.
    assert {row["candidates"] for row in engine.rows if row["step"] == 3} == {9}


def test_fidelity_leaves_the_full_result() -> None:
    model = tiny_model()
    pipe = model.load()
    plain = draw(pipe, model, WORDS[:2], 0, num_inference_steps=STEPS)
    with truth.asked(pipe, CONFIG) as engines:
        asked = draw(pipe, model, WORDS[:2], 0, num_inference_steps=STEPS)
    assert torch.equal(asked.latents, plain.latents)
    assert len(engines[0].rows) == 2 * 2 * (STEPS - len(FULL)) * len(truth.PROBES)  # samples and branches


# ------------------------------------------------------------------------------------------------------------- the run


def test_every_ablation_changes_one_thing() -> None:
    tap = TAPConfig.paper(full_steps=FULL)
    base = on_engine("paper", tap).settings
    names, same = [], 0
    for ablation in ablations():
        settings = ablation.variant(tap).settings
        changed = {name for name in settings if settings[name] != base.get(name)}
        names.append(ablation.slug)
        same += not changed
        allowed = {"oracle": {"probe", "loss", "granularity"}, "orders": {"orders", "horizon_span"}}
        assert changed <= allowed.get(ablation.group, changed)
        assert len(changed) <= 1 or ablation.group in allowed
    assert same == 8  # orders, λ, δ, windows, probe, proxy loss, granularity, oracle
    assert len(set(names)) == len(names)


CHOSEN = ("{1}", "{0, 1, 2}, λ = 0", "{0, 1, 2}, λ = 4", "λ = 0", "k - 2 … k + 2", "two blocks", "tokens shuffled",
          "L2, token")  # fmt: skip


def ablations_in(out: Path) -> Ablations:
    return Ablations(tiny_model(), 3, (5, 4), out, STEPS, chosen=[a for a in ablations() if a.label in CHOSEN])


@pytest.mark.slow
def test_a_run_that_is_taken_up_again_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Exception):
        pass

    first = ablations_in(tmp_path / "a")
    done: list[Any] = []
    measure = first._measure

    def interrupted(*args: Any) -> None:
        if len(done) == 3:
            raise Interrupted
        measure(*args)
        done.append(args)

    monkeypatch.setattr(first, "_measure", interrupted)
    with pytest.raises(Interrupted):
        first.run()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "a" / "cells").iterdir()}
    assert len(before) == 3
    cells = ablations_in(tmp_path / "a").run()
    assert {file: file.stat().st_mtime_ns for file in before} == before
    fresh = ablations_in(tmp_path / "b")
    assert fresh.run() == cells
    texts = [(tmp_path / name / "results.json").read_text() for name in "ab"]
    assert texts[0] == texts[1]

    by_label = {(cell["label"], cell["budget"]): cell for cell in cells}
    tap = by_label["{0, 1, 2}, λ = 4", 5]
    assert tap["method"] == "tap"
    assert "difference_db" not in tap
    assert by_label["{0, 1, 2}, λ = 0", 5]["method"] == by_label["λ = 0", 5]["method"]  # measured once
    for (label, budget), cell in by_label.items():
        looks = label in ("two blocks", "L2, token")
        assert cell["full_evaluations"] == (STEPS if looks else budget)

    write_page([tmp_path / "a", tmp_path / "b"], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    for shown in ("two blocks", "tokens shuffled", f"{tap['psnr_db']:.2f}", "tiny (3 samples, 12 steps)"):
        assert shown in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.partition("(")[2].rstrip(")")).read_text().startswith("<?xml")
    assert not any(math.isnan(v) for v in json.loads(texts[0])["fidelity"][0]["rank_correlation"])

    # A model that was not run at all budgets is left out of the plots of others.
    fewer = json.loads(texts[1])
    for part in ("cells", "fidelity"):
        fewer[part] = [entry for entry in fewer[part] if entry["budget"] == 5]
    (tmp_path / "b" / "results.json").write_text(json.dumps(fewer))
    write_page([tmp_path / "a", tmp_path / "b"], tmp_path / "page.md")
    for budget, models in ((5, 2), (4, 1)):
        plot = (tmp_path / f"page-fidelity-{budget}.svg").read_text()
        assert len(re.findall(r">tiny<", plot)) == models


@pytest.mark.slow
@pytest.mark.parametrize("label", CHOSEN)
def test_variants_leave_the_pipeline_as_it_was(label: str) -> None:
    model = tiny_model()
    pipe = model.load()
    variant: Variant = next(a for a in ablations() if a.label == label).variant(CONFIG)
    plain = run(pipe, model, None, WORDS[:1], 0, STEPS)
    changed = run(pipe, model, variant, WORDS[:1], 0, STEPS)
    assert changed.latents.isfinite().all()
    assert not torch.equal(changed.latents, plain.latents)
    assert torch.equal(run(pipe, model, None, WORDS[:1], 0, STEPS).latents, plain.latents)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())


CHANGED = ("even", "even in the pace", "in the pace", "in steps", "0", "Newton {2}")


@pytest.mark.slow
def test_the_recommended_settings_have_ablations_of_their_own(tmp_path: Path) -> None:
    chosen = [a for a in beyond() if a.label in (*CHANGED, "0.5", "token")]
    cells = Ablations(tiny_model(), 3, (5,), tmp_path, STEPS, of="recommended", chosen=chosen).run()
    settings = {cell["label"]: cell["settings"] for cell in cells}
    assert settings["token"]["full_steps"] == 5
    assert settings["even"]["full_steps"] == list(even_steps(STEPS, 5))
    assert settings["0"]["hindsight"] == 0
    by_label = {cell["label"]: cell for cell in cells}
    assert "difference_db" not in by_label["token"]
    for label in CHANGED:
        assert by_label[label]["difference_db"] != 0
        assert by_label[label]["full_evaluations"] == 5
    page = (tmp_path / "ablations.md").read_text()
    assert page.startswith("# Ablations of the defaults\n")
    assert "as `TAPConfig(full_steps=...)` has it" in page
    assert "Fidelity" not in page


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=30, unique=True), st.sampled_from([None, 64, 4096]))
def test_a_changed_timeline_lacks_one_thought(values: list[float], tokens: int | None) -> None:
    noise = tuple(sorted(values, reverse=True))
    full = (0, len(noise) - 1)
    known = Timeline(noise, "flow", full, tokens=tokens)

    def changed(**change: Any) -> ChangedTimeline:
        return ChangedTimeline(noise, "flow", full, tokens=tokens, **change)

    assert (changed().clock, changed().spacing, changed().pace) == (known.clock, known.spacing, known.pace)
    assert changed(stretched=False).clock == known.pace
    assert changed(by_step=True).clock == tuple(range(len(noise)))
    assert changed(ruled=False).spacing == known.pace
    # Without healing the latent is moved back by all that the window has moved it: A_s / B_s · Q e_s.
    anchors, step = (0,), len(noise) - 1
    a, b, _ = known._solver
    clock = np.array(known.clock)
    moved = sum(np.prod(a[k + 1 : step]) * b[k] * clock[k] / clock[step] for k in range(1, step))
    assert changed(heals=False).hindsight(anchors, step) == pytest.approx(a[step] / b[step] * moved, rel=1e-6)


def test_a_changed_engine_keeps_the_rest_of_the_timeline() -> None:
    known = Timeline((3.0, 2.0, 1.0), "epsilon", kept=0.7, tokens=256, end=0.1, fresh_noise="Ancestral")
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "begin", lambda self, call: seen.append(call.timeline))
        ChangedEngine(TAPConfig(), ruled=False).begin(replace(call_at(0), timeline=known))
    assert seen == [ChangedTimeline(**{**vars(known), "ruled": False})]
