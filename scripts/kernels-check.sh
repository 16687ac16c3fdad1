#!/usr/bin/env bash
# Compiles every kernel: to PTX for compute_80 and to machine code for sm_80, sm_90a and the newest architecture that the toolkit has.
# Prints registers, shared memory and spills of each; a spill fails, unless the kernel's file says why ("spills:" in its header).
# usage: scripts/kernels-check.sh CUDA_HOME
set -euo pipefail
nvcc=${1:?usage: scripts/kernels-check.sh CUDA_HOME}/bin/nvcc
cd "$(dirname "$0")/../kernels"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
newest=$("$nvcc" --list-gpu-code | grep -o 'sm_[0-9]*' | sort -V | tail -1)
failed=0
for source in *.cu; do
    "$nvcc" -ptx -O3 -std=c++17 -I . -arch=compute_80 -o "$tmp/x.ptx" "$source"
    for arch in sm_80 sm_90a "$newest"; do
        "$nvcc" -cubin -O3 -std=c++17 -I . -arch="$arch" -Xptxas -v -o "$tmp/x.cubin" "$source" > "$tmp/log" 2>&1 || { cat "$tmp/log"; exit 1; }
        awk -v arch="$arch" '
            /Compiling entry function/ { split($0, part, "'"'"'"); name = part[2] }
            /spill stores/ { spills = $5 + $9; stack = $1 }
            /Used [0-9]+ registers/ {
                shared = 0
                for (i = 1; i <= NF; i++) { if ($i == "registers,") registers = $(i - 1); if ($i ~ /^smem/) shared = $(i - 2) }
                printf "%-8s %-40s %3d registers %6d bytes shared %4d bytes stack %4d bytes spilt\n", arch, name, registers, shared, stack, spills
                total += spills
            }
            END { exit total > 0 }' "$tmp/log" || grep -q "spills:" "$source" || { echo "$source spills on $arch"; failed=1; }
    done
done
exit $failed
