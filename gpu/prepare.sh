#!/usr/bin/env bash
# What a machine without a network lacks, into .gpu (which git ignores): wheels of pure Python, and the pictures that
# the model scenes is trained on.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
pinned() { grep -E "^$1==" constraints.txt; }
mkdir -p .gpu
rm -f .gpu/*.whl
wanted=(
    "$(pinned diffusers)" "$(pinned cache_dit)" importlib-metadata zipp
    "huggingface_hub>=1.32,<2"  # suits both that machine's transformers and diffusers
    requests urllib3 certifi charset-normalizer idna  # which diffusers asks for, and transformers no longer brings along
    torchmetrics lightning-utilities                  # for the bench
    pytest pluggy iniconfig pygments packaging pytest-xdist execnet hypothesis sortedcontainers  # for the kernels' tests
)
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --platform any -d .gpu "${wanted[@]}"
"$PYTHON" -c 'from pathlib import Path; from tap_bench.scenes import load; load(Path(".gpu/scenes"))'
rm -f .gpu/scenes/*.tgz
du -sh .gpu
