"""Greedy generation by transformers: one text per turn."""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoModelForCausalLM

from tests.benchmarks.peers.turns import Turns


def main(settings: dict) -> None:
    dtype = getattr(torch, settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # all generate as many
    prompt = torch.tensor([settings["prompt"]])
    turns = Turns()
    ids: list[int] = []
    while True:
        turns.end(ids=ids)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=settings["new_tokens"],
            do_sample=False,
        )
        ids = out[0, prompt.shape[1] :].tolist()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
