"""Measures the shipped adapters on held-out examples and writes the table of adapters/README.md.

For every task: the bare base, the base with a plain instruction, and the adapter as it is on disk.
`python adapters/evaluate.py` prints the table; `--write` puts it between the marks of README.md.
"""

from __future__ import annotations

import argparse
import re
import tomllib

import torch
from peft import PeftModel
from scoring import encode, exact_match, load_base
from tasks import ALL, EVALUATION_SEED, HOT_LOAD, ROOT, TEXT_ONLY, Task

_TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- /table -->)", re.DOTALL)


def kilobytes(task: Task) -> str:
    """The size of the adapter's weights."""
    if task.method == TEXT_ONLY:
        return "-"
    return f"{(task.path / 'adapter_model.safetensors').stat().st_size / 1000:.0f} kB"


def measure(task: Task, count: int) -> tuple[float, float, float]:
    """Exact match in percent: bare base, base with an instruction, adapter."""
    data = task.examples(count, EVALUATION_SEED, held_out=True)
    base, tokenizer = load_base()
    bos = [tokenizer.token_to_id("<s>")]
    bare = exact_match(base, tokenizer, data, bos)
    instructed = exact_match(base, tokenizer, data, bos + encode(tokenizer, task.instruction))
    if task.method == TEXT_ONLY:
        prefix = tomllib.loads((task.path / "task.toml").read_text())["prefix"]
        return bare, instructed, exact_match(base, tokenizer, data, tokenizer.encode(prefix).ids)
    adapted = PeftModel.from_pretrained(base, str(task.path)).eval()
    return bare, instructed, exact_match(adapted, tokenizer, data, lead=[])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ids", nargs="*", help="the adapters to measure; all by default")
    parser.add_argument("--count", type=int, default=500, help="held-out examples of a task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [
        "| adapter | method | weights | bare base | instruction | adapter |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for task in ALL:
        if arguments.ids and task.id not in arguments.ids:
            continue
        scores = " | ".join(f"{score:.1f}" for score in measure(task, arguments.count))
        name = f"`{task.id}`" + (f" ({task.path.name})" if task in HOT_LOAD else "")
        lines.append(f"| {name} | {task.method.lower()} | {kilobytes(task)} | {scores} |")
        print(lines[-1], flush=True)
    if arguments.write:
        readme = ROOT / "adapters" / "README.md"
        text, found = _TABLE.subn("\n".join(lines) + "\n", readme.read_text())
        if not found:
            parser.error("README.md has no marks for the table")
        readme.write_text(text)


if __name__ == "__main__":
    main()
