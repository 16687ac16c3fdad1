#!/usr/bin/env python3
"""Banking77, TREC and E2E NLG as JSON lines, the same for prefixd and for PEFT.

usage: tasks.py DATA OUT [--labels names|words|letters]

Reads DATA/banking77/{train,test}.csv and categories.json, DATA/trec/TREC.{train,test}.all, DATA/e2e/devset.csv and
testset_w_refs.csv. Writes to OUT, for each of the tasks banking77, banking10, trec and e2e:

  TASK-train.jsonl  {"input": ..., "target": ...}
  TASK-test.jsonl   the same; e2e: {"input": ..., "targets": [...]}, one line for each distinct input
  TASK.toml         prefixd's task card: the template and the labels

Lines are in an order drawn once from a fixed seed, so the first N lines of a file are a fair sample that every program
can take. banking10 has the first ten of categories.json. A label is the data's own name (TREC: the word for it); with
--labels words it has spaces in place of underscores; with --labels letters it is a capital letter, or two where there
are more than 26 classes, in the order of categories.json: for small models, which spend long on how a label is spelt.
E2E trains on its development set: the inputs of its test set are others (asserted below).

Needs: Python 3.9, no packages.
"""
import argparse, csv, json, pathlib, random

TEMPLATE = "{{ input }}\n=> "
TREC = ["description", "entity", "abbreviation", "human", "location", "number"]  # by the digit of the data


def clean(text):
    return " ".join(text.split())


def rows(path, *columns):
    with open(path, encoding="utf-8", newline="") as f:
        return [tuple(clean(row[c]) for c in columns) for row in csv.DictReader(f)]


def trec(path):
    lines = path.read_text(encoding="latin-1").splitlines()
    return [(clean(line[2:]), TREC[int(line[0])]) for line in lines if line]


def write(out, name, records):
    random.Random(0).shuffle(records)
    with open(out / f"{name}.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    return len(records)


def card(out, task, description, labels):
    text = f"description = {json.dumps(description)}\ntemplate = {json.dumps(TEMPLATE)}\n"
    text += f"labels = {json.dumps(labels)}\n" if labels else "\n[stopping]\nmax_new_tokens = 120\n"
    (out / f"{task}.toml").write_text(text + "\n[sampling]\ntemperature = 0.0\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", type=pathlib.Path), p.add_argument("out", type=pathlib.Path)
    p.add_argument("--labels", choices=("names", "words", "letters"), default="names")
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)

    def written(labels):
        if a.labels == "letters":
            few = len(labels) <= 26
            return {l: chr(65 + i) if few else chr(65 + i // 26) + chr(65 + i % 26) for i, l in enumerate(labels)}
        return {l: l.replace("_", " ") if a.labels == "words" else l for l in labels}

    categories = json.loads((a.data / "banking77/categories.json").read_text())
    bank = {s: rows(a.data / f"banking77/{s}.csv", "text", "category") for s in ("train", "test")}
    sets = {
        "banking77": ("What a bank's customer wants, one of 77 intents.", categories, bank),
        "banking10": ("What a bank's customer wants, one of 10 intents.", categories[:10], bank),
        "trec": ("What a question asks for.", TREC, {s: trec(a.data / f"trec/TREC.{s}.all") for s in ("train", "test")}),
    }
    report = {}
    for task, (description, labels, splits) in sets.items():
        name = written(labels)
        card(a.out, task, description, list(name.values()))
        report[task] = {"labels": len(labels)}
        for split, pairs in splits.items():
            pairs = [(text, label) for text, label in pairs if label in labels]
            assert {label for _, label in pairs} == set(labels) and all(text for text, _ in pairs)
            records = [{"input": text, "target": name[label]} for text, label in pairs]
            report[task][split] = write(a.out, f"{task}-{split}", records)

    pairs, tests = rows(a.data / "e2e/devset.csv", "mr", "ref"), {}
    for mr, ref in rows(a.data / "e2e/testset_w_refs.csv", "mr", "ref"):
        tests.setdefault(mr, []).append(ref)
    assert not tests.keys() & {mr for mr, _ in pairs}
    card(a.out, "e2e", "A sentence that says the attributes of a restaurant.", None)
    report["e2e"] = {
        "train": write(a.out, "e2e-train", [{"input": mr, "target": ref} for mr, ref in pairs]),
        "test": write(a.out, "e2e-test", [{"input": mr, "targets": refs} for mr, refs in tests.items()]),
        "references": sum(map(len, tests.values())),
    }
    print(json.dumps(report))


main()
