"""The adapters, as PEFT makes, saves and loads them."""

from __future__ import annotations

import pathlib

import peft
import torch

VIRTUAL = 6
TASKS = 3
# The task that results of multitask prompts are for.
TASK = 1


def config(kind: str, encoder: bool) -> peft.PeftConfig:
    """The config of a kind, by the folder's name."""
    classify = encoder or kind.endswith("_seqcls")
    common = dict(task_type="SEQ_CLS" if classify else "CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    match kind.removesuffix("_seqcls"):
        case "prefix":
            return peft.PrefixTuningConfig(**common)
        case "prefix_proj":
            return peft.PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=16)
        case "prompt_random":
            return peft.PromptTuningConfig(**common)
        case "ptuning_mlp":
            return peft.PromptEncoderConfig(**common, encoder_reparameterization_type="MLP", encoder_hidden_size=16)
        case "ptuning_lstm":
            return peft.PromptEncoderConfig(
                **common, encoder_reparameterization_type="LSTM", encoder_hidden_size=16, encoder_num_layers=2
            )
        case "multitask":
            return peft.MultitaskPromptTuningConfig(**common, num_tasks=TASKS, num_ranks=2)
        case "cartridge":
            return peft.CartridgeConfig(**common, num_frozen_tokens=1)
        case "cpt":
            return peft.CPTConfig(
                task_type="CAUSAL_LM",
                cpt_token_ids=list(range(10, 10 + VIRTUAL)),
                cpt_mask=[1] * VIRTUAL,
                cpt_tokens_type_mask=[1, 2, 2, 3, 3, 4],
            )
    raise ValueError(kind)


def make(model: torch.nn.Module, kind: str, folder: pathlib.Path, encoder: bool, generator: torch.Generator) -> None:
    """Saves an adapter with strong weights, as `save_pretrained` writes it."""
    adapter = peft.get_peft_model(model, config(kind, encoder))
    # Stored K and V stand beside those of a normed stream; embeddings beside embeddings.
    std = {"prefix": 1.0, "cartridge": 1.0, "prefix_proj": 0.7, "ptuning_lstm": 0.9, "cpt": 0.05}.get(kind, 0.5)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if p.requires_grad or "prompt_encoder" in name and "cpt" != kind:
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    adapter.eval().save_pretrained(folder)


def run(adapter: peft.PeftModel, kind: str, ids: torch.Tensor) -> torch.Tensor:
    """Logits of `ids` `[1, n]`: `[1, positions, vocab]`, or `[1, labels]`."""
    extra = {"task_ids": torch.tensor([TASK])} if kind == "multitask" else {}
    return adapter(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits
