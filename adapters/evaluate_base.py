"""Measures the base with a plain instruction on every task of the generator, held-out examples.

`python adapters/evaluate_base.py` prints the table of models/demo/README.md.
"""

from __future__ import annotations

import argparse
import random

import torch
from scoring import encode, exact_match, load_base
from tasks import EVALUATION_SEED, FAMILIES, INSTRUCTIONS, examples


def outputs_of(family: str) -> list[str]:
    """The names of every task of a family, some of which only part of its inputs have."""
    rng = random.Random(0)
    names: dict[str, None] = {}
    for _ in range(200):
        names.update(dict.fromkeys(FAMILIES[family](rng, False).outputs))
    return list(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="held-out examples of a task")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base, tokenizer = load_base()
    bos = tokenizer.token_to_id("<s>")
    print("| input family | exact match by task |\n|---|---|")
    for family in FAMILIES:
        scores = []
        for output in outputs_of(family):
            data = examples(family, output, arguments.count, EVALUATION_SEED, held_out=True)
            lead = [bos] + encode(tokenizer, INSTRUCTIONS[output][0] + "\n")
            scores.append(f"{output} {exact_match(base, tokenizer, data, lead):.0f}")
        print(f"| {family} | {', '.join(scores)} |", flush=True)


if __name__ == "__main__":
    main()
