"""Writes src/training/metrics/cases.json: what sacrebleu, rouge_score and scikit-learn make of some answers.

Needs sacrebleu, rouge-score and scikit-learn.
"""

import json
import random
from pathlib import Path

import sacrebleu
from rouge_score import rouge_scorer
from sklearn.metrics import f1_score

WORDS = (
    "the a cat dog river , . ; runs slowly 1,000.5 5-6 don't e.g. U.S. (maybe) \"so\" &quot;x&quot; AT&amp;T "
    "price: $12.50 50% café naïve Ü-Bahn well-known end. 3.14, [b] {c} a/b x_y <tag> #1 @you ~ ` ^ *star* = + ? !"
).split()


def text(rng: random.Random, length: int) -> str:
    return rng.choice([" ", "  ", " "]).join(rng.choice(WORDS) for _ in range(length))


def near(rng: random.Random, reference: str) -> str:
    words = reference.split(" ")
    for _ in range(rng.randrange(4)):
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    return " ".join(words[: rng.randrange(1, len(words) + 1)]) if rng.random() < 0.4 else " ".join(words)


def corpus(rng: random.Random) -> dict:
    references = [[text(rng, rng.randrange(1, 14)) for _ in range(rng.randrange(1, 4))] for _ in range(rng.randrange(1, 5))]
    predictions = [near(rng, rng.choice(r)) if rng.random() < 0.8 else text(rng, 6) for r in references]
    return measured(predictions, references)


def measured(predictions: list[str], references: list[list[str]]) -> dict:
    most = max(len(r) for r in references)
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    scores = [scorer.score_multi(r, p) for p, r in zip(predictions, references)]
    mean = lambda key: sum(s[key].fmeasure for s in scores) / len(scores)
    return {
        "predictions": predictions,
        "references": references,
        "bleu": sacrebleu.corpus_bleu(predictions, streams).score,
        "rouge": [mean("rouge1"), mean("rouge2"), mean("rougeL")],
    }


def labels(rng: random.Random) -> dict:
    right = [rng.choice("abcd") for _ in range(12)]
    said = [r if rng.random() < 0.6 else rng.choice("abcde") for r in right]
    return {"right": right, "said": said, "f1": f1_score(right, said, average="macro", zero_division=0)}


def main() -> None:
    rng = random.Random(5)
    fixed = [
        measured(["the cat sat on the mat ."], [["the cat sat on the mat ."]]),
        measured(["", "a b c d e"], [["nothing here"], ["a b c d e"]]),
        measured(["one two"], [["three four five"]]),
        measured(["a new\nline and a tab\there"], [["a new line and a tab here", "another"]]),
        measured(["it costs 1,000.5 , or 5-6 times 3."], [["it costs 1,000.5, or 5-6 times 3 ."]]),
    ]
    cases = {"texts": fixed + [corpus(rng) for _ in range(60)], "labels": [labels(rng) for _ in range(12)]}
    path = Path(__file__).parents[2] / "src" / "training" / "metrics" / "cases.json"
    path.write_text(json.dumps(cases, indent=0, ensure_ascii=False) + "\n")
    print(f"{len(cases['texts'])} texts, {len(cases['labels'])} sets of labels: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
