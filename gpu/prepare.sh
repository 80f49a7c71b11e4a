#!/usr/bin/env bash
# What a machine without a network lacks, into .gpu (which git ignores): wheels for Linux and its Python, and the
# pictures that the model scenes is trained on.
#   gpu/prepare.sh [PYTHON_VERSION]    of that machine; by default 3.12
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
pinned() { grep -E "^$1==" constraints.txt; }
mkdir -p .gpu
# The hub's package: one that suits both that machine's transformers (below 2) and diffusers (1.32 or later).
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${1:-3.12}" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .gpu \
    "$(pinned diffusers)" "$(pinned cache_dit)" "huggingface_hub>=1.32,<2" importlib-metadata zipp
"$PYTHON" -c 'from pathlib import Path; from tap_bench.scenes import load; load(Path(".gpu/scenes"))'
rm -f .gpu/scenes/*.tgz
du -sh .gpu
