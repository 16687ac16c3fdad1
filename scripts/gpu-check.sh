#!/usr/bin/env bash
# What only a GPU can show, in one command. Runs executables that were built before, with neither cargo nor network:
#
#   scripts/cuda-toolkit.sh target/cuda    # or an installed toolkit
#   export CUDA_HOME=$PWD/target/cuda CUDA_PATH=$CUDA_HOME PATH=$CUDA_HOME/bin:$PATH CUDA_COMPUTE_CAP=80 CUDARC_CUDA_VERSION=13000
#   scripts/gpu-build.sh BINARIES          # prefixd, it, decoder, ops, data
#   scripts/gpu-check.sh BINARIES OUT [PART...]
#
# Parts, all of them where none is named, in this order: what says most comes first, as the deadline may leave out the last.
#   oracles    transformers' and PEFT's results, the golden text, sampling and whole training runs, on cuda:0 in f32 and bf16
#   decode     steps of the shapes of Llama 8B and Qwen2-0.5B at batch 1, 8 and 64, 16 adapters and 1; without graphs too
#   ops        each op beside its roofline and cuBLAS
#   sanitizer  compute-sanitizer's memcheck and racecheck on small cases: logits, engine, sampling, training
#   serving    with PYTHON: 32 requests over 8 prefix adapters beside PEFT, 32 adapters beside one, a prefix beside none
#   peers      with PYTHON: torch at the work of `ops`, PEFT at that of `decode`
#   bench      the server on cuda:0, driven by `prefixd bench`: one adapter against 16
#
# Environment: PYTHON has torch, transformers and PEFT, for `serving` grpcio, grpcio-tools, numpy and safetensors too; without it those comparisons
# are skipped. PREFIXD_TEST_DATA holds peft/ and stories260K/; if it is not set, BINARIES/data or ../shared/data does. DEADLINE_S (560) is how long
# all of it may take: what no longer fits is skipped.
#
# Writes logs, summary.json and summary.txt to OUT: each run with what came of it, and each goal with what was reached, by outputs of earlier calls
# too where OUT has them. Ends with 0 if all that was asked for ran and passed, 1 if something failed, 2 if nothing failed and something was
# skipped; a goal that is missed is no failure. The figures go to kernels/README.md.
set -uo pipefail
usage="usage: scripts/gpu-check.sh BINARIES OUT [PART...]"
binaries=$(realpath "${1:?$usage}")
mkdir -p "${2:?$usage}"
out=$(realpath "$2")
shift 2
parts=(oracles decode ops sanitizer serving peers bench)
[ $# -gt 0 ] || set -- "${parts[@]}"
for part in "$@"; do
    [[ " ${parts[*]} " == *" $part "* ]] || { echo "no part is called $part: ${parts[*]}" >&2; exit 64; }
done
deadline=${DEADLINE_S:-560}
python=${PYTHON:-}
data=${PREFIXD_TEST_DATA:+$(realpath -m "$PREFIXD_TEST_DATA")}
cd "$(dirname "$0")/.." || exit
for folder in "$binaries/data" ../shared/data; do
    [ -n "$data" ] || [ ! -d "$folder" ] || data=$(realpath "$folder")
done
export PREFIXD_TEST_DATA=${data:-$binaries/data}
unset PREFIXD_TEST_CASES
# cuBLAS and cuRAND as PyPI's packages, where no toolkit is installed.
packages=$("${python:-python3}" -c 'import glob, sysconfig; print(":".join(glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/*/lib")))' 2> /dev/null)
export LD_LIBRARY_PATH="$packages:/usr/local/cuda/lib64:${LD_LIBRARY_PATH:-}"
# candle's kernels are PTX, which the driver compiles once, if it can write down what came of it: in a home that is read-only, at every start.
export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-${TMPDIR:-/tmp}/prefixd-cuda-cache}
mkdir -p "$CUDA_CACHE_PATH"
results=$out/results.tsv
: > "$results"
rm -f "$out/card.txt"

