#!/usr/bin/env bash
# What only a GPU can show, in one command. Runs executables that were built before, with neither cargo nor network:
#
#   scripts/cuda-toolkit.sh target/cuda    # or an installed toolkit
#   export CUDA_HOME=$PWD/target/cuda CUDA_PATH=$CUDA_HOME PATH=$CUDA_HOME/bin:$PATH CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=13000
#   scripts/gpu-build.sh BINARIES          # prefixd, it, decoder, ops
#   scripts/gpu-check.sh BINARIES OUT [PART...]
#
# Parts, all of them where none is named:
#   oracles    transformers' and PEFT's results, the golden text and whole training runs, on cuda:0 in f32 and bf16
#   sanitizer  compute-sanitizer's memcheck and racecheck on the oracles of one small model
#   ops        each op beside its roofline and cuBLAS; with PYTHON beside torch
#   decode     steps of the shapes of Qwen2-0.5B and Llama 8B at batch 1, 8 and 64, 16 adapters and 1; with PYTHON beside PEFT
#   bench      the server on cuda:0, driven by `prefixd bench`: one adapter against 16
#   serving    with PYTHON: 32 requests over 8 prefix adapters beside PEFT, 32 adapters beside one, a prefix beside none
#
# PYTHON (environment) has torch, transformers and PEFT, for `serving` grpcio and grpcio-tools too. Writes logs and JSON to OUT and prints
# tables. The figures go to kernels/README.md.
set -uo pipefail
binaries=$(realpath "${1:?usage: scripts/gpu-check.sh BINARIES OUT [PART...]}")
mkdir -p "${2:?usage: scripts/gpu-check.sh BINARIES OUT [PART...]}"
out=$(realpath "$2")
shift 2
[ $# -gt 0 ] || set -- oracles sanitizer ops decode bench serving
python=${PYTHON:-}
cd "$(dirname "$0")/.."
failed=0
# cuBLAS and cuRAND as PyPI's packages, where no toolkit is installed.
packages=$("${python:-python3}" -c 'import glob, sysconfig; print(":".join(glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/*/lib")))' 2> /dev/null)
export LD_LIBRARY_PATH="$packages:/usr/local/cuda/lib64:${LD_LIBRARY_PATH:-}"

# run SECONDS NAME COMMAND...: its output in OUT/NAME, the end of it here.
run() {
    local limit=$1 name=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" > "$out/$name" 2>&1
    local status=$?
    [ $status = 0 ] || failed=1
    echo "== $name: status $status, $((SECONDS - start)) s"
}

oracles() {
    for test in oracle_peft golden_text training_oracle sampled_tokens; do
        PREFIXD_TEST_DEVICE=cuda:0 run 100 "$test.log" "$binaries/it" "$test" --nocapture --test-threads 4
        grep -E "^test |largest difference|test result|panicked" "$out/$test.log" | tail -12
    done
}
sanitizer() {
    for tool in memcheck racecheck; do
        PREFIXD_TEST_DEVICE=cuda:0 PREFIXD_TEST_CASES=llama_gqa run 100 "$tool.log" compute-sanitizer --tool "$tool" \
            --error-exitcode 1 "$binaries/it" oracle_peft_in_bf16 --nocapture
        tail -3 "$out/$tool.log"
    done
}
ops() {
    run 100 ops.jsonl "$binaries/ops"
    cut -c1-230 "$out/ops.jsonl"
    [ -n "$python" ] || return
    run 100 torch_ops.jsonl "$python" benches/peers/torch_ops.py --beside "$out/ops.jsonl"
    grep -v '^{' "$out/torch_ops.jsonl"
}
decode() {
    for shape in qwen2-0.5b llama-8b; do
        run 150 "decode-$shape.txt" "$binaries/decoder" device=cuda:0 shape="$shape" rows=1 rows=8 rows=64 rows=512 rows=2048 adapters=16,1 \
            prefix=16 prefix=64 prefix=256 prefix=1024 prefix=16,64,256,1024 --tries 15
        cat "$out/decode-$shape.txt"
        [ -n "$python" ] || continue
        run 150 "peft-decode-$shape.jsonl" "$python" benches/peers/peft_decode.py "$shape"
        cat "$out/peft-decode-$shape.jsonl"
    done
    run 60 decode-eager.txt "$binaries/decoder" device=cuda:0 shape=qwen2-0.5b rows=1 rows=8 rows=64 adapters=16 prefix=64 eager --tries 15
    cat "$out/decode-eager.txt"
}
bench() {
    for adapters in 1 16; do
        run 60 "bench-$adapters.txt" "$binaries/prefixd" bench --device cuda:0 --num-adapters "$adapters" --num-requests 256 --concurrency 64 \
            --save "$out/bench-$adapters.json"
        cat "$out/bench-$adapters.txt"
    done
}
serving() {
    [ -n "$python" ] || return
    for shape in ${SHAPES:-qwen2-0.5b}; do
        local base
        base=$(mktemp -d -p /dev/shm)
        "$python" benches/peers/random_base.py "$shape" "$base/$shape" --device cuda:0
        run 240 "serving-$shape.txt" "$python" benches/peers/serving.py "$base/$shape" --prefixd "$binaries/prefixd" --python "$python" --device cuda:0 \
            --only mixed distinct prefix --rounds 3 --threads "$(nproc)"
        tail -30 "$out/serving-$shape.txt"
        rm -rf "$base"
    done
}

command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/card.txt"
for part in "$@"; do
    $part
done
[ $failed = 0 ] && echo "all of it passed" || echo "something failed: see $out"
exit $failed
