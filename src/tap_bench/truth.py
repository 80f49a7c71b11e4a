"""What a full evaluation at the current hidden states would show: deeper probes, oracles, and how true a probe is.

A predicted step knows only what enters the first blocks. Here a predicted call is preceded by a full one that only
looks, whatever it costs, so that one can ask what a better probe would be worth. With all blocks as its probe, TAP is
an oracle: it compares each candidate's residual with the true one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tap_bench.variant import Variant, on_engine
from tap_diffusion.core.cache import History
from tap_diffusion.core.call import Call
from tap_diffusion.core.config import TAPConfig
from tap_diffusion.core.engine import Engine
from tap_diffusion.core.errors import UsageError
from tap_diffusion.core.schedule import plan
from tap_diffusion.core.selection import choose, proxy_losses, proxy_losses_onepass
from tap_diffusion.integrations.depth import Streams, named
from tap_diffusion.integrations.diffusers.api import hooks
from tap_diffusion.integrations.diffusers.hook import TAPHook

PROBES = {"modulated input": 0, "first block": 1, "two blocks": 2, "three blocks": 3}  # name: blocks that it runs


# -------------------------------------------------------------------------------------------------------- looking ahead


@contextmanager
def first_blocks(hook: TAPHook, count: int) -> Iterator[Callable[[int, str], Tensor]]:
    """Watch the first blocks within a ``with`` block.

    Args:
        hook: on the transformer.
        count: blocks of its first list of blocks.

    Yields:
        What the first so many blocks added to a stream, (B, N, D), in the latest call that ran them.

    Raises:
        UsageError: there are fewer.
    """
    depth = hook._depth
    name = depth.spec.blocks[0]
    blocks = list(attrgetter(name)(depth.module))[:count]
    if len(blocks) < count:
        raise UsageError(f"{type(depth.module).__name__} has {len(blocks)} {name}, not the {count} that are the probe")
    seen: dict[int, Streams] = {}

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen[0] = hook._streams(named(depth.first, args, kwargs))

    def leave(number: int) -> Callable[[nn.Module, Any, Any], None]:
        def left(_: nn.Module, args: Any, output: Any) -> None:
            seen[number] = depth.streams_of(output)

        return left

    handles = [depth.first.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [block.register_forward_hook(leave(i + 1)) for i, block in enumerate(blocks)]
    try:
        yield lambda number, stream: hook._tokens(seen[number][stream] - seen[0][stream])
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def looking_ahead(hook: TAPHook, found: Callable[[Tensor, str], None]) -> Iterator[None]:
    """Run each predicted call in full before, within a ``with`` block, and tell the true residual and its stream.

    The hook's engine takes no part in it, and random numbers come as if it were not there.
    """
    changed: Any = hook
    predict = hook._predict

    def ahead(depth: Any, calls: Any, forward: Any, probes: Any) -> Any:
        engine = hook.engine
        hook.engine = _Onlooker(engine.config, found)
        try:
            with torch.random.fork_rng():
                hook._run_in_full(depth, calls, forward, {})
        finally:
            hook.engine = engine
        return predict(depth, calls, forward, probes)

    changed._predict = ahead
    try:
        yield
    finally:
        del changed._predict


class _Onlooker(Engine):
    """Passes on what a full step leaves."""

    needs_probe = False

    def __init__(self, config: TAPConfig, found: Callable[[Tensor, str], None]) -> None:
        super().__init__(config)
        self._found = found

    def record(self, call: Call, before: Tensor, after: Tensor, probe: Tensor | None, stream: str = "") -> None:  # noqa: ARG002
        self._found(after - before, stream)


class DeepProbeEngine(Engine):
    """TAP with probe features that come from :func:`looking_ahead`.

    Args:
        config: see :class:`TAPConfig`; its own probe is not used.
        features: makes the probe features (B, N, D') of a residual and the name of its stream.
    """

    checks_past = False

    def __init__(self, config: TAPConfig, features: Callable[[Tensor, str], Tensor]) -> None:
        super().__init__(config)
        self._features = features
        self._ahead: Streams = {}

    def look(self, residual: Tensor, stream: str) -> None:
        """Take note of what the call that is to be predicted would leave."""
        self._ahead[stream] = self._features(residual, stream)

    def record(self, call: Call, before: Tensor, after: Tensor, probe: Tensor | None, stream: str = "") -> None:  # noqa: ARG002
        """As the base class, with features of its own."""
        super().record(call, before, after, self._features(after - before, stream), stream)

    def predict(
        self,
        call: Call,
        hidden_states: Tensor,
        probe: Callable[[], Tensor],  # noqa: ARG002
        stream: str = "",
    ) -> Tensor:
        """As the base class, with features of its own."""
        return super().predict(call, hidden_states, lambda: self._ahead.pop(stream), stream)


def deep_probe(config: TAPConfig, blocks: int) -> Variant:
    """TAP whose probe is what the first ``blocks`` blocks add to the hidden states."""
    return _looking(config, blocks, {"probe": f"{blocks} blocks"})


def oracle(config: TAPConfig) -> Variant:
    """TAP whose proxy loss is that between the candidates' residuals and the true one."""
    return _looking(config, 0, {"probe": "true residual"})


def _looking(config: TAPConfig, blocks: int, settings: dict[str, Any]) -> Variant:
    config = replace(config, probe="first_block")  # nothing more than a full step computes anyway
    variant = on_engine("paper", config)

    @contextmanager
    def applied(pipe: Any) -> Iterator[None]:
        with variant.applied(pipe), ExitStack() as stack:
            for hook in hooks(pipe):
                added = stack.enter_context(first_blocks(hook, blocks))

                def features(residual: Tensor, stream: str, added: Any = added) -> Tensor:
                    return added(blocks, stream) if blocks else residual

                hook.engine = engine = DeepProbeEngine(config, features)
                stack.enter_context(looking_ahead(hook, engine.look))
            yield

    return Variant("paper", applied, variant.settings | settings)


# ------------------------------------------------------------------------------------------------------------- fidelity


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's rank correlation along the first dimension, equal values sharing their mean rank.

    Args:
        one, other: (K, ...).

    Returns:
        (...), float64; NaN where all values of either are equal.
    """
    x, y = (_ranks(values) - (len(values) - 1) / 2 for values in (one, other))
    return (x * y).sum(0) / (x.square().sum(0) * y.square().sum(0)).sqrt()


def _ranks(values: Tensor) -> Tensor:
    lower = (values[:, None] > values[None]).sum(1)
    equal = (values[:, None] == values[None]).sum(1)
    return lower.double() + (equal.double() - 1) / 2


def fidelity(losses: Tensor, errors: Tensor, fixed: int) -> dict[str, Tensor]:
    """How well proxy losses order candidates by their true errors.

    Args:
        losses: proxy losses, (K, B, N).
        errors: true errors of the residual, (K, B, N).
        fixed: index of the candidate that a fixed predictor would take.

    Returns:
        For each sample, (B,) float64: mean and standard deviation over tokens of the rank correlation
        (``rank_correlation``, ``rank_spread``), share of tokens that take the truly best (``best_share``), and mean
        logarithms of the chosen one's error over the best's and over the fixed one's (``log_to_best``,
        ``log_to_fixed``).
    """
    correlation = rank_correlation(losses, errors)
    errors = errors.double().clamp_min(torch.finfo(torch.float64).tiny)
    chosen = errors.gather(0, choose(losses, "token")[None])[0]
    best = errors.amin(0)
    mean = correlation.nanmean(1)
    return {
        "rank_correlation": mean,
        "rank_spread": (correlation - mean[:, None]).square().nanmean(1).sqrt(),
        "best_share": (chosen == best).double().mean(1),
        "log_to_best": (chosen / best).log().mean(1),
        "log_to_fixed": (chosen / errors[fixed]).log().mean(1),
    }


class FidelityEngine(Engine):
    """Runs every step in full and asks each probe, at steps that TAP would predict, which candidate it would choose.

    Nothing is fed back: both the anchors and the steps between them are those of the full result.

    Args:
        config: whose full steps are the anchors.
        added: what the first blocks added to a stream, of :func:`first_blocks`.
        probes: blocks that each probe runs, by name; 0 is the hook's own probe.

    Attributes:
        rows: one for each predicted step, branch, probe and sample: :func:`fidelity`, and how many candidates differ.
    """

    def __init__(
        self, config: TAPConfig, added: Callable[[int, str], Tensor], probes: Mapping[str, int] = PROBES
    ) -> None:
        super().__init__(config)
        self.rows: list[dict[str, Any]] = []
        self._added, self._probes = added, probes
        self._truth: dict[tuple[str, str, str], History] = {}  # of each branch, stream and probe

    def reset(self) -> None:
        """As the base class."""
        super().reset()
        self._truth.clear()

    def begin(self, call: Call) -> bool:
        """Every step is full."""
        super().begin(call)
        return True

    def record(self, call: Call, before: Tensor, after: Tensor, probe: Tensor | None, stream: str = "") -> None:
        """Make a full step's features anchors; on other steps compare."""
        assert probe is not None
        residual = after - before
        for name, blocks in self._probes.items():
            h = self._added(blocks, stream) if blocks else probe
            key = (call.branch, stream, name)
            if plan(self.config, None, None)(call.step):
                self._truth.setdefault(key, History(self.config.anchors)).add(call.step, residual, h)
            else:
                self._compare(call.step, key, residual, h)

    def _compare(self, step: int, key: tuple[str, str, str], residual: Tensor, h: Tensor) -> None:
        history = self._truth[key]
        members, coefficients = self._candidates(tuple(history.times), step)
        distinct = [
            i for i, row in enumerate(coefficients) if not any(row.allclose(other) for other in coefficients[:i])
        ]
        fixed = next(i for i, kept in enumerate(distinct) if members[kept].order == 1 and members[kept].lag == 0)
        coefficients = coefficients[distinct]
        losses = proxy_losses_onepass(h, history.probe, history.gram, coefficients, self.config.loss)
        errors = proxy_losses(residual, history.residual, coefficients, "l2").sqrt()
        columns = {name: values.tolist() for name, values in fidelity(losses, errors, fixed).items()}
        for sample in range(len(h)):
            self.rows.append(
                dict(zip(("branch", "stream", "probe"), key, strict=True))
                | {"step": step, "sample": sample, "candidates": len(distinct)}
                | {name: values[sample] for name, values in columns.items()}
            )

    def _say_how_it_went(self) -> None:
        """Every step is meant to be full."""


@contextmanager
def asked(pipe: Any, config: TAPConfig, probes: Mapping[str, int] = PROBES) -> Iterator[list[FidelityEngine]]:
    """Ask all probes within a ``with`` block, of each transformer of a pipeline."""
    with on_engine("", config).applied(pipe), ExitStack() as stack:
        engines = []
        for hook in hooks(pipe):
            added = stack.enter_context(first_blocks(hook, max(probes.values())))
            hook.engine = engine = FidelityEngine(config, added, probes)
            engines.append(engine)
        yield engines
