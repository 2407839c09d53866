#!/usr/bin/env bash
# Every figure that the engine owes a GPU, in one go; needs torch and transformers only, weights are random.
#   experiments/benchmarks/gpu.sh OUT_FOLDER [SMALL]
# With a second argument the shapes are tiny and the device is what there is: a rehearsal, on a CPU too.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?the folder for the results}
small=${2:-}
mkdir -p "$out"

run() {
    local name=$1
    shift
    echo "== $name: $*"
    python experiments/benchmarks/engine.py --scratch "$out" --json "$out/$name.json" "$@" | tee "$out/$name.txt"
}

if [ -n "$small" ]; then
    shape() { echo --shape tiny --samples 8 --seqlen 64; }
else
    shape() { echo --shape "$1" --samples 128 --seqlen 2048; }
    python -m pytest -q tests/runtime/test_squared_gradients.py || echo "pytest or triton is missing, or the kernel is wrong"
fi

run 7b $(shape llama2-7b)
run 7b_interleaved $(shape llama2-7b) --schedule interleaved
if [ -z "$small" ]; then
    run 7b_tf32 $(shape llama2-7b) --gradient tf32
    run 7b_float32_two_layers $(shape llama2-7b) --layers 2 --forward float32 --gradient float32
fi
run 7b_host_activations $(shape llama2-7b) --activations host
run 13b $(shape llama2-13b)
run 70b_streaming_four_layers $(shape llama2-70b) --layers 4 --streaming
if [ -n "${WHOLE_70B:-}" ]; then
    run 70b_streaming $(shape llama2-70b) --streaming
fi
