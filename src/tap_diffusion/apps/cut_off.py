"""Prompts that are too long for a model: which of them its tokenizers cut off, and where.

Pipelines differ in how many tokens they take and by what option; some warn of it, others don't. So the tokenizers
themselves are watched while the pipeline runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

_QUOTED = 40  # characters of a prompt


class CutOff:
    """What tokenizers cut off.

    Args:
        texts: the prompts, a negative one among them.
        limit: tokens that the pipeline uses of a prompt, whatever its tokenizers give; None: all.
    """

    def __init__(self, texts: Sequence[str], limit: int | None = None) -> None:
        self._texts, self._limit = texts, limit
        self._found: dict[str, dict[str, tuple[int, int]]] = {}  # text -> tokenizer -> tokens kept, and all

    def messages(self) -> list[str]:
        """One line for each prompt that was cut off."""
        lines = []
        for text in self._found:
            shown = text if len(text) <= _QUOTED else text[:_QUOTED].rstrip() + "…"
            lines.append(f'the prompt "{shown}" is too long and was cut off: {self.of(text)}')
        return lines

    def of(self, text: str) -> str | None:
        """How many tokens each tokenizer kept of a prompt; None where it was not cut off."""
        found = self._found.get(text, {})
        return ", ".join(f"{name} kept {kept} of {whole} tokens" for name, (kept, whole) in found.items()) or None

    def note(self, name: str, count: Any, text: str, cap: int | None, special: bool) -> None:
        """Note that a tokenizer was given a text.

        Args:
            count: (text, whether with the special tokens) -> number of tokens.
            cap: tokens that it may give; None: any number.
            special: whether it adds special tokens.
        """
        prompt = self._prompt_in(text)
        whole = count(text, special)
        kept = whole if cap is None else min(whole, cap)
        if prompt is not None and self._limit is not None and (own := count(prompt, False)) > self._limit:
            # Some pipelines cut the embeddings, and not the tokens, which may be those of a template around the prompt.
            kept, whole = min((kept, whole), (self._limit, own))
        if kept < whole:
            by_tokenizer = self._found.setdefault(prompt or text, {})
            # The fewest of several calls: pipelines ask for all tokens too, to tell what they left out.
            by_tokenizer[name] = min((kept, whole), by_tokenizer.get(name, (kept, whole)))

    def _prompt_in(self, text: str) -> str | None:
        """The longest prompt that a text holds: pipelines put templates around prompts, and clean them."""
        plain = _plain(text)
        found = [prompt for prompt in self._texts if prompt and _plain(prompt) in plain]
        return max(found, key=len, default=None)


@contextmanager
def watched(pipe: Any, texts: Sequence[str], limit: int | None = None) -> Iterator[CutOff]:
    """Within this, what the pipeline's tokenizers cut off is noted."""
    found = CutOff(texts, limit)
    watching: list[Any] = []
    with ExitStack() as stack:
        for name, part in getattr(pipe, "components", {}).items():
            tokenizer = getattr(part, "tokenizer", part)  # a processor has one
            if isinstance(tokenizer, PreTrainedTokenizerBase) and not any(tokenizer is other for other in watching):
                watching.append(tokenizer)
                stack.enter_context(_watching(tokenizer, f"{name} ({type(tokenizer).__name__})", found))
        yield found


@contextmanager
def _watching(tokenizer: Any, name: str, found: CutOff) -> Iterator[None]:
    kind = type(tokenizer)

    def call(self: Any, text: Any = None, *args: Any, **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        if isinstance(texts, list | tuple) and all(isinstance(one, str) for one in texts):
            cap = (options.get("max_length") or self.model_max_length) if options.get("truncation") else None
            for one in texts:
                found.note(name, count, one, cap, options.get("add_special_tokens", True))
        return kind.__call__(self, text, *args, **options)

    def count(text: str, special: bool) -> int:
        return len(kind.__call__(tokenizer, text, add_special_tokens=special, verbose=False)["input_ids"])

    # Python looks for __call__ in the class. A class of its own leaves other tokenizers alone, and passes isinstance.
    tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    try:
        yield
    finally:
        tokenizer.__class__ = kind


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
