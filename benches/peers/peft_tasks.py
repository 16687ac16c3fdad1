#!/usr/bin/env python3
"""What Hugging Face PEFT learns from the files of tasks.py, on a small decoder, on the CPU.

usage: peft_tasks.py MODEL DATA TASK... [options]

MODEL is a Hugging Face folder, DATA what tasks.py wrote, TASK the name before -train.jsonl. A sequence is BOS, the
tokens of "{input}\\n=> ", those of the target and EOS; the loss counts target and EOS. Prints one JSON line for each
task and seed:

  accuracy              the label with the highest sum of log-probabilities of its tokens and EOS is right
  accuracy_without_eos  the same without EOS
  perplexity            e to the mean NLL of the first target's tokens; perplexity_with_eos counts EOS too
  bleu                  corpus BLEU of greedy texts against all targets (sacrebleu's defaults; tokeniser 13a)
  base_...              the same of the model without an adapter

A task whose training targets are at most 100 distinct ones is classification. With --head it is learnt by a linear head that reads
the prompt's last token (`score` of LlamaForSequenceClassification), trained beside the rows: accuracy is that of its largest logit.

Needs: torch, transformers 5, peft 0.21.
"""
import argparse, collections, json, math, os, pathlib, re, sys, time, warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
warnings.filterwarnings("ignore")
import torch
import torch.nn.functional as F
import transformers
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache

transformers.logging.set_verbosity_error()


class Texts:
    """Tokens of a model's texts; prompt and target are encoded apart, as a server sees them."""

    def __init__(self, folder, template):
        self.tok = AutoTokenizer.from_pretrained(folder)
        self.bos, self.eos = self.tok.bos_token_id, self.tok.eos_token_id
        self.template = template

    def ids(self, text):
        return self.tok(text, add_special_tokens=False)["input_ids"]

    def prompt(self, text):
        return ([] if self.bos is None else [self.bos]) + self.ids(self.template.replace("{input}", text))

    def target(self, text):
        return self.ids(text) + [self.eos]


def padded(rows, value=0):
    """Rows filled up on the right, and where they are real."""
    width = max(map(len, rows))
    ids = torch.tensor([r + [value] * (width - len(r)) for r in rows])
    return ids, torch.arange(width)[None] < torch.tensor([[len(r)] for r in rows])


# Training ------------------------------------------------------------------------------------------------------------

def kv_of(model, ids):
    """K and V of a text as rows of PEFT's prefix: [tokens, layers * 2 * heads * head_dim]."""
    with torch.no_grad():
        layers = model.base_model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values.layers
    each = [t[0].transpose(0, 1).flatten(1) for layer in layers for t in (layer.keys, layer.values)]
    return torch.cat(each, dim=1)


def adapter(model, a, text_ids, seed):
    torch.manual_seed(seed)
    kind = dict(task_type="SEQ_CLS" if a.head else "CAUSAL_LM", num_virtual_tokens=a.virtual_tokens)
    if a.method == "prefix_tuning":
        config = PrefixTuningConfig(**kind)
    else:
        config = PromptTuningConfig(**kind, prompt_tuning_init="SAMPLE_VOCAB" if a.init == "vocab" else "RANDOM")
    pm = get_peft_model(model, config)
    rows = pm.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        if a.init == "text":
            ids = (text_ids * a.virtual_tokens)[: a.virtual_tokens]
            rows.copy_(kv_of(model, ids) if a.method == "prefix_tuning" else model.get_input_embeddings()(torch.tensor(ids)))
        elif a.init == "vocab" and a.method == "prefix_tuning":
            rows.copy_(kv_of(model, torch.randint(0, model.config.vocab_size, (a.virtual_tokens,)).tolist()))
        elif a.init == "random" and a.init_std is not None:
            rows.normal_(0, a.init_std)
    return pm


def batches(count, size, seed, keep_order):
    """Indices, every epoch in a new order or in the data's."""
    g, left = torch.Generator().manual_seed(seed), []
    while True:
        while len(left) < size:
            left += list(range(count)) if keep_order else torch.randperm(count, generator=g).tolist()
        yield left[:size]
        left = left[size:]


