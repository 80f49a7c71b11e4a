"""The depth of a transformer: watched on full steps, left out on predicted ones, without touching the model's code.

A full step is the model as it is. Hooks on the first block, on the last block or the head, and on embedders that only
blocks read, tell what passes; they do nothing but for the thread and the call that watches, so that a backward pass may
run blocks again, and other threads may be in the same model.

A predicted step runs the model's own forward on a *view*: an object of the model's class that shares all its
parameters and parts, but for a few places. There a guise stands in for the first block, every other block is gone, and
the head gets the predicted stream instead of whatever has come through, so that nothing that a model does between its
blocks (concatenating streams, adding ControlNet or adapter features) can reach the output twice. The model itself
stays as it is.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from inspect import ismethod
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from tap_diffusion.core.compiling import uncompiled
from tap_diffusion.core.errors import UnsupportedModelError
from tap_diffusion.integrations.specs import Stream, TransformerSpec

Streams = dict[str, Tensor]  # by the name of the first block's argument
_registering = threading.Lock()  # torch counts hooks in a way that two threads at once can give two of them one number

StandIns = dict[Any, Any]  # for the output of a spec's unread submodules, by submodule and shapes of its arguments


class Guise(nn.Module):
    """Runs ``function`` in place of ``module``; whatever else the model reads of the module, it gets from there.

    The module is its child, for whatever walks the model in its forward (LoRA scales, for one).
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.guised = module
        self.forward = function

    def __getattr__(self, name: str) -> Any:
        guised = self.__dict__["_modules"]["guised"]
        return guised if name == "guised" else getattr(guised, name)


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


@dataclass
class _Watch:
    """What one full call is watched for."""

    enter: Callable[[dict[str, Any]], None]
    entered: Callable[[dict[str, Any], Any], None]
    leave: Callable[[str, Tensor], None]
    unread: StandIns
    arguments: dict[str, Any] = field(default_factory=dict)  # of the first block
    lengths: dict[str, int] = field(default_factory=dict)  # of the streams behind text


