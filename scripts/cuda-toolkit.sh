#!/usr/bin/env bash
# Assembles a CUDA 13.0 toolkit from PyPI wheels: no root, no GPU, no driver. usage: scripts/cuda-toolkit.sh DEST
#
# Then: export CUDA_HOME=DEST CUDA_PATH=DEST PATH="DEST/bin:$PATH" CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=13000
#       cargo build --release --features cuda
# The executable starts where no driver is: libcuda and the like are opened at the first call (scripts/cuda/lazy_libraries.py).
set -euo pipefail
dest=${1:?usage: scripts/cuda-toolkit.sh DEST}
here=$(cd "$(dirname "$0")" && pwd)
if [ -e "$dest/.complete" ]; then
    echo "$dest is there"
    exit 0
fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install --quiet --no-deps --no-compile --disable-pip-version-check --target "$tmp/site" \
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 \
    2> "$tmp/pip.log" || { cat "$tmp/pip.log" >&2; exit 1; }
rm -rf "$dest"
mkdir -p "$(dirname "$dest")"
mv "$tmp/site/nvidia/cu13" "$dest"
ln -s lib "$dest/lib64"
# -lcudart is the static one, so that nothing needs libcudart.so.
cp "$dest/lib/libcudart_static.a" "$dest/lib/libcudart.a"
python3 "$here/cuda/lazy_libraries.py" "$dest/lib" "$here"/cuda/symbols/*.syms
"$dest/bin/nvcc" --version | tail -2
touch "$dest/.complete"
