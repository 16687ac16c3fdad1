#!/usr/bin/env python3
"""The files of tasks.py learnt by prefixd and by Hugging Face PEFT, from the same settings, in one run.

usage: tasks_side_by_side.py MODEL DATA TASK... [--prefixd PATH] [--python PYTHON] [--lr X] [--steps N] [--seeds 0 1 2] [options]

MODEL is a Hugging Face folder, DATA what tasks.py wrote, TASK the name before -train.jsonl. PYTHON has torch, transformers and
PEFT: the other side is peft_tasks.py. prefixd trains and evaluates through a server, over gRPC. Both take the same lines, the
same number of virtual tokens, steps, batch, learning rate, warm-up, clipping and kind of initial weights. Each draws its own order
of the examples; with --one-order this script draws one for both, of which the initial text is the start. Prints a JSON line for each
side, task and seed, and then a table: mean and range over the seeds.

  --weights scaled   the control: numbers drawn from N(0, the real tensor's standard deviation), norms 1, biases 0
  --weights small    the same with standard deviation 0.02, as transformers starts a model

Figures: accuracy (of labels ranked by the log-probability of their tokens), perplexity (of the first target's tokens), BLEU. `base`
is the model without an adapter on the same texts. `gap` is what prefixd has more than PEFT (perplexity: less), `noise` the standard
error of that difference over the seeds.

Needs: grpcio, grpcio-tools; the executable; MODEL's weights in one model.safetensors of type F32 for the controls.
"""
import argparse, array, collections, json, math, pathlib, random, shutil, statistics, struct, subprocess, sys, tempfile, time

from prefixd_server import Prefixd, training

INITS = {"text": training.PROMPT_INIT_TEXT, "vocab": training.PROMPT_INIT_SAMPLED_VOCABULARY, "random": training.PROMPT_INIT_RANDOM}
METHODS = {"prefix": training.TRAINING_METHOD_PREFIX_TUNING, "prompt": training.TRAINING_METHOD_PROMPT_TUNING}
FEW = 20  # steps whose mean is the last loss, as in peft_tasks.py
TEMPLATE = "{}\n=> "  # that of tasks.py


def control(model, folder, deviation):
    """`model` with weights that never learnt."""
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    folder.chmod(0o755), path.chmod(0o644)
    data = bytearray(path.read_bytes())
    head = 8 + struct.unpack_from("<Q", data)[0]
    rng = random.Random(0)
    for name, t in json.loads(data[8:head]).items():
        if name == "__metadata__":
            continue
        assert t["dtype"] == "F32", f"{name} is {t['dtype']}"
        first, last = (head + x for x in t["data_offsets"])
        values = array.array("f", data[first:last])
        if len(t["shape"]) == 1:
            new = [float("norm" in name)] * len(values)
        else:
            size = deviation or statistics.pstdev(values)
            new = [rng.gauss(0, size) for _ in values]
        data[first:last] = array.array("f", new).tobytes()
    path.write_bytes(data)
    return folder


def lines(data, name, split):
    return [json.loads(line) for line in (data / f"{name}-{split}.jsonl").read_text("utf-8").splitlines()]


def examples(records, template="{}"):
    return training.Dataset(inline=training.ExampleList(examples=[
        training.TrainingExample(input=template.format(r["input"]), targets=r.get("targets") or [r["target"]]) for r in records]))


def ordered(a, seed, folder):
    """DATA in `folder`, the lines to learn from as often as the steps take them, every time through in a new order."""
    rng = random.Random(seed)
    for name in a.tasks:
        for kind in (".toml", "-test.jsonl"):
            shutil.copy(a.data / f"{name}{kind}", folder)
        all_lines, taken = (a.data / f"{name}-train.jsonl").read_text("utf-8").splitlines(), []
        while len(taken) < a.steps * a.batch_size:
            taken += rng.sample(all_lines, len(all_lines))
        (folder / f"{name}-train.jsonl").write_text("\n".join(taken[: a.steps * a.batch_size]) + "\n", "utf-8")
    return folder


