#!/usr/bin/env bash
# Builds what scripts/gpu-check.sh runs, stripped: prefixd, and the executables of the tests and of two benches. usage: scripts/gpu-build.sh BINARIES
set -euo pipefail
dest=${1:?usage: scripts/gpu-build.sh BINARIES}
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
ls -l "$dest"
