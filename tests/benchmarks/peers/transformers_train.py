"""A plain fine-tuning loop over transformers and, for LoRA, peft: one optimizer step per turn."""

from __future__ import annotations

import json
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from tests.benchmarks.peers.turns import Ids, Rows, Turns


def main(settings: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=getattr(torch, settings["dtype"])
    )
    if settings["lora"]:
        model = get_peft_model(model, LoraConfig(**settings["lora"], task_type="CAUSAL_LM"))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **settings["optimizer"])
    rows, size = Rows(path=settings["rows"]), settings["batch_size"]
    turns = Turns()
    for start in range(0, len(rows), size):
        batch = collate([rows[start + i] for i in range(size)])
        loss = model(**batch).loss  # padding is on the right: the causal mask hides it
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        turns.end(loss=loss.item())


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    padded = {
        key: pad_sequence([torch.tensor(row[key]) for row in rows], True, padding)
        for key, padding in (("tokens", Ids.pad_id), ("labels", -100))
    }
    return {"input_ids": padded["tokens"], "labels": padded["labels"]}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
