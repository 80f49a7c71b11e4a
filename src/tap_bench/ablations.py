"""The paper's ablations on the models of the bench, and some that need the truth; the same of the recommended settings.

    python -m tap_bench.ablations --model emoji --samples 32 --budgets 14,8 --out out/ablations-emoji
    python -m tap_bench.ablations --of recommended --model emoji --samples 32 --out out/beyond-emoji

Each cell changes one thing of TAP as the paper has it, on the paper's schedule, or of TAP as it is recommended, and is
compared with it pair by pair. The output folder holds one Parquet file per cell, ``results.json``, and a page with
plots. What is there is not done again.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from torch import Tensor
from tqdm import tqdm

from tap_bench import BASELINE, metrics, truth
from tap_bench.ablation_page import write_page
from tap_bench.bench import Bench, Suite
from tap_bench.calibration import run
from tap_bench.method import Method, Setting
from tap_bench.models import MODELS, BenchModel
from tap_bench.variant import Variant, on_engine
from tap_diffusion.apps.files import write_json, write_whole
from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.predictors import Candidate
from tap_diffusion.core.schedule import even_steps, growing_steps, paper_steps
from tap_diffusion.core.timeline import Timeline

SOURCE = "arXiv 2603.03792"
ORDERS: tuple[tuple[int, ...], ...] = ((0, 1), (1, 2), (0, 1, 2), (0, 1, 2, 3))


# ------------------------------------------------------------------------------------------------------------- engines


class ShiftedEngine(Engine):
    """TAP with the horizons {k - λ + shift, …, k + shift}. Reports name horizons as if the step were that much later.

    Args:
        config: see :class:`TAPConfig`.
        shift: in steps.
    """

    def __init__(self, config: TAPConfig, shift: float) -> None:
        super().__init__(config)
        self._shift = shift

    def _candidates(self, times: tuple[float, ...], t: float) -> tuple[list[Candidate], Tensor]:
        return super()._candidates(times, t + self._shift)


@dataclass(frozen=True)
class ChangedTimeline(Timeline):
    """A timeline without one of its thoughts.

    Attributes:
        ruled: whether full steps follow the rule (:attr:`Timeline.spacing`), or are even in the pace.
        stretched: whether the clock is even on the full steps, or is the pace.
        by_step: whether the clock counts steps.
        heals: whether hindsight takes into account that the full step heals errors.
    """

    ruled: bool = True
    stretched: bool = True
    by_step: bool = False
    heals: bool = True

    @cached_property
    def spacing(self) -> tuple[float, ...]:
        """As the base class, or the pace."""
        return super().spacing if self.ruled else self.pace

    @cached_property
    def clock(self) -> tuple[float, ...]:
        """As the base class, the pace, or the steps."""
        if self.by_step:
            return tuple(map(float, range(len(self))))
        return super().clock if self.stretched else self.pace

    @cached_property
    def _solver(self) -> Any:
        a, b, slope = super()._solver
        return a, b, slope if self.heals else 0 * slope


class ChangedEngine(Engine):
    """TAP with a :class:`ChangedTimeline`, for its schedule, its predictors and hindsight.

    Args:
        config: see :class:`TAPConfig`.
        change: attributes of the timeline.
    """

    def __init__(self, config: TAPConfig, **change: Any) -> None:
        super().__init__(config)
        self._change = change

    def begin(self, call: Call) -> bool:
        """As the base class, with that timeline."""
        timeline = call.timeline
        if timeline is not None:
            known = {field.name: getattr(timeline, field.name) for field in fields(timeline)}
            timeline = ChangedTimeline(**known | self._change)
        return super().begin(replace(call, timeline=timeline))


class ShuffledEngine(Engine):
    """TAP that deals out the choices of each sample's tokens among them at random: the same shares, wrong places."""

    def __init__(self, config: TAPConfig) -> None:
        super().__init__(config)
        self._generator = torch.Generator().manual_seed(0)

    def _choose(self, losses: Tensor) -> Tensor:
        choice = super()._choose(losses)
        places = torch.rand(choice.shape, generator=self._generator).argsort(1)
        return choice.gather(1, places.to(choice.device))


# ------------------------------------------------------------------------------------------------------- what is tried


@dataclass(frozen=True)
class Ablation:
    """TAP with one thing changed.

    Attributes:
        group: what is changed.
        label: to what.
        variant: gives the variant for TAP's configuration.
    """

    group: str
    label: str
    variant: Callable[[TAPConfig], Variant]

    @property
    def slug(self) -> str:
        """Name of its files."""
        text = f"{self.group} {self.label}".lower().replace("λ", "lambda").replace("δ", "delta")
        return re.sub(r"[^a-z0-9.]+", "-", text).strip("-")


