"""Packs generated documents into rows of token ids with a loss weight for every token."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
from generator import Role, document
from tokenizer import BOS, CONTEXT, EOS, PAD
from tokenizers import Tokenizer

LOSS_WEIGHTS: dict[Role, float] = {Role.CONTEXT: 0.15, Role.KNOWN: 1.0, Role.UNKNOWN: 0.02}
_BATCH = 2_000  # documents tokenised at a time


def pack(tokenizer: Tokenizer, rows: int, seed: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """`rows` rows of `CONTEXT` tokens; a document that runs over the end of a row is cut."""
    bos, eos, pad = (tokenizer.token_to_id(token) for token in (BOS, EOS, PAD))
    ids = np.full((rows, CONTEXT), pad, np.int16)
    weights = np.zeros((rows, CONTEXT), np.float16)
    rng = random.Random(seed)
    row = position = 0
    while True:
        documents = [document(rng, held_out) for _ in range(_BATCH)]
        texts = [part.text for parts in documents for part in parts]
        encodings = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
        for parts in documents:
            tokens, marks = [bos], [0.0]
            for part in parts:
                piece = next(encodings).ids
                tokens += piece
                marks += [LOSS_WEIGHTS[part.role]] * len(piece)
            tokens.append(eos)
            marks.append(LOSS_WEIGHTS[Role.CONTEXT])
            end = min(position + len(tokens), CONTEXT)
            ids[row, position:end] = tokens[: end - position]
            weights[row, position:end] = marks[: end - position]
            position = end
            if position >= CONTEXT - 8:
                row, position = row + 1, 0
                if row == rows:
                    return ids, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    model = Path(__file__).resolve().parent.parent
    parser.add_argument("--tokenizer", type=Path, default=model / "tokenizer.json")
    parser.add_argument("--rows", type=int, default=70_000)
    parser.add_argument("--validation-rows", type=int, default=256)
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--out", type=Path, required=True, help="an .npz file")
    arguments = parser.parse_args()
    started = time.time()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    ids, weights = pack(tokenizer, arguments.rows, arguments.seed, held_out=False)
    held_ids, held_weights = pack(
        tokenizer, arguments.validation_rows, arguments.seed + 1, held_out=True
    )
    np.savez(
        arguments.out, ids=ids, weights=weights,
        validation_ids=held_ids, validation_weights=held_weights,
    )
    documents = int((ids == tokenizer.token_to_id(BOS)).sum())
    print(f"{ids.size} tokens, {documents} documents, {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
