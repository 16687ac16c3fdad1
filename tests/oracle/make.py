"""Writes what transformers and PEFT say about tiny models of every family and adapter of every kind.

usage: make.py OUT [NAME...]

The layout is OUT/peft/<model>/<adapter>/{adapter_config.json, adapter_model.safetensors, oracle.json, oracle.safetensors}, with
`oracle_base` for the model alone: `p{i}.logits_all` `[positions, vocab]` (`p{i}.logits` `[labels]` of a classifier), greedy tokens by
the full forward, log-probabilities of continuations. OUT/placed/<model> is an adapter whose virtual tokens stand in a template.
Everything is float32, eager attention, one row at a time, and the adapter is the one that was loaded again from disk.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
import zlib

import peft
import torch
from safetensors.torch import load_file, save_file

import adapters
import models

GREEDY = 12
LENGTHS = (4, 23)
# Greedy steps closer than this could go either way in another order of sums.
MARGIN = 2e-3

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(models.VOCAB)}, "unk_token": "w0"},
}


@torch.no_grad()
def causal(run, generator: torch.Generator) -> tuple[dict, dict]:
    """The record of one causal case: what oracle.json holds, and the tensors."""
    prompts, tensors = [], {}
    for i, length in enumerate(LENGTHS):
        for _ in range(50):
            ids = torch.randint(3, models.VOCAB, (1, length), generator=generator)
            text, margins = ids, []
            for _ in range(GREEDY):
                top = run(text)[0, -1].topk(2)
                margins.append(float(top.values[0] - top.values[1]))
                text = torch.cat([text, top.indices[:1].view(1, 1)], 1)
            if min(margins) > MARGIN:
                break
        else:
            raise RuntimeError("no prompt with clear greedy steps")
        tensors[f"p{i}.logits_all"] = run(ids)[0].contiguous()
        continuations = []
        for n in (1, 5):
            more = torch.randint(3, models.VOCAB, (1, n), generator=generator)
            logits = run(torch.cat([ids, more], 1))[0, -n - 1 : -1].double().log_softmax(-1)
            continuations.append(
                {"ids": more[0].tolist(), "token_logprobs": logits.gather(1, more.view(-1, 1)).flatten().tolist()}
            )
        prompts.append(
            {
                "input_ids": ids[0].tolist(),
                "greedy_ids": text[0, length:].tolist(),
                "greedy_margins": margins,
                "continuations": continuations,
            }
        )
    return {"prompts": prompts}, tensors


@torch.no_grad()
def classes(run, generator: torch.Generator) -> tuple[dict, dict]:
    """The record of one classifier."""
    all_ids = [torch.randint(3, models.VOCAB, (1, n), generator=generator) for n in (*LENGTHS, 40)]
    tensors = {f"p{i}.logits": run(ids)[0].contiguous() for i, ids in enumerate(all_ids)}
    return {"prompts": [{"input_ids": ids[0].tolist()} for ids in all_ids]}, tensors


def write(folder: pathlib.Path, record: dict, tensors: dict, kind: str) -> None:
    if kind == "multitask":
        record["task_ids"] = [adapters.TASK]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "oracle.json").write_text(json.dumps(record))
    save_file(tensors, folder / "oracle.safetensors")
    largest = max(float(t.abs().max()) for t in tensors.values())
    print(f"{folder}: {len(record['prompts'])} prompts, largest logit {largest:.1f}")


@torch.no_grad()
def placed(name: str, out: pathlib.Path) -> None:
    """Virtual tokens in the middle and at the end of a template, by the embeddings put together by hand."""
    splits, generator = (2, adapters.VIRTUAL - 2), torch.Generator().manual_seed(7)
    model, folder = models.load(out / "peft" / name), out / "placed" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(out / "peft" / name / "prompt_random", folder, ignore=shutil.ignore_patterns("oracle.*"))
    card = f'template = "w5 {{{{ virtual_0 }}}} {{{{ input }}}} w9 {{{{ virtual_1 }}}}"\nvirtual_token_splits = {list(splits)}\n'
    (folder / "task.toml").write_text(card)
    first, second = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"].split(splits)
    table = model.get_input_embeddings()

    def run(ids: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        word = lambda i: table(torch.tensor([i]))
        rows = torch.cat([word(5), first, table(ids), word(9), second, table(more)])
        return model(inputs_embeds=rows[None], use_cache=False).logits[0, -1]

    prompts = []
    for n in (1, 19, 34):
        ids = torch.randint(3, models.VOCAB, (n,), generator=generator)
        text, logprobs = torch.empty(0, dtype=torch.long), []
        for _ in range(GREEDY):
            best = run(ids, text).double().log_softmax(-1).max(0)
            text = torch.cat([text, best.indices[None]])
            logprobs.append(float(best.values))
        words = " ".join(f"w{i}" for i in ids.tolist())
        prompts.append({"prompt": words, "greedy_ids": text.tolist(), "logprobs": logprobs})
    (folder / "oracle.json").write_text(json.dumps({"prompts": prompts}))
    print(f"{folder}: {len(prompts)} prompts")


def old_keys(folder: pathlib.Path) -> None:
    """The same config in the keys of transformers 4."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    parameters = config.pop("rope_parameters")
    if "sliding_attention" in parameters:
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
        config["sliding_window_pattern"] = 1 + config.pop("layer_types").index("full_attention")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = {"type": parameters.pop("rope_type"), **parameters}
    path.write_text(json.dumps(config, indent=2))


def one(name: str, out: pathlib.Path) -> None:
    config, more = models.MODELS[name]
    encoder = models.is_encoder(config)
    record = classes if encoder else causal
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    torch.manual_seed(0)
    folder = out / "peft" / name
    shutil.rmtree(folder, ignore_errors=True)
    model = models.load(config)
    models.strengthen(model, generator)
    model.save_pretrained(folder, max_shard_size="40KB" if name == "llama_old_keys" else "1GB")
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    write(folder / "oracle_base", *record(lambda ids: model(ids).logits, generator), "")
    for kind in ("prefix", "prompt_random", *more):
        classify = encoder or kind.endswith("_seqcls")
        adapters.make(models.load(folder, classify), kind, folder / kind, encoder, generator)
        (folder / kind / "README.md").unlink(missing_ok=True)
        # Not the path of the machine that wrote it.
        path = folder / kind / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}, indent=2))
        loaded = peft.PeftModel.from_pretrained(models.load(folder, classify), folder / kind).eval()
        record = classes if classify else causal
        write(folder / kind, *record(lambda ids: adapters.run(loaded, kind, ids), generator), kind)
    if name.endswith("old_keys"):
        old_keys(folder)


def main() -> None:
    torch.set_num_threads(1)
    out, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
    for name in names or models.MODELS:
        one(name, out)
        if name in ("llama_biases", "gemma", "gpt2_by_layer", "mistral"):
            placed(name, out)


if __name__ == "__main__":
    main()
