#!/usr/bin/env bash
# Compiles every kernel: to PTX for compute_80 and to machine code for sm_80, sm_90a and the newest architecture that the toolkit has.
# Prints registers, shared memory and spills of each; a spill fails, unless the kernel's file says why ("spills:" in its header).
# usage: scripts/kernels-check.sh CUDA_HOME
set -euo pipefail
nvcc=$(realpath "${1:?usage: scripts/kernels-check.sh CUDA_HOME}/bin/nvcc")
cd "$(dirname "$0")/../kernels"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
newest=$("$nvcc" --list-gpu-code | grep -o 'sm_[0-9]*' | sort -V | tail -1)
failed=0
# The compilations side by side, then the report in order.
compile() {
    local nvcc=$1 tmp=$2 source=$3 arch=$4
    case $arch in
    compute_*) "$nvcc" -ptx -O3 -std=c++17 -I . -arch="$arch" -o "$tmp/$source.ptx" "$source" > "$tmp/$source.$arch" 2>&1 ;;
    *) "$nvcc" -cubin -O3 -std=c++17 -I . -arch="$arch" -Xptxas -v -o "$tmp/$source.$arch.cubin" "$source" > "$tmp/$source.$arch" 2>&1 ;;
    esac || { cat "$tmp/$source.$arch"; return 255; }
}
export -f compile
for source in *.cu; do
    for arch in compute_80 sm_80 sm_90a "$newest"; do echo "$source $arch"; done
done | xargs -P "$(nproc)" -L 1 bash -c 'compile "$0" "$1" "$2" "$3"' "$nvcc" "$tmp"
for source in *.cu; do
    for arch in sm_80 sm_90a "$newest"; do
        awk -v arch="$arch" '
            /Compiling entry function/ { split($0, part, "'"'"'"); name = part[2] }
            /spill stores/ { spills = $5 + $9; stack = $1 }
            /Used [0-9]+ registers/ {
                shared = 0
                for (i = 1; i <= NF; i++) { if ($i == "registers,") registers = $(i - 1); if ($i ~ /^smem/) shared = $(i - 2) }
                printf "%-8s %-40s %3d registers %6d bytes shared %4d bytes stack %4d bytes spilt\n", arch, name, registers, shared, stack, spills
                total += spills
            }
            END { exit total > 0 }' "$tmp/$source.$arch" || grep -q "spills:" "$source" || { echo "$source spills on $arch"; failed=1; }
    done
done
exit $failed
