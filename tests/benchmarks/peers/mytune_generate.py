"""Greedy generation by mytune, as its recipe does it: one batch per turn."""

from __future__ import annotations

import json
import sys

import torch

from mytune.generation import Decoding, generate_batch, pack_linears
from mytune.models.llama3 import llama3
from mytune.modules import Decoder
from mytune.training import FullModelHFCheckpointer, load_weights
from tests.benchmarks.peers.turns import Turns, clock


def main(settings: dict) -> None:
    with torch.device("meta"):
        model = llama3(**settings["shape"]).eval()
    weights = FullModelHFCheckpointer(settings["model"]).weights(model.config)
    load_weights(model, weights, torch.device("cpu"), getattr(torch, settings["dtype"]))
    prompts, new_tokens = settings["prompts"], settings["new_tokens"]
    rows = len(prompts)
    pack_linears(model, rows, tokens_per_pass=rows + rows * len(prompts[0]) // new_tokens)
    flat, turns = flatness(model, prompts), Turns()
    ids: list[list[int]] = []
    while True:
        turns.end(ids=ids, flat=flat)
        ids = generate_batch(model, prompts, max_new_tokens=new_tokens)


def flatness(model: Decoder, prompts: list[list[int]], count: int = 512, part: int = 64) -> float:
    """Return the time for the last tokens over that for as many of the first ones."""
    times = [clock() for _ in Decoding(model, prompts, max_new_tokens=count)]
    return (times[-1] - times[-1 - part]) / (times[part] - times[0])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
