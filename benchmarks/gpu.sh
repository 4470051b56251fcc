#!/usr/bin/env bash
# All measurements on a GPU, in one call: bash benchmarks/gpu.sh [FOLDER FOR THE RESULTS]
# Needs torch 2.11 or newer and what `import ivegan` needs; neither Ray nor MLflow, and no data.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-build/gpu}}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
nvidia-smi > "$out/nvidia-smi.txt"
measure() { # NAME SCRIPT ARGUMENTS…; the last line of the output is JSON
  local name=$1
  shift
  echo "== $name"
  "$python" "$@" --device cuda | tee "$out/$name.txt"
}
bf16="--precision bfloat16"
measure step-mnist benchmarks/step.py mnist $bf16 --rounds 5 --seconds 5
measure step-mnist-float32 benchmarks/step.py mnist
measure step-celeba benchmarks/step.py celeba $bf16 --rounds 3 --seconds 10
measure step-celeba-float32 benchmarks/step.py celeba
measure loader-mnist benchmarks/loader.py mnist $bf16
measure loader-celeba benchmarks/loader.py celeba $bf16
