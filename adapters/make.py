"""Makes the shipped adapters anew with prefixd itself, and measures them: data from the generator, training by RPC.

    cargo build --release && python adapters/make.py              # all, seeds 0 1 2
    python adapters/make.py booking agenda --seeds 0              # some of them

Needs nothing but Python and the executable. It starts a server on an empty store, trains every task once a seed, has
`prefixd eval` compare generated answers with the targets, and writes: the folders of the first seed, their loss curves, the
table of README.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tasks import (
    ALL,
    EVALUATION_COUNT,
    EVALUATION_SEED,
    EXAMPLES_COUNT,
    EXAMPLES_SEED,
    HOT_LOAD,
    MODEL,
    ROOT,
    TEXT_ONLY,
    TRAIN_COUNT,
    TRAIN_SEED,
    VIRTUAL_TOKENS,
    Task,
)

METHODS = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "P_TUNING": "p-tuning"}
BATCH, WARMUP_STEPS = 16, 10
CURVES = MODEL / "curves"
_TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- /table -->)", re.DOTALL)


class Server:
    """A server of the embedded model on an empty store, for as long as the block runs."""

    def __init__(self, executable: Path, folder: Path) -> None:
        self.executable, self.store = executable, folder / "store"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"

    def __enter__(self) -> Server:
        command = [self.executable, "serve", "--listen", self.address, "--adapters", self.store]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            if subprocess.run([self.executable, "info", "--server", self.address], capture_output=True).returncode == 0:
                return self
            time.sleep(0.1)
        raise SystemExit("the server does not answer")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def ask(self, *arguments: object) -> dict:
        """One command's JSON answer."""
        command = [self.executable, *map(str, arguments), "--server", self.address, "--output", "json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
        return json.loads(done.stdout)


def write_lines(path: Path, examples: list) -> Path:
    """Examples as JSON lines."""
    path.write_text("".join(json.dumps(e._asdict()) + "\n" for e in examples))
    return path


def name_of(task: Task) -> str:
    """A name that no other task has: `stars` has two generations."""
    return f"{task.id}-{task.path.name}" if task in HOT_LOAD else task.id


def exact(server: Server, data: Path, *more: str) -> float:
    """Percent of held-out examples whose answer is the target."""
    scores = server.ask("eval", data, "--generate", "--skip-base", *more)["scores"]
    return 100 * scores["exact_match"]


def make(server: Server, task: Task, seeds: list[int], folder: Path) -> dict:
    """Trains a task once a seed; writes the first one's folder and curve; returns the figures."""
    name = name_of(task)
    task.path.mkdir(parents=True, exist_ok=True)
    card = task.path / "task.toml"
    card.write_text(task.toml())
    write_lines(task.path / "examples.jsonl", task.examples(EXAMPLES_COUNT, EXAMPLES_SEED, True))
    held_out = write_lines(folder / f"{name}.test.jsonl", task.examples(EVALUATION_COUNT, EVALUATION_SEED, True))
    instruction = folder / f"{name}.instruction"
    instruction.mkdir()
    plain = task.toml().replace(f"prefix = {json.dumps(task.instruction)}\n", "")
    (instruction / "task.toml").write_text(f"prefix = {json.dumps(task.instruction)}\n{plain}")
    server.ask("adapters", "upload", instruction, "--id", f"{name}.instruction")
    figures = {
        "task": task, "bare": exact(server, held_out), "scores": [], "seconds": [],
        "instruction": exact(server, held_out, "--adapter", f"{name}.instruction"),
    }
    if task.method == TEXT_ONLY:
        figures["scores"] = [figures["instruction"]]
        return figures
    data = write_lines(folder / f"{name}.train.jsonl", task.examples(TRAIN_COUNT, TRAIN_SEED, False))
    for seed in seeds:
        curve = CURVES / f"{name}.svg" if seed == seeds[0] else folder / "curve.svg"
        begun = time.time()
        server.ask(
            "train", data, "--adapter", name, "--replace", "--card", card, "--method", METHODS[task.method],
            "--virtual-tokens", VIRTUAL_TOKENS, "--lr", task.rate, "--steps", task.steps, "--batch-size", BATCH,
            "--schedule", "cosine", "--warmup-steps", WARMUP_STEPS, "--target-template", r" {{ target }}\n",
            "--init", task.init, *(["--init-text", task.instruction] if task.init == "text" else []),
            "--seed", seed, "--curve", curve, "--skip-eval",
        )
        figures["seconds"].append(time.time() - begun)
        figures["scores"].append(exact(server, held_out, "--adapter", name))
        if seed == seeds[0]:
            publish(server.store / name, task)
        print(f"{name}, seed {seed}: {figures['scores'][-1]:.1f} % after {figures['seconds'][-1]:.0f} s", flush=True)
    return figures


def publish(trained: Path, task: Task) -> None:
    """Copies the weights; the base is named as it is in this repository."""
    shutil.copy(trained / "adapter_model.safetensors", task.path)
    config = json.loads((trained / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "models/demo"
    (task.path / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def row(figures: dict) -> str:
    """A line of the table."""
    task: Task = figures["task"]
    name = f"`{task.id}`" + (f" ({task.path.name})" if task in HOT_LOAD else "")
    text = task.method == TEXT_ONLY
    size = "-" if text else f"{(task.path / 'adapter_model.safetensors').stat().st_size / 1000:.0f} kB"
    scores = ", ".join(f"{score:.1f}" for score in figures["scores"])
    curve = "-" if text else f"[curve](../models/demo/curves/{name_of(task)}.svg)"
    seen = "no" if task.form else "yes"
    cells = [name, task.method.lower(), size, seen, f"{figures['bare']:.1f}", f"{figures['instruction']:.1f}", scores, curve]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ids", nargs="*", help="the adapters to make; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one's adapter is shipped")
    parser.add_argument("--prefixd", type=Path, default=ROOT / "target" / "release" / "prefixd", help="the executable")
    arguments = parser.parse_args()
    unknown = set(arguments.ids) - {task.id for task in ALL}
    if unknown:
        parser.error(f"no such adapter: {', '.join(sorted(unknown))}")
    CURVES.mkdir(exist_ok=True)
    chosen = [task for task in ALL if not arguments.ids or task.id in arguments.ids]
    with tempfile.TemporaryDirectory() as scratch, Server(arguments.prefixd, Path(scratch)) as server:
        made = [make(server, task, arguments.seeds, Path(scratch)) for task in chosen]
    lines = [
        "| adapter | method | weights | format seen in pretraining | bare base | instruction | adapter, by seed | loss |",
        "|---|---|---:|---|---:|---:|---:|---|",
        *map(row, made),
    ]
    print("\n".join(lines))
    seconds = [s for figures in made for s in figures["seconds"]]
    if seconds:
        print(f"training took {min(seconds):.0f} to {max(seconds):.0f} s an adapter")
    if not arguments.ids:
        readme = ROOT / "adapters" / "README.md"
        text, found = _TABLE.subn(lambda _: "\n".join(lines) + "\n", readme.read_text())
        if not found:
            parser.error("README.md has no marks for the table")
        readme.write_text(text)


if __name__ == "__main__":
    main()
