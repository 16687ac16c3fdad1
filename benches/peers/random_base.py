#!/usr/bin/env python3
"""A Hugging Face folder with the shape of a known model and random bf16 weights: speed does not ask what they say.

usage: random_base.py qwen2-0.5b|llama-8b|tiny OUT [--device cpu|cuda:0]

Matrices are N(0, 0.02), norms 1, biases N(0, 0.02), drawn on the device from one seed. The tokenizer has a token for each byte and no
more: requests are to be made of token ids. `tiny` is for trying the scripts.

Needs: torch, safetensors.
"""
import argparse, json, pathlib

import torch
from safetensors.torch import save_file

from shapes import SHAPES

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("shape", choices=SHAPES), p.add_argument("out", type=pathlib.Path), p.add_argument("--device", default="cpu")
a = p.parse_args()
c = SHAPES[a.shape] | dict(hidden_act="silu", torch_dtype="bfloat16", bos_token_id=None, eos_token_id=None)
a.out.mkdir(parents=True)
draw = torch.Generator(a.device).manual_seed(0)
hidden, inner, index, files = c["hidden_size"], c["intermediate_size"], {}, 2 + c["num_hidden_layers"]
kv = hidden // c["num_attention_heads"] * c["num_key_value_heads"]


def save(number, shapes):
    """One file; a layer each keeps the memory that it takes small."""
    def tensor(name, shape):
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (torch.randn(shape, generator=draw, device=a.device) * 0.02).to(torch.bfloat16).cpu()

    name = f"model-{number:05}-of-{files:05}.safetensors"
    save_file({key: tensor(key, shape) for key, shape in shapes.items()}, a.out / name, metadata={"format": "pt"})
    index.update(dict.fromkeys(shapes, name))


save(1, {"model.embed_tokens.weight": (c["vocab_size"], hidden)})
for i in range(c["num_hidden_layers"]):
    layer = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
             "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
             "mlp.down_proj": (hidden, inner)}
    shapes = {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    if c["model_type"] == "qwen2":
        shapes |= {f"model.layers.{i}.self_attn.{name}.bias": layer[f"self_attn.{name}"][:1] for name in ("q_proj", "k_proj", "v_proj")}
    save(2 + i, shapes)
save(files, {"model.norm.weight": (hidden,)} | ({} if c["tie_word_embeddings"] else {"lm_head.weight": (c["vocab_size"], hidden)}))

# GPT-2's characters for bytes: printable ones stand for themselves.
own = [*range(33, 127), *range(161, 173), *range(174, 256)]
rest = [b for b in range(256) if b not in own]
characters = {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(rest)}
tokenizer = dict(version="1.0", truncation=None, padding=None, added_tokens=[], normalizer=None, post_processor=None,
                 pre_tokenizer=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True), decoder=dict(
                     type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True),
                 model=dict(type="BPE", vocab={characters[b]: b for b in range(256)}, merges=[]))
for name, content in (("config.json", c), ("tokenizer.json", tokenizer), ("model.safetensors.index.json", dict(metadata={}, weight_map=index))):
    (a.out / name).write_text(json.dumps(content))
