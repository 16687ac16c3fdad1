#!/usr/bin/env bash
# What only a GPU can show, in one command. Runs executables that were built before, with neither cargo nor network:
#
#   scripts/cuda-toolkit.sh target/cuda    # or an installed toolkit
#   export CUDA_HOME=$PWD/target/cuda CUDA_PATH=$CUDA_HOME PATH=$CUDA_HOME/bin:$PATH CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=13000
#   cargo build --release --features cuda
#   cargo test --release --features cuda --test it --no-run      # prints the path of the test executable
#   scripts/gpu-check.sh target/release/prefixd target/release/deps/it-XXXX OUT
#
# 1. The oracles of transformers and PEFT, the golden text and whole training runs, on cuda:0 in f32 and bf16.
# 2. The server on cuda:0, driven by `prefixd bench`: one adapter against 16, and none.
# Writes OUT/oracles.log and OUT/bench-*.json, and prints a table. No figure of it stands in kernels/README.md yet.
set -uo pipefail
prefixd=$(realpath "${1:?usage: scripts/gpu-check.sh PREFIXD TESTS OUT}")
tests=$(realpath "${2:?usage: scripts/gpu-check.sh PREFIXD TESTS OUT}")
out=${3:?usage: scripts/gpu-check.sh PREFIXD TESTS OUT}
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
[ $failed = 0 ] && echo "all of it passed" || echo "something failed: see $out"
exit $failed
