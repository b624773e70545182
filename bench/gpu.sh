#!/usr/bin/env bash
# Times sampling, training, encoding and K-means at the paper's sizes on one GPU, in under ten minutes.
#
#   bench/gpu.sh                    # docs/results/NAME-SIZE-PART.json, NAME-summary.txt and profiles of missed targets
#   PYTHON=python3.12 bench/gpu.sh OUT_FOLDER
#
# Needs this repository and a Python with torch, numpy, pillow, safetensors and jaxtyping; no network.
# Every part runs in its own process, so that a failure does not affect the others. Without a GPU everything runs at the
# smallest size on the CPU, into a temporary folder, which tests the script.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-600} LIMIT=${LIMIT:-180}  # seconds in total, and for one part; RUNS="base:train" selects parts

# "NVIDIA H100 80GB HBM3" -> h100; empty without a GPU
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 |
  sed 's/^NVIDIA //; s/ .*//' | tr '[:upper:]' '[:lower:]' | tr -cd '[:alnum:]')
if [ -n "$gpu" ]; then
  out=${1:-docs/results} name=$gpu device=cuda
  runs=${RUNS:-base:encode base:kmeans base:sample base:train large:sample large:train}
else
  out=${1:-$(mktemp -d)} name=cpu device=cpu
  runs=${RUNS:-micro:kmeans micro:encode micro:train micro:sample}
fi
mkdir -p "$out" || exit 1

# PART SIZE OPTION...: runs one part, which is stopped after its time limit or the total's
bench() {
  local part=$1 size=$2 left=$((BUDGET - SECONDS))
  shift 2
  [ $left -gt 0 ] || { echo "out of time: $part at $size"; return 124; }
  timeout $((left < LIMIT ? left : LIMIT)) "$PYTHON" -m digit.benchmark "$part" --size "$size" --device $device "$@"
}

failed=0
for run in $runs; do
  size=${run%:*} part=${run#*:}
  file="$out/$name-$size-$part"
  rm -f "$file.json" "$file-profile.txt"
  bench "$part" "$size" --json "$file.json" && continue
  echo "FAILED: $part at $size (exit $?)"
  failed=1
done

summary="$out/$name-summary.txt"
"$PYTHON" -m digit.benchmark.targets "$out" --prefix "$name" | tee "$summary" || failed=1
"$PYTHON" -m digit.benchmark.targets "$out" --prefix "$name" --missed | while read -r part size; do
  bench "$part" "$size" --profile "$out/$name-$size-$part-profile.txt"
done
echo "results: $out"
exit $failed