def ablations() -> Iterator[Ablation]:
    """All ablations, group by group. TAP itself comes in most groups."""
    for order in range(3):
        yield _configured("orders", f"{{{order}}}", orders=(order,), horizon_span=0.0)
    for span in (0.0, 4.0):
        for orders in ORDERS:
            yield _configured("orders", f"{{{', '.join(map(str, orders))}}}, λ = {span:g}", orders=orders,
                              horizon_span=span)  # fmt: skip
    for span in range(7):
        yield _configured("horizon span", f"λ = {span}", horizon_span=float(span))
    for step in (1.0, 0.5, 0.1):
        yield _configured("horizon step", f"δ = {step:g}", horizon_step=step)
    yield _configured("shifted windows", "k - 4 … k")
    for shift in (1, 2, 4):
        yield Ablation("shifted windows", f"k - {4 - shift} … k + {shift}".replace("k - 0", "k"), _shifted(shift))
    yield _configured("probe", "modulated input")
    yield _configured("probe", "first block", probe="first_block")
    for name, blocks in truth.PROBES.items():
        if blocks > 1:
            yield Ablation("probe", name, lambda config, blocks=blocks: truth.deep_probe(config, blocks))  # type: ignore[misc]
    for name, loss in {"cosine": "cosine", "L2": "l2", "relative L2": "relative_l2", "L1": "l1"}.items():
        yield _configured("proxy loss", name, loss=loss)
    for granularity in ("token", "sample", "batch"):
        yield _configured("granularity", granularity, granularity=granularity)
    yield Ablation("granularity", "tokens shuffled", _shuffled)
    yield _configured("oracle", "proxy, token")
    for granularity in ("token", "sample"):
        for name, loss in (("L2", "l2"), ("cosine", "cosine")):
            yield Ablation("oracle", f"{name}, {granularity}", _oracle(loss=loss, granularity=granularity))


def beyond() -> Iterator[Ablation]:
    """All ablations of the recommended settings, group by group."""
    yield Ablation("clock", "in windows", _plain)
    yield Ablation("clock", "in the pace", _changed(stretched=False))
    yield Ablation("clock", "in steps", _changed(by_step=True))
    yield Ablation("schedule", "the rule", _plain)
    yield Ablation("schedule", "even in the pace", _changed(ruled=False))
    for label, steps in _SCHEDULES.items():
        yield Ablation("schedule", label, _scheduled(steps))
    for gain in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
        yield _configured("hindsight", f"{gain:g}", hindsight=gain)
    yield Ablation("hindsight", "1, as if nothing healed", _changed(heals=False))
    for orders in ((0,), (1,), (2,), (3,), *ORDERS):
        yield _configured("predictors", f"Newton {{{', '.join(map(str, orders))}}}", orders=orders)
    yield _configured("predictors", "Taylor {0, 1, 2}", family="taylor")
    yield _configured("predictors", "Taylor {0, 1, 2}, λ = 4", family="taylor", horizon_span=4.0)
    yield _configured("predictors", "FoCa {2}", family="foca", orders=(2,))
    yield _configured("slopes", "whole in even windows")
    for share in (0.25, 0.5, 0.75, 1.0):
        yield _configured("slopes", f"{share:g}", slopes=share)
    for granularity in ("token", "sample", "batch"):
        yield _configured("granularity", granularity, granularity=granularity)
    yield Ablation("granularity", "tokens shuffled", _shuffled)
    yield _configured("probe", "modulated input")
    yield _configured("probe", "first block", probe="first_block")
    for name, loss in {"cosine": "cosine", "L2": "l2"}.items():
        yield _configured("proxy loss", name, loss=loss)
    yield _configured("sketch", "384 or more")
    for stride in (1, 2, 4, 8, 16):
        yield _configured("sketch", "all channels" if stride == 1 else f"1 in {stride}", sketch=stride)


_SCHEDULES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "paper": paper_steps,
    "even": even_steps,
    "even after 2": lambda steps, count: even_steps(steps, count, warmup=2),
    "growing": growing_steps,
}


def _scheduled(full: Callable[[int, int], tuple[int, ...]]) -> Callable[[TAPConfig], Variant]:
    def variant(config: TAPConfig) -> Variant:
        assert config.steps is not None
        assert isinstance(config.full_steps, int)
        return on_engine("", replace(config, full_steps=full(config.steps, config.full_steps)))

    return variant


