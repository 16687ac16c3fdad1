#!/usr/bin/env python3
"""Requests answered by transformers and Hugging Face PEFT, one batch for each adapter: the other side of serving.py.

usage: peft_serving.py MODEL STORE ADAPTER... [--dtype f32|bf16] [--threads N] [--device cpu|cuda:N]

Loads PEFT's folders STORE/ADAPTER, prints {"ready": true}, and then answers each JSON line of its input
  {"requests": [[adapter, [token ids]], ...], "new": tokens}
with one: seconds that it took, and seconds until each group was done. Requests of an adapter form a batch; PEFT runs the batches
one after the other, as it has one active adapter. Greedy, no end of sequence.

Needs: torch, transformers 5, peft 0.21, Linux.
"""
import argparse, json, os, pathlib, sys, time, warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
warnings.filterwarnings("ignore")
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("model", type=pathlib.Path), p.add_argument("store", type=pathlib.Path), p.add_argument("adapters", nargs="+")
p.add_argument("--dtype", choices=("f32", "bf16"), default="bf16"), p.add_argument("--threads", type=int, default=2)
p.add_argument("--device", default="cpu")
a = p.parse_args()
import torch, transformers, peft
from transformers import AutoModelForCausalLM

transformers.logging.set_verbosity_error()
torch.set_num_threads(a.threads)
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[a.dtype]
model = AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype, attn_implementation="sdpa").eval().to(a.device)
pm = peft.PeftModel.from_pretrained(model, a.store / a.adapters[0], adapter_name=a.adapters[0])
for name in a.adapters[1:]:
    pm.load_adapter(a.store / name, adapter_name=name)
pm.eval()
pm.generation_config.eos_token_id = None

print(json.dumps({"ready": True, "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}), flush=True)
for line in sys.stdin:
    work, groups = json.loads(line), {}
    for name, ids in work["requests"]:
        groups.setdefault(name, []).append(ids)
    start, done = time.perf_counter(), []
    for name, prompts in groups.items():
        pm.set_adapter(name)
        ids = torch.tensor(prompts, device=a.device)
        with torch.inference_mode():
            out = pm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=work["new"],
                              min_new_tokens=work["new"], use_cache=True, pad_token_id=0)
        assert out.shape == (len(prompts), ids.shape[1] + work["new"]), out.shape
        done.append(round(time.perf_counter() - start, 3))
    print(json.dumps({"wall_s": done[-1], "group_done_s": done}), flush=True)
