#!/usr/bin/env python3
"""What training costs those who are served: the same load on a server in quiet, and with a job that trains on it.

usage: beside_training.py [--model MODEL] [--prefixd PATH] [--share S ...] [--rounds N] [--seconds S]

Starts a server (the embedded model if none is named), keeps 8 requests over 4 prefix adapters under way by `prefixd bench`, in quiet
and beside a training job, in turn, and prints a line of JSON for each round and the medians: p99 and mean inter-token latency,
output tokens a second, and what the job itself gets done.

Needs: Python 3.9 and the executable.
"""
import argparse, json, pathlib, random, socket, statistics, subprocess, tempfile, time

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--model", default="embedded"), p.add_argument("--prefixd", default="target/release/prefixd")
p.add_argument("--share", type=float, nargs="+", default=[0.3]), p.add_argument("--rounds", type=int, default=3)
p.add_argument("--seconds", type=float, default=10), p.add_argument("--concurrency", type=int, default=8)
a = p.parse_args()

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"


def ask(*arguments, check=True):
    command = [a.prefixd, *map(str, arguments), "--server", address, "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout) if done.returncode == 0 else None


def load():
    r = ask("bench", "--num-adapters", 4, "--prefix-len", 32, "--prompt-len", 32, "--output-len", 64, "--concurrency", a.concurrency,
            "--duration", a.seconds, "--warmup", a.concurrency)
    return {k: r[k] for k in ("p99_itl_ms", "mean_itl_ms", "output_throughput", "failed")}


def job(folder):
    rng = random.Random(0)
    word = lambda: "".join(rng.choice("abcdefghij") for _ in range(4))
    line = lambda: json.dumps({"input": " ".join(word() for _ in range(12)), "target": " ".join(word() for _ in range(4))})
    data = folder / "data.jsonl"
    data.write_text("".join(line() + "\n" for _ in range(64)))
    made = ask("train", data, "--adapter", "beside", "--replace", "--steps", 100000, "--batch-size", 8, "--append-eos", "false", "--detach",
               "--no-load")
    return made["job_id"]


def last(name):
    """The job's last step, if it has made one."""
    return next(j for j in ask("jobs", "list")["jobs"] if j["job_id"] == name)["last_step"]


def steps(name):
    return last(name)["step"]


for share in a.share:
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        server = subprocess.Popen([a.prefixd, "serve", "--model", a.model, "--adapters", folder / "store", "--listen", address,
                                   "--training-share", str(share)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while ask("info", check=False) is None:
                time.sleep(0.1)
            for _ in range(a.rounds):
                quiet = load()
                name = job(folder)
                while not last(name):
                    time.sleep(0.05)
                before, began = steps(name), time.time()
                beside = load()
                rate = (steps(name) - before) / (time.time() - began)
                ask("jobs", "cancel", name)
                rounds.append(dict(quiet=quiet, beside=beside, training_steps_per_s=round(rate, 2)))
                print(json.dumps(dict(share=share, **rounds[-1])), flush=True)
        finally:
            server.terminate()
            server.wait()
    ratio = lambda key: round(statistics.median(r["beside"][key] / r["quiet"][key] for r in rounds), 3)
    print(json.dumps(dict(model=a.model, training_share=share, rounds=a.rounds, p99_itl_ratio=ratio("p99_itl_ms"), mean_itl_ratio=ratio("mean_itl_ms"),
                          output_throughput_ratio=ratio("output_throughput"))))
