"""The table of models: every transformer class that diffusers exports, and what TAP does with it."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import diffusers

from tap_diffusion.integrations.specs import REFUSED, SPECS

_CLASS_NAME = re.compile(r"(?!.*ControlNet)\w*(Transformer|DiT)\w*?(Model|Transformer)|\w+Transformer")


@dataclass(frozen=True)
class Entry:
    """One class.

    Attributes:
        pipelines: classes of diffusers that take it as a component.
        status: "works", "refused", or "unknown" for classes of a newer diffusers.
        probe: what the proxy loss compares.
        stream: the first block's argument that is predicted.
        note: the reason of a refusal, or what else to know.
    """

    name: str
    pipelines: tuple[str, ...]
    status: str
    probe: str = ""
    stream: str = ""
    note: str = ""

    @property
    def families(self) -> tuple[str, ...]:
        """The pipelines without the word."""
        return tuple(name.removesuffix("Pipeline") for name in self.pipelines)

    def to_dict(self) -> dict[str, object]:
        """As JSON takes it."""
        return asdict(self) | {"pipelines": list(self.pipelines)}


def catalog() -> list[Entry]:
    """All entries that this version of diffusers has, by name. Reads its source, but imports none of its models."""
    pipelines = _pipelines_by_component()
    names = {name for name in dir(diffusers) if _CLASS_NAME.fullmatch(name) or name in SPECS or name in REFUSED}
    return [_entry(name, tuple(sorted(pipelines[name]))) for name in sorted(names)]


def absent() -> list[str]:
    """Classes that TAP knows and this version of diffusers has not yet, by name."""
    return sorted({*SPECS, *REFUSED}.difference(dir(diffusers)))


def _entry(name: str, pipelines: tuple[str, ...]) -> Entry:
    if name in SPECS:
        spec = SPECS[name]
        probe = "modulated input" if spec.probe else "first block"
        return Entry(name, pipelines, "works", probe, ", ".join(s.argument for s in spec.streams), spec.note)
    return Entry(name, pipelines, "refused" if name in REFUSED else "unknown", note=REFUSED.get(name, ""))


@cache
def _pipelines_by_component() -> dict[str, set[str]]:
    """Pipeline classes by the class names in the annotations of their constructors."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for file in sorted((Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py")):
        for pipeline, annotation in _annotations(ast.parse(file.read_text(encoding="utf-8"))):
            for node in ast.walk(annotation):
                if isinstance(node, ast.Name):
                    found[node.id].add(pipeline)
    return found


def _annotations(module: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in module.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                for argument in method.args.args:
                    if argument.annotation is not None:
                        yield node.name, argument.annotation


def as_markdown(entries: list[Entry]) -> str:
    """The lists of docs/models.md by class: what works, and what doesn't."""
    works = [entry for entry in entries if entry.status == "works"]
    others = [entry for entry in entries if entry.status != "works"]
    lines = [
        *(f"- `{e.name}`: {', '.join(e.families) or 'no pipeline'}{e.note and f'. {e.note}'}" for e in works),
        "",
        "Not accelerated:",
        "",
        *(f"- `{entry.name}`: {entry.note or 'not known'}" for entry in others),
    ]
    return "\n".join(lines) + "\n"
