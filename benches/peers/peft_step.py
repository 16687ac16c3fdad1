#!/usr/bin/env python3
"""How long a training step of Hugging Face PEFT takes on the CPU, and how much memory it needs at most.

usage: peft_step.py --model FOLDER [--dtype f32|bf16] [--method prefix_tuning|prompt_tuning] [options]
       peft_step.py --hidden 896 --layers 24 --heads 14 --kv-heads 2 --inter 4864 --vocab 151936 [options]

FOLDER is a Hugging Face folder, its weights may be random. Without one a Qwen2 of the given shape gets random weights.
A step: forward and backward of one batch of random tokens, all of them labelled, clipping to norm 1, AdamW. Prints one
JSON line; peak_rss_mib is that of the whole process from the first step on, and so holds the interpreter and the libraries too
(before_steps_mib: what is resident when the first step begins). One method a process, or the peak is that of the larger one.

Needs: torch, transformers 5, peft 0.21, Linux.
"""
import argparse, json, os, pathlib, statistics, sys, time, warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
warnings.filterwarnings("ignore")
p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--model", type=pathlib.Path)
p.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
p.add_argument("--method", choices=("prefix_tuning", "prompt_tuning"), default="prefix_tuning")
p.add_argument("--checkpointing", action="store_true", help="compute activations again on the way back")
p.add_argument("--labelled", type=int, default=0, help="label only the last N tokens of each sequence; 0: all")
p.add_argument("--batch", type=int, default=4), p.add_argument("--tokens", type=int, default=128)
p.add_argument("--virtual-tokens", type=int, default=32), p.add_argument("--lr", type=float, default=1e-3)
p.add_argument("--steps", type=int, default=7), p.add_argument("--warmup", type=int, default=2, help="steps before those that count")
p.add_argument("--threads", type=int, default=2)
p.add_argument("--hidden", type=int, default=896), p.add_argument("--layers", type=int, default=24)
p.add_argument("--heads", type=int, default=14), p.add_argument("--kv-heads", type=int, default=2)
p.add_argument("--inter", type=int, default=4864), p.add_argument("--vocab", type=int, default=151936)
a = p.parse_args()
import torch, transformers, peft
from transformers import AutoModelForCausalLM, Qwen2Config

transformers.logging.set_verbosity_error()
torch.set_num_threads(a.threads)
torch.manual_seed(0)
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[a.dtype]
resident = lambda what: int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1]) // 1024

start = time.time()
if a.model:
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype, attn_implementation="sdpa")
else:
    config = Qwen2Config(hidden_size=a.hidden, num_hidden_layers=a.layers, num_attention_heads=a.heads, num_key_value_heads=a.kv_heads,
                         intermediate_size=a.inter, vocab_size=a.vocab, tie_word_embeddings=True, max_position_embeddings=2048,
                         bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
model.requires_grad_(False)
if a.checkpointing:
    # PEFT refuses this with prefix_tuning, below: transformers drops a cache, which the prefix is, where it checkpoints.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
kind = dict(task_type="CAUSAL_LM", num_virtual_tokens=a.virtual_tokens)
result = dict(what="peft_step", method=a.method, dtype=a.dtype, checkpointing=a.checkpointing, batch=a.batch, tokens=a.tokens,
              labelled=a.labelled or a.tokens, virtual_tokens=a.virtual_tokens, threads=a.threads,
              model=a.model.name if a.model else "random", params=sum(t.numel() for t in model.parameters()),
              torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__)
try:
    if a.method == "prefix_tuning":
        pm = peft.get_peft_model(model, peft.PrefixTuningConfig(**kind))
    else:
        pm = peft.get_peft_model(model, peft.PromptTuningConfig(**kind, prompt_tuning_init="RANDOM"))
except ValueError as e:
    print(json.dumps(result | {"error": str(e)}))
    sys.exit(1)
pm.train()
weights = [t for t in pm.parameters() if t.requires_grad]
optimizer = torch.optim.AdamW(weights, lr=a.lr)
result.update(adapter_dtype=str(weights[0].dtype).removeprefix("torch."), trainable=sum(t.numel() for t in weights), load_s=round(time.time() - start, 2), before_steps_mib=resident("VmRSS"),
              load_average=round(os.getloadavg()[0], 2))
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
g, seconds, cpu, losses = torch.Generator().manual_seed(1), [], [], []
for _ in range(a.warmup + a.steps):
    ids = torch.randint(1, model.config.vocab_size - 4, (a.batch, a.tokens), generator=g)
    labels = ids.clone()
    if a.labelled:
        labels[:, : -a.labelled] = -100
    wall, used = time.perf_counter(), time.process_time()
    loss = pm(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(round(loss.item(), 4))
    seconds.append(round(time.perf_counter() - wall, 4)), cpu.append(round(time.process_time() - used, 4))
counted = seconds[a.warmup:]
result.update(step_s=statistics.median(counted), step_min_s=min(counted), tokens_per_s=round(a.batch * a.tokens / statistics.median(counted), 1),
              step_cpu_s=statistics.median(cpu[a.warmup:]), seconds=seconds, warmup=a.warmup, losses=losses,
              peak_rss_mib=resident("VmHWM"), load_average_end=round(os.getloadavg()[0], 2))
print(json.dumps(result))
