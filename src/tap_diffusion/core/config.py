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
    """How TAP accelerates a model. Every field is validated on construction.

    The defaults are the recommended settings, which go beyond the paper (docs/beyond.md); :meth:`paper` is the paper.

    Args:
        speedup: steps for each full one, where neither ``full_steps`` nor ``interval`` is given. At least 6 steps
            are full, or all where there are fewer.
        full_steps: how many steps of a trajectory are full, spaced as ``clock`` says; or exactly which, counted
            from its start, the first among them.
        interval: the paper's N: after the ``warmup`` one step in this many is full; 1: every step.
        warmup: full steps at the start of each trajectory, with ``interval``.
        steps: length of a trajectory, for a transformer by itself, whose scheduler TAP doesn't know. Without it
            ``speedup`` means an ``interval`` of as much, rounded. Beside a tuple of ``full_steps``: the length that
            they are for; another is an error.
        clock: where full steps are even and how predictors extrapolate: in the ``step``, as in the paper, or by what
            the scheduler's ``noise`` says: full steps are even in a time that is the denser at the start the more
            tokens a picture or video has (:attr:`Timeline.spacing <tap_diffusion.core.timeline.Timeline.spacing>`;
            ``tap plan`` shows which), and predictors extrapolate in windows between full steps, wherever these are
            (:attr:`Timeline.clock <tap_diffusion.core.timeline.Timeline.clock>`).
        hindsight: share of the error of the predicted steps that the next full step makes up for
            (:meth:`Timeline.hindsight <tap_diffusion.core.timeline.Timeline.hindsight>`): 1 all, 0 nothing, as in the
            paper. It costs another predicted step at each full step, and needs to know the scheduler.
        family: predictors to choose from, a key of :data:`tap_diffusion.core.predictors.FAMILIES`.
        orders: orders of the candidates. Order 0 reuses the newest anchor; order m needs m + 1 anchors. With a
            single order and ``horizon_span=0`` nothing is left to choose: a fixed predictor, and no probe runs.
        slopes: share of each candidate's extrapolation that is carried out, the rest being reuse of the newest anchor:
            1 all of it, as in the paper, 0 nothing. None: all, but with fewer than ten full steps that are dense at the
            start a tenth for each (:attr:`Timeline.slopes <tap_diffusion.core.timeline.Timeline.slopes>`), and nothing
            where the scheduler adds fresh noise and the model does not predict noise
            (:attr:`Timeline.reuses <tap_diffusion.core.timeline.Timeline.reuses>`).
        history: anchors to keep, for families that use more than the largest order plus one, which is the default.
            The cache grows with it, and so does rounding, since differences are kept: above 8 use
            ``cache_dtype="float32"``, which suffices up to about 14.
        horizon_span: λ of the paper. A candidate of order 1 or more, k steps after the newest anchor, comes with
            each horizon in {k - λ, …, k}.
        horizon_step: δ of the paper, the spacing of these horizons.
        loss: proxy loss between predicted and actual probe features.
        granularity: over what the argmin is taken: each token, each sample, or the whole batch. With ``batch``
            the result of a sample depends on the others in its batch.
        probe: features that the proxy loss compares: ``modulated_input`` of the first block, or what the
            ``first_block`` adds to the hidden states (dearer: it runs the whole block).
        sketch: keep one in this many channels of the probe features, and compare them on these alone: nearly half the
            cache can be saved. 1: all, as in the paper. None: as many as leave at least 384.
        cache_dtype: of the cache; ``model`` is that of the hidden states. Differences are formed in float32 or better
            whatever it is.
        offload: ``cpu`` keeps the cache in host memory (pinned, beside a GPU) while full steps run, whose activations
            are what a GPU's memory must suffice for. It costs about two transfers of the cache for each full call.

    Raises:
        ConfigError: a value is not allowed.
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
            "None, an integer of at least 1, or a tuple of rising integers that starts with 0",
        )
        yield "interval", self.interval is None or _is_count(self.interval), "None or an integer of at least 1"
        yield "interval", self.interval is None or full is None, "None where full_steps are given"
        yield (
            "speedup",
            speedup == DEFAULT_SPEEDUP or (full is None and self.interval is None),  # as if it were left out
            "left out where full_steps or interval say how many steps are full",
        )
        yield "warmup", _is_count(self.warmup), "an integer of at least 1"
        yield "steps", self.steps is None or _is_count(self.steps), "None or at least 1"
        yield "clock", *_among(self.clock, get_args(Clock))
        yield "hindsight", _is_number(self.hindsight) and 0 <= self.hindsight <= 2, "a number from 0 to 2"
        yield "family", *_among(self.family, FAMILIES)
        yield (
            "orders",
            isinstance(self.orders, tuple)
            and len(self.orders) > 0
            and all(_is_int(order) and 0 <= order <= MAX_ORDER for order in self.orders)
            and len(set(self.orders)) == len(self.orders),
            f"a non-empty tuple of distinct integers from 0 to {MAX_ORDER}",
        )
        slopes, needed = self.slopes, max(self.orders) + 1
        yield "slopes", slopes is None or (_is_number(slopes) and 0 <= slopes <= 1), "None or from 0 to 1"
        yield (
            "history",
            self.history is None or (_is_int(self.history) and needed <= self.history <= MAX_HISTORY),
            f"None or an integer from {needed}, the largest of its orders plus one, to {MAX_HISTORY}",
        )
        yield "horizon_span", _is_number(span) and span >= 0, "a number ≥ 0"
        yield "horizon_step", _is_number(step) and step > 0, "a number > 0"
        yield (
            "horizon_step",
            len(self.orders) * (span / step + 1) <= 255,
            f"large enough for at most 255 candidates (horizon_span is {span})",
        )
        yield "loss", *_among(self.loss, get_args(Loss))
        yield "granularity", *_among(self.granularity, get_args(Granularity))
        yield "probe", *_among(self.probe, get_args(Probe))
        yield "sketch", self.sketch is None or _is_count(self.sketch), "None or an integer of at least 1"
        yield "cache_dtype", *_among(self.cache_dtype, get_args(CacheDType))
        yield "offload", self.offload in (None, "cpu"), "None or 'cpu'"

    @classmethod
    def paper(cls, interval: int | None = None, **changes: Any) -> TAPConfig:
        """The paper's settings: 3 warm-up steps, Taylor orders 0 to 2, λ = 4, δ = 1, cosine, per token.

        Args:
            interval: N, by default 6, or None where ``changes`` name the ``full_steps``.
            changes: fields that are to differ from the paper.
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
        """The full steps that a search on a real model found (arXiv 2609.39343), for trajectories of 50 steps.

        Other trajectories are refused: there, and with other numbers of full steps, the default spacing is meant.

        Args:
            model: ``flux.1-dev``, ``qwen-image``, ``wan2.1-1.3b`` or ``hunyuan-video``.
            full_steps: 9, 13 or 21.
            changes: other fields.

        Raises:
            ConfigError: there is none. The message names those that there are.
        """
        if model not in PRESETS:
            raise ConfigError(f"there is no preset for {model!r}; there are {', '.join(PRESETS)}")
        found = PRESETS[model]
        if full_steps not in found:
            raise ConfigError(
                f"no search for {full_steps} full steps on {model} is known, only for {', '.join(map(str, found))};"
                f" TAPConfig(full_steps={full_steps}) spaces them by a rule"
            )
        settings: dict[str, Any] = {"full_steps": found[full_steps], "steps": STEPS}
        return cls(**settings | changes)

    @property
    def predicts(self) -> bool:
        """Whether any step of a trajectory that is long enough is predicted."""
        if self.full_steps is None and self.interval is None:
            return self.speedup > 1
        return self.interval != 1

    @property
    def anchors(self) -> int:
        """Anchors to keep: ``history``, or as many as the candidates need, the largest order plus one."""
        return self.history or max(self.orders) + 1

    @property
    def chooses(self) -> bool:
        """Whether there is more than one candidate, so that the probe is needed."""
        return len(self.orders) > 1 or (self.orders != (0,) and self.horizon_span >= self.horizon_step)

    def stride(self, channels: int) -> int:
        """One in how many channels of the probe is kept where it has this many."""
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
