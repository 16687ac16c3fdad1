"""The models: one row each. Tiny, random, and loud: a wrong position, mask, scale, order or norm moves a logit by far more
than the tolerance of the tests."""

from __future__ import annotations

import torch
import transformers as T

VOCAB = 64
POSITIONS = 96

# What most families share. 8 is the width of a head unless a row says otherwise.
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=POSITIONS,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MULTI_HEAD = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}
WIDE = COMMON | dict(head_dim=16)
# Few positions, so that the ramps and ratios of the scalings bite.
ORIGINAL = dict(original_max_position_embeddings=24)


def rope(kind: str, theta: float = 10000.0, **parameters) -> dict:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **parameters))


LONG_ROPE = rope("longrope", short_factor=[1.0, 1.5], long_factor=[2.0, 3.0], partial_rotary_factor=0.5)
GEMMA3_ROPE = dict(
    rope_parameters=dict(
        sliding_attention=dict(rope_type="default", rope_theta=1000.0),
        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=50000.0),
    )
)
LABELS = dict(num_labels=3)
ENCODER = MULTI_HEAD | LABELS
# Sequence classification on a decoder: a trained `score` reads the last row.
CLASSIFY = ("prefix_seqcls", "prompt_random_seqcls")

# name -> (config, adapters besides `prefix` and `prompt_random`)
MODELS: dict[str, tuple[T.PreTrainedConfig, tuple[str, ...]]] = {
    "llama_biases": (T.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True), ("ptuning_lstm", *CLASSIFY)),
    "llama_llama3": (
        T.LlamaConfig(**COMMON, **rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL)),
        (),
    ),
    "llama_linear": (T.LlamaConfig(**COMMON, **rope("linear", factor=2.0)), ("ptuning_mlp",)),
    "llama_dynamic": (T.LlamaConfig(**COMMON, **rope("dynamic", factor=2.0)), ()),
    "llama_yarn": (T.LlamaConfig(**WIDE, **rope("yarn", factor=4.0, **ORIGINAL)), ("multitask",)),
    "llama_yarn_mscale": (
        T.LlamaConfig(**WIDE, **rope("yarn", factor=4.0, mscale=1.5, mscale_all_dim=0.5, truncate=False, **ORIGINAL)),
        (),
    ),
    "llama_yarn_factor": (
        T.LlamaConfig(
            **WIDE, **rope("yarn", factor=4.0, attention_factor=0.8, beta_fast=8.0, beta_slow=0.5, **ORIGINAL)
        ),
        (),
    ),
    # Written again in the keys of transformers 4, and sharded: see make.py.
    "llama_old_keys": (T.LlamaConfig(**COMMON, **rope("linear", theta=500.0, factor=2.0)), ()),
    "qwen2_windows": (
        T.Qwen2Config(
            **COMMON, tie_word_embeddings=True, use_sliding_window=True, sliding_window=10, max_window_layers=1
        ),
        ("cartridge",),
    ),
    "qwen3": (T.Qwen3Config(**WIDE), ("prefix_proj", "multitask")),
    "qwen3_tied": (T.Qwen3Config(**WIDE, tie_word_embeddings=True), ("cpt",)),
    "mistral": (T.MistralConfig(**WIDE, sliding_window=12), ("prefix_proj",)),
    "gemma": (T.GemmaConfig(**WIDE), ("ptuning_mlp", *CLASSIFY)),
    "gemma2": (
        T.Gemma2Config(
            **WIDE, sliding_window=8, attn_logit_softcapping=2.0, final_logit_softcapping=5.0, query_pre_attn_scalar=9
        ),
        ("cartridge",),
    ),
    "gemma3_text": (
        T.Gemma3TextConfig(
            **WIDE | dict(num_hidden_layers=3),
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=9,
            **GEMMA3_ROPE,
        ),
        (),
    ),
    "gemma3_old_keys": (
        T.Gemma3TextConfig(
            **WIDE | dict(num_hidden_layers=3),
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=9,
            **GEMMA3_ROPE,
        ),
        (),
    ),
    "phi3": (T.Phi3Config(**COMMON, sliding_window=14), ("cpt",)),
    "phi3_longrope": (
        T.Phi3Config(**COMMON | dict(max_position_embeddings=192, original_max_position_embeddings=96), **LONG_ROPE),
        (),
    ),
    "gpt2_by_layer": (
        T.GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=POSITIONS,
            scale_attn_by_inverse_layer_idx=True,
            bos_token_id=1,
            eos_token_id=2,
        ),
        ("ptuning_lstm",),
    ),
    "gpt_neox": (
        T.GPTNeoXConfig(**MULTI_HEAD | dict(num_attention_heads=2), **rope("default", partial_rotary_factor=0.25)),
        ("prefix_proj",),
    ),
    "gpt_neox_sequential": (
        T.GPTNeoXConfig(**MULTI_HEAD, use_parallel_residual=False, **rope("default", partial_rotary_factor=1.0)),
        (),
    ),
    "bert_seqcls": (T.BertConfig(**ENCODER, type_vocab_size=2), ("ptuning_mlp",)),
    "roberta_seqcls": (T.RobertaConfig(**ENCODER | dict(pad_token_id=1), type_vocab_size=1), ("ptuning_mlp",)),
}


def is_encoder(config: T.PreTrainedConfig) -> bool:
    return config.model_type in ("bert", "roberta")


def load(source, classify: bool = False) -> torch.nn.Module:
    """A model by its config (random weights) or its folder, in float32 with the plain attention. `classify`: a decoder with
    a new head of three classes."""
    config = source if isinstance(source, T.PreTrainedConfig) else T.AutoConfig.from_pretrained(source)
    if is_encoder(config):
        classify = True
    elif classify:
        config.num_labels = LABELS["num_labels"]
        return (
            T.AutoModelForSequenceClassification.from_pretrained(source, config=config, attn_implementation="eager")
            .float()
            .eval()
        )
    auto = T.AutoModelForSequenceClassification if classify else T.AutoModelForCausalLM
    make = auto.from_config if isinstance(source, T.PreTrainedConfig) else auto.from_pretrained
    return make(source, attn_implementation="eager").float().eval()


def strengthen(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights that matter: transformers' own start too near to zero to show a fault."""
    normal = lambda p, std: torch.randn(p.shape, generator=generator) * std
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name.lower() or "ln_" in name:
                # Gemma's norms count as 1 + w, so theirs lie around 0, as biases do.
                centre = 0.0 if name.endswith("bias") or "gemma" in model.config.model_type else 1.0
                p.copy_(centre + torch.rand(p.shape, generator=generator) - 0.5)
            elif name.endswith("bias"):
                p.copy_(normal(p, 0.2))
            elif "embed" in name or "wte" in name or "wpe" in name:
                p.copy_(normal(p, 0.1 if "gemma" in model.config.model_type else 0.5))
            else:
                p.copy_(normal(p, 0.25))
