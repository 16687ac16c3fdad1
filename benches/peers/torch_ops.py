#!/usr/bin/env python3
"""torch at the work of `benches/ops.rs`: the same shapes and names, a cold L2, the card's own events. One JSON object a line.

usage: torch_ops.py [--device cuda:0] [--tries 15] [--beside OPS_JSONL]

Attention is scaled_dot_product_attention over K and V of each request, laid out beforehand: torch has no shared prefix. A product is what
F.linear calls. With `--beside`, which holds what `cargo bench --bench ops` printed, a table of ratios follows: torch's time over ours.

Needs: torch, a GPU.
"""
import argparse, json, pathlib, statistics

import torch
import torch.nn.functional as F

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--device", default="cuda:0"), p.add_argument("--tries", type=int, default=15), p.add_argument("--beside", type=pathlib.Path)
a = p.parse_args()
device, bf16 = torch.device(a.device), torch.bfloat16
torch.set_grad_enabled(False)
torch.set_default_device(device)
HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, DIM, OWN = 4096, 14336, 128256, 32, 8, 128, 128
# 512 MiB that are read between two calls: what is written would still be on its way to memory while the next one is timed.
flush = torch.zeros((1 << 15, 1 << 13), dtype=torch.bfloat16)
found = {}


def report(op, shape, work):
    """Median of the microseconds that `work` takes."""
    for _ in range(3):
        work()
    times = []
    for _ in range(a.tries):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.sum(1)
        begin.record(), work(), end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    found[op, shape] = statistics.median(times)
    print(json.dumps(dict(op=op, shape=shape, torch_us=round(found[op, shape], 3))))


for name, n, k in (("qkv", HIDDEN + 2 * KV_HEADS * DIM, HIDDEN), ("o", HIDDEN, HIDDEN), ("up", 2 * INNER, HIDDEN), ("down", HIDDEN, INNER), ("head", VOCAB, HIDDEN)):
    w = torch.randn(n, k, dtype=bf16)
    for m in (1, 4, 8, 16, 32, 64, 512):
        x = torch.randn(m, k, dtype=bf16)
        report("linear", f"{name} {m} x {n} x {k}", lambda: F.linear(x, w))
    del w

decode = [(n, adapters, prefix, 1) for n, adapters in ((64, 16), (64, 1), (1, 1)) for prefix in (16, 64, 256, 1024)]
for n, adapters, prefix, rows in decode + [(1, 1, 0, 512), (8, 8, 64, 128), (1, 1, 0, 2048), (1, 1, 4096, 1), (8, 8, 4096, 1), (64, 64, 256, 1)]:
    length = prefix + OWN + rows
    q = torch.randn(n, HEADS, rows, DIM, dtype=bf16)
    key, value = (torch.randn(n, KV_HEADS, length, DIM, dtype=bf16) for _ in range(2))
    mask = None if rows == 1 else torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
    shape = f"{n} sequences of {rows} rows, {adapters} adapters, prefix {prefix}, own {OWN}"
    report("attention", shape, lambda: F.scaled_dot_product_attention(q, key, value, attn_mask=mask, enable_gqa=True))
    del key, value

weight, table = torch.ones(HIDDEN, dtype=bf16), torch.randn(VOCAB, HIDDEN, dtype=bf16)
for m in (1, 64, 512):
    x, up, ids = torch.randn(m, HIDDEN, dtype=bf16), torch.randn(m, 2 * INNER, dtype=bf16), torch.arange(m)
    report("norm", f"{m} x {HIDDEN}", lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-5))
    report("activation", f"{m} x {INNER}", lambda: F.silu(up[:, :INNER]) * up[:, INNER:])
    report("embed", f"{m} x {HIDDEN}", lambda: F.embedding(ids, table))
    if m <= 64:
        logits = torch.randn(m, VOCAB) * 3
        report("sample", f"{m} x {VOCAB}, greedy", lambda: logits.argmax(-1))
        report("sample", f"{m} x {VOCAB}, temperature", lambda: torch.multinomial(logits.softmax(-1), 1))

if a.beside:
    print(f"\n{'op':10} {'shape':64} {'us':>9} {'roofline':>9} {'torch/own':>10}")
    for line in a.beside.read_text().splitlines():
        own = json.loads(line) if line.startswith("{") else {}
        if (theirs := found.get((own.get("op"), own.get("shape")))) is not None:
            print(f"{own['op']:10} {own['shape']:64} {own['us']:9.1f} {own['of_roofline']:9.2f} {theirs / own['us']:10.2f}")
