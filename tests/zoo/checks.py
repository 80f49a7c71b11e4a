"""What must hold for every class. Each check raises AssertionError where it does not."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import tap_diffusion as tap
from tap_diffusion.core.schedule import full_steps
from tap_diffusion.integrations.depth import named
from tap_diffusion.integrations.passes import Passes
from tap_diffusion.integrations.specs import SPECS, Stream, TransformerSpec
from tiny import engine_of
from zoo import CASES, Conditions, build, class_of, denoise, evaluate, start

# Fewer warm-up steps than anchors, so that anchors of another trajectory would have a say.
INTERVAL, WARMUP = 4, 2
CONFIG = tap.TAPConfig.paper(INTERVAL, warmup=WARMUP, horizon_span=1)
# Another step by the timestep, the same for the model: embeddings of time can turn over 10,000 times from 0 to 1.
A_LITTLE_LATER = 1 - 1e-6
REUSE = tap.TAPConfig.paper(interval=2, warmup=1, orders=(0,), horizon_span=0)


CHECKPOINTING_FAILS = {"HunyuanImageTransformer2DModel"}  # TypeError in diffusers 0.42, TAP or not
NO_BACKWARD = {"Kandinsky6SRTransformer3DModel"}  # FlexAttention has none on a CPU


def spec_of(name: str) -> TransformerSpec:
    """What TAP knows of a case's class."""
    return SPECS[class_of(name)]


