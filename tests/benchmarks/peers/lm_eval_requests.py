"""Requests of lm_eval's kinds, answered by mytune's adapter or lm_eval's own HFLM: all per turn."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch

from tests.benchmarks.peers.turns import Turns


def mytune_model(settings: dict[str, Any]) -> Any:
    from mytune.evaluation import HarnessModel
    from mytune.generation import pack_linears
    from mytune.models import auto_model
    from mytune.models.llama3 import llama3_tokenizer
    from mytune.training import (
        FullModelHFCheckpointer,
        load_for_inference,
        use_fast_float32_matmul,
    )

    device, dtype = torch.device("cpu"), getattr(torch, settings["dtype"])
    use_fast_float32_matmul(device)
    with torch.device("meta"):
        model = auto_model(settings["model"])
    model = load_for_inference(model, FullModelHFCheckpointer(settings["model"]), device, dtype)
    pack_linears(model, rows=512)
    tokenizer = llama3_tokenizer(settings["tiktoken"])
    return HarnessModel(model, tokenizer, batch_size=settings["batch_size"])


def lm_eval_model(settings: dict[str, Any]) -> Any:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    dtype = getattr(torch, settings["dtype"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=settings["tokenizer"],
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    return HFLM(model, tokenizer=tokenizer, batch_size=settings["batch_size"], device="cpu")


def main(who: str, settings: dict[str, Any]) -> None:
    lm = {"mytune": mytune_model, "lm_eval": lm_eval_model}[who](settings)
    with open(settings["requests"]) as file:
        requests = [SimpleNamespace(args=tuple(args)) for args in json.load(file)]
    turns = Turns()
    answers: list[Any] = []
    while True:
        turns.end(answers=answers)
        answers = getattr(lm, settings["kind"])(requests)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
