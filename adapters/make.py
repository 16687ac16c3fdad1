"""Trains the shipped adapters with PEFT and writes their folders.

`python adapters/make.py` makes all of them, `python adapters/make.py slots formal` the named ones,
`python adapters/make.py --cards` only task.toml and examples.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time

import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from scoring import collate, encode, load_base, logits
from tasks import (
    ALL,
    EXAMPLES_COUNT,
    EXAMPLES_SEED,
    TEXT_ONLY,
    TRAIN_COUNT,
    TRAIN_SEED,
    VIRTUAL_TOKENS,
    Task,
)
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

WARMUP_STEPS = 20
FINAL_RATE_SHARE = 0.05


def write_card(task: Task) -> None:
    """Writes task.toml and examples.jsonl."""
    task.path.mkdir(parents=True, exist_ok=True)
    (task.path / "task.toml").write_text(task.toml())
    lines = [json.dumps(e._asdict()) for e in task.examples(EXAMPLES_COUNT, EXAMPLES_SEED, True)]
    (task.path / "examples.jsonl").write_text("\n".join(lines) + "\n")


def attach(base: LlamaForCausalLM, tokenizer: Tokenizer, task: Task) -> PeftModel:
    """The base with a fresh adapter.

    Prompt tuning and P-tuning start from PEFT's random weights; prefix tuning starts from the keys
    and values of `<s>` and the task's instruction, repeated to the number of virtual tokens.
    """
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL_TOKENS}
    if task.method == "PROMPT_TUNING":
        return get_peft_model(base, PromptTuningConfig(**common))
    if task.method == "P_TUNING":
        return get_peft_model(base, PromptEncoderConfig(**common, encoder_hidden_size=192))
    model = get_peft_model(base, PrefixTuningConfig(**common))
    text = [tokenizer.token_to_id("<s>")] + VIRTUAL_TOKENS * encode(tokenizer, task.instruction)
    with torch.no_grad():
        cache = base(input_ids=torch.tensor([text[:VIRTUAL_TOKENS]]), use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(
        model, past_key_values=cache, num_virtual_tokens=VIRTUAL_TOKENS
    )
    return model


def train(base: LlamaForCausalLM, tokenizer: Tokenizer, task: Task, batch: int, seed: int) -> PeftModel:
    """Trains the adapter of a task; the base stays as it is."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    data = task.examples(TRAIN_COUNT, TRAIN_SEED, held_out=False)
    model = attach(base, tokenizer, task)
    model.eval()  # the base has no dropout; this only says that nothing else is to change
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters)
    started = time.time()
    for step in range(task.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / task.steps))
        decay = FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * cosine
        for group in optimizer.param_groups:
            group["lr"] = task.rate * decay * min(1, (step + 1) / WARMUP_STEPS)
        rows = collate(tokenizer, rng.sample(data, batch), lead=[])
        with torch.autocast("cpu", torch.bfloat16):
            predicted = logits(model, rows)[:, :-1]
        flat = predicted.reshape(-1, predicted.size(-1)).float()
        loss = cross_entropy(flat, rows.labels[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"  {task.steps} steps, {time.time() - started:.0f} s, last loss {loss.item():.4f}")
    return model


def save(model: PeftModel, task: Task) -> None:
    """Writes what PEFT's save_pretrained writes, without its generated README.md."""
    model.peft_config["default"].base_model_name_or_path = "models/demo"
    model.save_pretrained(task.path)
    (task.path / "README.md").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ids", nargs="*", help="the adapters to make; all by default")
    parser.add_argument("--cards", action="store_true", help="write no weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    unknown = set(arguments.ids) - {task.id for task in ALL}
    if unknown:
        parser.error(f"no such adapter: {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    for task in ALL:
        if arguments.ids and task.id not in arguments.ids:
            continue
        print(f"{task.id}: {task.method}", flush=True)
        write_card(task)
        if task.method != TEXT_ONLY and not arguments.cards:
            base, tokenizer = load_base()  # a fresh one: PEFT leaves marks on the model it wraps
            save(train(base, tokenizer, task, arguments.batch, arguments.seed), task)


if __name__ == "__main__":
    main()
