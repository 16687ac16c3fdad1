#!/usr/bin/env bash
# A CUDA toolkit and a driver that stand in where there is neither: with them the CUDA path builds, links and runs, on the processor. They need a
# C++ compiler on x86-64. usage: scripts/cuda-stand-in.sh DEST
#
# Then: . DEST/env
#       PREFIXD_TEST_DEVICE=cuda:0 cargo test --features cuda --test it oracle
# nvcc writes empty files; libcuda, libcublas and libcurand are scripts/cuda/driver, where work runs when it is waited for and not before, and
# what a GPU's driver refuses is refused. CUDA_STAND_IN_LOG=1 prints at the end how often each thing was done, CUDA_STAND_IN_MIB is the memory
# of the device (8192), CUDA_STAND_IN_REFUSE=graph has it refuse recordings, memory:N the N-th piece of memory.
set -euo pipefail
dest=${1:?usage: scripts/cuda-stand-in.sh DEST}
mkdir -p "$dest"/{bin,lib64,driver,objects}
dest=$(realpath "$dest")
cd "$(dirname "$0")/.."
rm -f "$dest"/objects/*.o
ln -sf "$PWD/scripts/cuda/nvcc-stand-in" "$dest/bin/nvcc"
python3 scripts/cuda/lazy_libraries.py "$dest/lib64" scripts/cuda/symbols/*.syms
printf '!<arch>\n' > "$dest/lib64/libcudart.a"
mapfile -t flags < <(grep -v "^#" kernels/cpu/flags)
compile() {
    ${CXX:-g++} -O2 -fPIC -mtls-dialect=gnu2 -fvisibility=hidden -Ikernels -Ikernels/cpu -Iscripts/cuda/driver "${@:3}" -c "$2" -o "$1/$(basename "$2").o"
}
export -f compile
printf '%s\n' kernels/*.cu scripts/cuda/driver/*.cpp | xargs -P "$(nproc)" -I{} bash -c 'compile "$@"' _ "$dest/objects" {} "${flags[@]}"
${CXX:-g++} -shared -o "$dest/driver/libcuda.so.1" "$dest"/objects/*.o
ln -sf libcuda.so.1 "$dest/driver/libcublas.so.13"
ln -sf libcuda.so.1 "$dest/driver/libcurand.so.10"
# A compute capability of its own: candle-kernels' build takes what lies in target/ for that of any nvcc.
cat > "$dest/env" << ENV
export PATH="$dest/bin:\$PATH" NVCC=nvcc CUDA_HOME="$dest" CUDA_PATH="$dest" CUDA_COMPUTE_CAP=86 CUDARC_CUDA_VERSION=13000
export CUDA_STAND_IN=1 LD_LIBRARY_PATH="$dest/driver\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
ENV
