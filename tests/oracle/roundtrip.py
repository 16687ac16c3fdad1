"""Round trip: folders that prefixd wrote load in PEFT and give the same logits.

    python tests/oracle/roundtrip.py target/release/prefixd [BASE]

BASE is a model folder with adapters in it, tests/oracle/results/peft/llama_yarn if not given. It checks that
`prefixd adapters convert`
- leaves the tensors of each of its adapters as they are, from safetensors and from adapter_model.bin, and that PEFT
  computes the same logits with what was written;
- turns prefix encoders as ChatGLM and P-tuning v2 save them into prefix-tuning that PEFT runs with the K and V of the
  encoder, with and without a projection;
- turns a bare `decoder.pt` into prompt tuning, and carries CPT and cartridges.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import CartridgeConfig, CPTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

PREFIXD = Path(sys.argv[1]).resolve()
RESULTS = Path(__file__).resolve().parent / "results"
BASE = Path(sys.argv[2]) if len(sys.argv) > 2 else RESULTS / "peft" / "llama_yarn"
IDS = torch.tensor([[1, 44, 18, 24, 57, 33]])


def base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits(folder):
    """Logits of the last len(IDS) positions with the adapter of `folder`, as PEFT computes them."""
    model = PeftModel.from_pretrained(base(), folder).eval()
    multitask = model.active_peft_config.peft_type.value == "MULTITASK_PROMPT_TUNING"
    extra = {"task_ids": torch.tensor([1])} if multitask else {}
    if model.active_peft_config.peft_type.value == "CPT":
        extra["labels"] = None
    return model(input_ids=IDS, **extra).logits[:, -IDS.shape[1] :]


def convert(src, dst, *arguments):
    subprocess.run([PREFIXD, "adapters", "convert", src, dst, *arguments], check=True, stdout=subprocess.DEVNULL)
    return load_file(dst / "adapter_model.safetensors")


def equal(name, got, want):
    assert got.keys() == want.keys(), f"{name}: {got.keys()} != {want.keys()}"
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key], tensor), f"{name}: {key} changed"


def same_logits(name, folder, want):
    difference = (logits(folder) - want).abs().max().item()
    print(f"{name}: largest difference {difference:.1e}")
    assert difference == 0, name


def peft_folders(work):
    """Every adapter of the base, and one CPT and one cartridge made here."""
    for folder in sorted(BASE.iterdir()):
        if (folder / "adapter_config.json").is_file():
            yield folder
    torch.manual_seed(0)
    made = {
        "cpt": CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_mask=[1] * 3, cpt_tokens_type_mask=[1, 2, 3]
        ),
        "cartridge": CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=1),
    }
    for name, config in made.items():
        get_peft_model(base(), config).save_pretrained(work / name)
        yield work / name


def identity(work):
    for folder in peft_folders(work):
        name, want = folder.name, logits(folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        out = work / f"out-{name}"
        equal(name, convert(folder, out), tensors)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert json.loads((out / "adapter_config.json").read_text()) == config, f"{name}: the config changed"
        same_logits(name, out, want)
        pickled = work / f"bin-{name}"
        pickled.mkdir()
        (pickled / "adapter_config.json").write_text(json.dumps(config))
        torch.save(tensors, pickled / "adapter_model.bin")
        equal(f"{name} pickled", convert(pickled, work / f"out-bin-{name}"), tensors)
        same_logits(f"{name} pickled", work / f"out-bin-{name}", want)


class PrefixEncoder(torch.nn.Module):
    """ChatGLM's and P-tuning v2's: rows for all layers, or rows that an MLP makes them of."""

    def __init__(self, n, width, hidden=None):
        super().__init__()
        self.embedding = torch.nn.Embedding(n, width if hidden is None else hidden)
        if hidden is not None:
            layers = torch.nn.Linear(hidden, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, width)
            self.trans = torch.nn.Sequential(*layers)

    def forward(self):
        rows = self.embedding.weight
        return self.trans(rows) if hasattr(self, "trans") else rows


@torch.no_grad()
def prefix_encoders(work):
    model, config, n = base(), base().config, 5
    layers, heads, dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    flags = ["--layers", str(layers), "--kv-heads", str(heads), "--head-dim", str(dim)]
    for name, hidden, prefix in [("plain", None, "transformer."), ("projected", 24, "")]:
        torch.manual_seed(1)
        encoder = PrefixEncoder(n, 2 * layers * heads * dim, hidden)
        # ChatGLM's get_prompt: [n, 2L, H, D] -> for each layer its K and V, [1, H, n, D].
        kv = encoder().view(1, n, 2 * layers, heads, dim).permute(2, 0, 3, 1, 4).split(2)
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (k, v) in enumerate(kv):
            cache.update(k, v, layer)
        want = model(input_ids=IDS, past_key_values=cache, attention_mask=torch.ones(1, n + IDS.shape[1])).logits
        state = {f"{prefix}prefix_encoder.{key}": value for key, value in encoder.state_dict().items()}
        for kind in ["bin", "safetensors"]:
            file, out = work / f"{name}.{kind}", work / f"out-{name}-{kind}"
            torch.save(state, file) if kind == "bin" else save_file(state, file)
            arguments = flags if kind == "bin" else ["--model", BASE]
            rows = convert(file, out, *arguments)["prompt_embeddings"]
            assert (rows - encoder()).abs().max() < 1e-5
            difference = (logits(out) - want).abs().max().item()
            print(f"prefix encoder, {name}, {kind}: largest difference {difference:.1e}")
            assert difference < (1e-4 if hidden else 1e-6)


@torch.no_grad()
def decoder_pt(work):
    torch.manual_seed(2)
    rows, model = torch.randn(7, base().config.hidden_size) * 0.1, base()
    folder = work / "tgis"
    folder.mkdir()
    torch.save(rows, folder / "decoder.pt")
    equal("decoder.pt", convert(folder, work / "out-tgis"), {"prompt_embeddings": rows})
    inputs = torch.cat([rows[None], model.get_input_embeddings()(IDS)], dim=1)
    same_logits("decoder.pt", work / "out-tgis", model(inputs_embeds=inputs).logits[:, -IDS.shape[1] :])


with tempfile.TemporaryDirectory() as folder:
    identity(Path(folder))
    prefix_encoders(Path(folder))
    decoder_pt(Path(folder))
print("all round trips are equal")
