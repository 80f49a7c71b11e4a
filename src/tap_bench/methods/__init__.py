"""The methods that the bench compares, one file each.

A new one is a file with a list ``METHODS``, named here or given to ``tap bench --methods FILE.py``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tap_bench.method import Method
from tap_bench.methods import (
    cachedit,
    dicache,
    diffusers_caches,
    dpcache,
    easycache,
    first_block_cache,
    forecasters,
    hicache_pp,
    l2p,
    magcache,
    meancache,
    planned,
    racer,
    seacache,
    solvers,
    spectrum,
    tap,
    teacache,
)
from tap_diffusion.core.errors import UsageError

MODULES = (
    tap, forecasters, hicache_pp, spectrum, racer, teacache, seacache, easycache, first_block_cache, magcache, dicache,
    dpcache, l2p, meancache, planned, diffusers_caches, cachedit, solvers,
)  # fmt: skip


def registry() -> dict[str, Method]:
    """All methods that come with the bench, by name."""
    return {method.name: method for module in MODULES for method in module.METHODS}


def load(file: Path) -> dict[str, Method]:
    """The methods of somebody's file, by name.

    Raises:
        UsageError: it can't be imported or has no list ``METHODS``.
    """
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.exists():
        raise UsageError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    methods = getattr(module, "METHODS", None)
    if not isinstance(methods, list) or not all(isinstance(method, Method) for method in methods):
        raise UsageError(f"{file} has no list METHODS of tap_bench.method.Method")
    return {method.name: method for method in methods}
