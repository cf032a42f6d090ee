"""Greedy generation by torchtune, as its recipe does it with a KV cache: one text per turn."""

from __future__ import annotations

import json
import sys

import torch
from torchtune import generation, training
from torchtune.models.llama3 import llama3

from tests.benchmarks.peers.turns import Turns


def main(settings: dict) -> None:
    dtype = getattr(torch, settings["dtype"])
    checkpointer = training.FullModelHFCheckpointer(
        settings["model"], ["model.safetensors"], "LLAMA3", settings["model"] + "_unused"
    )
    with training.set_default_dtype(dtype):
        model = llama3(**settings["shape"]).eval()
    model.load_state_dict(checkpointer.load_checkpoint()[training.MODEL_KEY])
    prompt, new_tokens = torch.tensor(settings["prompt"]), settings["new_tokens"]
    model.setup_caches(1, dtype, decoder_max_seq_len=len(prompt) + new_tokens)
    turns = Turns()
    ids: list[int] = []
    while True:
        turns.end(ids=ids)
        model.reset_caches()
        with torch.inference_mode():
            out, _ = generation.generate(
                model, prompt, max_generated_tokens=new_tokens, temperature=0.0
            )
        ids = out[0, len(prompt) :].tolist()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
