#!/usr/bin/env python3
"""Breaks one thing at a time in the kernels, and shows which tests of theirs notice.

usage: scripts/kernels-mutate.py [--only TEXT] [--jobs N]

Builds the kernels as a shared library with every access checked, and the tests of ops against it once (feature `emulate`). Then each
mutation: a change of source, the library built again, the tests named beside it run. Caught: a test fails, or the sanitizer ends it.
Prints a line for each and ends with an error if one is not caught. Needs g++ with libasan and libubsan.
"""
import argparse, concurrent.futures, json, os, pathlib, shutil, subprocess, sys, tempfile

root = pathlib.Path(__file__).resolve().parent.parent
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--only", default="", help="those whose file or description has this text"), p.add_argument("--jobs", type=int, default=os.cpu_count())
a = p.parse_args()

# By file: tests, then (what is wrong, the source as it is, as it is not). A source that stands more than once changes at its first place.
MUTATIONS = {
    "common.cuh": ("ops::gpu::tests::rows::norms", [
        ("the barrier before the parts are read dropped", "if (lane == 0) parts[warp] = v;\n    __syncthreads();", "if (lane == 0) parts[warp] = v;"),
        ("the barrier before the parts are written dropped", "    __syncthreads();  // `parts` may still be read by an earlier call\n", ""),
        ("a warp's sum stops a lane short", "for (int m = 16; m > 0; m >>= 1) v = op", "for (int m = 16; m > 1; m >>= 1) v = op"),
    ]),
    "head.cuh": ("ops::gpu::tests::rows", [
        ("the barrier between store and exchange dropped", "        __syncwarp();\n#pragma unroll\n        for (int i = 0; i < MAX_HEAD / 32; i++) {\n            const int at = i * 32 + (threadIdx.x & 31);\n            if (at >= 2",
         "#pragma unroll\n        for (int i = 0; i < MAX_HEAD / 32; i++) {\n            const int at = i * 32 + (threadIdx.x & 31);\n            if (at >= 2"),
        ("`>` for `>=` at the end of what turns", "if (at >= 2 * half) continue;", "if (at > 2 * half) continue;"),
        ("the pair of the second half is its own", "const int pair = at < half ? at : at - half;", "const int pair = at;"),
        ("the sign of the sine", "v[i] * cosine - shared[at + half] * sine", "v[i] * cosine + shared[at + half] * sine"),
        ("eps left out", "/ dim + eps)", "/ dim)"),
    ]),
    "embed.cu": ("ops::gpu::tests::rows::embeddings", [
        ("`>` for `>=`: token 0 is soft", "from >= 0 ?", "from > 0 ?"),
        ("soft rows off by one", "(size_t)(-1 - from)", "(size_t)(-from)"),
        ("the scale left out", "hidden + i]) * scale :", "hidden + i]) :"),
        ("learned positions by row", "(size_t)positions[row] * hidden", "(size_t)row * hidden"),
        ("`>` for `>=`: the token in place 0 is one of the table", "from >= SAMPLED", "from > SAMPLED"),
        ("the place of a token taken for it", "from = sampled[from - SAMPLED]", "from = from - SAMPLED"),
        ("a row too few in the gradient", "r < starts[s + 1]; r++", "r + 1 < starts[s + 1]; r++"),
    ]),
    "norm.cu": ("ops::gpu::tests::rows::norms", [
        ("the mean left in", "(row[i] - mean) * scale", "row[i] * scale"),
        ("squares not centred", "(row[i] - mean) * (row[i] - mean)", "row[i] * row[i]"),
        ("eps left out", "sqrtf(variance + eps)", "sqrtf(variance)"),
        ("another row's start", "(size_t)blockIdx.x * width", "(size_t)blockIdx.x * (width - 1)"),
    ]),
    "rope.cu": ("ops::gpu::tests::rows", [
        ("v turns too", "if (head < heads + kv_heads) h.turn", "if (head < all) h.turn"),
        ("`<=` for `<` after the last head", "if (index < rows * heads) f", "if (index <= rows * heads) f"),
        ("heads counted as rows", "f(index / heads, index % heads)", "f(index % heads, index / heads)"),
    ]),
    "kv_write.cu": ("ops::gpu::tests::rows", [
        ("the slot taken for the row", "((size_t)slots[row] * kv_heads", "((size_t)row * kv_heads"),
        ("K and V exchanged", "(is_k ? keys : values)", "(is_k ? values : keys)"),
        ("k by q's weight", "is_q ? q_weight : k_weight", "q_weight"),
        ("`>` for `>=` after the last head", "if (index >= rows * all) return;", "if (index > rows * all) return;"),
        ("stored V at K's place", "from[width + i]", "from[i]"),
    ]),
    "add.cu": ("ops::gpu::tests::rows::products", [
        ("`>` for `>=` at the end of a row", "if (column >= width) return;", "if (column > width) return;"),
        ("the bias by row", "bias[column]", "bias[blockIdx.x]"),
    ]),
    "linear.cu": ("ops::linear::rows", [
        ("the barrier before the sum of warps dropped", "    __syncthreads();\n    for (int i = threadIdx.x; i < m * COLUMNS", "    for (int i = threadIdx.x; i < m * COLUMNS"),
        ("rows past the end read", "low[s] = pack_at<WIDE>(x + g * k, g < m ? at : k, k);", "low[s] = pack_at<WIDE>(x + g * k, at, k);"),
        ("columns past the end read", "column < result.n ? at : k, k);", "at, k);"),
        ("columns past the end written", "if (first + column >= result.n) continue;", "if (first + column > result.n) continue;"),
        ("a warp's part left out", "for (int p = 0; p < WARPS; p++)", "for (int p = 1; p < WARPS; p++)"),
        ("a stride of shared memory", "STRIDE = COLUMNS + 8", "STRIDE = COLUMNS - 1"),
        ("alignment not asked", "((size_t)x | (size_t)w) % 16 == 0", "true"),
        ("rows 8 and on taken for the first", "(g + e / 2 * 8) * STRIDE", "(g + e % 2 * 8) * STRIDE"),
        ("the bias left out", "if (bias) sum += bias[column];", ""),
        ("a lane's sum alone (f32)", "const float sum = warp_reduce(sums[r][c], SumOp());", "const float sum = sums[r][c];"),
    ]),
    "activation.cu": ("ops::activation::device", [
        ("the gate's other half", "up ? f * to_float(b.v[i]) : f", "up ? f * to_float(a.v[i]) : f"),
        ("the tail as a whole pack", "if (i < count) p[i] = v.v[i];", "p[i] = v.v[i];"),
    ]),
    "mma.cuh": ("ops::linear::rows", [
        ("halves of a pair exchanged", "{From<T>::f32(low), From<T>::f32(high)}", "{From<T>::f32(high), From<T>::f32(low)}", "ops::prefix_attention::device"),
        ("low halves for high ones", "0x7632", "0x5410", "ops::prefix_attention::device"),
    ]),
    "prefix_attention.cu": ("ops::prefix_attention::device", [
        ("a row of no parts combined", "if (head >= a.heads || r.count == 0) return;", "if (head >= a.heads) return;"),
        ("the barrier after Q is laid out dropped", "            to[32] = uint4{x.z, y.z, x.w, y.w};\n        }\n        __syncthreads();", "            to[32] = uint4{x.z, y.z, x.w, y.w};\n        }"),
        ("the barrier before quarters are merged dropped", "            __syncthreads();\n            if (base == 0) {", "            if (base == 0) {"),
        ("the barrier after the weights dropped", "                    state[v] = s;\n                }\n                __syncthreads();", "                    state[v] = s;\n                }"),
        ("the barrier before the stage is used again dropped", "                    to = merge4(to, o, w[0][WARPS], w[1][WARPS]);\n                }\n            }\n            __syncthreads();",
         "                    to = merge4(to, o, w[0][WARPS], w[1][WARPS]);\n                }\n            }"),
        ("`<=` for `<` in what a row sees", "- range.x < range.y ?", "- range.x <= range.y ?"),
        ("all of a page seen where a row sees a part", "const bool masked = slot < all_lo || slot + PAGE > all_hi;", "const bool masked = slot < all_lo;"),
        ("the first slot of a window forgotten", "const bool masked = slot < all_lo || slot + PAGE > all_hi;", "const bool masked = slot + PAGE > all_hi;"),
        ("keys nobody sees are read", "const bool there[2] = {slot + g >= lo && slot + g < hi,", "const bool there[2] = {true,"),
        ("V nobody sees is read", "there[i] = slot + key[i] >= lo && slot + key[i] < hi;", "there[i] = true;"),
        ("the maximum of half a row", "            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));\n", ""),
        ("the sum of half a row", "                x.l[r][h] += __shfl_xor_sync(FULL_WARP, x.l[r][h], 2);\n", ""),
        ("what was summed not rescaled", "x.o[r][j][i] *= factor[i / 2];", "x.o[r][j][i] *= 1.f;"),
        ("rescaled by the other row's factor", "x.o[r][j][i] *= factor[i / 2];", "x.o[r][j][i] *= factor[i % 2];"),
        ("the cap left out", "cap > 0.f ? cap * tanhf(s / cap) : s", "s"),
        ("spans merged without rescaling", "a = float2{m, fmaf(b.y, w.y, a.y * w.x)};", "a = float2{m, b.y + a.y};"),
        ("another KV head", "(size_t)entry * stride + (size_t)blockIdx.y * a.dim", "(size_t)entry * stride"),
        ("a page of the other part", "a.tables + u.table[span.part] + first + lane", "a.tables + u.table[0] + first + lane"),
        ("own spans start where the prefix ends", "start((index - (part ? u.prefix_spans : 0)) * SPAN)", "start(index * SPAN)"),
        ("partial results at another span", "(size_t)(r.partial + index) * a.heads + a.head(u, v);\n            float4*", "(size_t)r.partial * a.heads + a.head(u, v);\n            float4*"),
        ("rows that see nothing written", "if (max(r.lo[span.part], span.start) >= min(r.hi[span.part], span.start + SPAN)) continue;", ""),
        ("combine leaves out a span", "for (int k = 0; k < r.count; k++)", "for (int k = 0; k + 1 < r.count; k++)"),
        ("a sum of nothing is divided by", "From<T>::f32(s.y == 0.f ? 0.f : merged(v, d + e) * factor)", "From<T>::f32(merged(v, d + e) * factor)"),
        ("V's columns in their order", "const int f = v / 16 * NT + c / 8 + x % width, l = v % 8 * 4 + column / 2;", "const int f = v / 16 * NT + c / 8 + column, l = v % 8 * 4 + x % width / 2;"),
        ("the barrier around p dropped (f32)", "                p[lane] = weight;\n                __syncwarp();", "                p[lane] = weight;"),
        ("query heads of one row only", "return blockIdx.y * (heads / kv_heads) + u.head + v % u.heads;", "return blockIdx.y * (heads / kv_heads) + u.head;"),
    ]),
    "sample.cu": ("ops::sample::device", [
        ("the barrier before the parts are read dropped", "    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = v;\n    __syncthreads();", "    if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = v;"),
        ("the barrier before `found` is reset dropped", "    __syncthreads();  // before a next call resets it\n", ""),
        ("the barrier after a histogram dropped", "        if (w) h.add(digit(key, level), signed_by(how, w));\n    });\n    __syncthreads();", "        if (w) h.add(digit(key, level), signed_by(how, w));\n    });"),
        ("the carry forgotten", "(unsigned)(v >> 32) + (old + part < old)", "(unsigned)(v >> 32)"),
        ("the higher id wins a tie", "| ~(unsigned)id;\n        // Few", "| (unsigned)id;\n        // Few"),
        ("changed tokens count twice", "return visit == OFF ? 0 - v : v;", "return visit == OFF ? 0 : v;"),
        ("the repetition penalty of negative logits", "x > 0.f ? __fdiv_rn(x, repetition) : __fmul_rn(x, repetition)", "__fdiv_rn(x, repetition)"),
        ("`<=` for `<` at top-k's last", "key < floor ? 0 :", "key <= floor ? 0 :"),
        ("equals after the k-th kept", "block_reduce_u64(sum, Plus()) - spare;", "block_reduce_u64(sum, Plus());"),
        ("min-p above the best", "if (w >= least) likely", "if (w > least) likely"),
        ("top-p rounded down", "ceil((double)c.top_p * (double)total)", "floor((double)c.top_p * (double)total)"),
        ("the draw one unit further", "place(row, first, scratch, weigh, target + 1)", "place(row, first, scratch, weigh, target + 2)"),
        ("a row too far", "logits + (size_t)c.row * vocab", "logits + (size_t)(c.row + 1) * vocab"),
        ("a token that is not read counts as one that was seen", "change.count + (change.id == row.pending && change.count != BANNED)", "change.count"),
        ("a token that is not read lifts its ban", "(change.id == row.pending && change.count != BANNED)", "(change.id == row.pending)"),
        ("a token that is not read is changed twice", " && !row.is_listed(row.pending)) {", ") {"),
        ("a token that is not read by its place", "BANNED : before[c.pending]", "BANNED : c.pending"),
        ("a token that is not read may be the best unchanged", "return id == pending || is_listed(id);", "return is_listed(id);"),
        ("the order of the best", "rank += best_few[i] > own", "rank += best_few[i] < own"),
    ]),
    "norm_backward.cu": ("ops::norm::device", [("eps left out", "/ width + eps)", "/ width)")]),
    "cross_entropy.cu": ("ops::cross_entropy::device", [("the first barrier dropped", "__syncthreads();", "")]),
    "prefix_attention_backward.cu": ("ops::prefix_attention::packed::device", [("the first barrier dropped", "__syncthreads();", "")]),
}

