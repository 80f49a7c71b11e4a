"""The depth of a transformer: watched on full steps, left out on predicted ones, without touching the model's code.

For the time of one call a few submodules are exchanged for guises of themselves. On a full step the first block and
the head tell what enters them. On a predicted step a guise stands in for the first block, every other block is gone,
and the head gets the predicted stream instead of whatever has come through, so that nothing that a model does between
its blocks (concatenating streams, adding ControlNet or adapter features) can reach the output twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tap_diffusion.compiling import uncompiled
from tap_diffusion.errors import UnsupportedModelError
from tap_diffusion.integrations.models import Stream, TransformerSpec

Streams = dict[str, Tensor]  # by the name of the first block's argument
StandIns = dict[Any, Any]  # for the output of a spec's unread submodules, by submodule and shapes of its arguments


class Guise(nn.Module):
    """Runs ``function`` in place of ``module``; whatever else the model reads of the module, it gets from there."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["_guised"] = module  # not a submodule: the model must not find it twice
        self.forward = function

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_guised"], name)


class _Thinned(nn.ModuleList):
    """Few blocks that count as many: models find a block's share of a common modulation by the lengths of lists.

    Args:
        blocks: over which one iterates.
        length: what they count as.
        others: is in the place of every other one, for models that ask for their blocks by number.
    """

    _length: int | None = None

    def __init__(self, blocks: list[nn.Module], length: int | None = None, others: nn.Module | None = None) -> None:
        super().__init__(blocks)
        self._length = length
        self.__dict__["_others"] = others  # not a submodule

    def __len__(self) -> int:
        return super().__len__() if self._length is None else self._length

    def __getitem__(self, index: Any) -> Any:
        others = self.__dict__["_others"]
        if others is not None and isinstance(index, int) and len(self._modules) <= index < len(self):
            return others
        return super().__getitem__(index)