def _changed(**change: Any) -> Callable[[TAPConfig], Variant]:
    def variant(config: TAPConfig) -> Variant:
        changed = on_engine("", config, lambda config: ChangedEngine(config, **change))
        return replace(changed, settings=changed.settings | change)

    return variant


def _configured(group: str, label: str, **change: Any) -> Ablation:
    return Ablation(group, label, lambda config: on_engine("", replace(config, **change)))


def _shifted(shift: int) -> Callable[[TAPConfig], Variant]:
    def variant(config: TAPConfig) -> Variant:
        shifted = on_engine("", config, lambda config: ShiftedEngine(config, shift))
        return replace(shifted, settings=shifted.settings | {"shift": shift})

    return variant


def _shuffled(config: TAPConfig) -> Variant:
    variant = on_engine("", config, ShuffledEngine)
    return replace(variant, settings=variant.settings | {"shuffled": True})


def _oracle(**change: Any) -> Callable[[TAPConfig], Variant]:
    return lambda config: truth.oracle(replace(config, **change))


def _paper(steps: int, budget: int) -> TAPConfig:
    return TAPConfig.paper(full_steps=paper_steps(steps, budget))


def _recommended(steps: int, budget: int) -> TAPConfig:
    return TAPConfig(full_steps=budget, steps=steps)


OF = {"paper": (_paper, ablations), "recommended": (_recommended, beyond)}  # the baseline, and what is changed of it


# ------------------------------------------------------------------------------------------------------------- the run


class Ablations(Bench):
    """One run of the ablations, in one folder.

    Args:
        model: to run on.
        samples: measured in each cell.
        budgets: full evaluations per trajectory that the schedule has. What a look-ahead costs is not counted.
        out: the folder.
        steps: of the full result.
        of: a key of ``OF``.
        chosen: the ablations; all of these where none are given.

    Raises:
        UsageError: the folder holds a run with other settings.
    """

    def __init__(
        self,
        model: BenchModel,
        samples: int,
        budgets: Sequence[int],
        out: Path,
        steps: int = 50,
        of: str = "paper",
        chosen: Sequence[Ablation] | None = None,
    ) -> None:
        self.of = of
        base, whole = OF[of]
        self.ablations = list(whole() if chosen is None else chosen)
        methods: dict[str, Method] = {}
        names = {_settings(_method(BASELINE, base, _plain), steps): BASELINE}
        methods[BASELINE] = _method(BASELINE, base, _plain)
        self._names: list[str] = []  # of each ablation: some are the same in two groups
        for ablation in self.ablations:
            method = _method(ablation.slug, base, ablation.variant)
            name = names.setdefault(_settings(method, steps), ablation.slug)
            methods.setdefault(name, method)
            self._names.append(name)
        suite = Suite(samples, 1, tuple(budgets), None, timed=0, repeats=0)
        super().__init__(model, methods, suite, budgets, out, steps)

    def run(self) -> list[dict[str, Any]]:
        """Do what is left to do; return the cells and write ``results.json`` and ``ablations.md`` with its plots."""
        wanted = [(method, budget) for budget in self.budgets for method in self.methods.values()]
        for method, budget in tqdm(wanted, desc="measuring", unit="cell"):
            (variant,) = method.variants(Setting(self.pipe, self.steps, budget, self.calibration))
            self._measure(method, budget, variant)
        self._measure(None, self.steps, None)
        asked = self.budgets if self.of == "paper" else []
        for budget in tqdm(asked, desc="fidelity", unit="budget", disable=not asked):
            self._ask(budget)
        cells = [cell for budget in self.budgets for cell in self._cells(budget)]
        fidelity = [row for budget in asked for row in self._fidelity(budget)]
        write_json(
            self.out / "results.json",
            {"model": self.model.name, "of": self.of, "steps": self.steps, "samples": len(self.measured),
             "cells": cells, "fidelity": fidelity},
        )  # fmt: skip
        write_page([self.out], self.out / "ablations.md")
        return cells

    def _costs(self, variant: Variant | None, calls: int) -> dict[str, int]:  # noqa: ARG002
        """Cost is not what is asked here."""
        return {}

    def _cells(self, budget: int) -> Iterator[dict[str, Any]]:
        tables = {name: pq.read_table(self.out / "cells" / f"{name}-{budget}.parquet") for name in self.methods}
        baseline = tables[BASELINE]["psnr_db"].to_pylist()
        for ablation, name in zip(self.ablations, self._names, strict=True):
            table = tables[name]
            facts = json.loads(table.schema.metadata[b"facts"])
            psnr = table["psnr_db"].to_pylist()
            cell = {
                "group": ablation.group,
                "label": ablation.label,
                "method": name,
                "budget": budget,
                "full_evaluations": facts["full_steps"],  # with those of a look-ahead
                "psnr_db": fmean(psnr),
                "psnr_ci": metrics.bootstrap_interval(psnr),
                "ssim": fmean(table["ssim"].to_pylist()),
                "latent_error": fmean(table["latent_error"].to_pylist()),
                "settings": facts["settings"],
            }
            if name != BASELINE:
                cell |= metrics.difference(psnr, baseline)
            yield cell

    # ---------------------------------------------------------------------------------------------------- fidelity

    def _ask(self, budget: int) -> None:
        """Ask each probe on the trajectories of the full result, unless that has been done."""
        file = self.out / "fidelity" / f"{budget}.parquet"
        if file.exists():
            return
        rows = []
        size = self.model.batch
        for first in tqdm(range(0, len(self.measured), size), desc=f"fidelity-{budget}", leave=False):
            conditions = self.measured[first : first + size]
            with truth.asked(self.pipe, _paper(self.steps, budget)) as engines:
                run(self.pipe, self.model, None, conditions, first, self.steps)
            for row in (row for engine in engines for row in engine.rows):
                half, sample = divmod(row["sample"], len(conditions))  # both branches of guidance may be in one batch
                rows.append(row | {"branch": f"{row['branch']}/{half}", "sample": first + sample})
        file.parent.mkdir(exist_ok=True)
        write_whole(file, lambda partial: pq.write_table(pa.Table.from_pylist(rows), partial))

    def _fidelity(self, budget: int) -> Iterator[dict[str, Any]]:
        rows = pq.read_table(self.out / "fidelity" / f"{budget}.parquet").to_pylist()
        for probe in truth.PROBES:
            own = [row for row in rows if row["probe"] == probe]
            steps = sorted({row["step"] for row in own})
            yield {
                "budget": budget,
                "probe": probe,
                "chance": fmean(1 / row["candidates"] for row in own),
                "rank_correlation": _interval(own, "rank_correlation"),
                "rank_spread": _mean(own, "rank_spread"),
                "best_share": _interval(own, "best_share"),
                "error_to_best": [exp(value) for value in _interval(own, "log_to_best")],
                "error_to_fixed": [exp(value) for value in _interval(own, "log_to_fixed")],
                "by_step": [
                    {
                        "step": step,
                        "chance": fmean(1 / row["candidates"] for row in at),
                        **{name: _mean(at, name) for name in ("rank_correlation", "rank_spread", "best_share")},
                        "error_to_best": exp(_mean(at, "log_to_best")),
                        "error_to_fixed": exp(_mean(at, "log_to_fixed")),
                    }
                    for step in steps
                    for at in [[row for row in own if row["step"] == step]]
                ],
            }