def figures(scores):
    if scores.HasField("macro_f1"):
        return {"accuracy": round(scores.exact_match, 4)}
    return {"perplexity": round(scores.perplexity, 4), "bleu": round(scores.bleu, 2)}


def ours(model, a):
    """prefixd's lines."""
    with tempfile.TemporaryDirectory() as store, Prefixd(a.prefixd, model, store, "--threads", a.threads, "--dtype", "f32") as server:
        for name in a.tasks:
            card = (a.data / f"{name}.toml").read_text("utf-8")
            learn, test = lines(a.data, name, "train"), lines(a.data, name, "test")[: a.test or None]
            settings = dict(method=METHODS[a.method], num_virtual_tokens=a.virtual_tokens, init=INITS[a.init], learning_rate=a.lr,
                            warmup_steps=round(a.warmup * a.steps), batch_size=a.batch_size, max_steps=a.steps,
                            classification_head=a.head)
            base = {}
            for seed in a.seeds:
                start = time.time()
                job = server.training.CreateTrainingJob(training.CreateTrainingJobRequest(
                    adapter_id=name, settings=training.TrainingSettings(**settings, seed=seed, keep_order=a.one_order), data=examples(learn), task_card=card,
                    load=True, replace=True)).job
                losses, ended = [], None
                for event in server.training.WatchTrainingJob(training.WatchTrainingJobRequest(job_id=job.job_id)):
                    if event.HasField("step"):
                        losses.append(event.step.loss)
                    elif event.HasField("job"):
                        ended = event.job
                if ended.state != training.TRAINING_JOB_STATE_SUCCEEDED:
                    raise SystemExit(f"{name}: {ended.error}")
                train_s = time.time() - start
                ask = lambda data, **k: server.training.Evaluate(training.EvaluateRequest(adapter_id=name, data=data, **k))
                found = figures(ask(examples(test), skip_base=True).scores)
                if not base and not a.head:
                    # The bare base reads no template: here it is in the text.
                    base = {f"base_{k}": v for k, v in figures(ask(examples(test, TEMPLATE)).base_scores).items()}
                yield dict(task=name, seed=seed, **found, **base, test=len(test), loss_first=round(losses[0], 4),
                           loss_last=round(statistics.mean(losses[-FEW:]), 4), train_s=round(train_s, 1),
                           too_long=ended.too_long_examples, version=server.info.version)