def blocks_of(name: str, model: nn.Module) -> list[nn.Module]:
    """All blocks of the depth, in order."""
    return [block for place in spec_of(name).blocks for block in attrgetter(place)(model)]


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything of the modules that an integration might leave changed."""

    def content(value: Any) -> Any:
        if isinstance(value, dict):
            return list(value)
        return [id(item) for item in value] if isinstance(value, list) else id(value)  # some models remake lists

    return {
        name: (id(module), {k: content(v) for k, v in vars(module).items()}) for name, module in model.named_modules()
    }


def check_off(name: str) -> None:
    """Promise 1: interval=1 changes no bit, and disable leaves no trace."""
    case, model = CASES[name], build(name)
    plain, before = denoise(model, case), trace(model)
    assert plain[0].isfinite().all()
    assert plain[0].std() > 1e-3
    with tap.enabled(model, tap.TAPConfig.paper(interval=1)):
        assert torch.equal(denoise(model, case)[0], plain[0])
    assert trace(model) == before
    with tap.enabled(model, CONFIG):
        assert not torch.equal(denoise(model, case)[0], plain[0])
    assert trace(model) == before
    assert torch.equal(denoise(model, case)[0], plain[0])


def check_same_input(name: str) -> None:
    """With order 0, a predicted step on (nearly) the same input repeats the full step."""
    case, model = CASES[name], build(name)
    z, conditions = start(case), Conditions(0, 1, torch.float32)
    with tap.enabled(model, REUSE):
        full = evaluate(model, case, z, 0.7, conditions)
        predicted = evaluate(model, case, z, A_LITTLE_LATER * 0.7, conditions)
        assert tap.report(model).predicted_steps == 1
    error = (predicted - full).norm() / full.norm()
    assert error < 1e-2, f"relative error {error:.3f}"
    with _stream_into_head(name, model, lambda argument, entered, left: entered[argument]):
        bare = evaluate(model, case, z, 0.7, conditions)
    assert (bare - full).norm() / full.norm() > 0.05, "the depth has no effect that could be tested"


@contextmanager
def _stream_into_head(name: str, model: nn.Module, make: Any) -> Iterator[None]:
    """The plain model, all blocks running, with another stream put before its head (or out of its last block).

    Args:
        make: (name of the stream, first block's streams by name, this stream as it left the blocks) -> the stream that
            takes its place.
    """
    spec = spec_of(name)
    blocks = blocks_of(name, model)
    entered: dict[str, Tensor] = {}

    def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = named(block, args, kwargs)
        given = [stream.argument for stream in spec.streams if arguments[stream.argument] is not None]
        entered.update({argument: arguments[argument].clone() for argument in given})

    def exchanged(stream: Stream, value: Tensor) -> Tensor:
        length = entered[stream.argument].shape[1] if stream.behind_text else value.shape[1]
        text, left = value.tensor_split([value.shape[1] - length], dim=1)
        new = make(stream.argument, entered, left).reshape(left.shape).to(left.dtype)
        return torch.cat([text, new], dim=1)

    handles = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    for stream in spec.streams:

        def before(head: nn.Module, args: Any, kwargs: Any, stream: Stream = stream) -> Any:
            if args:
                return (exchanged(stream, args[0]), *args[1:]), kwargs
            key = next(iter(kwargs))
            return args, {**kwargs, key: exchanged(stream, kwargs[key])}

        def after(block: nn.Module, args: Any, output: Any, stream: Stream = stream) -> Any:
            if isinstance(output, Tensor):
                return exchanged(stream, output)
            return tuple(
                exchanged(stream, value) if argument == stream.argument else value
                for argument, value in zip(spec.outputs, output, strict=True)
            )

        if stream.head is None:
            handles.append(blocks[-1].register_forward_hook(after))
        else:
            head = attrgetter(stream.head)(model)
            for module in head.values() if isinstance(head, nn.ModuleDict) else [head]:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_full_step(name: str) -> None:
    """A full step is the plain model's call: the same bits, gradients included, with an adapter and its scale, with
    gradient checkpointing or without. A predicted step follows the scale as well."""
    case, model = CASES[name], build(name)
    scaled = _with_adapter(name, model)
    z = start(case)

    def run(scale: float, time: float = 0.7, backward: bool = False) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        given = case.inputs(z.clone(), torch.full((1,), time), conditions.step())
        if scaled:
            given[scaled] = {**given.get(scaled, {}), "scale": scale}
        output = model(**given, return_dict=False)
        velocity = case.velocity(output, z)
        if backward and velocity.requires_grad:
            velocity.square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return velocity.detach(), gradients

    conditions = Conditions(0, 1, torch.float32)
    model.requires_grad_(class_of(name) not in NO_BACKWARD)
    for checkpointing in (False, True):
        if checkpointing and class_of(name) in CHECKPOINTING_FAILS:
            continue
        if checkpointing and model._supports_gradient_checkpointing:
            model.enable_gradient_checkpointing()
        plain, gradients = run(0.3, backward=True)
        with tap.enabled(model, REUSE):
            full, found = run(0.3, backward=True)
            assert tap.report(model).full_steps == 1
        assert torch.equal(full, plain)
        assert len(found) == len(gradients)
        assert gradients or class_of(name) in NO_BACKWARD
        assert all(map(torch.equal, found, gradients)), f"other gradients, {checkpointing=}"
    if not scaled:
        return
    with torch.no_grad(), tap.enabled(model, REUSE):
        full, _ = run(0.3)
        predicted, _ = run(0.3, A_LITTLE_LATER * 0.7)
        assert tap.report(model).predicted_steps == 1
        other, _ = run(0.0, 0.6)
        assert (other - full).norm() > 1e-3 * full.norm(), "the scale has no effect that could be tested"
    error = (predicted - full).norm() / full.norm()
    assert error < 1e-2, f"relative error {error:.3f}"


def _with_adapter(name: str, model: nn.Module) -> str | None:
    """Add a LoRA to the first and the last block and the heads; the name of the argument that scales it, if any."""
    from peft import LoraConfig

    if not hasattr(model, "add_adapter"):
        return None
    wanted = [*blocks_of(name, model)[:1], *blocks_of(name, model)[-1:]]
    wanted += [attrgetter(stream.head)(model) for stream in spec_of(name).streams if stream.head is not None]
    parts = {id(part) for module in wanted for part in module.modules() if type(part) is nn.Linear}
    places = [place for place, part in model.named_modules() if id(part) in parts]
    torch.manual_seed(2)
    model.add_adapter(LoraConfig(r=2, target_modules=places, init_lora_weights=False))  # type: ignore[operator]
    known = inspect.signature(type(model).forward).parameters
    return next((argument for argument in ("joint_attention_kwargs", "attention_kwargs") if argument in known), None)


def check_recomputation(name: str) -> None:
    """With order 0, a predicted step is the model's own head on first-block input plus cached residual.

    The independent side runs all blocks and only exchanges what enters the head: so nothing else that the depth
    computes may have a say in the output.
    """
    case, model = CASES[name], build(name)
    z = [start(case, seed) for seed in (0, 1)]
    with tap.enabled(model, REUSE):
        conditions = Conditions(0, 1, torch.float32)
        evaluate(model, case, z[0], 0.7, conditions)
        predicted = evaluate(model, case, z[1], 0.6, conditions)
        assert tap.report(model).predicted_steps == 1
    residuals: dict[str, Tensor] = {}
    conditions = Conditions(0, 1, torch.float32)

    def observe(argument: str, entered: dict[str, Tensor], left: Tensor) -> Tensor:
        residuals[argument] = left.reshape(entered[argument].shape) - entered[argument]
        return left

    def recompute(argument: str, entered: dict[str, Tensor], left: Tensor) -> Tensor:
        return entered[argument] + residuals[argument]

    with _stream_into_head(name, model, observe):
        evaluate(model, case, z[0], 0.7, conditions)
    with _stream_into_head(name, model, recompute):
        expected = evaluate(model, case, z[1], 0.6, conditions)
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def check_schedule(name: str) -> None:
    """Full evaluations are the schedule's, and predicted steps complete no block."""
    case, model = CASES[name], build(name)
    calls: list[int] = []
    for i, block in enumerate(blocks_of(name, model)):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    evaluate(model, case, start(case), 1.0, Conditions(0, 1, torch.float32))
    per_step = list(calls)
    assert len(set(per_step)) == len(blocks_of(name, model)), "not every block runs"
    calls.clear()
    with tap.enabled(model, CONFIG):
        denoise(model, case)
        report = tap.report(model)
    expected = full_steps(12, INTERVAL, WARMUP)
    assert (report.steps, report.full_steps, report.fallbacks) == (12, len(expected), {})
    probes = report.predicted_steps * (0 if spec_of(name).probe else 1)
    assert calls.count(per_step[-1]) == len(expected) * per_step.count(per_step[-1])
    assert len(calls) == len(expected) * len(per_step) + probes
    assert len(report.choices) == report.predicted_steps * len(spec_of(name).streams)
    taken = torch.cat([choice.index.flatten() for choice in report.choices])
    assert len(taken.unique()) > 1, "every token always takes the same candidate"


def check_probe(name: str) -> None:
    """What a predicted step compares is what a full step on the same input keeps, though few blocks are there."""
    case, model = CASES[name], build(name)
    z, conditions = start(case), Conditions(0, 1, torch.float32)
    kept: list[Tensor] = []
    compared: list[Tensor] = []
    with tap.enabled(model, CONFIG):
        engine: Any = engine_of(model)
        record, predict = engine.record, engine.predict

        def recording(call: Any, before: Tensor, after: Tensor, probe: Tensor, *more: Any) -> None:
            kept.append(probe.clone())
            record(call, before, after, probe, *more)

        def predicting(call: Any, x: Tensor, probe: Callable[[], Tensor], *more: Any) -> Tensor:
            compared.append(probe().clone())
            return predict(call, x, probe, *more)

        engine.record, engine.predict = recording, predicting
        for time in (0.9, 0.7, A_LITTLE_LATER * 0.7):
            evaluate(model, case, z, time, conditions)
    assert len(compared) == len(spec_of(name).streams)
    for one, other in zip(kept[-len(compared) :], compared, strict=True):
        assert (other - one).norm() / one.norm() < 1e-2, "the probe differs where blocks are left out"


def _unread(name: str, model: nn.Module) -> dict[str, nn.Module]:
    """The case's unread submodules."""
    present = set(spec_of(name).unread)
    return {
        place: module
        for place, module in model.named_modules()
        if place in present or (place.rpartition(".")[0] in present and isinstance(_parent(model, place), _LISTS))
        if not isinstance(module, _LISTS)
    }


_LISTS = (nn.ModuleList, nn.ModuleDict)


def _parent(model: nn.Module, place: str) -> nn.Module:
    return model.get_submodule(place.rpartition(".")[0])


def check_unread(name: str) -> None:
    """Submodules called unread run on full steps alone, and whatever they gave on a predicted one would change no bit.

    The independent side runs them on predicted steps, too, and puts something else in the place of their output.
    """
    case = CASES[name]

    def traced(model: nn.Module) -> list[Tensor]:
        """Outputs of three calls, the last of them predicted, and all that it predicts from."""
        engine: Any = engine_of(model)
        predict, trace, conditions = engine.predict, [], Conditions(0, 1, torch.float32)

        def predicting(call: Any, x: Tensor, probe: Callable[[], Tensor], *more: Any) -> Tensor:
            trace.extend([x.clone(), probe().clone()])
            result: Tensor = predict(call, x, probe, *more)
            return result

        engine.predict = predicting
        trace += [evaluate(model, case, start(case), time, conditions) for time in (1.0, 0.9, 0.8)]
        assert (tap.report(model).full_steps, tap.report(model).predicted_steps) == (2, 1)
        return trace

    model = build(name)
    runs: list[str] = []
    for place, module in _unread(name, model).items():
        module.register_forward_pre_hook(lambda *_, place=place: runs.append(place))
    with tap.enabled(model, CONFIG):
        without = traced(model)
    times = Counter(runs)
    assert all(times[place] and times[place] % 2 == 0 for place in _unread(name, model)), times
    evaluate(model, case, start(case), 0.8, Conditions(0, 1, torch.float32))
    assert Counter(runs) == {place: count // 2 * 3 for place, count in times.items()}, "not run on full steps alone"

    model = build(name)
    predicted = False

    def exchange(module: nn.Module, args: Any, output: Any) -> Any:
        return tree_map(_something_else, output) if predicted else output

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal predicted
        predicted = tap.report(model).steps == 2

    for module in _unread(name, model).values():
        module.register_forward_hook(exchange)
    model.register_forward_pre_hook(enter)
    with tap.enabled(model, CONFIG), patch.object(Passes, "_unread", lambda *_: {}):
        exchanged = traced(model)
    assert len(without) == len(exchanged)
    assert all(map(torch.equal, without, exchanged)), "what was to be unread has been read"


def _something_else(value: Any) -> Any:
    number = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return 1.5 * value + 1 if number else value


Check = Callable[[str], None]


class Interrupt(Exception):
    pass


def _raise_at(name: str, model: nn.Module, call: int) -> Any:
    """Make the last block raise at its n-th call from now on."""
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise Interrupt

    return blocks_of(name, model)[-1].register_forward_pre_hook(hook)


def check_repeatable(name: str) -> None:
    """Promise 2: whatever came before, the result is that of a fresh model."""
    case, model = CASES[name], build(name)
    fresh_model = build(name)
    with tap.enabled(fresh_model, CONFIG):
        fresh = denoise(fresh_model, case)[0]
    with tap.enabled(model, CONFIG):

        def same(after: str) -> None:
            assert torch.equal(denoise(model, case)[0], fresh), f"another result after {after}"

        denoise(model, case)
        same("a run")
        denoise(model, case, stop=6)
        same("an interrupt")
        handle = _raise_at(name, model, 4)
        try:
            denoise(model, case)
        except Interrupt:
            pass
        else:
            raise AssertionError("the last block was not called four times")
        handle.remove()
        same("an exception")
        denoise(model, case, size=2, stop=7)
        same("another size")
        denoise(model, case, batch=2)
        same("another batch size")
        denoise(model, case, steps=9)
        same("another number of steps")
        denoise(model, case, branches=(0, 1), stop=5)
        same("two branches")
        stays = set(getattr(model, "_keep_in_fp32_modules", None) or ())  # as from_pretrained(torch_dtype=...) does
        kept = [
            (part, dict(part._parameters), dict(part._buffers))
            for place, part in model.named_modules()
            if not stays.intersection(place.split("."))
        ]
        for dtype in case.dtypes:
            for part, parameters, buffers in kept:  # not model.to(), which could not be undone without loss
                for own, values in ((part._parameters, parameters), (part._buffers, buffers)):
                    own.update({k: v.to(dtype) for k, v in values.items() if v is not None and v.is_floating_point()})
            assert denoise(model, case, dtype=dtype)[0].isfinite().all()
            assert not tap.report(model).fallbacks
            for part, parameters, buffers in kept:
                part._parameters.update(parameters)
                part._buffers.update(buffers)
            same(f"{dtype}")


def check_branches(name: str) -> None:
    """Promise 3: branches in separate calls, named or not, do not mix."""
    case, model = CASES[name], build(name)
    with tap.enabled(model, CONFIG):
        alone = [denoise(model, case, branches=(seed,))[0] for seed in (1, 2, 3)]
        for contexts in (False, True) if hasattr(model, "cache_context") else (False,):
            together = denoise(model, case, branches=(1, 2, 3), contexts=contexts)
            for one, other in zip(alone, together, strict=True):
                assert torch.equal(one, other), f"branches mix, contexts={contexts}"


def check_memory(name: str) -> None:
    """Promise 4: at most 2 tensors of the stream's size per anchor and branch, and none when TAP is off."""
    case, model = CASES[name], build(name)
    entered: list[int] = []

    def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = named(block, args, kwargs)
        entered.append(sum(arguments[s.argument].nbytes for s in spec_of(name).streams))

    handle = blocks_of(name, model)[0].register_forward_pre_hook(enter, with_kwargs=True)
    evaluate(model, case, start(case), 1.0, Conditions(0, 1, torch.float32))
    handle.remove()
    tap.enable(model, CONFIG)
    denoise(model, case, branches=(1, 2))
    engine = engine_of(model)
    # Beside these, inner products of a few numbers per token and a mean token, which count where
    # the stream is as narrow as here.
    tokens = sum(choice.index.numel() for choice in tap.report(model).choices if choice.step == CONFIG.warmup)
    mean_tokens = 2 * 256 * 4
    allowed = 2 * 2 * CONFIG.anchors * entered[0] + tokens * CONFIG.anchors**2 * 4 + mean_tokens
    assert 0 < tap.report(model).cache_bytes <= allowed
    tap.disable(model)
    assert engine.cache_bytes == 0
