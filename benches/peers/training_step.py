#!/usr/bin/env python3
"""A training step of prefixd beside one of Hugging Face PEFT, on one model, in one run.

usage: training_step.py MODEL [--prefixd PATH] [--python PYTHON] [--dtype f32|bf16] [--method prefix|prompt] [--steps N] [--labelled N]

Batches of 4 sequences of about 128 tokens, 32 virtual tokens; every token a target, or with --labelled about the last N. PYTHON is one that has torch, transformers
and PEFT (peft_step.py). Each side runs alone, one after the other, three times in turn; medians and their ratio are printed as a
JSON line. prefixd's time is that of its batches, as its job reports it; peak memory is that of the whole process from the first step on, weights
included, and what was resident before it stands beside it: loading maps the checkpoint's files, on both sides.
"""
import argparse, json, os, pathlib, random, socket, statistics, subprocess, tempfile, time

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("model", type=pathlib.Path), p.add_argument("--prefixd", default="target/release/prefixd")
p.add_argument("--python", default="python3"), p.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
p.add_argument("--method", choices=("prefix", "prompt"), default="prefix"), p.add_argument("--steps", type=int, default=5)
p.add_argument("--recompute", choices=("never", "always"), default="never"), p.add_argument("--rounds", type=int, default=3)
p.add_argument("--labelled", type=int, default=0, help="only about the last N tokens of each sequence are targets; 0: all")
a = p.parse_args()
BATCH, TOKENS, VIRTUAL = 4, 128, 32


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def resident(pid, what):
    """MiB of a process: VmRSS now, VmHWM at most."""
    return int(next(l for l in open(f"/proc/{pid}/status") if l.startswith(what)).split()[1]) // 1024


def ours(folder):
    """Tokens a second, MiB at most in training and before it."""
    address = f"127.0.0.1:{free_port()}"
    server = subprocess.Popen([a.prefixd, "serve", "--model", a.model, "--dtype", a.dtype, "--adapters", folder / "store", "--listen", address,
                               "--kv-tokens", "1024"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              # What is to be kept is kept, whatever it takes.
                              env={**os.environ, "PREFIXD_TRAINING__ACTIVATION_MIB": "65536"})
    ask = lambda *x: subprocess.run([a.prefixd, *map(str, x), "--server", address, "--output", "json"], capture_output=True, text=True)
    try:
        while ask("info").returncode:
            time.sleep(0.2)
        rng = random.Random(0)
        words = ["".join(rng.choice("abcdefghij") for _ in range(3)) for _ in range(40)]
        text = lambda n: " ".join(rng.choice(words) for _ in range(n))
        count = lambda t: len(json.loads(ask("tokenize", t).stdout)["token_ids"])

        def words_of(tokens):
            n = 1
            while count(text(n + 1)) < tokens:
                n += 1
            return n

        told = words_of(TOKENS - a.labelled) if a.labelled else 0
        target = words_of(a.labelled or TOKENS)
        data = folder / "data.jsonl"
        data.write_text("".join(json.dumps({"input": text(told) if told else "a", "target": text(target)}) + "\n" for _ in range(16)))
        before = resident(server.pid, "VmRSS")
        pathlib.Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # the peak counts from here
        done = ask("train", data, "--adapter", "x", "--replace", "--method", a.method, "--init", "vocabulary", "--virtual-tokens", VIRTUAL,
                   "--steps", a.steps + 1, "--batch-size", BATCH, "--recompute", a.recompute, "--append-eos", "false",
                   "--curve", folder / "c.svg", "--no-load")
        if done.returncode:
            raise SystemExit(done.stderr)
        rate = json.loads(done.stdout)["job"]["last_step"]["tokens_per_second"]
        if a.method == "prompt":
            # It counts the rows of the prompt, which run once for all sequences; PEFT's figure has those of the examples alone.
            rate *= BATCH * TOKENS / (BATCH * TOKENS + VIRTUAL)
        return rate, resident(server.pid, "VmHWM"), before
    finally:
        server.terminate()
        server.wait()


def theirs():
    """The same of PEFT."""
    script = pathlib.Path(__file__).with_name("peft_step.py")
    done = subprocess.run([a.python, script, "--model", a.model, "--dtype", a.dtype, "--method", f"{a.method}_tuning", "--batch", str(BATCH),
                           "--tokens", str(TOKENS), "--virtual-tokens", str(VIRTUAL), "--steps", str(a.steps), "--labelled", str(a.labelled)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)
    r = json.loads(done.stdout.splitlines()[-1])
    return r["tokens_per_s"], r["peak_rss_mib"], r["before_steps_mib"]


rates = {"prefixd": [], "peft": []}
for _ in range(a.rounds):
    with tempfile.TemporaryDirectory() as folder:
        rates["prefixd"].append(ours(pathlib.Path(folder)))
    rates["peft"].append(theirs())
median = {side: statistics.median(r for r, *_ in runs) for side, runs in rates.items()}
peak = {side: max(m for _, m, _ in runs) for side, runs in rates.items()}
before = {side: max(m for *_, m in runs) for side, runs in rates.items()}
print(json.dumps(dict(model=a.model.name, dtype=a.dtype, method=a.method, recompute=a.recompute, labelled=a.labelled or TOKENS, tokens_per_s=median, peak_mib=peak, before_mib=before,
                      step_time_ratio=round(median["peft"] / median["prefixd"], 3), peak_ratio=round(peak["prefixd"] / peak["peft"], 3), runs=rates)))
