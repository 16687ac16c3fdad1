"""Hugging Face folders as GGUF, written by the package `gguf` of llama.cpp: its names, orders and blocks, none of ours.

    python tests/oracle/to_gguf.py fixtures               the files in results/gguf
    python tests/oracle/to_gguf.py all OUT FOLDER...      every model folder below FOLDER..., in every type

Needs `gguf` and numpy alone.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import gguf
import numpy as np

RESULTS = Path(__file__).parent / "results"
ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "GemmaForCausalLM": gguf.MODEL_ARCH.GEMMA,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
    "Phi3ForCausalLM": gguf.MODEL_ARCH.PHI3,
    "GPT2LMHeadModel": gguf.MODEL_ARCH.GPT2,
}
TYPES = gguf.GGMLQuantizationType
# What a whole model is written in; K blocks have 256 elements, more than a row of these models.
MODEL_TYPES = {"f32": TYPES.F32, "f16": TYPES.F16, "bf16": TYPES.BF16, "q8_0": TYPES.Q8_0, "q5_1": TYPES.Q5_1}
BLOCK_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


class Unsayable(Exception):
    """The format has no words for it."""


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's safetensors as float32."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, info in header.items():
            start, end = (8 + length + at for at in info["data_offsets"])
            if info["dtype"] == "BF16":
                values = (np.frombuffer(data[start:end], np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(data[start:end], {"F32": np.float32, "F16": np.float16}[info["dtype"]])
            found[name] = values.astype(np.float32).reshape(info["shape"])
    return found


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """As `LlamaModel.permute` of convert_hf_to_gguf."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def numbers(w: gguf.GGUFWriter, c: dict, architecture: str, out: dict[str, np.ndarray]) -> None:
    heads = c.get("num_attention_heads") or c["n_head"]
    hidden = c.get("hidden_size") or c["n_embd"]
    context = c.get("max_position_embeddings") or c["n_positions"]
    w.add_context_length(context)
    w.add_embedding_length(hidden)
    w.add_block_count(c.get("num_hidden_layers") or c["n_layer"])
    w.add_feed_forward_length(c.get("intermediate_size") or c.get("n_inner") or 4 * hidden)
    w.add_head_count(heads)
    if architecture == "GPT2LMHeadModel":
        if c.get("scale_attn_by_inverse_layer_idx"):
            raise Unsayable("scale_attn_by_inverse_layer_idx")
        w.add_layer_norm_eps(c["layer_norm_epsilon"])
        return
    w.add_head_count_kv(c.get("num_key_value_heads", heads))
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    dim = c.get("head_dim") or hidden // heads
    w.add_key_length(dim)
    w.add_value_length(dim)
    if c.get("use_sliding_window"):
        raise Unsayable("use_sliding_window")
    if c.get("sliding_window") and not architecture.startswith("Qwen"):
        w.add_sliding_window(c["sliding_window"])
    if "Gemma2" in architecture:
        w.add_attn_logit_softcapping(c["attn_logit_softcapping"])
        w.add_final_logit_softcapping(c["final_logit_softcapping"])
    if c.get("query_pre_attn_scalar"):
        w.add_attention_scale(c["query_pre_attn_scalar"] ** -0.5)
    if "Gemma3" in architecture:
        layers = range(c["num_hidden_layers"])
        every = c.get("sliding_window_pattern")
        types = c.get("layer_types")
        w.add_sliding_window_pattern([types[i] == "sliding_attention" if types else (i + 1) % every != 0 for i in layers])
    rope(w, c, dim, context, out)


def rope(w: gguf.GGUFWriter, c: dict, dim: int, context: int, out: dict[str, np.ndarray]) -> None:
    p = c.get("rope_parameters") or c.get("rope_scaling") or {}
    local = p.get("sliding_attention", {}).get("rope_theta") or c.get("rope_local_base_freq")
    p = p.get("full_attention", p)
    if local:
        w.add_rope_freq_base_swa(local)
    theta = p.get("rope_theta") or c.get("rope_theta", 10000.0)
    w.add_rope_freq_base(theta)
    dim = int(dim * (p.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0))
    w.add_rope_dimension_count(dim)
    original = c.get("original_max_position_embeddings") or p.get("original_max_position_embeddings")
    kind = p.get("rope_type") or p.get("type") or "default"
    if kind == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(p["factor"])
    elif kind == "yarn":
        if any(k in p for k in ("attention_factor", "mscale", "truncate")):
            raise Unsayable("odd yarn")
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(p["factor"])
        w.add_rope_scaling_orig_ctx_len(original)
    elif kind == "longrope":
        w.add_rope_scaling_orig_ctx_len(original)
        w.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(context / original) / math.log(original)))
        out["rope_factors_short.weight"] = np.array(p["short_factor"], np.float32)
        out["rope_factors_long.weight"] = np.array(p["long_factor"], np.float32)
    elif kind == "llama3":
        freqs = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
        low, high, factor = p["low_freq_factor"], p["high_freq_factor"], p["factor"]
        divisors = []
        for freq in freqs:
            wavelength = 2 * math.pi / freq
            if wavelength < original / high:
                divisors.append(1.0)
            elif wavelength > original / low:
                divisors.append(factor)
            else:
                smooth = (original / wavelength - low) / (high - low)
                divisors.append(1 / ((1 - smooth) / factor + smooth))
        out["rope_freqs.weight"] = np.array(divisors, np.float32)
    elif kind not in ("default", "dynamic"):
        raise Unsayable(kind)


