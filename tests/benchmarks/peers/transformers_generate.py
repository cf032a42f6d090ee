"""Greedy generation by transformers: one batch per turn."""

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
    prompts = torch.tensor(settings["prompts"])
    turns = Turns()
    ids: list[list[int]] = []
    while True:
        turns.end(ids=ids)
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=settings["new_tokens"],
            do_sample=False,
        )
        ids = out[:, prompts.shape[1] :].tolist()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
