#!/usr/bin/env python3
"""What prefixd learns from the files of tasks.py: the same figures as peft_tasks.py, through a server and its commands.

usage: prefixd_tasks.py MODEL DATA TASK... [--prefixd PATH] [--steps N] [--lr X] [--seeds 0 1 2] [--init text|random] [--limit N]

Starts a server of MODEL on an empty store and trains each task once a seed. Prints one JSON line for each. Labels are ranked by
the log-probability of their tokens (accuracy_without_eos of peft_tasks.py).

Needs: Python 3.9 and the executable.
"""
import argparse, json, os, pathlib, socket, subprocess, tempfile, time

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("model", type=pathlib.Path), p.add_argument("data", type=pathlib.Path), p.add_argument("tasks", nargs="+")
p.add_argument("--prefixd", type=pathlib.Path, default=pathlib.Path("target/release/prefixd"))
p.add_argument("--method", default="prefix"), p.add_argument("--init", default="text")
p.add_argument("--steps", type=int, default=1000), p.add_argument("--lr", type=float, default=0.1)
p.add_argument("--batch", type=int, default=16), p.add_argument("--virtual-tokens", type=int, default=20)
p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2]), p.add_argument("--limit", type=int, default=500)
a = p.parse_args()

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"


def ask(*arguments):
    command = [a.prefixd, *map(str, arguments), "--server", address, "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


with tempfile.TemporaryDirectory() as folder:
    store = pathlib.Path(folder) / "store"
    server = subprocess.Popen([a.prefixd, "serve", "--model", a.model, "--adapters", store, "--listen", address],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while subprocess.run([a.prefixd, "info", "--server", address], capture_output=True).returncode:
            time.sleep(0.1)
        for task in a.tasks:
            for seed in a.seeds:
                start = time.time()
                trained = ask("train", a.data / f"{task}-train.jsonl", "--adapter", task, "--replace", "--card", a.data / f"{task}.toml",
                              "--method", a.method, "--virtual-tokens", a.virtual_tokens, "--init", a.init, "--lr", a.lr,
                              "--steps", a.steps, "--batch-size", a.batch, "--warmup-steps", round(0.06 * a.steps), "--seed", seed,
                              "--curve", pathlib.Path(folder) / "curve.svg", "--skip-eval")
                seconds = time.time() - start
                measured = ask("eval", a.data / f"{task}-test.jsonl", "--adapter", task, "--limit", a.limit)
                print(json.dumps(dict(task=task, seed=seed, train_s=round(seconds, 1), scores=measured["scores"],
                                      base=measured["base_scores"], loss_last=trained["job"]["last_step"]["loss"], steps=a.steps,
                                      lr=a.lr, method=a.method, init=a.init, model=a.model.name, examples=measured["examples"])), flush=True)
    finally:
        server.terminate()
        server.wait()
