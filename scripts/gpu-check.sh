#!/usr/bin/env bash
# What only a GPU can show, in one command. Runs executables that were built before, with neither cargo nor network:
#
#   scripts/cuda-toolkit.sh target/cuda    # or an installed toolkit
#   export CUDA_HOME=$PWD/target/cuda CUDA_PATH=$CUDA_HOME PATH=$CUDA_HOME/bin:$PATH CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=13000
#   cargo build --release --features cuda
#   cargo test --release --features cuda --test it --no-run      # prints the path of the test executable
#   scripts/gpu-check.sh target/release/prefixd target/release/deps/it-XXXX OUT [PYTHON]
#
# 1. The oracles of transformers and PEFT, the golden text and whole training runs, on cuda:0 in f32 and bf16.
# 2. The server on cuda:0, driven by `prefixd bench`: one adapter against 16.
# 3. With PYTHON, which has torch, transformers, PEFT, grpcio and grpcio-tools: random bases of the shapes of Qwen2-0.5B and Llama 8B, made on
#    the card; 32 requests over 8 prefix adapters beside PEFT, 32 adapters beside one, a prefix beside none (benches/peers/serving.py).
# Writes OUT/oracles.log, OUT/bench-*.json and OUT/serving-*.txt, and prints tables. No figure of it stands in kernels/README.md yet.
set -uo pipefail
prefixd=$(realpath "${1:?usage: scripts/gpu-check.sh PREFIXD TESTS OUT [PYTHON]}")
tests=$(realpath "${2:?usage: scripts/gpu-check.sh PREFIXD TESTS OUT [PYTHON]}")
out=${3:?usage: scripts/gpu-check.sh PREFIXD TESTS OUT [PYTHON]}
python=${4:-}
peers=$(dirname "$0")/../benches/peers
mkdir -p "$out"
failed=0
# cuBLAS and cuRAND as PyPI's packages, where no toolkit is installed.
packages=$(python3 -c 'import glob, sysconfig; print(":".join(glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/*/lib")))' 2> /dev/null)
export LD_LIBRARY_PATH="$packages:${LD_LIBRARY_PATH:-}"
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/card.txt"
PREFIXD_TEST_DEVICE=cuda:0 timeout 300 "$tests" oracle --nocapture > "$out/oracles.log" 2>&1 || failed=1
grep -E "^test |largest difference|test result" "$out/oracles.log" | tail -40
for adapters in 1 16; do
    timeout 120 "$prefixd" bench --device cuda:0 --num-adapters "$adapters" --num-requests 256 --concurrency 64 --save "$out/bench-$adapters.json" \
        | tee "$out/bench-$adapters.txt" || failed=1
done
for shape in ${python:+qwen2-0.5b llama-8b}; do
    base=$(mktemp -d)
    "$python" "$peers/random_base.py" "$shape" "$base/$shape" --device cuda:0 \
        && timeout 200 "$python" "$peers/serving.py" "$base/$shape" --prefixd "$prefixd" --python "$python" --device cuda:0 --only mixed distinct prefix \
            --rounds 3 --threads "$(nproc)" | tee "$out/serving-$shape.txt" || failed=1
    rm -rf "$base"
done
[ $failed = 0 ] && echo "all of it passed" || echo "something failed: see $out"
exit $failed
