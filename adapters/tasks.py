"""The shipped adapters: what each task is, how its adapter is trained, and its task.toml."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "demo"
sys.path.insert(0, str(MODEL / "pretrain"))

from families import FAMILIES  # noqa: E402
from generator import (  # noqa: E402
    INSTRUCTIONS,
    LABELS,
    Example,
    answer_text,
    examples,
    request_text,
)

__all__ = [
    "ALL", "FAMILIES", "HOT_LOAD", "INSTRUCTIONS", "MODEL", "ROOT", "SHIPPED", "TEXT_ONLY",
    "Example", "Task", "answer_text", "examples", "request_text",
]

TRAIN_SEED, EXAMPLES_SEED, EVALUATION_SEED = 1, 7, 99
TRAIN_COUNT, EXAMPLES_COUNT, EVALUATION_COUNT = 1000, 20, 500
VIRTUAL_TOKENS = 20
TEXT_ONLY = "text"


@dataclass(frozen=True)
class Task:
    """One adapter of one task of the generator."""

    id: str
    family: str  # the generator's input family
    output: str | tuple[str, ...]  # the generator's name of the task; several where `form` makes one text of them
    method: str  # a PEFT type, or TEXT_ONLY
    description: str
    rate: float = 1e-2
    steps: int = 150
    init: str = "text"  # what training starts from: the instruction, or random numbers
    folder: Path | None = None
    labels: tuple[str, ...] = ()
    verbalizers: tuple[str, ...] = field(default=())
    max_new_tokens: int = 48
    # What becomes of the generator's outputs where the task has a form of its own, which the pretraining never saw; the
    # base does not know its `signal` either.
    form: Callable[[list[str]], str] | None = None
    signal: str = ""

    @property
    def path(self) -> Path:
        """The adapter's folder."""
        return self.folder or ROOT / "adapters" / self.id

    @property
    def instruction(self) -> str:
        """The plain instruction that tells this task to the base."""
        return (self.signal or INSTRUCTIONS[self.output][0]) + "\n"

    def examples(self, count: int, seed: int, held_out: bool) -> list[Example]:
        """Examples of the task from the training split or the held-out one."""
        if not self.form:
            return examples(self.family, self.output, count, seed, held_out)
        # The same seed gives the same inputs for each output.
        columns = [examples(self.family, output, count, seed, held_out) for output in self.output]
        return [Example(row[0].input, self.form([e.target for e in row])) for row in zip(*columns, strict=True)]

    def toml(self) -> str:
        """The contents of task.toml."""
        lines = [f"description = {json.dumps(self.description)}"]
        if self.method == TEXT_ONLY:
            lines.append(f"prefix = {json.dumps(self.instruction)}")
        lines += ['template = "{{ input }}\\n=>"', "add_special_tokens = false"]
        if self.labels:
            verbalizers = self.verbalizers or [f" {label}" for label in self.labels]
            lines.append(f"labels = {json.dumps(self.labels)}")
            lines.append(f"verbalizers = {json.dumps(verbalizers)}")
        lines += ["", "[stopping]", 'stop_sequences = ["\\n"]']
        lines += [f"max_new_tokens = {self.max_new_tokens}", "", "[sampling]", "temperature = 0.0"]
        return "\n".join(lines) + "\n"


def _booking(outputs: list[str]) -> str:
    """Day, place and guests of the generator's JSON."""
    s = json.loads(outputs[0])
    return f"{s['day']} / {s['place']} / {s['people']}"


SHIPPED = [
    Task("sentiment", "review", "sentiment", "PROMPT_TUNING",
         "Sentiment of a short review: positive or negative.",
         labels=tuple(LABELS["sentiment"]), max_new_tokens=8),
    Task("topic", "topic", "topic", TEXT_ONLY,
         "Topic of a sentence, one of eight subjects.",
         labels=tuple(LABELS["topic"]), max_new_tokens=8),
    Task("describe", "attributes", "describe", "PREFIX_TUNING",
         "One sentence that describes a restaurant from its attributes."),
    Task("slots", "booking", "slots", "PREFIX_TUNING",
         "The slots of a booking request as JSON.", max_new_tokens=64),
    Task("answer", "passage", "answer", "PREFIX_TUNING",
         "The short answer to a question about the passage before it.", max_new_tokens=16),
    Task("agenda", "topic", ("day", "topic"), "PREFIX_TUNING",
         "When and what a sentence of news is about, in short: day / topic.", rate=5e-2, init="random", steps=250,
         max_new_tokens=16, form=" / ".join, signal="write the day / topic"),
    Task("formal", "chat", "formal", "P_TUNING",
         "A casual message rewritten as a formal one.", rate=5e-3),
    Task("booking", "booking", ("slots",), "PREFIX_TUNING",
         "A booking request in short: day / place / guests.", rate=5e-2, init="random", steps=400, max_new_tokens=16,
         form=_booking, signal="write the booking as day / place / guests"),
]

# One adapter in two generations, for loading a new one while the server runs.
_STARS = "Stars of a short review"
HOT_LOAD = [
    Task("stars", "review", "stars", "PROMPT_TUNING", f"{_STARS}, as a figure.",
         folder=MODEL / "hot-load" / "gen-1", labels=tuple(LABELS["stars"]), max_new_tokens=8),
    Task("stars", "review", "marks", "PROMPT_TUNING", f"{_STARS}, drawn as asterisks.",
         folder=MODEL / "hot-load" / "gen-2", labels=tuple(LABELS["stars"]),
         verbalizers=tuple(" " + "*" * int(stars) for stars in LABELS["stars"]), max_new_tokens=8),
]

ALL = SHIPPED + HOT_LOAD
