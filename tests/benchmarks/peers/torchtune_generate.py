"""Greedy generation by torchtune, as its recipe does it with a KV cache: one batch per turn."""

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
    prompts, new_tokens = torch.tensor(settings["prompts"]), settings["new_tokens"]
    rows, length = prompts.shape
    model.setup_caches(rows, dtype, decoder_max_seq_len=length + new_tokens)
    turns = Turns()
    ids: list[list[int]] = []
    while True:
        turns.end(ids=ids)
        model.reset_caches()
        with torch.inference_mode():
            out, _ = generation.generate(
                model, prompts, max_generated_tokens=new_tokens, temperature=0.0
            )
        ids = out[:, length:].tolist()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
