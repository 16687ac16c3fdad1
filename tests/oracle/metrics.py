"""Scores texts and labels with sacrebleu, rouge-score and scikit-learn, for src/training/metrics/tests.rs.

    python tests/oracle/metrics.py [OUT]

OUT is src/training/metrics/metrics.json if not given. The sentences are our own.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

import sacrebleu
import scipy.stats
import sklearn.metrics
from rouge_score.rouge_scorer import RougeScorer

ROUGES = ["rouge1", "rouge2", "rougeL"]
HERE = Path(__file__).resolve()

HERON = "The heron waits at the edge of the pond until a fish comes near."

# Name: pairs of a prediction and its references.
TEXTS = {
    "perfect": [(HERON, [HERON])],
    "perfect corpus": [
        (HERON, [HERON]),
        ("Rain fell on the tin roof all night.", ["Rain fell on the tin roof all night."]),
    ],
    "no overlap": [("Seven grey boats lay at anchor.", ["My aunt bakes bread with rye"])],
    "only the full stop matches": [("Seven grey boats lay at anchor.", ["My aunt bakes bread with rye."])],
    "one word off": [("The heron waits at the edge of the lake until a fish comes near.", [HERON])],
    "word order": [("Near the pond a fish waits until the heron comes at the edge of the.", [HERON])],
    "case matters to BLEU alone": [("THE HERON waits at the Edge of the pond until a FISH comes near.", [HERON])],
    "too short": [("The heron waits at the pond.", [HERON])],
    "too long": [(HERON + " Then it stabs, swallows and waits again as if nothing had happened.", [HERON])],
    "clipped counts": [("the the the the the the the", ["the cat is on the mat near the door"])],
    "one word": [("yes", ["yes"])],
    "one wrong word": [("yes", ["no"])],
    "three words": [("blue paper lanterns", ["blue paper lanterns"])],
    "four words": [("four blue paper lanterns", ["four blue paper lanterns"])],
    "short ones reach four words with a mark": [("blue paper lanterns.", ["blue paper lanterns."])],
    "smoothed once": [("the old mill by a river stands", ["the old mill near this river stands"])],
    "smoothed twice": [("a small dog ran far", ["a small cat sat far"])],
    "smoothed thrice": [("rain on stone at dawn", ["dawn came with rain and wind"])],
    "empty prediction": [("", [HERON])],
    "empty reference": [(HERON, [""])],
    "both empty": [("", [""])],
    "an empty prediction in a corpus": [(HERON, [HERON]), ("", ["The door was shut."]), ("Come in.", ["Come in!"])],
    "only whitespace": [(" \t\n ", ["   "])],
    "only marks": [("?! ... ,,, --", ["?! ... ,,, --"])],
    "whitespace around": [("  The kettle sings on the stove. \n", ["The kettle sings on the stove."])],
    "tabs and newlines": [("The kettle\tsings\non the\r\nstove again.", ["The kettle sings on the stove again."])],
    "separators of ASCII": [("red\x1cgreen\x1dblue\x1egrey\x1fpink", ["red green blue grey pink\x1f"])],
    "other spaces": [("red\u00a0green\u2003blue\u3000grey\u0085pink", ["red green blue grey pink"])],
    "zero width": [("red\u200bgreen blue grey pink black", ["redgreen blue grey pink black"])],
    "broken at a hyphen": [
        ("The weather sta-\ntion sent no data to-day.", ["The weather station sent no data to-day."])
    ],
    "a hyphen at the end": [("It ended with a dash-\n", ["It ended with a dash-"])],
    "skipped": [("We met <skipped>at the well by noon.", ["We met at the well <skipped> by noon."])],
    "numbers": [("It cost 1,000.5 crowns, not 999.", ["It cost 1,000.5 crowns, not 1000."])],
    "ranges": [("Read pages 5-6 and 10-12 by 2024-05-06.", ["Read pages 5 - 6 and 10-12 by 2024-05-06."])],
    "hyphens and digits": [("A-4 or 4-A or -4 or 4- or 4--4", ["A - 4 or 4 - A or - 4 or 4 - or 4 - - 4"])],
    "stops beside digits": [
        ("At 5. Or .5 or 5.a or a.5 or 1.,2 end", ["At 5 . Or . 5 or 5 . a or a . 5 or 1 . , 2 end"])
    ],
    "a stop first, a stop last": [(".5 of it went to town by 5.", [". 5 of it went to town by 5 ."])],
    "runs of stops": [("Well... so,, then.,.,no ..5.. done", ["Well . . . so , , then . , . , no . . 5 . . done"])],
    "stops within words": [("See v1.2.3 at a.b.c,d or U.S.A. now", ["See v1.2.3 at a . b . c , d or U . S . A . now"])],
    "percent and money": [("Sales rose 12.5% to $3,400 (up $378)!", ["Sales rose 12.5 % to $ 3,400 ( up $ 378 ) !"])],
    "apostrophes": [("It's the farmer's 'best' dog, isn't it?", ["It's the farmer's ' best ' dog, is n't it ?"])],
    "quotes": [('"Wait," she said, "the tide\'s out."', ['" Wait , " she said , " the tide\'s out . "'])],
    "entities": [("&quot;Salt &amp; pepper&quot; if 3 &lt; 4 &gt; 2", ['"Salt & pepper" if 3 < 4 > 2'])],
    "entities twice": [("x &amp;lt; y &amp;amp; z &amp;quot; w &apos; v", ["x < y &amp; z &quot; w &apos; v"])],
    "marks": [
        (
            "a@b.org, #tag_x; c:\\d/e [f] {g} |h| ~i~ ^j^ `k` *l* m=n+o",
            ["a @ b . org , # tag _ x ; c : \\ d / e [ f ] { g } | h | ~ i ~ ^ j ^ ` k ` * l * m = n + o"],
        )
    ],
    "letters beyond ASCII": [("Über dem Fluß wächst große Öde.", ["Über dem Fluss wächst große Öde."])],
    "other scripts": [
        ("Снег лежит на крыше дома.", ["Снег лежал на крыше дома."]),
        ("雪が屋根に積もる。", ["雪が屋根に残る。"]),
    ],
    "marks beyond ASCII": [("«Oui», dit-elle – “à demain”… ¿sí?", ["« Oui », dit-elle — “ à demain ” … ¿ sí ?"])],
    "digits beyond ASCII": [("٣.٤ or ３-４ or x².5", ["٣ . ٤ or ３ - ４ or x² . 5"])],
    "lower case into ASCII": [("300 \u212a of \u0130ce \u212bre cold \u017fo", ["300 K of ice are cold so 300 k"])],
    "emoji": [("Good job 👍🏽, team 🎉!", ["Good job 👍🏽 , team 🎉 !"])],
    "combining marks": [("cafe\u0301 au lait at noon", ["caf\u00e9 au lait at noon"])],
    "two references": [
        ("The ferry leaves at noon today.", ["The ferry departs at noon today.", "At noon today the boat leaves."])
    ],
    "three references": [
        (
            "A fox crossed the frozen field.",
            ["The fox ran over the ice.", "A fox crossed a field.", "Over the frozen field went a fox."],
        )
    ],
    "references of two lengths, as close": [
        ("one two three four five six", ["one two three four", "one two three four five six seven eight"])
    ],
    "as close, the longer first": [
        ("one two three four five six", ["one two three four five six seven eight", "one two three four"])
    ],
    "closest is longer": [("one two three four five", ["one two", "one two three four five six", "five"])],
    "each count from another reference": [
        ("red red blue blue green now", ["red red blue green", "red blue blue green now then"])
    ],
    "the same reference twice": [("one two two three four", ["one two three four", "one two three four"])],
    "one reference is empty": [("The lamp is lit.", ["", "The lamp is lit at dusk."])],
    "as many references as there are": [
        ("The ferry leaves at noon.", ["The ferry departs at noon.", "At noon the boat leaves."]),
        ("Bring two ropes and a lamp.", ["Bring a lamp and two ropes."]),
        ("It is cold.", ["It is cold today.", "It's cold.", "Cold, isn't it?"]),
    ],
    "best per measure": [("a b c d e f", ["f e d c b a", "a b x y z w", "a x b x c x d x e x"])],
    "corpus": [
        ("The parcel arrived on Monday, two days late.", ["The parcel came on Monday, two days too late."]),
        ("Nobody knew who had left the gate open.", ["No one knew who left the gate open."]),
        ("She counted 14 swans and 3 geese.", ["She counted fourteen swans and three geese."]),
        ("Paint the fence before it rains!", ["Paint that fence before the rain comes!"]),
        ("Why?", ["Why not?"]),
    ],
    "a corpus of short ones": [("yes", ["yes"]), ("no", ["no"]), ("maybe so", ["maybe not"]), ("left", ["right"])],
    "short with one long": [("yes", ["yes"]), ("the bus to the coast is late", ["the bus to the coast was late"])],
    "a longest subsequence with gaps": [("b a n a n a s p l i t", ["a b a n d o n a l l p l a t e s"])],
    "a long text": [(" ".join([HERON] * 12), [" ".join([HERON.replace("fish", "frog")] * 13)])],
    "underscores and case": [("snake_case CamelCase kebab-case x2y", ["snake case camelcase kebab case X2Y"])],
}

# Name: predictions and references.
LABELS = {
    "all right": ("a b c", "a b c"),
    "all wrong": ("a b c", "b c a"),
    "one class": ("a a a", "a a a"),
    "binary": ("1 0 1 1 0 0 1", "1 0 0 1 0 1 1"),
    "never predicted": ("yes yes yes yes", "yes no yes maybe"),
    "only predicted": ("good bad odd good", "good bad bad good"),
    "rare": ("a a a a a a a a b a", "a a a a a a a a b b"),
    "case and marks": ("Ja ja JA nein. nein", "ja ja ja nein nein."),
    "beyond ASCII": ("gut schön grün 雪", "gut schon grün 雪"),
    "many": ("a b c d e f g h a b c d e f g h", "a b c d e f g a b c d e f g h h"),
    "one pair": ("a", "b"),
}
# What a split at spaces cannot say: empty labels, labels with spaces.
SPACED = {"empty": (["", "a", ""], ["", "", "a"]), "spaces": ([" a", "a", "a b"], ["a", "a", "a b"])}

PERPLEXITIES = [[1.0], [0.5], [0.25, 0.25, 0.25], [0.9, 0.01, 0.3, 0.77], [1e-30, 1e-12, 0.5], [1 / 32000] * 5]


def text_case(name: str, pairs: list[tuple[str, list[str]]]) -> dict:
    """Scores of a corpus."""
    predictions, references = [p for p, _ in pairs], [r for _, r in pairs]
    # sacrebleu wants the first references of all, then the second ones; None where there is none.
    most = max(len(r) for r in references)
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    scorer = RougeScorer(ROUGES, use_stemmer=False)
    scores = [scorer.score_multi(r, p) for p, r in pairs]
    return {
        "name": name,
        "predictions": predictions,
        "references": references,
        "bleu": sacrebleu.corpus_bleu(predictions, streams).score,
        **{kind: sum(s[kind].fmeasure for s in scores) / len(scores) for kind in ROUGES},
        # By the definition, against the first references.
        "exact_match": sum(p.strip() == r[0].strip() for p, r in pairs) / len(pairs),
    }


def label_case(name: str, predictions: list[str], references: list[str]) -> dict:
    """Scores of a classifier."""
    return {
        "name": name,
        "predictions": predictions,
        "references": references,
        "accuracy": float(sklearn.metrics.accuracy_score(references, predictions)),
        "macro_f1": float(sklearn.metrics.f1_score(references, predictions, average="macro", zero_division=0)),
    }


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parents[2] / "src/training/metrics/metrics.json"
    labels = {name: (p.split(), r.split()) for name, (p, r) in LABELS.items()} | SPACED
    lists = {
        "texts": [text_case(name, pairs) for name, pairs in TEXTS.items()],
        "labels": [label_case(name, *pair) for name, pair in labels.items()],
        "perplexities": [
            {"probabilities": ps, "perplexity": float(scipy.stats.gmean([1 / p for p in ps]))} for ps in PERPLEXITIES
        ],
    }
    made_by = {
        "sacrebleu": sacrebleu.__version__,
        "rouge-score": metadata.version("rouge-score"),
        "scikit-learn": sklearn.__version__,
    }
    # A case a line.
    parts = [f' "{key}": [\n' + ",\n".join(json.dumps(case) for case in cases) + "\n ]" for key, cases in lists.items()]
    text = "{\n" + ",\n".join([f' "made_by": {json.dumps(made_by)}', *parts]) + "\n}\n"
    json.loads(text)
    out.write_text(text)
    print(f"{', '.join(f'{len(cases)} {key}' for key, cases in lists.items())}, {len(text)} bytes")


main()
