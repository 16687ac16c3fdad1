"""Seeded generator of pretraining documents: input families, tasks on them, many phrasings.

A document is `<s>`, a signal of the task (an instruction in one of many phrasings, a tag, a
statement of new label words, or nothing), then one or more examples `input\\n=> output\\n`, then
`</s>`. One document in ten has a single example and no signal; it is answered "what shall I do ?".

Run it to print sample documents: `python generator.py --documents 10 --seed 1`.
"""

from __future__ import annotations

import argparse
import random
from enum import Enum
from typing import NamedTuple

import lexicon as lex
from families import FAMILIES, FAMILY_WEIGHTS

BARE_ANSWER = "what shall I do ?"

INSTRUCTIONS: dict[str, list[str]] = {
    "sentiment": ["is this review positive or negative ?", "give the sentiment of the review",
                  "did the guest like it ?", "label the mood of this text"],
    "aspect": ["what is the review about ?", "name the aspect", "choose food , staff , room or price"],
    "place": ["which place is named ?", "give the name of the place", "find the restaurant"],
    "stars": ["how many stars ?", "give a star rating", "rate this from 1 to 5"],
    "marks": ["draw the stars", "mark the review with stars", "write one star for each point"],
    "item": ["which item is judged ?", "name the item"],
    "judge": ["which word judges it ?", "find the opinion word"],
    "topic": ["what is the topic ?", "label the topic of the sentence", "which subject is this about ?"],
    "phrase": ["give the key phrase", "find the main phrase", "extract the key phrase"],
    "person": ["who is in the text ?", "give the name of the person", "find the person"],
    "day": ["which day ?", "give the day of the week", "find the day"],
    "slots": ["turn the request into json", "fill the slots as json", "write the request as json"],
    "intent": ["what does the user want to do ?", "label the intent", "give the intent of the request"],
    "time": ["give the time in 24 hours", "at what time ?", "write the time"],
    "guests": ["how many people ?", "count the guests"],
    "describe": ["describe the restaurant in a sentence", "write a sentence from the data",
                 "turn the data into text"],
    "json": ["write the data as json", "turn the data into json"],
    "ad": ["write an ad for the restaurant", "make an advert"],
    "ask": ["ask about the restaurant", "write a question from the data"],
    "name": ["give the name only", "what is it called ?"],
    "answer": ["answer the question", "read the text and answer", "reply with a short answer"],
    "who": ["who is the question about ?", "name the person in the question"],
    "question": ["repeat the question", "give only the question"],
    "full": ["answer in a full sentence", "reply with a full sentence"],
    "iso": ["write the date in iso form", "normalise the date", "convert the date to year month day"],
    "us": ["write the date in us form", "convert the date to slashes"],
    "year": ["which year ?", "give the year"],
    "month": ["which month ?", "give the month"],
    "short": ["shorten the date", "write the short date"],
    "formal": ["make it formal", "rewrite politely", "write this as a formal message"],
    "informal": ["make it informal", "rewrite as slang", "write this as a casual message"],
    "object": ["which thing is it about ?", "name the thing"],
    "act": ["what kind of message is it ?", "label the message type"],
    "copy": ["copy the words", "repeat the text"],
    "reverse": ["reverse the words", "write the words backwards"],
    "first": ["give the first word", "what comes first ?"],
    "last": ["give the last word", "what comes last ?"],
    "translate": ["translate into Zalu", "say it in Zalu", "what is this in Zalu ?"],
    "count": ["count the words", "how many words ?"],
    "swap": ["swap the first and last word", "exchange the ends"],
    "inside": ["what is inside the brackets ?", "give the word between the signs"],
    "strip": ["remove the signs", "leave only the words"],
    "bracket": ["put the second word in brackets", "write the second word ( like this )"],
    "quote": ["put both words in quotes", "write the words in \"quotes\""],
    "signs": ["give only the signs", "copy the signs"],
}

