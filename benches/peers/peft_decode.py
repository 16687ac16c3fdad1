#!/usr/bin/env python3
"""Decoding by transformers and Hugging Face PEFT: the other side of `cargo bench --bench decoder`, with its words.

usage: peft_decode.py qwen2-0.5b|llama-8b [--device cuda:0] [--rows 1 8 64] [--adapters 16] [--prefix 16 64 256 1024] [--tokens 8] [--tries 2]

Random weights, made on the device. A step decodes one token of each row after 80 others; row i has adapter i modulo the number of
adapters, prefix-tuning with so many virtual tokens. PEFT has one active adapter, so a step is one of each adapter's rows after the other.
The seconds of a step are those of generating 1 + TOKENS tokens less those of generating one, each the best of TRIES, for all groups, by TOKENS. Prints a JSON line each.

Needs: torch, transformers 5, peft.
"""
import argparse, json, os, time, warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
import peft, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM

from shapes import SHAPES

OWN = 80
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("shape", choices=SHAPES), p.add_argument("--device", default="cuda:0"), p.add_argument("--tokens", type=int, default=8)
p.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64]), p.add_argument("--adapters", type=int, default=16)
p.add_argument("--tries", type=int, default=2), p.add_argument("--prefix", type=int, nargs="+", default=[16, 64, 256, 1024])
a = p.parse_args()
transformers.logging.set_verbosity_error()
torch.manual_seed(0)
facts = SHAPES[a.shape] | dict(hidden_act="silu", bos_token_id=None, eos_token_id=None)
config = AutoConfig.for_model(**{k: v for k, v in facts.items() if k != "architectures"})
with torch.device(a.device):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def seconds(pm, groups, new):
    if a.device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for name, rows in groups:
        pm.set_adapter(name)
        ids = torch.randint(config.vocab_size, (rows, OWN), device=a.device)
        with torch.inference_mode():
            pm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new, use_cache=True,
                        pad_token_id=0)
    if a.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


for prefix in a.prefix:
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix)
    pm = peft.get_peft_model(model, settings, adapter_name="0")
    for i in range(1, a.adapters):
        pm.add_adapter(str(i), settings)
    pm.eval()
    for rows in a.rows:
        each = [len(range(i, rows, a.adapters)) for i in range(min(rows, a.adapters))]
        groups = [(str(i), n) for i, n in enumerate(each)]
        seconds(pm, groups[:1], 1 + a.tokens)
        best = {new: min(seconds(pm, groups, new) for _ in range(a.tries)) for new in (1, 1 + a.tokens)}
        step = (best[1 + a.tokens] - best[1]) / a.tokens
        print(json.dumps(dict(shape=a.shape, rows=rows, adapters=len(groups), prefix=prefix, step_ms=round(1000 * step, 3), tokens_s=round(rows / step, 1),
                              torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__)), flush=True)
    model = pm.unload() if hasattr(pm, "unload") else pm.base_model
    del pm
