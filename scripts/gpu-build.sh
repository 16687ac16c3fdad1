#!/usr/bin/env bash
# Builds what scripts/gpu-check.sh runs, stripped: prefixd, and the executables of the tests and of two benches. The test data goes beside them, as
# a machine with a GPU may have neither. usage: scripts/gpu-build.sh BINARIES
set -euo pipefail
dest=$(realpath -m "${1:?usage: scripts/gpu-build.sh BINARIES}")
given=${PREFIXD_TEST_DATA:+$(realpath -m "$PREFIXD_TEST_DATA")}
cd "$(dirname "$0")/.."
mkdir -p "$dest"
cargo build --locked --release --features cuda --bin prefixd --bench decoder --bench ops --test it --message-format=json-render-diagnostics \
    | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"):
        print(message["target"]["name"], message["executable"])' \
    | while read -r name path; do
        strip -o "$dest/$name" "$path"
    done
for part in peft stories260K; do
    if [ -d "${given:-../shared/data}/$part" ]; then
        mkdir -p "$dest/data"
        cp -r "${given:-../shared/data}/$part" "$dest/data/"
    else
        echo "without ${given:-../shared/data}/$part: gpu-check.sh will skip what needs it" >&2
    fi
done
ls -l "$dest"
