"""Pretrains the demo model, a small Llama, on packed rows for a wall-clock budget.

A checkpoint in bfloat16 and a line of `training-log.jsonl` are written every minute, so that a run
that is stopped early leaves a usable model.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from rows import LOSS_WEIGHTS
from tokenizer import CONTEXT
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

WARMUP_STEPS = 100
FINAL_RATE_SHARE = 0.03
LOG_NAME = "training-log.jsonl"


def build(vocabulary: int) -> LlamaForCausalLM:
    """The model with fresh weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # the fastest on CPU at rows of 256
    return model


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every next token, flattened."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits[:, :-1]
    flat = logits.reshape(-1, logits.size(-1)).float()
    return cross_entropy(flat, ids[:, 1:].reshape(-1), reduction="none")


@torch.no_grad()
def validate(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, float]:
    """Mean loss on held-out rows by the role of the token."""
    losses = torch.cat([token_losses(model, batch) for batch in ids.split(32)])
    flat = weights[:, 1:].reshape(-1)
    return {
        role.value: round(losses[(flat - weight).abs() < 0.005].mean().item(), 4)
        for role, weight in LOSS_WEIGHTS.items()
    }


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors in bfloat16."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=2, do_sample=False
    )
    copy.to(torch.bfloat16).save_pretrained(out)


def train(arguments: argparse.Namespace) -> None:
    """Trains until the budget of minutes is spent."""
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    data = np.load(arguments.rows)
    ids, weights = torch.from_numpy(data["ids"]), torch.from_numpy(data["weights"])
    held_ids = torch.from_numpy(data["validation_ids"]).long()
    held_weights = torch.from_numpy(data["validation_weights"]).float()
    vocabulary = json.loads((arguments.out / "tokenizer.json").read_text())["model"]["vocab"]
    model = build(len(vocabulary))
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.95), fused=True)
    log = (arguments.out / "pretrain" / LOG_NAME).open("w")
    budget, started, reported, step = 60 * arguments.minutes, time.time(), 0.0, 0

    def report(loss: float) -> None:
        record = {
            "seconds": round(time.time() - started), "step": step,
            "tokens": step * arguments.batch * CONTEXT, "loss": round(loss, 4),
            "validation": validate(model, held_ids, held_weights),
        }
        print(json.dumps(record), file=log, flush=True)
        print(json.dumps(record), flush=True)
        save(model, arguments.out)

    while (share := (time.time() - started) / budget) < 1:
        decay = FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * decay * min(1, (step + 1) / WARMUP_STEPS)
        first = (step * arguments.batch) % (len(ids) - arguments.batch + 1)
        batch = slice(first, first + arguments.batch)
        flat = weights[batch, 1:].float().reshape(-1)
        loss = (token_losses(model, ids[batch].long()) * flat).sum() / flat.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if time.time() - reported > 60:
            reported = time.time()
            report(loss.item())
    report(loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="the .npz file of rows.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--minutes", type=float, default=50.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