FLAGS = [flag for flag in (root / "kernels/cpu/flags").read_text().splitlines() if not flag.startswith("#")]
FLAGS += ["-O1", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-w"]
work = root / "target/mutate"
work.mkdir(parents=True, exist_ok=True)


def compile(source, out, name):
    """The file `name` of the folder `source`."""
    to = out / (name + ".o")
    subprocess.run(["g++", *FLAGS, "-I", source, "-I", source / "cpu", "-c", source / name, "-o", to], check=True, capture_output=True, text=True)


def reads(name, header):
    """Whether a file includes `header`; all kernels have common.cuh by another one or themselves."""
    return f'"{header}"' in (root / "kernels" / name).read_text() or header == "common.cuh" and name.endswith(".cu")


def link(objects, out):
    subprocess.run(["g++", "-shared", "-fsanitize=address,undefined", "-o", out / "libprefixd_kernels.so", *objects], check=True, capture_output=True, text=True)


names = sorted(f.name for f in (root / "kernels").glob("*.cu")) + ["cpu/emulate.cpp"]
(work / "cpu").mkdir(exist_ok=True)
with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
    list(pool.map(lambda name: compile(root / "kernels", work, name), names))
link([work / (name + ".o") for name in names], work)
built = subprocess.run(["cargo", "test", "--locked", "--features", "emulate", "--lib", "--no-run", "--message-format=json"], cwd=root,
                       env={**os.environ, "PREFIXD_KERNELS_DIR": str(work)}, stdout=subprocess.PIPE, text=True, check=True)
messages = [json.loads(line) for line in built.stdout.splitlines() if line.startswith("{")]
tests = next(m["executable"] for m in messages if m.get("executable") and m["target"]["kind"] == ["lib"])
asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()


def run(library, filter):
    """The first sign of a failure, or None."""
    env = {**os.environ, "LD_LIBRARY_PATH": str(library), "LD_PRELOAD": asan, "RUST_BACKTRACE": "0",
           "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    try:
        done = subprocess.run([tests, filter], cwd=root, env=env, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "it does not end"
    text = done.stdout + done.stderr
    if done.returncode == 0:
        return None if " 0 passed" not in text else sys.exit(f"{filter}: no test")
    lines = text.splitlines()
    said = [l for l in lines if "AddressSanitizer:" in l or "runtime error" in l]
    said += [lines[i + 1] for i, l in enumerate(lines[:-1]) if "panicked at" in l]
    return (said or [f"status {done.returncode}"])[0].strip()[:90]


def mutate(file, filter, what, before, after):
    source = (root / "kernels" / file).read_text()
    if before not in source:
        sys.exit(f"{file}: {what}: the source is not there any more")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        folder = pathlib.Path(folder)
        shutil.copytree(root / "kernels", folder / "kernels")
        (folder / "kernels" / file).write_text(source.replace(before, after, 1))
        (folder / "cpu").mkdir()
        changed = [n for n in names if n == file or reads(n, file)]
        try:
            for name in changed:
                compile(folder / "kernels", folder, name)
        except subprocess.CalledProcessError as e:
            sys.exit(f"{file}: {what}: {e.stderr}")
        link([(folder if name in changed else work) / (name + ".o") for name in names], folder)
        return run(folder, filter)


todo = [(file, m[3] if len(m) > 3 else tests_of, *m[:3]) for file, (tests_of, all) in MUTATIONS.items() for m in all]
todo = [m for m in todo if a.only in m[0] or a.only in m[2]]
for filter in sorted({m[1] for m in todo}):
    if (said := run(work, filter)) is not None:
        sys.exit(f"{filter} fails as it is: {said}")
missed = 0
with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
    for (file, _, what, *_), said in zip(todo, pool.map(lambda m: mutate(*m), todo)):
        missed += said is None
        print(f"{file}: {what}: {said or 'NOT CAUGHT'}", flush=True)
print(f"{len(todo) - missed} of {len(todo)} are caught")
sys.exit(missed > 0)