def train(pm, examples, a, lr, seed):
    weights = [p for p in pm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=a.weight_decay)
    warmup = round(a.warmup * a.steps)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, a.steps)
    order, losses = batches(len(examples), a.batch_size, seed, a.keep_order), []
    pm.train()
    for _ in range(a.steps):
        chosen = [examples[i] for i in next(order)]
        if a.head:
            (ids, mask), labels = padded([p for p, _ in chosen]), torch.tensor([c for _, c in chosen])
        else:
            ids, mask = padded([p + t for p, t in chosen])
            labels, _ = padded([[-100] * len(p) + t for p, t in chosen], -100)
        loss = pm(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    pm.eval()
    return losses, sum(p.numel() for p in weights), warmup


# Evaluation ----------------------------------------------------------------------------------------------------------

class Reader:
    """The base after an adapter (`pm`; None: the bare base). A prompt is read once, whatever is then asked of it."""

    def __init__(self, base, pm):
        self.base, self.pm = base, pm
        self.method = pm.peft_config["default"].peft_type.value if pm else None
        self.virtual = pm.peft_config["default"].num_virtual_tokens if pm else 0

    def prefill(self, prompts):
        """Log-probabilities after each prompt, and the state to go on from: (cache, mask of its slots, lengths)."""
        ids, mask = padded(prompts)
        n, b = self.virtual, len(prompts)
        full = torch.cat([torch.ones(b, n, dtype=torch.bool), mask], 1)
        if self.method == "PREFIX_TUNING":
            out = self.base(input_ids=ids, attention_mask=full.long(), past_key_values=self.pm.get_prompt(b), use_cache=True)
        elif self.method:
            rows = torch.cat([self.pm.get_prompt(b), self.base.get_input_embeddings()(ids)], 1)
            out = self.base(inputs_embeds=rows, attention_mask=full.long(), use_cache=True)
        else:
            out = self.base(input_ids=ids, attention_mask=full.long(), use_cache=True)
        length = mask.sum(1)
        at = length - 1 + (out.logits.shape[1] - ids.shape[1])
        return out.logits[torch.arange(b), at].log_softmax(-1), (out.past_key_values, full, length + n)

    def go_on(self, state, ids):
        """Log-probabilities after every token of `ids` [rows, tokens], and the state behind them."""
        cache, mask, length = state
        mask = torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], 1)
        places = length[:, None] + torch.arange(ids.shape[1])[None]
        out = self.base(input_ids=ids, attention_mask=mask.long(), position_ids=places, past_key_values=cache, use_cache=True)
        return out.logits.log_softmax(-1), (out.past_key_values, mask, length + ids.shape[1])


def repeated(state, times):
    cache, mask, length = state
    pairs = [(l.keys.repeat_interleave(times, 0), l.values.repeat_interleave(times, 0)) for l in cache.layers]
    return DynamicCache(pairs), mask.repeat_interleave(times, 0), length.repeat_interleave(times, 0)


def target_scores(reader, prompts, targets):
    """For row i and each of `targets[i]` (as many everywhere): log-probabilities [rows, targets, tokens], 0 behind EOS."""
    first, state = reader.prefill(prompts)
    each = len(targets[0])
    ids, real = padded([t for row in targets for t in row])
    later, _ = reader.go_on(repeated(state, each), ids[:, :-1])
    logprobs = torch.cat([first.repeat_interleave(each, 0)[:, None], later], 1)
    got = logprobs.gather(2, ids[..., None])[..., 0]
    return (got * real).view(len(prompts), each, -1), real.view(len(prompts), each, -1)