class Depth:
    """The places in one transformer that a spec names.

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
        self._blocks = self._all_blocks()
        self._heads = {s.head: self._get(s.head) for s in spec.streams if s.head is not None}
        self._unread = {place: self._get(place) for place in self._unread_places()}
        self._lists = {name: self._get(name) for name in spec.blocks} | {
            name: self._get(name) for name in spec.bypassed
        }
        self._current = threading.local()  # its watch: what the full call is watched for that runs in this thread
        self._views: list[_View] = []  # that no thread uses
        self._observers: list[_Observer] = []

    def is_current(self) -> bool:
        """Whether the module still holds what it held when this was made."""
        originals = self._heads | self._unread | self._lists
        return (
            self._all_blocks() == self._blocks
            and all(self._get(place) is original for place, original in originals.items())
            and all(observer.is_outermost() for observer in self._observers)
        )

    def _all_blocks(self) -> list[nn.Module]:
        return [block for name in self.spec.blocks for block in self._get(name)]

    # ----------------------------------------------------------------------------------------------------- full steps

    def attach(self) -> None:
        """Begin to observe. Until :meth:`watched` is entered, nothing is done with what is seen."""
        observers = [_Observer(self.first, self._enters, self._entered)]
        if self.spec.leaves_by_block:
            observers.append(_Observer(self._blocks[-1], None, self._left_last))
        for stream in self.spec.streams:
            if stream.head is None:
                continue
            head = self._heads[stream.head]
            for part in head.values() if isinstance(head, nn.ModuleDict) else [head]:
                observers.append(_Observer(part, self._enters_head(stream, part), None))
        observers += [_Observer(part, None, self._ran_unread(place)) for place, part in self._unread.items()]
        self._observers = observers

    def detach(self) -> None:
        """Cease to observe, without a trace."""
        for observer in reversed(self._observers):
            observer.remove()
        self._observers = []

    @contextmanager
    def watched(
        self,
        enter: Callable[[dict[str, Any]], None],
        entered: Callable[[dict[str, Any], Any], None],
        leave: Callable[[str, Tensor], None],
        unread: StandIns,
    ) -> Iterator[None]:
        """A full step of this thread.

        Args:
            enter: gets the first block's arguments by name, before it runs.
            entered: gets them and its output, when it has run.
            leave: gets each stream, by name, as it leaves the last block or enters the head.
            unread: into which go stand-ins for what the spec's unread submodules give.
        """
        self._current.watch = _Watch(enter, entered, leave, unread)
        try:
            yield
        finally:
            self._current.watch = None

    @property
    def _watch(self) -> _Watch | None:
        return getattr(self._current, "watch", None)

    # Under torch.compile, the model's code is compiled and these are not: they never look the same twice.

    @uncompiled
    def _enters(self, args: Any, kwargs: Any) -> None:
        watch = self._watch
        if watch is not None:
            watch.arguments = self._named(args, kwargs)
            watch.lengths = self._lengths(watch.arguments)
            watch.enter(watch.arguments)

    @uncompiled
    def _entered(self, *seen: Any) -> None:
        watch = self._watch
        if watch is not None:
            watch.entered(watch.arguments, seen[-1])

    @uncompiled
    def _left_last(self, *seen: Any) -> None:
        watch = self._watch
        if watch is not None:
            streams = self.streams_of(seen[-1])
            for stream in self.spec.streams:
                if stream.head is None:
                    value = streams[stream.argument]
                    if isinstance(seen[-1], Tensor):  # and not text beside it
                        _, value = _behind_text(stream, value, watch.lengths)
                    watch.leave(stream.argument, value)

    def _enters_head(self, stream: Stream, head: nn.Module) -> Callable[[Any, Any], None]:
        @uncompiled
        def enters(args: Any, kwargs: Any) -> None:
            watch = self._watch
            if watch is not None:
                _, tokens = _behind_text(stream, _first_of(head, args, kwargs), watch.lengths)
                watch.leave(stream.argument, tokens)

        return enters

    def _ran_unread(self, place: str) -> Callable[[Any, Any, Any], None]:
        @uncompiled
        def ran(args: Any, kwargs: Any, output: Any) -> None:
            watch = self._watch
            if watch is not None:
                watch.unread[place, _shapes(args, kwargs)] = _stand_in(output)

        return ran

    # ------------------------------------------------------------------------------------------------ predicted steps

    @contextmanager
    def left_out(self, predict: Callable[[dict[str, Any]], Streams], unread: StandIns) -> Iterator[nn.Module]:
        """A predicted step: run the model's forward on the view that this gives.

        Args:
            predict: gets the first block's arguments by name and returns what enters the head.
            unread: where it has a stand-in for what one of the spec's unread submodules would give, that doesn't run.
        """
        try:
            view = self._views.pop()
        except IndexError:
            view = _View(self)
        try:
            with view.of_call(predict, unread) as module:
                yield module
        finally:
            self._views.append(view)

    @contextmanager
    def lent(self, view: nn.Module) -> Iterator[None]:
        """The model itself with the guises of a view in their places, for hosts whose wrappers hold on to the model."""
        originals = self._heads | self._unread | self._lists
        try:
            self._set({place: view.get_submodule(place) for place in originals})
            yield
        finally:
            self._set(originals)

    def _set(self, places: dict[str, nn.Module]) -> None:
        for place, module in places.items():
            parent, _, name = place.rpartition(".")
            self.module.get_submodule(parent)._modules[name] = module

    # -------------------------------------------------------------------------------------------------- what is asked

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

    def first_output(self, arguments: dict[str, Any]) -> Any:
        """What the first block returns. Run beside the model's own pass: the arguments stay as they are."""
        return self.first(**self._copied(arguments))

    def attention_input(self, arguments: dict[str, Any]) -> Tensor:
        """The modulated input: run the first block as far as its attention, or the norm that the spec names.

        The block's own code runs, uncompiled, up to that place and no further, and leaves the arguments as they are.
        """
        first = unwrapped(self.first)
        norm = self.spec.modulated_norm
        place = norm or self.spec.attention
        try:
            children = [first.get_submodule(place)] if place else attentions(first)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"the first block of this {type(self.module).__name__} is a {type(first).__name__} without {place}, by"
                " which TAP chooses: something else has replaced it, another cache perhaps. Remove that, or use"
                " TAPConfig(probe='first_block')"
            ) from error
        thread = threading.get_ident()  # other threads may run this block to its end at the same time

        # Without a third argument while another thread removes the hook.
        def at_attention(_: nn.Module, args: Any, kwargs: Any = None) -> None:
            if threading.get_ident() == thread:
                values = (*args, *(kwargs or {}).values())
                raise _Reached(next(value for value in values if isinstance(value, Tensor)))

        def after_norm(_: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                raise _Reached(output if isinstance(output, Tensor) else output[0])

        with _registering:
            handles = [
                child.register_forward_hook(after_norm)
                if norm
                else child.register_forward_pre_hook(at_attention, with_kwargs=True)
                for child in children
            ]
        watch, self._current.watch = self._watch, None  # this is not the model's own pass
        try:
            first._call_impl(**self._copied(arguments))
        except _Reached as reached:
            return reached.value
        finally:
            self._current.watch = watch
            with _registering:
                for handle in handles:
                    handle.remove()
        hooks = getattr(getattr(first, "_diffusers_hook", None), "hooks", {})
        skipped = [name for name in hooks if "skip" in name.lower()]
        reason = f"is skipped by {skipped[0]}; skip others, or" if skipped else "calls no attention;"
        raise UnsupportedModelError(
            f"the first block of this {type(self.module).__name__} {reason} use TAPConfig(probe='first_block')"
        )

    def _copied(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The first block's arguments, copies in place of those that it passes on: some blocks write into them."""
        passed = {*self.spec.outputs, *(stream.argument for stream in self.spec.streams)}
        return {
            name: value.clone() if name in passed and isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }

    def _lengths(self, arguments: dict[str, Any]) -> dict[str, int]:
        streams = [stream for stream in self.spec.streams if stream.behind_text]
        split = self.split(arguments) if streams else {}
        return {stream.argument: split[stream.argument].shape[1] for stream in streams}

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

    def _get(self, place: str) -> Any:
        found: Any = self.module
        for name in place.split("."):
            if found is None:
                break
            found = found._modules.get(name)  # a third of the time of attributes, and this is asked at every call
        return found


class NotCopied:
    """What is bound to one model, and would go on working for it from a copy of that model."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("a model can't be copied while TAP is enabled on it; call tap.disable(...) first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a model can't be pickled while TAP is enabled on it; call tap.disable(...) first")


class _Observer(NotCopied):
    """Sees what enters and what leaves a module, from outside of what is compiled.

    Args:
        before: gets positional and keyword arguments; None: not of interest.
        after: gets these and the output; likewise.
    """

    def __init__(
        self,
        module: nn.Module,
        before: Callable[[Any, Any], None] | None,
        after: Callable[[Any, Any, Any], None] | None,
    ) -> None:
        self._module, self._before, self._after = module, before, after
        self._handles: list[Any] = []
        self._compiled = module._compiled_call_impl  # by module.compile(), whose graph is to have no hooks in it
        if self._compiled is not None:
            module._compiled_call_impl = self._around
            return
        # Outside of others' hooks, as the guises of a view are.
        if before is not None:
            self._handles.append(module.register_forward_pre_hook(self._pre_hook, prepend=True, with_kwargs=True))
        if after is not None:
            self._handles.append(module.register_forward_hook(self._hook, with_kwargs=True))

    def is_outermost(self) -> bool:
        """Whether the module has not been compiled since, hooks included."""
        now: Any = self._module._compiled_call_impl
        return now is None if self._compiled is None else getattr(now, "__self__", None) is self

    def remove(self) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()
        if self._compiled is not None and self.is_outermost():
            self._module._compiled_call_impl = self._compiled

    def _pre_hook(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        assert self._before is not None
        self._before(args, kwargs)

    def _hook(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        assert self._after is not None
        self._after(args, kwargs, output)

    def _around(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is not None:
            self._before(args, kwargs)
        assert self._compiled is not None
        output = self._compiled(*args, **kwargs)
        if self._after is not None:
            self._after(args, kwargs, output)
        return output


class _View:
    """A transformer without its depth: an object of its class that shares all but a few places with it.

    Args:
        depth: of the transformer.
    """

    def __init__(self, depth: Depth) -> None:
        self._depth = depth
        self._predict: Callable[[dict[str, Any]], Streams]
        self._unread: StandIns
        self._predicted: Streams = {}
        self._lengths: dict[str, int] = {}
        self._places = self._guises()
        self._parts: dict[str, nn.Module] = {}  # objects in the place of the model ("") and of modules on the way
        for place in dict.fromkeys(way for guised in self._places for way in _ways(guised)):
            original = depth._get(place) if place else depth.module
            self._parts[place] = object.__new__(type(original))
            self._parts[place].__dict__.update(original.__dict__, _modules={})

    @contextmanager
    def of_call(self, predict: Callable[[dict[str, Any]], Streams], unread: StandIns) -> Iterator[nn.Module]:
        """The view, for one call."""
        self._predict, self._unread, self._predicted = predict, unread, {}
        before = {place: self._refreshed(place) for place in self._parts}
        for place, module in {**self._parts, **self._places}.items():
            if place:
                parent, _, name = place.rpartition(".")
                self._parts[parent]._modules[name] = module
        try:
            yield self._parts[""]
        finally:
            for place, attributes in before.items():
                self._hand_over(place, attributes)
            del self._predict, self._unread, self._predicted

    def _refreshed(self, place: str) -> dict[str, Any]:
        """Let a part have all attributes and parts of the original; return them."""
        original = self._depth._get(place) if place else self._depth.module
        part = self._parts[place]
        own = part.__dict__
        modules = own["_modules"]
        own.update(original.__dict__, _modules=modules, _compiled_call_impl=None)
        for name, value in original.__dict__.items():
            if ismethod(value) and value.__self__ is original:  # a forward that was replaced, for one
                own[name] = MethodType(value.__func__, part)
        modules.clear()  # in the original's order
        modules.update(original._modules)
        return own.copy()

    def _hand_over(self, place: str, before: dict[str, Any]) -> None:
        """Give the original what the call has set on its view."""
        original = self._depth._get(place) if place else self._depth.module
        for name, value in self._parts[place].__dict__.items():
            if name not in before or before[name] is not value:
                setattr(original, name, value)

    def _guises(self) -> dict[str, nn.Module]:
        """What takes which place."""
        depth, spec = self._depth, self._depth.spec

        @uncompiled
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            arguments = depth._named(args, kwargs)
            self._lengths = depth._lengths(arguments)
            self._predicted.update(self._predict(arguments))
            arguments = depth.split(arguments)
            return depth._as_output({**arguments, **self._predicted} if spec.leaves_by_block else arguments)

        @uncompiled
        def nothing(*args: Any, **kwargs: Any) -> Any:
            return depth._as_output(depth._named(args, kwargs))

        first: dict[str, list[nn.Module]] = {spec.blocks[0]: [Guise(depth.first, stand_in)]}
        others = {spec.blocks[0]: Guise(depth.first, nothing)}
        for name, outputs in spec.bypassed.items():
            block = depth._lists[name][0]
            first[name] = [Guise(block, _pass_through(block, outputs))]
        places: dict[str, nn.Module] = {
            name: _Thinned(first.get(name, []), len(blocks), others.get(name)) for name, blocks in depth._lists.items()
        }
        for stream in spec.streams:
            if stream.head is None:
                continue
            head = depth._heads[stream.head]
            if isinstance(head, nn.ModuleDict):
                places[stream.head] = nn.ModuleDict({k: self._head(stream, m) for k, m in head.items()})
            else:
                places[stream.head] = self._head(stream, head)
        return places | {place: self._replaced(place, module) for place, module in depth._unread.items()}

    def _head(self, stream: Stream, head: nn.Module) -> nn.Module:
        @uncompiled
        def predicted(value: Tensor) -> Tensor:
            if stream.argument not in self._predicted:
                return value
            text, tokens = _behind_text(stream, value, self._lengths)
            new = self._predicted[stream.argument].reshape(tokens.shape).to(tokens.dtype)
            return new if text is None else torch.cat([text, new], dim=1)

        def run(*args: Any, **kwargs: Any) -> Any:
            if args:
                return head(predicted(args[0]), *args[1:], **kwargs)
            name = parameters(type(head).forward)[0]
            return head(**kwargs | {name: predicted(kwargs[name])})

        return Guise(head, run)

    def _replaced(self, place: str, module: nn.Module) -> nn.Module:
        @uncompiled
        def replace(*args: Any, **kwargs: Any) -> Any:
            stand_in = self._unread.get((place, _shapes(args, kwargs)))
            return module(*args, **kwargs) if stand_in is None else stand_in

        return Guise(module, replace)


class _Reached(Exception):
    def __init__(self, value: Tensor) -> None:
        self.value = value


def _ways(place: str) -> list[str]:
    """The modules on the way to a place: of ``a.b.c`` the model itself, ``a`` and ``a.b``."""
    names = place.split(".")
    return [".".join(names[:count]) for count in range(len(names))]


def _first_of(module: nn.Module, args: Any, kwargs: Any) -> Tensor:
    """The first argument of a module, however its caller passes it."""
    value: Tensor = args[0] if args else kwargs[parameters(type(module).forward)[0]]
    return value


def _behind_text(stream: Stream, value: Tensor, lengths: dict[str, int]) -> tuple[Tensor | None, Tensor]:
    """Text and tokens of what enters a head."""
    if not stream.behind_text:
        return None, value
    text, tokens = value.tensor_split([value.shape[1] - lengths[stream.argument]], dim=1)
    return text, tokens


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