def vocabulary(w: gguf.GGUFWriter, folder: Path, c: dict) -> None:
    """A BPE, byte-level or SentencePiece's; of another tokenizer nothing is written, its file has to lie beside."""
    t = json.loads((folder / "tokenizer.json").read_text())
    model = t["model"]
    if model["type"] != "BPE":
        return
    texts = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [gguf.TokenType.NORMAL] * len(texts)
    for token in t["added_tokens"]:
        unknown = token["content"] == model.get("unk_token")
        special = gguf.TokenType.UNKNOWN if unknown else gguf.TokenType.CONTROL
        kinds[token["id"]] = special if token["special"] else gguf.TokenType.USER_DEFINED
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    if model.get("byte_fallback"):
        kinds = [gguf.TokenType.BYTE if s.startswith("<0x") else k for s, k in zip(texts, kinds)]
        rank = {}
        for i, (a, b) in enumerate(merges):
            rank.setdefault(a + b, i)
        w.add_tokenizer_model("llama")
        w.add_token_scores([float(-rank.get(s, 10**9)) for s in texts])
        w.add_add_space_prefix("Prepend" in json.dumps(t["normalizer"]))
    else:
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("smollm" if "Digits" in json.dumps(t["pre_tokenizer"]) else "gpt-2")
        w.add_token_merges([" ".join(m) for m in merges])
    w.add_token_list(texts)
    w.add_token_types(kinds)
    w.add_add_bos_token("SpecialToken" in t["post_processor"]["single"][0])
    w.add_bos_token_id(c["bos_token_id"])
    w.add_eos_token_id(c["eos_token_id"])


def write(folder: Path, file: Path, kind: TYPES) -> None:
    c = json.loads((folder / "config.json").read_text())
    architecture = c["architectures"][0]
    if architecture not in ARCHITECTURES:
        raise Unsayable(architecture)
    arch = ARCHITECTURES[architecture]
    out: dict[str, np.ndarray] = {}
    w = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    numbers(w, c, architecture, out)
    vocabulary(w, folder, c)
    names = gguf.get_tensor_name_map(arch, c.get("num_hidden_layers") or c["n_layer"])
    gemma = architecture.startswith("Gemma")
    tied = c.get("tie_word_embeddings", gemma)
    for name, x in tensors(folder).items():
        if tied and name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if arch == gguf.MODEL_ARCH.LLAMA and "q_proj" in name:
            x = permute(x, c["num_attention_heads"])
        if arch == gguf.MODEL_ARCH.LLAMA and "k_proj" in name:
            x = permute(x, c.get("num_key_value_heads", c["num_attention_heads"]))
        if gemma and name.endswith("norm.weight"):
            x = x + 1
        if arch == gguf.MODEL_ARCH.GPT2 and ".c_" in name and name.endswith(".weight"):
            x = x.T
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new, name
        out[new] = np.ascontiguousarray(x)
    for name, x in out.items():
        if x.ndim == 1 or kind == TYPES.F32:
            w.add_tensor(name, x)
        elif kind == TYPES.F16 or x.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            # Rows that are not whole blocks stay floats, as llama.cpp's quantizer leaves them.
            w.add_tensor(name, x.astype(np.float16))
        else:
            w.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def blocks(file: Path) -> None:
    """Blocks of any bits, each type beside what gguf-py decodes them to."""
    random = np.random.default_rng(1)
    w = gguf.GGUFWriter(file, "llama")
    for name in BLOCK_TYPES:
        kind = TYPES[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        rows, width = 3, 256
        raw = random.integers(0, 256, (rows * width // elements, size), np.uint8)
        # The scales are float16 somewhere in a block; any bits there may be an infinity. Those bits are made finite ones.
        for at in {"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208]}.get(name, [0, 2] if name not in ("Q4_0", "Q5_0", "Q8_0") else [0]):
            scale = random.normal(0, 1, len(raw)).astype(np.float16)
            raw[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
        raw = raw.reshape(rows, width // elements * size)
        w.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
        w.add_tensor(f"{name}.bias", gguf.dequantize(raw, kind).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main() -> None:
    if sys.argv[1:] == ["fixtures"]:
        out = RESULTS / "gguf"
        out.mkdir(exist_ok=True)
        blocks(out / "blocks")
        for model, kind in [("llama_llama3", "f32"), ("gemma2", "f32"), ("qwen3", "q8_0")]:
            write(RESULTS / "peft" / model, out / f"{model}.{kind}.gguf", MODEL_TYPES[kind])
        return
    command, out, *folders = sys.argv[1:]
    assert command == "all", __doc__
    Path(out).mkdir(parents=True, exist_ok=True)
    for folder in sorted(f.parent for root in folders for f in Path(root).rglob("config.json")):
        for kind, number in MODEL_TYPES.items():
            file = Path(out) / f"{folder.name}.{kind}.gguf"
            try:
                write(folder, file, number)
            except (Unsayable, gguf.QuantError) as e:
                file.unlink(missing_ok=True)
                print(f"{folder.name}.{kind}: skipped: {e}")


main()
