"""Greedy generation by mytune, as its recipe does it: one text per turn."""

from __future__ import annotations

import json
import sys

import torch

from mytune.generation import generate, pack_linears
from mytune.models.llama3 import llama3
from mytune.training import FullModelHFCheckpointer, load_weights
from tests.benchmarks.peers.turns import Turns


def main(settings: dict) -> None:
    with torch.device("meta"):
        model = llama3(**settings["shape"]).eval()
    weights = FullModelHFCheckpointer(settings["model"]).weights(model.config)
    load_weights(model, weights, torch.device("cpu"), getattr(torch, settings["dtype"]))
    pack_linears(model)
    turns = Turns()
    ids: list[int] = []
    while True:
        turns.end(ids=ids)
        new = generate(model, settings["prompt"], max_new_tokens=settings["new_tokens"])
        ids = list(new)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
