#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in the order of its worth, in at most eight minutes: see gpu/README.md.
#   gpu/run.sh [--tiny] [PART ...]    parts: kernels flux compiled peers others memory train
# Each part writes JSON under $OUT as it goes and has seconds of its own. One that fails does not stop the next.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu} LIMIT=${LIMIT:-480} PYTHON=${PYTHON:-python3}
tiny=()
if [ "${1:-}" = --tiny ]; then tiny=(--tiny); shift; fi
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(kernels flux compiled peers others memory)
declare -A seconds=([kernels]=60 [flux]=110 [compiled]=100 [peers]=100 [others]=70 [memory]=40 [train]=480)

mkdir -p "$OUT"
if compgen -G ".gpu/*.whl" > /dev/null; then  # packages that the machine lacks, from gpu/prepare.sh
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .gpu/*.whl
    export PYTHONPATH=/tmp/site
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

measure() {  # part, seconds
    timeout --kill-after=5 "$2" "$PYTHON" -m tap_bench.gpu "$1" --out "$OUT/$1.json" "${tiny[@]}"
}

train() {  # seconds; goes on with the bench's model scenes, and leaves it as one file, with a sheet of samples
    local options=(--work out/gpu-scenes --data .gpu/scenes --from src/tap_bench/weights/scenes)
    [ ${#tiny[@]} -eq 0 ] && options+=(--batch 64 --steps "${STEPS:-6000}" --compile) || options+=(--batch 1 --steps 1)
    "$PYTHON" -m tap_bench.scenes train "${options[@]}" --minutes "$(bc -l <<< "$1 / 60")" --every 500 &&
        "$PYTHON" -m tap_bench.scenes export "${options[@]:0:6}" --to out/gpu-scenes/pipeline &&
        tar -cf "$OUT/scenes.tar" -C out/gpu-scenes pipeline &&
        cp "$(ls out/gpu-scenes/*.png | tail -n 1)" "$OUT/scenes.png"
}

failed=0
for part in "${parts[@]}"; do
    left=$((LIMIT - SECONDS))
    budget=$((left < seconds[$part] ? left : seconds[$part]))
    if [ $budget -lt 15 ]; then echo "$part: no time left"; failed=1; continue; fi
    began=$SECONDS
    if [ "$part" = train ]; then train $((budget - 30)); else measure "$part" "$budget"; fi > "$OUT/$part.log" 2>&1
    status=$?
    [ $status -eq 0 ] || { failed=1; tail -n 5 "$OUT/$part.log"; }
    echo "$part: status $status, $((SECONDS - began)) s of $budget"
done
exit $failed