# Tasks whose outputs are labels; documents may name other words for the labels.
LABELS: dict[str, list[str]] = {
    "sentiment": ["positive", "negative"],
    "stars": ["5", "4", "2", "1"],
    "aspect": list(lex.ASPECTS),
    "topic": list(lex.TOPICS),
    "intent": list(lex.BOOKING_VERBS),
}

_CUES = ["", "", "please ", "now ", "task : ", "Task : ", "your job : ", "next , "]
_TAGS = ["[{}]", "{} :", "<{}>", "mode {}", "# {}"]
_RENAMINGS = ["say {new} for {old}", "{old} means {new}", "{old} : {new}", "write {new} if {old}"]


class Role(Enum):
    """What a part of a document is, for the weight of its tokens in the loss."""

    CONTEXT = "context"  # signals and inputs
    KNOWN = "known"  # an output whose task the text before it tells
    UNKNOWN = "unknown"  # an output whose task cannot be known yet


class Part(NamedTuple):
    """A piece of a document that is tokenised on its own."""

    text: str
    role: Role


class Example(NamedTuple):
    """An input and the output of one task."""

    input: str
    target: str


def request_text(text: str) -> str:
    """The input as the model reads it; its answer starts after the arrow."""
    return f"{text}\n=>"


def answer_text(target: str) -> str:
    """The output as the model writes it; the newline ends it."""
    return f" {target}\n"


def _signal(rng: random.Random, task: str) -> tuple[str | None, int, dict[str, str]]:
    """The text that tells the task (if any), the number of examples, and new label words."""
    draw = rng.random()
    if task in LABELS and draw < 0.30:
        labels = LABELS[task]
        renamed = dict(zip(labels, rng.sample(lex.LABEL_WORDS, len(labels)), strict=True))
        form = rng.choice(_RENAMINGS)
        pairs = list(renamed.items())
        rng.shuffle(pairs)
        text = " , ".join(form.format(old=old, new=new) for old, new in pairs)
        return text, rng.choice([1, 2, 3]), renamed
    if draw < 0.60:
        return rng.choice(_CUES) + rng.choice(INSTRUCTIONS[task]), rng.choice([1, 1, 2, 3]), {}
    if draw < 0.74:
        return rng.choice(_TAGS).format(task), rng.choice([1, 1, 2]), {}
    return None, rng.choice([2, 3, 4, 5]), {}


def document(rng: random.Random, held_out: bool = False, bare_share: float = 0.10) -> list[Part]:
    """The parts of one document, without `<s>` and `</s>`."""
    (name,) = rng.choices(list(FAMILY_WEIGHTS), weights=list(FAMILY_WEIGHTS.values()))
    family = FAMILIES[name]
    sample = family(rng, held_out)
    if rng.random() < bare_share:
        request = Part(request_text(sample.text), Role.CONTEXT)
        return [request, Part(answer_text(BARE_ANSWER), Role.KNOWN)]
    task = rng.choice(list(sample.outputs))
    signal, count, renamed = _signal(rng, task)
    parts = [] if signal is None else [Part(signal + "\n", Role.CONTEXT)]
    known = signal is not None
    for index in range(count):
        while index and task not in (sample := family(rng, held_out)).outputs:
            pass
        target = renamed.get(sample.outputs[task], sample.outputs[task])
        parts.append(Part(request_text(sample.text), Role.CONTEXT))
        parts.append(Part(answer_text(target), Role.KNOWN if known else Role.UNKNOWN))
        known = True
    return parts


def examples(family: str, task: str, count: int, seed: int, held_out: bool) -> list[Example]:
    """`count` different examples of a task, from the training split or the held-out one."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    for _ in range(200 * count):
        if len(found) == count:
            break
        sample = FAMILIES[family](rng, held_out)
        if task in sample.outputs:
            found.setdefault(sample.text, sample.outputs[task])
    if len(found) < count:
        raise ValueError(f"{family}/{task} has fewer than {count} different inputs")
    return [Example(text, target) for text, target in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=10, help="how many to print")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    for _ in range(arguments.documents):
        print("<s>" + "".join(part.text for part in document(rng)) + "</s>")


if __name__ == "__main__":
    main()