def in_parts(items, size):
    """Indices of `items`, those of about the same length together."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    return [order[i: i + size] for i in range(0, len(order), size)]


@torch.inference_mode()
def classify(reader, prompts, right, labels, rows):
    hits = {"accuracy": 0, "accuracy_without_eos": 0}
    for part in in_parts(prompts, max(1, rows // len(labels))):
        got, real = target_scores(reader, [prompts[i] for i in part], [labels] * len(part))
        last = real & ~torch.cat([real[..., 1:], torch.zeros_like(real[..., :1])], -1)
        for key, scores in (("accuracy", got.sum(-1)), ("accuracy_without_eos", (got * ~last).sum(-1))):
            hits[key] += sum(int(b == right[i]) for i, b in zip(part, scores.argmax(1).tolist()))
    return {k: round(v / len(prompts), 4) for k, v in hits.items()}


@torch.inference_mode()
def by_head(pm, prompts, right, rows):
    hits = 0
    for part in in_parts(prompts, rows):
        ids, mask = padded([prompts[i] for i in part])
        found = pm(input_ids=ids, attention_mask=mask.long()).logits.argmax(-1).tolist()
        hits += sum(int(f == right[i]) for i, f in zip(part, found))
    return {"accuracy": round(hits / len(prompts), 4)}


@torch.inference_mode()
def likelihood(reader, prompts, targets, rows):
    nll = {"perplexity": [0.0, 0], "perplexity_with_eos": [0.0, 0]}
    for part in in_parts([p + t for p, t in zip(prompts, targets)], max(1, rows // 4)):
        got, real = target_scores(reader, [prompts[i] for i in part], [[targets[i]] for i in part])
        for j, i in enumerate(part):
            n = len(targets[i])
            for key, k in (("perplexity", n - 1), ("perplexity_with_eos", n)):
                nll[key][0] -= got[j, 0, :k].sum().item()
                nll[key][1] += k
    return {k: round(math.exp(s / n), 4) for k, (s, n) in nll.items()}


@torch.inference_mode()
def greedy(reader, texts, prompts, most, rows):
    answers = [None] * len(prompts)
    for part in in_parts(prompts, max(1, rows // 4)):
        scores, state = reader.prefill([prompts[i] for i in part])
        out, alive = [[] for _ in part], [True] * len(part)
        for _ in range(most):
            ids = scores.argmax(-1)
            for j, id in enumerate(ids.tolist()):
                alive[j] = alive[j] and id != texts.eos
                if alive[j]:
                    out[j].append(id)
            if not any(alive):
                break
            scores, state = reader.go_on(state, ids[:, None])
            scores = scores[:, 0]
        for j, i in enumerate(part):
            answers[i] = texts.tok.decode(out[j], skip_special_tokens=True).strip()
    return answers


def words13a(line):
    """mteval-v13a: signs apart, but not full stops and commas between digits; a hyphen only behind a digit."""
    line = line.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for a, b in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        line = line.replace(a, b)
    line = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {line} ")
    line = re.sub(r"([^0-9])([.,])", r"\1 \2 ", line)
    line = re.sub(r"([.,])([^0-9])", r" \1 \2", line)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", line).split()


def bleu(answers, references):
    right, total, length, wanted = [0] * 4, [0] * 4, 0, 0
    grams = lambda w, n: collections.Counter(tuple(w[i: i + n]) for i in range(len(w) - n + 1))
    for answer, refs in zip(answers, references):
        answer, refs = words13a(answer), [words13a(r) for r in refs]
        length += len(answer)
        wanted += min((abs(len(r) - len(answer)), len(r)) for r in refs)[1]
        for n in range(1, 5):
            most = collections.Counter()
            for r in refs:
                most |= grams(r, n)
            said = grams(answer, n)
            right[n - 1] += sum((said & most).values())
            total[n - 1] += sum(said.values())
    if not any(right) or 0 in total:
        return 0.0
    logs, smooth = 0.0, 1.0
    for r, t in zip(right, total):
        if r == 0:
            smooth *= 2
        logs += math.log(100 * r / t if r else 100 / (smooth * t))
    return (math.exp(1 - wanted / length) if length < wanted else 1.0) * math.exp(logs / 4)


def evaluate(reader, texts, task, a):
    if task.labels:
        return classify(reader, task.prompts, task.right, [texts.target(l) for l in task.labels], a.rows)
    found = likelihood(reader, task.prompts, [texts.target(t[0]) for t in task.targets], a.rows)
    if a.bleu:
        some = min(a.bleu, len(task.prompts))
        answers = greedy(reader, texts, task.prompts[:some], a.max_new_tokens, a.rows)
        found.update(bleu=round(bleu(answers, task.targets[:some]), 2), bleu_texts=some, sample=answers[0])
    return found


class Task:
    def __init__(self, data, name, texts, a):
        read = lambda split: [json.loads(l) for l in (data / f"{name}-{split}.jsonl").read_text("utf-8").splitlines()]
        learn, test = read("train"), read("test")[: a.test or None]
        self.name, self.labels = name, sorted({r["target"] for r in learn})
        self.examples = [(texts.prompt(r["input"]), texts.target(r["target"])) for r in learn]
        if a.max_length:
            self.examples = [e for e in self.examples if len(e[0]) + len(e[1]) <= a.max_length]
        self.too_long = len(learn) - len(self.examples)
        self.prompts = [texts.prompt(r["input"]) for r in test]
        self.targets = [r["targets"] if "targets" in r else [r["target"]] for r in test]
        self.right, self.majority = None, None
        if len(self.labels) <= 100:
            self.right = [self.labels.index(t[0]) for t in self.targets]
            most = collections.Counter(r["target"] for r in learn).most_common(1)[0][0]
            self.majority = round(sum(t[0] == most for t in self.targets) / len(test), 4)
        else:
            self.labels = None
        if a.head:
            if not self.labels:
                raise SystemExit(f"{name} is no classification")
            self.examples = [(p, self.labels.index(r["target"])) for (p, _), r in zip(self.examples, learn)]


def base_model(a, labels):
    """The frozen model, with a head for so many labels if one is trained."""
    how = dict(dtype=torch.float32, attn_implementation=a.attention)
    if a.head:
        model = AutoModelForSequenceClassification.from_pretrained(a.model, num_labels=labels, pad_token_id=0, **how)
    else:
        model = AutoModelForCausalLM.from_pretrained(a.model, **how)
    return model.eval().requires_grad_(False)


def check(model, pm, task, texts):
    """The reader says what PEFT's own forward of the whole sequence says."""
    reader, targets = Reader(model, pm), [texts.target(t[0]) for t in task.targets[:4]]
    with torch.inference_mode():
        got, _ = target_scores(reader, task.prompts[:4], [[t] for t in targets])
        for i, t in enumerate(targets):
            logits = pm(input_ids=torch.tensor([task.prompts[i] + t])).logits[0, -len(t) - 1: -1].log_softmax(-1)
            want = logits.gather(1, torch.tensor(t)[:, None])[:, 0]
            off = (got[i, 0, : len(t)] - want).abs().max().item()
            assert off < 1e-3, (i, off)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=pathlib.Path), p.add_argument("data", type=pathlib.Path), p.add_argument("tasks", nargs="+")
    p.add_argument("--method", choices=("prefix_tuning", "prompt_tuning"), default="prefix_tuning")
    p.add_argument("--init", choices=("random", "vocab", "text"), default="random",
                   help="random: PEFT's own, N(0, 1); vocab: drawn tokens; text: the first training examples (prefix: K and V)")
    p.add_argument("--init-text", help="this text instead (implies --init text); repeated or cut to the virtual tokens")
    p.add_argument("--init-std", type=float, help="with --init random: this standard deviation instead of 1")
    p.add_argument("--virtual-tokens", type=int, default=20), p.add_argument("--lr", type=float, default=3e-2)
    p.add_argument("--steps", type=int, default=300), p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--warmup", type=float, default=0.06, help="share of the steps")
    p.add_argument("--weight-decay", type=float, default=0.0)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--test", type=int, default=0, help="take the first N test lines; 0: all")
    p.add_argument("--bleu", type=int, default=100, help="texts to write for BLEU; 0: none")
    p.add_argument("--max-new-tokens", type=int, default=120), p.add_argument("--max-length", type=int, default=0)
    p.add_argument("--template", default="{input}\n=> "), p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rows", type=int, default=320, help="sequences at once in the evaluation")
    p.add_argument("--attention", choices=("eager", "sdpa"), default="sdpa")
    p.add_argument("--keep-order", action="store_true", help="take the examples in their order")
    p.add_argument("--head", action="store_true", help="a linear head classifies, instead of words")
    p.add_argument("--no-base", action="store_true", help="do not measure the bare base")
    p.add_argument("--save", type=pathlib.Path, help="folder for the trained adapters, TASK-SEED each")
    a = p.parse_args()
    a.init = "text" if a.init_text is not None else a.init
    torch.set_num_threads(a.threads)
    texts = Texts(a.model, a.template)
    for name in a.tasks:
        task = Task(a.data, name, texts, a)
        model = base_model(a, len(task.labels or []))
        text = (texts.tok(a.init_text)["input_ids"] if a.method == "prefix_tuning" else texts.ids(a.init_text)) if a.init_text else \
            [i for prompt, target in task.examples[: a.virtual_tokens] for i in (prompt if a.head else prompt + target)]
        start = time.time()
        base = {} if a.no_base or a.head else {f"base_{k}": v for k, v in evaluate(Reader(model, None), texts, task, a).items()}
        base_s = time.time() - start
        for seed in a.seeds:
            pm = adapter(model, a, text, seed)
            start, cpu = time.time(), time.process_time()
            losses, trainable, warmup = train(pm, task.examples, a, a.lr, seed)
            train_s, train_cpu, start = time.time() - start, time.process_time() - cpu, time.time()
            if a.head:
                found = by_head(pm, task.prompts, task.right, a.rows)
            else:
                check(model, pm, task, texts)
                found = evaluate(Reader(model, pm), texts, task, a)
            if a.save:
                pm.save_pretrained(a.save / f"{name}-{seed}")
            few = min(20, len(losses))
            line = dict(task=name, seed=seed, **found, **base, majority=task.majority, test=len(task.prompts),
                        loss_first=round(losses[0], 4), loss_last=round(sum(losses[-few:]) / few, 4),
                        train_s=round(train_s, 1), train_cpu_s=round(train_cpu, 1), eval_s=round(time.time() - start, 1), base_eval_s=round(base_s, 1),
                        method=a.method, init=a.init, init_text=a.init_text, init_std=a.init_std, lr=a.lr, steps=a.steps, warmup_steps=warmup,
                        batch_size=a.batch_size, virtual_tokens=a.virtual_tokens, trainable=trainable, weight_decay=a.weight_decay,
                        train=len(task.examples), too_long=task.too_long, threads=a.threads, attention=a.attention,
                        model=a.model.name, data=a.data.name, torch=torch.__version__, transformers=transformers.__version__,
                        peft=__import__("peft").__version__)
            print(json.dumps({k: v for k, v in line.items() if v is not None}, ensure_ascii=False), flush=True)
            # PEFT put its own head in the place of the model's.
            model = base_model(a, len(task.labels)) if a.head else pm.get_base_model()


main()
