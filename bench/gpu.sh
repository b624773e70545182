#!/usr/bin/env bash
# Everything that one GPU can tell of this repository, in under ten minutes and into one JSON file: whether all paths run
# and compute what a CPU computes, then sampling, training, encoding and K-means at the paper's sizes beside their targets.
#
#   bench/gpu.sh                        # docs/results/NAME.json, NAME that of the GPU
#   bench/gpu.sh FILE.json PART ...     # some parts alone, such as values sample:base
#   PYTHON=python3.12 bench/gpu.sh
#
# Needs this repository and a Python with torch, Triton, numpy, pillow, safetensors and jaxtyping; no network. Every part
# is a process of its own, stopped at its limit, and what has ended is in the file. Without a GPU the same parts run at the
# smallest size on the CPU, into a temporary file, which tries the script.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" bench/gpu.py "$@"