class Depth:
    """The places in one transformer that a spec names, and their guises.

    Args:
        module: the transformer.
        spec: of its class.

    Raises:
        UnsupportedModelError: there is no first block.
    """

    def __init__(self, module: nn.Module, spec: TransformerSpec) -> None:
        self.module, self.spec = module, spec
        blocks = self._get(spec.blocks[0])
        if not blocks:
            raise UnsupportedModelError(
                f"this {type(module).__name__} has no {spec.blocks[0]}, the first of which is TAP's probe"
            )
        self.first: nn.Module = blocks[0]
        self._entered: Callable[[dict[str, Any], Any], Any]
        self._left: Callable[[str, Tensor], Tensor]
        self._unread: StandIns
        self._lengths: dict[str, int] = {}  # of the streams behind text, in the current call
        self._full = self._guises(full=True)
        self._predicted = self._guises(full=False)
        self._originals = {place: self._get(place) for place in self._full | self._predicted}
        self._blocks = self._all_blocks()

    def is_current(self) -> bool:
        """Whether the module still holds what it held when this was made."""
        return self._all_blocks() == self._blocks and all(
            self._get(place) is original for place, original in self._originals.items()
        )

    def _all_blocks(self) -> list[nn.Module]:
        return [block for name in self.spec.blocks for block in self._get(name)]

    @contextmanager
    def watched(
        self,
        enter: Callable[[dict[str, Any], Any], None],
        leave: Callable[[str, Tensor], None],
        unread: StandIns,
    ) -> Iterator[None]:
        """A full step. ``enter`` gets the first block's arguments by name, and its output; ``leave`` gets each stream,
        by name, as it leaves the last block or enters the head; into ``unread`` go stand-ins for what the spec's
        unread submodules give.
        """

        def left(stream: str, value: Tensor) -> Tensor:
            leave(stream, value)
            return value

        with self._exchanged(self._full, enter, left, unread):
            yield

    @contextmanager
    def left_out(self, predict: Callable[[dict[str, Any]], Streams], unread: StandIns) -> Iterator[None]:
        """A predicted step: ``predict`` gets the first block's arguments by name and returns what enters the head.

        Where ``unread`` has a stand-in for what one of the spec's unread submodules would give, that does not run.
        """
        predicted: Streams = {}

        def entered(arguments: dict[str, Any], _: Any) -> Any:
            predicted.update(predict(arguments))
            arguments = self.split(arguments)
            return self._as_output({**arguments, **predicted} if self.spec.leaves_by_block else arguments)

        def left(stream: str, value: Tensor) -> Tensor:
            if stream not in predicted:
                return value
            return predicted[stream].reshape(value.shape).to(value.dtype)

        with self._exchanged(self._predicted, entered, left, unread):
            yield

    def streams_of(self, block_output: Any) -> Streams:
        """The streams in what the first block returns."""
        if isinstance(block_output, Tensor):
            return {self.spec.streams[0].argument: block_output}
        named = dict(zip(self.spec.outputs, block_output, strict=False))
        return {stream.argument: named[stream.argument] for stream in self.spec.streams}

    def split(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The first block's arguments as its code gets them: context parallelism may split some on their way in."""
        registry = getattr(self.first, "_diffusers_hook", None)
        if registry is None:
            return arguments
        # Only now, since ComfyUI does without diffusers.
        from diffusers.hooks.context_parallel import ContextParallelSplitHook

        for hook in registry.hooks.values():
            if isinstance(hook, ContextParallelSplitHook):
                _, arguments = hook.pre_forward(self.first, **arguments)
        return arguments

    def attention_input(self, arguments: dict[str, Any]) -> Tensor:
        """The modulated input: run the first block as far as its attention, or the norm that the spec names.

        The block's own code runs, uncompiled, up to that place and no further.
        """
        first = unwrapped(self.first)
        norm = self.spec.modulated_norm
        place = norm or self.spec.attention
        children = [first.get_submodule(place)] if place else attentions(first)

        def at_attention(_: nn.Module, args: Any, kwargs: Any) -> None:
            raise _Reached(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

        def after_norm(_: nn.Module, args: Any, output: Any) -> None:
            raise _Reached(output if isinstance(output, Tensor) else output[0])

        handles = [
            child.register_forward_hook(after_norm)
            if norm
            else child.register_forward_pre_hook(at_attention, with_kwargs=True)
            for child in children
        ]
        try:
            first._call_impl(**arguments)
        except _Reached as reached:
            return reached.value
        finally:
            for handle in handles:
                handle.remove()
        raise UnsupportedModelError(
            f"the first block of {type(self.module).__name__} calls no attention; use TAPConfig(probe='first_block')"
        )

    # ------------------------------------------------------------------------------------------------------- guises

    def _guises(self, full: bool) -> dict[str, nn.Module]:
        """What takes which place in the module."""
        spec = self.spec
        lists = {name: list(self._get(name)) for name in spec.blocks}

        def first(*args: Any, **kwargs: Any) -> Any:
            output = self.first(*args, **kwargs)
            self._on_enter(args, kwargs, output)
            return output

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return self._on_enter(args, kwargs)

        @uncompiled
        def nothing(*args: Any, **kwargs: Any) -> Any:
            return self._as_output(self._named(args, kwargs))

        others = None if full else Guise(self.first, nothing)
        if full:
            if spec.leaves_by_block:
                last_list = next(name for name in reversed(spec.blocks) if lists[name])
                lists[last_list][-1] = self._last(lists[last_list][-1], first)
            if lists[spec.blocks[0]][0] is self.first:
                lists[spec.blocks[0]][0] = Guise(self.first, first)
        else:
            lists = {name: [] for name in spec.blocks} | {spec.blocks[0]: [Guise(self.first, stand_in)]}
            for name, outputs in spec.bypassed.items():
                block = self._get(name)[0]
                lists[name] = [Guise(block, _pass_through(block, outputs))]
        places: dict[str, nn.Module] = {
            name: _Thinned(blocks, len(self._get(name)), others if name == spec.blocks[0] else None)
            for name, blocks in lists.items()
        }
        for stream in spec.streams:
            if stream.head is None:
                continue
            head = self._get(stream.head)
            if isinstance(head, nn.ModuleDict):
                places[stream.head] = nn.ModuleDict({k: self._head(stream, m) for k, m in head.items()})
            else:
                places[stream.head] = self._head(stream, head)
        return places | {place: self._kept(place) if full else self._replaced(place) for place in self._unread_places()}

    def _last(self, block: nn.Module, first: Callable[..., Any]) -> nn.Module:
        run = first if block is self.first else block

        def last(*args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            streams = self.streams_of(output)
            for stream in self.spec.streams:
                if stream.head is None:
                    self._on_leave(stream, streams[stream.argument])
            return output

        return Guise(block, last)

    def _head(self, stream: Stream, head: nn.Module) -> nn.Module:
        def run(*args: Any, **kwargs: Any) -> Any:
            if args:
                return head(self._on_leave(stream, args[0]), *args[1:], **kwargs)
            name = parameters(type(head).forward)[0]
            return head(**kwargs | {name: self._on_leave(stream, kwargs[name])})

        return Guise(head, run)

    # Under torch.compile, the model's code is compiled and these are not: they never look the same twice.

    @uncompiled
    def _on_enter(self, args: Any, kwargs: Any, output: Any = None) -> Any:
        arguments = self._named(args, kwargs)
        streams = self.split(arguments)
        self._lengths = {s.argument: streams[s.argument].shape[1] for s in self.spec.streams if s.behind_text}
        return self._entered(arguments, output)

    @uncompiled
    def _on_leave(self, stream: Stream, value: Tensor) -> Tensor:
        if not stream.behind_text:
            return self._left(stream.argument, value)
        text, tokens = value.tensor_split([value.shape[1] - self._lengths[stream.argument]], dim=1)
        return torch.cat([text, self._left(stream.argument, tokens)], dim=1)

    def _unread_places(self) -> list[str]:
        """Where this module has a submodule that the spec calls unread; of a list or a dictionary of them, each."""
        places: list[str] = []
        for place in self.spec.unread:
            found = self._get(place)
            if isinstance(found, nn.ModuleList | nn.ModuleDict):
                places += [f"{place}.{name}" for name in found._modules]
            elif found is not None:
                places.append(place)
        return places

    def _kept(self, place: str) -> nn.Module:
        module = self._get(place)

        @uncompiled
        def keep(*args: Any, **kwargs: Any) -> Any:
            output = module(*args, **kwargs)
            self._unread[place, _shapes(args, kwargs)] = _stand_in(output)
            return output

        return Guise(module, keep)

    def _replaced(self, place: str) -> nn.Module:
        module = self._get(place)

        @uncompiled
        def replace(*args: Any, **kwargs: Any) -> Any:
            stand_in = self._unread.get((place, _shapes(args, kwargs)))
            return module(*args, **kwargs) if stand_in is None else stand_in

        return Guise(module, replace)

    @contextmanager
    def _exchanged(self, places: dict[str, nn.Module], entered: Any, left: Any, unread: StandIns) -> Iterator[None]:
        self._entered, self._left, self._unread = entered, left, unread
        try:
            self._set(places)
            yield
        finally:
            self._set({place: self._originals[place] for place in places})
            del self._entered, self._left, self._unread

    def _named(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """The first block's arguments by name."""
        if self.spec.arguments:
            return dict(zip(self.spec.arguments, args, strict=False)) | kwargs
        return named(unwrapped(self.first), args, kwargs)

    def _as_output(self, arguments: dict[str, Any]) -> Any:
        """What the first block would return if it changed nothing."""
        if not self.spec.outputs:
            return arguments[self.spec.streams[0].argument]
        return tuple(arguments.get(name) for name in self.spec.outputs)

    def _get(self, place: str) -> Any:
        found: Any = self.module
        for name in place.split("."):
            if found is None:
                break
            found = found._modules.get(name)  # a third of the time of attributes, and this is asked at every call
        return found

    def _set(self, places: dict[str, nn.Module]) -> None:
        for place, module in places.items():
            parent, _, name = place.rpartition(".")
            self.module.get_submodule(parent)._modules[name] = module


class _Reached(Exception):
    def __init__(self, value: Tensor) -> None:
        self.value = value


def unwrapped(module: nn.Module) -> nn.Module:
    """What torch.compile wraps, or the module itself."""
    original = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module)
    return original


def attentions(block: nn.Module) -> list[nn.Module]:
    """Children (of an inner block as well) whose name or class says attention, outermost only; not its norm."""
    found = [
        child
        for name, child in block.named_children()
        if ("attn" in name and "norm" not in name) or "attention" in type(child).__name__.lower()
    ]
    return found or [inner for child in block.children() for inner in attentions(child)]


def _pass_through(block: nn.Module, outputs: tuple[str, ...]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = named(block, args, kwargs)
        return arguments[outputs[0]] if len(outputs) == 1 else tuple(arguments[name] for name in outputs)

    return run


def _shapes(args: Any, kwargs: Any) -> tuple[Any, ...]:
    return tuple(getattr(value, "shape", None) for value in (*args, *kwargs.values()))


def _stand_in(output: Any) -> Any:
    """Zeros in the shape of tensors and nested tuples and lists, which take no memory."""
    if isinstance(output, tuple | list):
        return type(output)([_stand_in(part) for part in output])
    # Of integers and booleans, sequence lengths may be made.
    if isinstance(output, Tensor) and (output.is_floating_point() or output.is_complex()):
        return output.new_zeros(()).expand(output.shape)
    return output


def named(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """A module's arguments by name, however its caller passes them."""
    return dict(zip(parameters(type(module).forward), args, strict=False)) | kwargs


@cache
def parameters(method: Callable[..., Any]) -> list[str]:
    """Names of a method's parameters, without self."""
    return list(inspect.signature(method).parameters)[1:]
