"""Requests of lm_eval's kinds, answered by the wrapper of torchtune's eleuther_eval recipe."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchtune
from lm_eval.models.huggingface import HFLM
from torchtune import training
from torchtune.models.llama3 import Llama3Tokenizer, llama3

from tests.benchmarks.peers.turns import Turns


def recipe() -> Any:
    """Import the recipe, whose wrapper would load GPT-2 from the Hub, which is not needed."""
    file = Path(torchtune.__file__).parents[1] / "recipes" / "eleuther_eval.py"
    spec = importlib.util.spec_from_file_location("eleuther_eval", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(settings: dict[str, Any]) -> None:
    dtype = getattr(torch, settings["dtype"])
    checkpointer = training.FullModelHFCheckpointer(
        settings["model"], ["model.safetensors"], "LLAMA3", settings["model"] + "_unused"
    )
    with training.set_default_dtype(dtype):
        model = llama3(**settings["shape"]).eval()
    model.load_state_dict(checkpointer.load_checkpoint()[training.MODEL_KEY])

    def without_gpt2(self: Any, *args: Any, device: str = "cpu", **settings: Any) -> None:
        super(HFLM, self).__init__()
        self._device = torch.device(device)
        self.backend, self.batch_sizes, self.logits_cache = "causal", {}, True
        self.enable_thinking = self.softmax_dtype = self.mixed_precision_dtype = None

    HFLM.__init__ = without_gpt2
    tokenizer = Llama3Tokenizer(settings["tiktoken"])
    wrapper = recipe()._LLMEvalWrapper(
        model,
        tokenizer,
        device=torch.device("cpu"),
        max_seq_length=settings["shape"]["max_seq_len"],
        batch_size=settings["batch_size"],
        dtype=dtype,
        enable_kv_cache=True,
    )
    with open(settings["requests"]) as file:
        requests = [SimpleNamespace(args=tuple(args)) for args in json.load(file)]
    turns = Turns()
    answers: list[Any] = []
    while True:
        turns.end(answers=answers)
        with torch.no_grad():
            answers = getattr(wrapper, settings["kind"])(requests)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
