"""Batches of examples and exact match, with transformers and PEFT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tasks import MODEL, Example, answer_text, request_text
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

_IGNORED = -100  # the label of a token that is not scored


@dataclass(frozen=True)
class Batch:
    """Padded rows: the tokens, the answer's tokens at their places, and the attention mask."""

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor


def load_base() -> tuple[LlamaForCausalLM, Tokenizer]:
    """The frozen base in float32 and its tokenizer."""
    disable_progress_bar()
    set_verbosity_error()
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.requires_grad_(False)
    return model.eval(), Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids without `<s>`."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def collate(tokenizer: Tokenizer, examples: list[Example], lead: list[int]) -> Batch:
    """A batch of requests with their answers, each after the tokens of `lead`."""
    rows = [
        (lead + encode(tokenizer, request_text(e.input)), encode(tokenizer, answer_text(e.target)))
        for e in examples
    ]
    width = max(len(request) + len(answer) for request, answer in rows)
    shape = (len(rows), width)
    ids = torch.full(shape, tokenizer.token_to_id("<pad>"))
    labels, mask = torch.full(shape, _IGNORED), torch.zeros(shape, dtype=torch.long)
    for row, (request, answer) in enumerate(rows):
        length = len(request) + len(answer)
        ids[row, :length] = torch.tensor(request + answer)
        labels[row, len(request):length] = torch.tensor(answer)
        mask[row, :length] = 1
    return Batch(ids, labels, mask)


def logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits of the text's positions; PEFT may return those of the virtual tokens before them."""
    return model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, -batch.ids.size(1):]


@torch.no_grad()
def exact_match(
    model: torch.nn.Module, tokenizer: Tokenizer, examples: list[Example], lead: list[int]
) -> float:
    """Percentage of examples whose every answer token, newline included, is the likeliest.

    This is the share that greedy decoding gets right: greedy decoding follows the answer exactly
    as long as each of its tokens is the likeliest after the ones before it.
    """
    correct = 0
    for start in range(0, len(examples), 50):
        batch = collate(tokenizer, examples[start:start + 50], lead)
        predicted, labels = logits(model, batch)[:, :-1].argmax(-1), batch.labels[:, 1:]
        correct += ((predicted == labels) | (labels == _IGNORED)).all(1).sum().item()
    return 100 * correct / len(examples)


@torch.no_grad()
def greedy(
    model: torch.nn.Module, tokenizer: Tokenizer, text: str, lead: list[int], limit: int = 64
) -> list[int]:
    """Token ids that greedy decoding writes for a request, up to and with the newline."""
    ids, written = lead + encode(tokenizer, request_text(text)), []
    while len(written) < limit:
        row = torch.tensor([ids + written])
        written.append(model(input_ids=row).logits[0, -1].argmax().item())
        if "\n" in tokenizer.decode([written[-1]]):
            break
    return written
