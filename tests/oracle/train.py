"""Whole training runs of PEFT and torch, for prefixd's training to repeat: results/peft/train/<model>-<adapter>/.

`python train.py [OUT]` (default: results/peft). The models must be there already (make.py). Each example runs by itself,
without padding; a step's loss is the sum over its labelled tokens divided by their number, or the mean over examples for
classes. train.json has the data, the settings, every loss and gradient norm; train.safetensors the weights before
(`init.`) and after (`final.`), under PEFT's names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

VIRTUAL = 6
STEPS, WARMUP, BATCH, EXAMPLES = 40, 4, 4, 16
RUNS = [
    # model, name, how, settings that differ
    ("llama_biases", "ptuning_lstm", dict(kind="lstm"), {}),
    ("llama_biases", "multitask", dict(kind="multitask"), {"lr": 0.02}),
    ("llama_biases", "prefix_cosine", dict(kind="prefix"), {"schedule": "cosine", "weight_decay": 0.1, "clip": 0.5}),
    # K and V as large as a long training leaves them: most of the softmax is 0 or 1.
    ("llama_biases", "prefix_large", dict(kind="prefix"), {"scale": 12.0, "lr": 0.1}),
    ("llama_biases", "prefix_cls", dict(kind="prefix", labels=3), {}),
    ("gemma2", "prompt", dict(kind="prompt"), {}),
    ("gpt2_by_layer", "prefix", dict(kind="prefix"), {}),
    ("bert_seqcls", "prefix_cls", dict(kind="prefix", labels=3), {}),
    ("bert_seqcls", "prompt_cls", dict(kind="prompt", labels=3), {}),
    # Its head has two layers.
    ("roberta_seqcls", "ptuning_cls", dict(kind="lstm", labels=3), {}),
]


def config(kind: str, task: TaskType):
    common = {"task_type": task, "num_virtual_tokens": VIRTUAL}
    if kind == "prefix":
        return PrefixTuningConfig(**common)
    if kind == "prompt":
        return PromptTuningConfig(**common)
    if kind == "lstm":
        return PromptEncoderConfig(
            **common, encoder_reparameterization_type="LSTM", encoder_num_layers=2, encoder_dropout=0.0,
            encoder_hidden_size=12,
        )
    return MultitaskPromptTuningConfig(**common, num_tasks=3, num_ranks=2)


def load(path: Path, labels: int):
    settings = AutoConfig.from_pretrained(path)
    for key in [k for k in vars(settings) if k.endswith(("dropout", "dropout_prob", "pdrop"))]:
        setattr(settings, key, 0.0)
    settings._attn_implementation = "eager"
    if not labels:
        return AutoModelForCausalLM.from_pretrained(path, config=settings, dtype=torch.float32)
    settings.num_labels = labels
    if settings.pad_token_id is None:
        settings.pad_token_id = 0
    return AutoModelForSequenceClassification.from_pretrained(
        path, config=settings, dtype=torch.float32, ignore_mismatched_sizes=True
    )


def name_of(parameter: str) -> str:
    """prompt_encoder.default.embedding.weight -> embedding.weight; heads keep their module's name."""
    parts = [p for p in parameter.split(".") if p not in ("prompt_encoder", "default", "base_model", "model", "modules_to_save")]
    return ".".join(parts)


def data(vocab: int, labels: int, tasks: int) -> list[dict]:
    generator = torch.Generator().manual_seed(11)
    draw = lambda low, high, n: torch.randint(low, high, (n,), generator=generator).tolist()
    examples = []
    for i in range(EXAMPLES):
        ids = draw(3, vocab, draw(6, 16, 1)[0])
        example = {"input_ids": ids}
        if labels:
            example["class"] = ids[0] % labels
        else:
            # The first token is a target too, now and then: the last virtual token predicts it.
            example["labels"] = [-100 if j < len(ids) // 3 and (i % 4 or j) else t for j, t in enumerate(ids)]
        if tasks:
            example["task"] = i % tasks
        examples.append(example)
    return examples


def loss_of(model, example: dict, kind: str, labels: int) -> tuple[torch.Tensor, int]:
    """Sum of the losses of an example's targets, and how many there are."""
    ids = torch.tensor([example["input_ids"]])
    extra = {"task_ids": torch.tensor([example["task"]])} if "task" in example else {}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits
    if labels:
        return torch.nn.functional.cross_entropy(logits, torch.tensor([example["class"]]), reduction="sum"), 1
    lead = logits.shape[1] - ids.shape[1]
    wanted = [(lead + i - 1, t) for i, t in enumerate(example["labels"]) if t != -100 and lead + i > 0]
    rows, targets = zip(*wanted)
    return torch.nn.functional.cross_entropy(logits[0, list(rows)], torch.tensor(targets), reduction="sum"), len(rows)


def run(root: Path, model_name: str, adapter: str, how: dict, changed: dict) -> None:
    torch.manual_seed(5)
    kind, labels = how["kind"], how.get("labels", 0)
    settings = {"lr": 0.01, "schedule": "linear", "weight_decay": 0.01, "clip": 1.0, "scale": 0.3, **changed}
    base = load(root / model_name, labels)
    vocab = base.get_input_embeddings().num_embeddings
    model = get_peft_model(base, config(kind, TaskType.SEQ_CLS if labels else TaskType.CAUSAL_LM))
    model.train()
    trained = {name_of(n): p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            if "task_" in name:
                # PEFT's start is so near to 0 that nothing would be seen of it.
                parameter.add_(0.7 if name.endswith("cols") else 0.5)
            elif "embedding" in name:
                parameter.mul_(settings["scale"])
    out = {f"init.{n}": p.detach().clone() for n, p in trained.items()}
    examples = data(vocab, labels, 3 if kind == "multitask" else 0)
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randperm(EXAMPLES, generator=generator)[:BATCH].tolist() for _ in range(STEPS)]
    optimizer = torch.optim.AdamW(trained.values(), lr=settings["lr"], weight_decay=settings["weight_decay"])
    schedule = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}[settings["schedule"]]
    scheduler = schedule(optimizer, WARMUP, STEPS)
    losses, norms, rates = [], [], []
    for batch in batches:
        parts = [loss_of(model, examples[i], kind, labels) for i in batch]
        loss = sum(p[0] for p in parts) / sum(p[1] for p in parts)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), settings["clip"]).item())
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    out |= {f"final.{n}": p.detach().clone() for n, p in trained.items()}
    folder = root / "train" / f"{model_name}-{adapter}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in out.items()}, folder / "train.safetensors")
    log = {
        "model": model_name, "adapter": adapter, "lr": settings["lr"], "betas": [0.9, 0.999], "eps": 1e-8,
        "weight_decay": settings["weight_decay"], "clip_grad_norm": settings["clip"], "schedule": settings["schedule"],
        "warmup_steps": WARMUP, "total_steps": STEPS, "batch_size": BATCH, "examples": examples, "batches": batches,
        "lr_used": rates, "losses_f32": losses, "grad_norms_unclipped_f32": norms,
    }
    (folder / "train.json").write_text(json.dumps(log) + "\n")
    print(f"{folder.name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}; {sorted(trained)}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "peft"
    for spec in RUNS:
        run(root, *spec)


if __name__ == "__main__":
    main()
