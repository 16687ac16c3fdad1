"""Trains the byte-level BPE tokenizer on the generator's text; every digit is its own token."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from generator import document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIAL_TOKENS = [BOS, EOS, PAD]  # ids 0, 1 and 2
CONTEXT = 256


def train(documents: int, vocabulary: int, seed: int) -> Tokenizer:
    """A tokenizer of `vocabulary` tokens from `documents` training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    text = ("".join(part.text for part in document(rng)) for _ in range(documents))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def configuration() -> dict[str, object]:
    """The contents of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--vocabulary", type=int, default=1536)
    parser.add_argument("--seed", type=int, default=11)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train(arguments.documents, arguments.vocabulary, arguments.seed)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    config = json.dumps(configuration(), indent=2) + "\n"
    (arguments.out / "tokenizer_config.json").write_text(config)
    print(f"{tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