def _plain(config: TAPConfig) -> Variant:
    return on_engine("", config)


def _method(name: str, base: Callable[[int, int], TAPConfig], variant: Callable[[TAPConfig], Variant]) -> Method:
    return Method(name, "tap", SOURCE, lambda setting: [variant(base(setting.steps, setting.budget))])


def _settings(method: Method, steps: int) -> str:
    (variant,) = method.variants(Setting(None, steps, 3, None))  # type: ignore[arg-type]
    return json.dumps(variant.settings)


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Mean over rows, without those where no token has a value."""
    return fmean(row[name] for row in rows if row[name] == row[name])


def _interval(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Mean over samples, and its 95 % bootstrap interval."""
    samples = defaultdict(list)
    for row in rows:
        samples[row["sample"]].append(row)
    values = [_mean(own, name) for own in samples.values()]
    return [fmean(values), *metrics.bootstrap_interval(values)]


# ------------------------------------------------------------------------------------------------------------- command


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; a run that was interrupted goes on there.")],
    samples: Annotated[int, typer.Option(help="Samples measured in each cell.", min=1)] = 32,
    budgets: Annotated[str, typer.Option(help="Full evaluations per trajectory.")] = "14,8",
    steps: Annotated[int, typer.Option(help="Of the full result.", min=4)] = 50,
    of: Annotated[str, typer.Option(help=f"What is changed: one of {', '.join(OF)}.")] = "paper",
) -> None:
    """Run the ablations on a model of the bench."""
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is none of {', '.join(MODELS)}", param_hint="--model")
    if of not in OF:
        raise typer.BadParameter(f"{of!r} is none of {', '.join(OF)}", param_hint="--of")
    Ablations(MODELS[model](), samples, [int(budget) for budget in budgets.split(",")], out, steps, of).run()


if __name__ == "__main__":
    typer.run(main)
