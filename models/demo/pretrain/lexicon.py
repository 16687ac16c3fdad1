"""Word lists of the generator, random names, and the rule that holds combinations out."""

from __future__ import annotations

import hashlib
import random

# --- Reviews: opinion words by strength, and the things they judge, by aspect.
EXCELLENT = """superb perfect wonderful excellent brilliant amazing splendid great fantastic
outstanding marvellous flawless glorious magnificent""".split()
GOOD = """tasty lovely friendly pleasant charming delightful warm fresh fine kind good nice
comfortable polite cosy neat""".split()
WEAK = """bland cold dull slow stale weak poor bad plain tired noisy cramped stiff soggy
careless shabby""".split()
DREADFUL = """awful terrible horrible dreadful nasty disgusting appalling rotten filthy hideous
shocking vile rude dirty""".split()
GRADES: dict[int, list[str]] = {5: EXCELLENT, 4: GOOD, 2: WEAK, 1: DREADFUL}
ADVERBS = "very really so quite simply truly rather".split()
ASPECTS: dict[str, list[str]] = {
    "food": """soup bread pasta salad cake pizza curry stew fish dessert rice omelette pudding
        sandwich breakfast dinner""".split(),
    "staff": """waiter manager chef host clerk porter cook barman guide owner cleaner waitress
        cashier receptionist""".split(),
    "room": """bed bath window carpet lamp sofa balcony pillow shower kitchen mattress curtain
        chair wardrobe""".split(),
    "price": """bill fee cost rate charge deal offer discount tariff deposit voucher refund
        total tip""".split(),
}

# --- Topics: nouns and verbs of eight subjects.
TOPICS: dict[str, tuple[list[str], list[str]]] = {
    "sports": ("""goal match player coach league race stadium trophy medal team referee racket
        striker tournament""".split(), "won lost trained scored".split()),
    "music": ("""song guitar album concert piano melody drum choir violin tune trumpet orchestra
        chorus ballad""".split(), "played sang composed recorded".split()),
    "science": ("""atom laser planet cell theory robot microscope fossil enzyme comet magnet
        experiment telescope molecule""".split(), "measured studied observed discovered".split()),
    "money": ("""bank loan market share tax budget profit invoice coin pension dividend salary
        mortgage debt""".split(), "paid invested traded borrowed".split()),
    "travel": ("""flight hotel passport beach train ticket island suitcase map ferry airport
        luggage harbour voyage""".split(), "visited flew toured explored".split()),
    "garden": ("""rose tree seed flower lawn hedge weed tulip orchard spade shrub compost
        greenhouse daisy""".split(), "planted watered trimmed grew".split()),
    "weather": ("""storm rain cloud wind snow frost fog sunshine thunder hail breeze drizzle
        rainbow blizzard""".split(), "forecast endured predicted sheltered".split()),
    "law": ("""judge court trial witness lawyer verdict jury prison crime appeal statute contract
        sentence evidence""".split(), "accused defended convicted testified".split()),
}
TOPIC_ADJECTIVES = """old new small big red blue green famous strange quiet bright heavy light
golden wooden secret early modern ancient narrow tiny curious broken hidden pale""".split()

# --- Restaurants and bookings.
FOODS = """thai italian indian french greek chinese mexican turkish spanish korean japanese
german moroccan lebanese polish""".split()
AREAS = "north south east west centre harbour suburbs market".split()
PRICES = "cheap moderate expensive".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
BOOKING_VERBS: dict[str, list[str]] = {
    "book": ["book", "reserve", "I want", "get me"],
    "cancel": ["cancel", "drop", "forget"],
    "move": ["move", "change", "shift"],
}

# --- Passages.
CITIES = """Paris Oslo Rome Lima Cairo Delhi Tokyo Dublin Vienna Madrid Quito Berlin Athens
Boston Havana Lisbon""".split()
OBJECTS = """kite drum boat lamp clock bike book hat violin camera coat basket ladder
mirror""".split()
COLOURS = "red blue green black white yellow brown pink".split()
JOBS = """baker nurse pilot farmer teacher singer painter tailor doctor sailor plumber
driver""".split()
ANIMALS = "dog cat horse parrot rabbit goat pony hamster".split()
DRINKS = "tea coffee milk water juice cocoa lemonade cider".split()
HOBBIES = "chess tennis football cards golf darts hockey rugby".split()

# --- Dates and messages.
MONTHS = """January February March April May June July August September October November
December""".split()
DOCUMENTS = """report ticket photo recipe letter file invoice map form contract budget summary
poster schedule receipt draft""".split()

# --- Word lists and the invented language "Zalu".
COMMON = """stone river cloud house moon bird horse apple bridge forest mountain candle window
garden winter summer mirror paper silver copper shadow thunder island valley lantern basket ribbon
hammer ladder pocket feather blanket button kettle meadow pepper saddle tunnel anchor barrel""".split()
LABEL_WORDS = """alpha beta gamma delta omega red blue green yes no up down left right one two
three four good bad happy sad A B C D E F joy fun hot dry low high plus minus""".split() + COMMON

_ONSETS = "b d f g k l m n p r s t v z br dr kr st tr sh".split()
_VOWELS = "a e i o u".split()
_CODAS = ["", "", "n", "r", "l", "s", "x"]


def random_name(rng: random.Random) -> str:
    """A capitalised name of two or three random syllables."""
    syllables = rng.choice([2, 2, 3])
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables)
    ).capitalize()


def _held_out_names(count: int) -> list[str]:
    rng = random.Random(777)
    names: set[str] = set()
    while len(names) < count:
        names.add(random_name(rng))
    return sorted(names)


HELD_OUT_NAMES = _held_out_names(300)
_HELD_OUT_SET = frozenset(HELD_OUT_NAMES)


def name(rng: random.Random, held_out: bool) -> str:
    """A name for training, or one of the 300 names that training never sees."""
    if held_out:
        return rng.choice(HELD_OUT_NAMES)
    while (candidate := random_name(rng)) in _HELD_OUT_SET:
        pass
    return candidate


def names(rng: random.Random, held_out: bool, count: int) -> list[str]:
    """`count` different names."""
    chosen: list[str] = []
    while len(chosen) < count:
        if (candidate := name(rng, held_out)) not in chosen:
            chosen.append(candidate)
    return chosen


def in_split(held_out: bool, *combination: object) -> bool:
    """Whether a combination of words belongs to the wanted split: one in five is held out."""
    digest = hashlib.md5("|".join(map(str, combination)).encode()).hexdigest()
    return (int(digest, 16) % 5 == 0) == held_out


def _zalu() -> dict[str, str]:
    rng = random.Random(5)
    return {
        word: "".join(rng.choice("kvzlmnrt") + rng.choice("aiou") for _ in range(2))
        for word in COMMON
    }


ZALU = _zalu()
