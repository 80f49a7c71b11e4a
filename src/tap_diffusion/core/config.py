"""The one configuration object."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

from tap_diffusion.core.errors import ConfigError
from tap_diffusion.core.predictors import FAMILIES
from tap_diffusion.core.presets import PRESETS, STEPS

Loss = Literal["cosine", "l2", "relative_l2", "l1"]
Granularity = Literal["token", "sample", "batch"]
Probe = Literal["modulated_input", "first_block"]
CacheDType = Literal["model", "float32", "bfloat16", "float16"]
Clock = Literal["noise", "step"]

DEFAULT_SPEEDUP = 5.0
MAX_ORDER = 8
MAX_HISTORY = 64
ENOUGH_CHANNELS = 384  # of the probe, to tell which candidate is best; on models trained here 24 were enough


@dataclass(frozen=True, kw_only=True)
class TAPConfig:
    """How TAP accelerates a model. Every field is checked when the object is made.

    The defaults are recommended. They go beyond the paper (docs/beyond.md); :meth:`paper` gives the paper's settings.

    A *full* step runs the whole model. A *predicted* step runs only its input and output layers.

    Args:
        speedup: target speed-up: one step in this many is full. At least 6 steps are full, so short runs reach less.
        full_steps: instead, how many steps are full, placed as ``clock`` says. Or exactly which, as a tuple of step
            numbers from 0 upwards; 0 must be among them.
        interval: instead, the paper's N: after the ``warmup``, one step in this many is full. 1 makes all steps full.
        warmup: with ``interval``: how many steps at the start are full.
        steps: number of denoising steps of a run. Needed only for a transformer without a pipeline, whose scheduler
            TAP can't see; without it, ``speedup`` then acts as an ``interval`` of that many steps, rounded. With a
            tuple of ``full_steps``: the number of steps that they are meant for; runs of another length raise an error.
        clock: what decides where full steps go, and the time that predictors extrapolate in. ``noise`` uses the
            scheduler's noise: full steps are denser at the start the more tokens a picture or video has
            (:attr:`Timeline.spacing <tap_diffusion.core.timeline.Timeline.spacing>`; ``tap plan`` shows which), and
            predictors extrapolate in :attr:`Timeline.clock <tap_diffusion.core.timeline.Timeline.clock>`. ``step``
            counts steps, as in the paper.
        hindsight: how much of the last predictions' error each full step corrects: 1 all, 0 nothing, as in the paper
            (:meth:`Timeline.hindsight <tap_diffusion.core.timeline.Timeline.hindsight>`). Costs one more predicted step
            at each full step, and needs a scheduler that TAP knows.
        family: kind of predictor, a key of :data:`tap_diffusion.core.predictors.FAMILIES`.
        orders: orders of the candidate predictions that TAP chooses from. Order 0 reuses the last full step's result;
            order m extrapolates from the last m + 1 full steps. With one order and ``horizon_span=0`` there is nothing
            to choose, and the probe is skipped.
        slopes: how far each candidate extrapolates, from 0 (reuse the last full step's result) to 1 (all the way, as in
            the paper). None: 1, but a tenth for each full step where fewer than ten are dense at the start
            (:attr:`Timeline.slopes <tap_diffusion.core.timeline.Timeline.slopes>`), and 0 where the scheduler adds
            fresh noise and the model does not predict noise
            (:attr:`Timeline.reuses <tap_diffusion.core.timeline.Timeline.reuses>`).
        history: how many full steps to keep in the cache, for families that use more than the largest order plus one,
            which is the default. More take more memory and add rounding errors: above 8 use ``cache_dtype="float32"``,
            which suffices up to about 14.
        horizon_span: λ of the paper. A candidate of order 1 or more, k steps after the last full step, comes with every
            horizon from k - λ to k.
        horizon_step: δ of the paper, the distance between these horizons.
        loss: how predicted and actual probe features are compared.
        granularity: what shares one choice of candidate: each token, each sample, or the whole batch. With ``batch``, a
            sample's result depends on the others in its batch.
        probe: the features that are compared. ``modulated_input``: what enters the first block's attention.
            ``first_block``: what the whole first block adds, which takes longer.
        sketch: compare only one in this many channels of the features, which can save nearly half the cache. 1 compares
            all, as in the paper. None leaves at least 384.
        cache_dtype: dtype of the cache. ``model`` is the dtype of the model's hidden states. Differences are always
            computed in float32 or better.
        offload: ``cpu`` keeps the cache in host memory (pinned, with a GPU) while full steps run, which is when a GPU's
            memory is fullest. Costs about two transfers of the cache for each full step.

    Raises:
        ConfigError: a value is not allowed. The message says what is.
    """

    speedup: float = DEFAULT_SPEEDUP
    full_steps: int | tuple[int, ...] | None = None
    interval: int | None = None
    warmup: int = 3
    steps: int | None = None
    clock: Clock = "noise"
    hindsight: float = 1.0
    family: str = "newton"
    orders: tuple[int, ...] = (1, 2)
    slopes: float | None = None
    history: int | None = None
    horizon_span: float = 0.0
    horizon_step: float = 1.0
    loss: Loss = "cosine"
    granularity: Granularity = "token"
    probe: Probe = "modulated_input"
    sketch: int | None = None
    cache_dtype: CacheDType = "model"
    offload: Literal["cpu"] | None = None

    def __post_init__(self) -> None:
        for name in ("orders", "full_steps"):
            if isinstance(value := getattr(self, name), list):  # what JSON makes of a tuple
                object.__setattr__(self, name, tuple(value))
        for field, valid, allowed in self._rules():
            if not valid:
                raise ConfigError(f"TAPConfig.{field} is {getattr(self, field)!r}; it must be {allowed}")

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """Field, whether its value is allowed, and which are. Each may rely on those before it."""
        speedup, full, span, step = self.speedup, self.full_steps, self.horizon_span, self.horizon_step
        yield "speedup", _is_number(speedup) and speedup >= 1, "a number ≥ 1"
        yield (
            "full_steps",
            full is None or _is_schedule(full) or (not isinstance(full, tuple) and _is_count(full)),
            "None, a whole number of at least 1, or a tuple of rising step numbers that starts with 0",
        )
        yield "interval", self.interval is None or _is_count(self.interval), "None or a whole number of at least 1"
        yield (
            "interval",
            self.interval is None or full is None,
            "left out beside full_steps, which also says how many steps are full; give one of them",
        )
        yield (
            "speedup",
            speedup == DEFAULT_SPEEDUP or (full is None and self.interval is None),  # as if it were left out
            "left out beside full_steps or interval, which also say how many steps are full; give one of them",
        )
        yield "warmup", _is_count(self.warmup), "a whole number of at least 1"
        yield "steps", self.steps is None or _is_count(self.steps), "None or a whole number of at least 1"
        yield "clock", *_among(self.clock, get_args(Clock))
        yield "hindsight", _is_number(self.hindsight) and 0 <= self.hindsight <= 2, "a number from 0 to 2"
        yield "family", *_among(self.family, FAMILIES)
        yield (
            "orders",
            isinstance(self.orders, tuple)
            and len(self.orders) > 0
            and all(_is_int(order) and 0 <= order <= MAX_ORDER for order in self.orders)
            and len(set(self.orders)) == len(self.orders),
            f"a tuple of different whole numbers from 0 to {MAX_ORDER}, at least one",
        )
        slopes, needed = self.slopes, max(self.orders) + 1
        yield "slopes", slopes is None or (_is_number(slopes) and 0 <= slopes <= 1), "None or a number from 0 to 1"
        yield (
            "history",
            self.history is None or (_is_int(self.history) and needed <= self.history <= MAX_HISTORY),
            f"None or a whole number from {needed}, the largest order plus one, to {MAX_HISTORY}",
        )
        yield "horizon_span", _is_number(span) and span >= 0, "a number ≥ 0"
        yield "horizon_step", _is_number(step) and step > 0, "a number > 0"
        yield (
            "horizon_step",
            len(self.orders) * (span / step + 1) <= 255,
            f"larger, so that a horizon_span of {span} gives at most 255 candidates",
        )
        yield "loss", *_among(self.loss, get_args(Loss))
        yield "granularity", *_among(self.granularity, get_args(Granularity))
        yield "probe", *_among(self.probe, get_args(Probe))
        yield "sketch", self.sketch is None or _is_count(self.sketch), "None or a whole number of at least 1"
        yield "cache_dtype", *_among(self.cache_dtype, get_args(CacheDType))
        yield "offload", self.offload in (None, "cpu"), "None or 'cpu'"

    @classmethod
    def paper(cls, interval: int | None = None, **changes: Any) -> TAPConfig:
        """The paper's settings: 3 warm-up steps, Taylor orders 0 to 2, λ = 4, δ = 1, cosine, per token.

        Args:
            interval: the paper's N; 6 unless ``changes`` give ``full_steps``.
            changes: fields that differ from the paper.
        """
        if interval is None and "full_steps" not in changes:
            interval = 6
        settings = dict(
            interval=interval, warmup=3, clock="step", hindsight=0.0, family="taylor", orders=(0, 1, 2),
            slopes=1.0, horizon_span=4.0, horizon_step=1.0, loss="cosine", granularity="token",
            probe="modulated_input", sketch=1,
        )  # fmt: skip
        return cls(**settings | changes)

    @classmethod
    def preset(cls, model: str, full_steps: int, **changes: Any) -> TAPConfig:
        """The full steps that a published search found best for a model (arXiv 2609.39343), for runs of 50 steps.

        Runs of another length raise an error. Use the default placement there, and for other numbers of full steps.

        Args:
            model: ``flux.1-dev``, ``qwen-image``, ``wan2.1-1.3b`` or ``hunyuan-video``.
            full_steps: 9, 13 or 21.
            changes: other fields.

        Raises:
            ConfigError: there is none. The message names those that there are.
        """
        if model not in PRESETS:
            raise ConfigError(f"there is no preset for {model!r}; there are presets for {', '.join(PRESETS)}")
        found = PRESETS[model]
        if full_steps not in found:
            raise ConfigError(
                f"there is no preset of {full_steps} full steps for {model}, only of {', '.join(map(str, found))};"
                f" TAPConfig(full_steps={full_steps}) places them by a rule"
            )
        settings: dict[str, Any] = {"full_steps": found[full_steps], "steps": STEPS}
        return cls(**settings | changes)

    @property
    def predicts(self) -> bool:
        """Whether any step is predicted, in a run that is long enough."""
        if self.full_steps is None and self.interval is None:
            return self.speedup > 1
        return self.interval != 1

    @property
    def anchors(self) -> int:
        """How many full steps the cache keeps: ``history``, or the largest order plus one."""
        return self.history or max(self.orders) + 1

    @property
    def chooses(self) -> bool:
        """Whether there is more than one candidate, so that the probe is needed."""
        return len(self.orders) > 1 or (self.orders != (0,) and self.horizon_span >= self.horizon_step)

    def stride(self, channels: int) -> int:
        """One in how many channels of the probe is compared, where it has this many."""
        return self.sketch or max(1, channels // ENOUGH_CHANNELS)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TAPConfig:
        """Inverse of :meth:`to_dict`. Raises ConfigError for a name that is no field."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                meant = f"did you mean {near[0]!r}? Its" if near else "its"
                raise ConfigError(f"TAPConfig has no field {name!r}; {meant} fields are {', '.join(known)}")
        return cls(**values)

    def to_json(self) -> str:
        """All fields as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TAPConfig:
        """Inverse of :meth:`to_json`. Raises ConfigError where ``text`` is not a JSON object of fields."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the configuration is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"the configuration must be a JSON object, not {type(values).__name__}")
        return cls.from_dict(values)

    def save(self, file: str | Path) -> None:
        """Write :meth:`to_json` to a file."""
        Path(file).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> TAPConfig:
        """Inverse of :meth:`save`. Raises ConfigError, or OSError where the file can't be read."""
        return cls.from_json(Path(file).read_text(encoding="utf-8"))


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return _is_int(value) and value >= 1


def _is_schedule(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and all(_is_int(step) for step in value)
        and value[:1] == (0,)
        and all(a < b for a, b in pairwise(value))
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _among(value: object, names: Iterable[str]) -> tuple[bool, str]:
    """Whether a value is one of the names, and what to say where it isn't."""
    return value in list(names), "one of " + ", ".join(names)  # a list, since JSON gives any value
