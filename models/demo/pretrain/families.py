"""Input families: each draws one input text and the outputs of every task defined on it."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from typing import NamedTuple

import lexicon as lex


class Sample(NamedTuple):
    """An input and, by task name, what each task writes for it."""

    text: str
    outputs: dict[str, str]


def review(rng: random.Random, held_out: bool) -> Sample:
    """A one-sentence review of a place; the opinion words fix the stars and the sentiment."""
    while True:
        aspect = rng.choice(list(lex.ASPECTS))
        item = rng.choice(lex.ASPECTS[aspect])
        stars = rng.choice(list(lex.GRADES))
        opinion = rng.choice(lex.GRADES[stars])
        if lex.in_split(held_out, item, opinion):
            break
    place = lex.name(rng, held_out)
    second = rng.choice(lex.GRADES[stars])
    adverb = rng.choice(lex.ADVERBS)
    text = rng.choice([
        f"the {item} at {place} was {adverb} {opinion}",
        f"we tried {place} and the {item} was {opinion} and {second}",
        f"{place} has a {adverb} {opinion} {item}",
        f"I think the {item} at {place} is {opinion} , {adverb} {second}",
        f"a {opinion} {item} at {place} , I found it {second}",
        f"my visit to {place} : {opinion} {item}",
        f"at {place} they gave us a {opinion} {item}",
    ])
    return Sample(text, {
        "sentiment": "positive" if stars > 3 else "negative",
        "aspect": aspect,
        "place": place,
        "stars": str(stars),
        "marks": "*" * stars,
        "item": item,
        "judge": opinion,
    })


def topic(rng: random.Random, held_out: bool) -> Sample:
    """A sentence of news on one of eight subjects, with one described noun: the key phrase."""
    while True:
        subject = rng.choice(list(lex.TOPICS))
        nouns, verbs = lex.TOPICS[subject]
        noun, adjective = rng.choice(nouns), rng.choice(lex.TOPIC_ADJECTIVES)
        if lex.in_split(held_out, noun, adjective):
            break
    person = lex.name(rng, held_out)
    other, verb, day = rng.choice(nouns), rng.choice(verbs), rng.choice(lex.DAYS)
    text = rng.choice([
        f"{person} {verb} near the {adjective} {noun} on {day}",
        f"on {day} {person} {verb} with a {adjective} {noun} and a {other}",
        f"the {adjective} {noun} and the {other} pleased {person} on {day}",
        f"{person} said the {adjective} {noun} came on {day}",
        f"last {day} the {adjective} {noun} was shown to {person}",
        f"{person} wrote about the {other} and a {adjective} {noun} on {day}",
    ])
    return Sample(text, {
        "topic": subject, "phrase": f"{adjective} {noun}", "person": person, "day": day,
    })


def booking(rng: random.Random, held_out: bool) -> Sample:
    """A request to book, cancel or move a table."""
    place, day = lex.name(rng, held_out), rng.choice(lex.DAYS)
    hour, half, people = rng.randint(1, 11), rng.choice(["am", "pm"]), rng.randint(2, 9)
    time = f"{hour + 12 if half == 'pm' else hour:02d}:00"
    intent = rng.choice(list(lex.BOOKING_VERBS))
    verb = rng.choice(lex.BOOKING_VERBS[intent])
    text = rng.choice([
        f"{verb} a table for {people} at {place} on {day} at {hour} {half}",
        f"{verb} {place} on {day} for {people} people at {hour} {half}",
        f"for {day} at {hour} {half} {verb} a table at {place} for {people}",
    ])
    slots = {"place": place, "day": day, "time": time, "people": people}
    return Sample(text, {
        "slots": json.dumps(slots), "intent": intent, "place": place,
        "time": time, "day": day, "guests": str(people),
    })


def attributes(rng: random.Random, held_out: bool) -> Sample:
    """The attributes of a restaurant, in random order."""
    place, food = lex.name(rng, held_out), rng.choice(lex.FOODS)
    area, price = rng.choice(lex.AREAS), rng.choice(lex.PRICES)
    pairs = [("name", place), ("food", food), ("area", area), ("price", price)]
    record = dict(pairs)
    rng.shuffle(pairs)
    separator = rng.choice([" | ", " , ", " ; "])
    article = "an" if price[0] in "aeiou" else "a"
    return Sample(separator.join(f"{key} = {value}" for key, value in pairs), {
        "describe": f"{place} is {article} {price} {food} restaurant in the {area} .",
        "json": json.dumps(record),
        "ad": f"Try {place} for {price} {food} food !",
        "ask": f"Do you know {place} in the {area} ?",
        "name": place,
    })


def _facts(rng: random.Random, person: str) -> list[tuple[str, str, str]]:
    """Every fact that may be told of a person: (sentence, question, answer)."""
    city, job, animal = rng.choice(lex.CITIES), rng.choice(lex.JOBS), rng.choice(lex.ANIMALS)
    thing = f"{rng.choice(lex.COLOURS)} {rng.choice(lex.OBJECTS)}"
    drink, hobby, age = rng.choice(lex.DRINKS), rng.choice(lex.HOBBIES), str(rng.randint(11, 79))
    return [
        (f"{person} lives in {city} .", f"where does {person} live ?", city),
        (f"{person} has a {thing} .", f"what does {person} have ?", thing),
        (f"{person} is a {job} .", f"what job does {person} do ?", job),
        (f"{person} keeps a {animal} .", f"which animal does {person} keep ?", animal),
        (f"{person} drinks {drink} .", f"what does {person} drink ?", drink),
        (f"{person} plays {hobby} .", f"what does {person} play ?", hobby),
        (f"{person} is {age} years old .", f"how old is {person} ?", age),
    ]


def passage(rng: random.Random, held_out: bool) -> Sample:
    """Two to four facts, no two of one kind, about one or two people, then a question."""
    people = lex.names(rng, held_out, rng.choice([1, 2]))
    by_kind = list(zip(*(_facts(rng, person) for person in people), strict=True))
    told = []
    for kind in rng.sample(by_kind, rng.choice([2, 2, 3, 4])):
        who = rng.randrange(len(people))
        told.append((kind[who], people[who]))
    (sentence, question, answer), person = rng.choice(told)
    text = " ".join(fact[0] for fact, _ in told) + " " + question
    return Sample(text, {"answer": answer, "who": person, "question": question, "full": sentence})


def date(rng: random.Random, held_out: bool) -> Sample:
    """A date written out in one of several ways."""
    while True:
        day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1960, 2029)
        if lex.in_split(held_out, day, month, year):
            break
    month_name = lex.MONTHS[month - 1]
    suffix = "th" if 10 <= day <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    lead = rng.choice(["", "on ", "from ", "since ", "it was "])
    text = lead + rng.choice([
        f"{month_name} {day} , {year}", f"{day} {month_name} {year}",
        f"the {day}{suffix} of {month_name} {year}", f"{month_name} {day}{suffix} {year}",
    ])
    return Sample(text, {
        "iso": f"{year}-{month:02d}-{day:02d}", "us": f"{month}/{day}/{year}",
        "year": str(year), "month": month_name, "short": f"{day} {month_name[:3]} {year}",
    })


# (message type, casual message, formal message)
_MESSAGES = [
    ("request", "hey {p} send me the {o} pls", "Dear {p} , could you please send me the {o} ?"),
    ("demand", "yo {p} gimme the {o} asap",
     "Dear {p} , please give me the {o} as soon as possible ."),
    ("thanks", "thx {p} got the {o}", "Dear {p} , thank you , I have received the {o} ."),
    ("apology", "sorry {p} lost ur {o}", "Dear {p} , I apologise , I have lost your {o} ."),
    ("question", "hi {p} wheres the {o}", "Dear {p} , could you tell me where the {o} is ?"),
    ("problem", "{p} cant find the {o}", "Dear {p} , I am unable to find the {o} ."),
    ("offer", "hey {p} want me to fix the {o}", "Dear {p} , would you like me to correct the {o} ?"),
    ("refusal", "nah {p} cant do the {o}", "Dear {p} , I am afraid I cannot prepare the {o} ."),
]


def chat(rng: random.Random, held_out: bool) -> Sample:
    """A casual message, or the formal one that says the same."""
    person, thing = lex.name(rng, held_out), rng.choice(lex.DOCUMENTS)
    act, casual, formal = rng.choice(_MESSAGES)
    casual, formal = casual.format(p=person, o=thing), formal.format(p=person, o=thing)
    outputs = {"person": person, "object": thing, "act": act}
    if rng.random() < 0.6:
        return Sample(casual, {"formal": formal, **outputs})
    return Sample(formal, {"informal": casual, **outputs})


def words(rng: random.Random, held_out: bool) -> Sample:
    """Two to four common words."""
    while True:
        chosen = rng.sample(lex.COMMON, rng.choice([2, 3, 4]))
        if lex.in_split(held_out, *chosen[:2]):
            break
    return Sample(" ".join(chosen), {
        "copy": " ".join(chosen),
        "reverse": " ".join(reversed(chosen)),
        "first": chosen[0],
        "last": chosen[-1],
        "translate": " ".join(lex.ZALU[word] for word in chosen),
        "count": str(len(chosen)),
        "swap": " ".join([chosen[-1], *chosen[1:-1], chosen[0]]),
    })


_WRAPPERS = ["()", "[]", "{}", "<>", '""', "''", "``", "**", "__", "~~"]
_JOINERS = ["/", "-", "_", "=", "+", ":", "@", ".", "\\", "|", "&", " / ", " - ", " + ", " | "]


def symbols(rng: random.Random, held_out: bool) -> Sample:
    """Words among brackets, quotes and signs, so that every printable character occurs."""
    while True:
        left, right = rng.sample(lex.COMMON, 2)
        if lex.in_split(held_out, left, right):
            break
    if rng.random() < 0.3:
        left = lex.name(rng, held_out)
    if rng.random() < 0.15:
        left = left.upper()
    shape = rng.randrange(3)
    if shape == 0:
        opening, closing = rng.choice(_WRAPPERS)
        pad = rng.choice(["", " "])
        text = f"{left} {opening}{pad}{right}{pad}{closing}"
        return Sample(text, {
            "copy": text, "inside": right, "first": left, "strip": f"{left} {right}",
        })
    if shape == 1:
        text = left + rng.choice(_JOINERS) + right
        return Sample(text, {
            "copy": text, "first": left, "last": right, "strip": f"{left} {right}",
            "bracket": f"{left} ( {right} )", "quote": f'"{left}" "{right}"',
        })
    signs = " ".join(rng.choices(string.punctuation, k=rng.choice([2, 3, 4])))
    last = rng.choice([str(rng.randint(0, 999)), "".join(rng.choices(string.ascii_letters, k=3))])
    text = f"{left} {signs} {last}"
    return Sample(text, {"copy": text, "first": left, "last": last, "signs": signs})


FAMILIES: dict[str, Callable[[random.Random, bool], Sample]] = {
    "review": review, "topic": topic, "booking": booking, "attributes": attributes,
    "passage": passage, "date": date, "chat": chat, "words": words, "symbols": symbols,
}

# How often a pretraining document draws each family: more of what is harder to learn.
FAMILY_WEIGHTS: dict[str, float] = {
    "review": 1.0, "topic": 1.0, "booking": 1.3, "attributes": 1.0,
    "passage": 2.0, "date": 1.0, "chat": 1.0, "words": 0.8, "symbols": 0.8,
}