# note NAME passed|failed|skipped SECONDS [WHY]
note() {
    printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4:-}" >> "$results"
    echo "== $1: $2, $3 s${4:+: $4}"
}
# run SECONDS NAME PATTERN COMMAND...: its output in OUT/NAME. It passes if it ends well and a line matches PATTERN, since a bench that finds no
# card and a test that is not there end well too. With UNABLE (environment): where a line matches that, the machine cannot do it, which is no failure.
run() {
    local most=$1 name=$2 pattern=$3 left=$((deadline - SECONDS)) start=$SECONDS status=0 why=
    shift 3
    rm -f "$out/$name"
    if [ $left -lt 20 ]; then
        note "$name" skipped 0 "no time was left"
        return 1
    fi
    local limit=$((most < left ? most : left))
    timeout -k 5 "$limit" "$@" > "$out/$name" 2>&1 || status=$?
    local took=$((SECONDS - start))
    if [ $status = 0 ] && grep -qE -- "$pattern" "$out/$name"; then
        note "$name" passed $took
        return 0
    elif [ $status = 0 ]; then
        why="nothing was done: no line matches $pattern"
    elif [ -n "${UNABLE:-}" ] && grep -qE -- "$UNABLE" "$out/$name"; then
        note "$name" skipped $took "$(grep -m1 -E -- "$UNABLE" "$out/$name")"
        return 1
    elif [ $status != 124 ] && [ $status != 137 ]; then
        why="status $status"
    elif [ "$limit" -lt "$most" ]; then
        note "$name" skipped $took "stopped by the deadline of $deadline s"
        return 1
    else
        why="not done after $limit s"
    fi
    note "$name" failed $took "$why"
    tail -n 15 "$out/$name"
    return 1
}
# check SECONDS NAME TEST [COMMAND...]: one test of `it` on the GPU, run by COMMAND.
check() {
    local most=$1 name=$2 test=$3
    shift 3
    PREFIXD_TEST_DEVICE=cuda:0 run "$most" "$name.log" '^test result: ok\. 1 passed' "$@" "$binaries/it" --exact "$test" --nocapture --test-threads 1
}
# What a run that may have been cut short did write.
show() {
    [ ! -f "$out/$1" ] || cut -c1-230 "$out/$1"
}
# has NAME MODULE...: whether PYTHON has all of them; else NAME is skipped.
has() {
    local name=$1 missing
    shift
    if [ -z "$python" ]; then
        note "$name" skipped 0 "PYTHON is not set: nothing is compared with torch or PEFT"
        return 1
    fi
    if ! missing=$("$python" -c '
import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
print(*missing)
sys.exit(len(missing))' "$@" 2>&1); then
        note "$name" skipped 0 "$python has no ${missing//$'\n'/ }"
        return 1
    fi
}

# Each test in a process of its own, all at once: what one does to its context is nothing to the others.
oracles() {
    local part
    for part in peft peft/train stories260K; do
        [ -d "$PREFIXD_TEST_DATA/$part" ] || note "data/$part" skipped 0 "not in $PREFIXD_TEST_DATA (PREFIXD_TEST_DATA): what needs it does not run"
    done
    check 150 oracle_peft oracle::oracle_peft &
    check 150 oracle_peft_in_bf16 oracle::oracle_peft_in_bf16 &
    check 150 kv_cache_dtype oracle::oracle_peft_with_halves_of_k_and_v &
    check 150 sampled_tokens sampling::sampled_tokens_follow_from_the_logits &
    check 150 training_oracle_runs training::training_oracle_runs &
    [ ! -d "$PREFIXD_TEST_DATA/stories260K" ] || check 150 golden_text stories::oracle_stories260k_golden_text &
    wait
    local log
    for log in oracle_peft oracle_peft_in_bf16 sampled_tokens training_oracle_runs golden_text; do
        [ ! -f "$out/$log.log" ] || grep -E "largest difference|of the bound|generations|jobs in one batch|characters" "$out/$log.log" | tail -n 4
    done
}
decode() {
    local shape
    for shape in llama-8b qwen2-0.5b; do
        run 150 "decode-$shape.txt" '^decode' "$binaries/decoder" device=cuda:0 shape="$shape" rows=1 rows=8 rows=64 rows=512 rows=2048 adapters=16,1 \
            prefix=16 prefix=64 prefix=256 prefix=1024 prefix=16,64,256,1024 --tries 15
        show "decode-$shape.txt"
    done
    run 60 decode-eager.txt '^decode' "$binaries/decoder" device=cuda:0 shape=qwen2-0.5b rows=1 rows=8 rows=64 adapters=16 prefix=64 eager --tries 15
    show decode-eager.txt
}
ops() {
    run 120 ops.jsonl '"op":"attention"' "$binaries/ops"
    show ops.jsonl
}
# On cases that are in the repository. Calls of the driver that fail are no errors: a kernel is looked for in one module after the other.
sanitizer() {
    if ! command -v compute-sanitizer > /dev/null; then
        note sanitizer skipped 0 "no compute-sanitizer is there"
        return
    fi
    local tool=(compute-sanitizer --error-exitcode 1 --report-api-errors no --tool) UNABLE="Device not supported"
    PREFIXD_TEST_CASES=qwen3_tied check 120 memcheck-logits oracle::oracle_peft_in_bf16 "${tool[@]}" memcheck &
    PREFIXD_TEST_CASES=qwen3_tied check 120 memcheck-engine oracle::oracle_peft "${tool[@]}" memcheck &
    check 120 memcheck-sampling sampling::sampled_tokens_follow_from_the_logits "${tool[@]}" memcheck &
    PREFIXD_TEST_CASES=gemma2-prompt,llama_biases-prefix_cosine check 120 memcheck-training training::training_oracle_runs "${tool[@]}" memcheck &
    PREFIXD_TEST_CASES=qwen3_tied check 120 racecheck-logits oracle::oracle_peft_in_bf16 "${tool[@]}" racecheck &
    PREFIXD_TEST_CASES=qwen3_tied check 120 racecheck-engine oracle::oracle_peft "${tool[@]}" racecheck &
    wait
    grep -hE "ERROR SUMMARY|RACECHECK SUMMARY" "$out"/memcheck-*.log "$out"/racecheck-*.log
}
serving() {
    has serving torch transformers peft grpc grpc_tools numpy safetensors || return
    local shape base
    for shape in ${SHAPES:-qwen2-0.5b}; do
        base=$(mktemp -d -p /dev/shm)
        run 60 "base-$shape.txt" '^made' bash -c '"$@" && echo made' _ "$python" benches/peers/random_base.py "$shape" "$base/$shape" --device cuda:0 \
            && run 200 "serving-$shape.txt" '"part": "mixed"' "$python" benches/peers/serving.py "$base/$shape" --prefixd "$binaries/prefixd" \
                --python "$python" --device cuda:0 --only mixed distinct prefix --rounds 3 --threads "$(nproc)"
        show "serving-$shape.txt" | tail -n 30
        rm -rf "$base"
    done
}
peers() {
    has peers torch transformers peft || return
    local beside=() shape
    [ ! -s "$out/ops.jsonl" ] || beside=(--beside "$out/ops.jsonl")
    run 100 torch_ops.jsonl '"torch_us"' "$python" benches/peers/torch_ops.py "${beside[@]}" && grep -v '^{' "$out/torch_ops.jsonl"
    for shape in qwen2-0.5b llama-8b; do
        run 150 "peft-decode-$shape.jsonl" '"step_ms"' "$python" benches/peers/peft_decode.py "$shape"
        show "peft-decode-$shape.jsonl"
    done
}
bench() {
    local adapters
    for adapters in 1 16; do
        run 60 "bench-$adapters.txt" 'none failed' "$binaries/prefixd" bench --device cuda:0 --num-adapters "$adapters" --num-requests 256 --concurrency 64 \
            --save "$out/bench-$adapters.json"
        show "bench-$adapters.txt"
    done
}

# The tables of all that ran, and of the goals as far as outputs say.
summarise() {
    python3 - "$out" "$SECONDS" "$deadline" "$*" "${parts[*]}" << 'PYTHON' | tee "$out/summary.txt"
import datetime, json, pathlib, re, statistics, sys

out, seconds, deadline, asked = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split()
others = [part for part in sys.argv[5].split() if part not in asked]
read = lambda name: (out / name).read_text(errors="replace") if (out / name).is_file() else ""


def lines_of_json(name):
    for line in read(name).splitlines():
        try:
            yield json.loads(line) if line.startswith("{") else {}
        except ValueError:
            pass  # cut off


runs = [dict(zip(("run", "result", "seconds", "why"), line.split("\t"))) for line in read("results.tsv").splitlines()]
goals = []


def goal(what, wanted, reached, source):
    """`reached`: a figure of each case; the lowest decides."""
    low, high = (min(reached), max(reached)) if reached else (None, None)
    goals.append(dict(goal=what, wanted=wanted, reached=low, highest=high, cases=len(reached), holds=None if low is None else low >= wanted, source=source))


for shape in ("llama-8b", "qwen2-0.5b"):
    name = f"decode-{shape}.txt"
    bandwidth = re.search(r"^([\d.]+) GB/s, peak", read(name), re.M)
    # (rows, adapters, prefix) -> tokens and GB a second
    steps = {(int(n), int(a), prefix): (float(tokens), float(gbps)) for n, a, prefix, tokens, gbps in re.findall(
        r"^decode +(\d+) rows, +(\d+) adapters, prefix \[([\d, ]+)\]:.*?([\d.]+) tokens/s, +([\d.]+) GB/s", read(name), re.M)}
    share = lambda rows, adapters: [gbps / float(bandwidth[1]) for (n, a, _), (_, gbps) in steps.items() if (n, a) == (rows, adapters)]
    goal(f"{shape}: batch 1, share of the bandwidth", 0.70, share(1, 1), name)
    goal(f"{shape}: batch 64 over 16 adapters, share of the bandwidth", 0.60, share(64, 16), name)
    # Of adapters with prefixes of different lengths, the one adapter has the shortest: no comparison.
    goal(f"{shape}: batch 64, 16 adapters beside one", 0.97, [tokens / steps[64, 1, prefix][0] for (n, a, prefix), (tokens, _) in steps.items()
         if (n, a) == (64, 16) and "," not in prefix and (64, 1, prefix) in steps], name)
grouped = {line["shape"]: line["ungrouped_over_own"] for line in lines_of_json("ops.jsonl") if "ungrouped_over_own" in line}
goal("grouped attention beside ungrouped, everywhere", 0.98, list(grouped.values()), "ops.jsonl")
# Of 16 adapters, 64 requests see 3 times what groups read: 4 times is for one.
goal("grouped attention beside ungrouped, 64 requests of one adapter, prefix 1024", 4.0,
     [x for shape, x in grouped.items() if re.match("64 sequences of 1 rows, 1 adapters, prefix 1024", shape)], "ops.jsonl")
served = []
for path in sorted(out.glob("serving-*.txt")):
    sides = {}
    for line in lines_of_json(path.name):
        if line.get("part") == "mixed":
            sides.setdefault(line["side"].split()[0], []).append(line["output_throughput"])
    if {"prefixd", "PEFT"} <= set(sides):
        served.append(statistics.median(sides["prefixd"]) / statistics.median(sides["PEFT"]))
goal("32 requests over 8 adapters, throughput beside PEFT's", 10.0, served, "serving-*.txt")

of = lambda result: [run["run"] for run in runs if run["result"] == result]
card = read("card.txt").strip()
(out / "summary.json").write_text(json.dumps(dict(
    date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), card=card, seconds=seconds, deadline=deadline, asked=asked, not_asked=others,
    failed=of("failed"), skipped=of("skipped"), runs=runs, goals=goals), indent=1))
print(f"\n{card or 'no card was seen'}; {seconds} s of {deadline}; parts: {' '.join(asked)}\n\n| run | result | s | |\n|---|---|---|---|")
for run in runs:
    print(f"| {run['run']} | {run['result'] if run['result'] == 'passed' else run['result'].upper()} | {run['seconds']} | {run['why']} |")
print("\n| goal | wanted | reached (lowest to highest) | |\n|---|---|---|---|")
for g in goals:
    reached = "-" if g["reached"] is None else f"{g['reached']:.3f}" + (f" to {g['highest']:.3f} in {g['cases']} cases" if g["cases"] > 1 else "")
    print(f"| {g['goal']} | {g['wanted']:g} | {reached} | {({True: 'reached', False: 'MISSED', None: 'no figure'})[g['holds']]} |")
missed, open_ = sum(g["holds"] is False for g in goals), sum(g["holds"] is None for g in goals)
print(f"\n{len(of('passed'))} runs passed, {len(of('failed'))} failed, {len(of('skipped'))} skipped; "
      f"of {len(goals)} goals {len(goals) - missed - open_} reached, {missed} missed, {open_} without a figure")
for result in ("failed", "skipped"):
    if of(result):
        print(f"{result.upper()}: {', '.join(of(result))}")
if others:
    print(f"NOT ASKED FOR: {', '.join(others)}")
if runs and not of("failed") and not of("skipped"):
    print("all that was asked for ran and passed" + ("; not all goals are reached" if missed + open_ else ", and every goal is reached"))
sys.exit(1 if of("failed") or not runs else 2 if of("skipped") else 0)
PYTHON
    return "${PIPESTATUS[0]}"
}

# Also where somebody ends it early: what is done is told.
asked=$*
finish() {
    trap - EXIT
    local part
    for part in "${waiting[@]}"; do
        note "$part" skipped 0 "it was ended before"
    done
    summarise "$asked"
    exit $?
}
waiting=("$@")
trap finish EXIT
trap 'exit 143' HUP INT TERM
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/card.txt"
for part in "$@"; do
    $part
    waiting=("${waiting[@]:1}")
done