def theirs(model, a):
    """PEFT's lines. Its own random prefix is N(0, 1), prefixd's N(0, 0.02^2): both take the latter here."""
    command = [a.python, pathlib.Path(__file__).with_name("peft_tasks.py"), model, a.data, *a.tasks, "--method", f"{a.method}_tuning",
               "--init", a.init, "--lr", a.lr, "--steps", a.steps, "--warmup", a.warmup, "--batch-size", a.batch_size, "--virtual-tokens",
               a.virtual_tokens, "--test", a.test, "--bleu", a.test or 10**9, "--threads", a.threads, "--seeds", *a.seeds]
    if a.method == "prefix" and a.init == "random" and a.peft_std:
        command += ["--init-std", a.peft_std]
    command += ["--keep-order"] * a.one_order + ["--head"] * a.head
    child = subprocess.Popen([str(x) for x in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        for line in child.stdout:
            r = json.loads(line)
            # prefixd ranks labels, and counts perplexity, without the end-of-sequence token.
            for prefix in ("", "base_"):
                if f"{prefix}accuracy_without_eos" in r:
                    r[f"{prefix}accuracy"] = r[f"{prefix}accuracy_without_eos"]
            keys = ("task", "seed", "accuracy", "perplexity", "bleu", "base_accuracy", "base_perplexity", "base_bleu", "majority", "test",
                    "loss_first", "loss_last", "train_s", "too_long", "torch", "transformers", "peft")
            yield {k: r[k] for k in keys if k in r}
        if child.wait():
            raise SystemExit(f"peft_tasks.py ended with {child.returncode}")
    finally:
        child.kill()
        child.wait()


def table(found):
    """Rows of Markdown, one for each kind of weights, task and figure."""
    yield "| weights | task | figure | prefixd | PEFT | gap | noise | base | majority |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for (weights, task), sides in found.items():
        for figure in ("accuracy", "perplexity", "bleu"):
            got = {side: [r[figure] for r in rows] for side, rows in sides.items() if figure in rows[0]}
            if not got:
                continue
            scale, digits = (100, 1) if figure == "accuracy" else (1, 2)
            show = lambda v: "" if v is None else f"{scale * v:.{digits}f}"
            spread = lambda v: f"{show(statistics.mean(v))} ({show(min(v))} to {show(max(v))})" if v else ""
            a, b, gap, noise = got.get("prefixd"), got.get("peft"), None, None
            if a and b:
                gap = (statistics.mean(a) - statistics.mean(b)) * (-1 if figure == "perplexity" else 1)
                if min(len(a), len(b)) > 1:
                    noise = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
            every = [r for rows in sides.values() for r in rows]
            one = lambda key: next((r[key] for r in every if key in r), None)
            yield "| " + " | ".join([weights, task, figure, spread(a), spread(b), show(gap), show(noise), show(one(f"base_{figure}")),
                                     show(one("majority")) if figure == "accuracy" else ""]) + " |"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=pathlib.Path), p.add_argument("data", type=pathlib.Path), p.add_argument("tasks", nargs="*")
    p.add_argument("--prefixd", type=pathlib.Path, default=pathlib.Path("target/release/prefixd"))
    p.add_argument("--python", default=sys.executable)
    p.add_argument("--sides", nargs="+", choices=("prefixd", "peft"), default=["prefixd", "peft"])
    p.add_argument("--weights", nargs="+", choices=("real", "scaled", "small"), default=["real"])
    p.add_argument("--method", choices=METHODS, default="prefix")
    p.add_argument("--init", choices=INITS, default="text",
                   help="text: the first examples (prefix: their K and V), prefixd's default; vocab: drawn tokens; random: numbers")
    p.add_argument("--peft-std", type=float, default=0.02, help="of PEFT's random prefix; prefixd's is 0.02; 0: PEFT's own, 1")
    p.add_argument("--lr", type=float, default=0.1), p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--warmup", type=float, default=0.06, help="share of the steps")
    p.add_argument("--batch-size", type=int, default=16), p.add_argument("--virtual-tokens", type=int, default=20)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--test", type=int, default=0, help="take the first N test lines; 0: all")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--one-order", action="store_true", help="both sides learn the examples in the same order")
    p.add_argument("--head", action="store_true", help="a linear head classifies, instead of words; it is trained beside the rows")
    p.add_argument("--read", type=pathlib.Path, nargs="*", default=[], help="lines that earlier runs printed: in the table too")
    a = p.parse_args()
    settings = dict(model=a.model.name, data=a.data.name, method=a.method, init=a.init, lr=a.lr, steps=a.steps, warmup=a.warmup,
                    batch_size=a.batch_size, virtual_tokens=a.virtual_tokens, threads=a.threads, one_order=a.one_order, head=a.head)
    found = {}
    keep = lambda line: found.setdefault((line["weights"], line["task"]), collections.defaultdict(list))[line["side"]].append(line)
    for text in (text for path in a.read for text in path.read_text().splitlines()):
        if text.startswith("{"):
            keep(json.loads(text))
    for weights in a.weights:
        with tempfile.TemporaryDirectory() as folder:
            model = a.model
            if weights != "real":
                model = control(a.model, pathlib.Path(folder) / a.model.name, 0.02 if weights == "small" else None)
            for seeds in ([[seed] for seed in a.seeds] if a.one_order else [a.seeds]) if a.tasks else ():
                with tempfile.TemporaryDirectory() as data:
                    data = ordered(a, seeds[0], pathlib.Path(data)) if a.one_order else a.data
                    run = argparse.Namespace(**{**vars(a), "data": data, "seeds": seeds})
                    for side in a.sides:
                        for line in {"prefixd": ours, "peft": theirs}[side](model, run):
                            line = dict(side=side, weights=weights) | line | settings
                            keep(line)
                            print(json.dumps(line), flush=True)
    print("\n".join(table(found)))


main()
