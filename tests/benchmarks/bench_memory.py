"""What each lever saves and costs, counted and not timed: the same on every device. A Llama of 8
blocks (dim 256, vocabulary 4,096; 11 M parameters) in bfloat16, 4 x 512 tokens, not compiled.
`kept` is all that a forward pass leaves for its backward pass, on the device and on the CPU; in full
fine-tuning 2,048 bytes of it are the head's gradient, which is made in the forward pass.
`optimizer` is its state. `peak` is the most that a step holds at once, weights excluded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mytune.models.llama3 import llama3, lora_llama3
from mytune.modules import Decoder, LinearCrossEntropyLoss
from mytune.training import (
    LiveBytes,
    StepInBackward,
    checkpoint_activations,
    count_saved_bytes,
    offload_activations,
    optimizer_state,
    recomputed_blocks,
)
from tests.benchmarks.common import THREADS, Row

TITLE = "Memory"
SIZES = dict(vocab_size=4096, num_layers=8, num_heads=8, num_kv_heads=2, embed_dim=256)
SIZES |= dict(intermediate_dim=896, max_seq_len=512)
LOSS = LinearCrossEntropyLoss()


@dataclass(frozen=True)
class Lever:
    """The keys of the recipe that are not at their defaults."""

    name: str
    ac_mode: str | None = None
    ac_option: int | str | None = None
    offload: bool = False
    in_backward: bool = False
    optimizer: str = "torch.optim.AdamW"


NONE = Lever("none")
ACTIVATIONS = [
    Lever("ac_mode=selective, ac_option=op", "selective", "op"),
    Lever("ac_mode=selective, ac_option=2", "selective", 2),
    Lever("ac_mode=full", "full"),
    Lever("offloading", offload=True),
    Lever("ac_mode=full, offloading", "full", offload=True),
]
OPTIMIZER = [
    Lever("optimizer_in_bwd", in_backward=True),
    Lever("bitsandbytes AdamW8bit", optimizer="bitsandbytes.optim.AdamW8bit"),
    Lever("torchao AdamW8bit", optimizer="torchao.optim.AdamW8bit"),
    Lever("torchao AdamW4bit", optimizer="torchao.optim.AdamW4bit"),
    Lever("all", "full", None, True, True, "bitsandbytes.optim.AdamW8bit"),
]


def measure(quick: bool) -> list[Row]:
    """Return a row per method and lever; those of a package that is missing are left out."""
    torch.set_num_threads(THREADS)
    torch.compiler.set_stance("force_eager")  # torchao compiles its step, which counts nothing
    sizes = {**SIZES, "num_layers": 2} if quick else SIZES
    full = partial(llama3, **sizes)
    lora = partial(lora_llama3, ["q_proj", "k_proj", "v_proj", "o_proj"], True, **sizes)
    cases = [("full", full, each) for each in (NONE, *ACTIVATIONS, *OPTIMIZER)]
    cases += [("LoRA", lora, each) for each in (NONE, *ACTIVATIONS)]
    rows = [measure_lever(*case) for case in cases]
    return [row for row in rows if row]


def measure_lever(method: str, build: Callable[[], Decoder], lever: Lever) -> Row | None:
    """Count one lever on a new model."""
    model = bfloat16(build())
    rule = recomputed_blocks(len(model.layers), False, lever.ac_mode, lever.ac_option)
    checkpoint_activations(model, rule, keep_products=lever.ac_option == "op")
    try:
        optimizer = find(lever.optimizer)([p for p in model.parameters() if p.requires_grad])
    except ImportError:
        return None
    tokens = torch.randint(4096, (4, 512), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1)}
    away = []

    def forward() -> Tensor:
        with offload_activations(model, lever.offload) as waiting:
            loss: Tensor = LOSS(model, batch)
        away.append(waiting.nbytes if waiting else 0)
        return loss

    kept = count_saved_bytes(forward)
    if lever.in_backward:
        StepInBackward(optimizer)

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as flop:
        step()
    states = optimizer_state(model, optimizer)[0].values()
    live = LiveBytes()
    with live:  # the second step: state is there before it
        step()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = sum(each.nbytes for each in states)
    return {
        "method": method,
        "lever": lever.name,
        "kept, bytes per token": float((kept - away[0]) / tokens.numel()),
        "on the CPU": float(away[0] / tokens.numel()),
        "MFLOP per token": flop.get_total_flops() / tokens.numel() / 1e6,
        "optimizer, bytes per parameter": state / trained,
        "peak, MB": (live.peak - away[0] + state) / 1e6,
    }


def bfloat16(model: Decoder) -> Decoder:
    """Return the model as the recipe has it: adapters stay float32."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.bfloat16()
        else:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def find(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    found: Callable[..., Any] = getattr(__import__(module, fromlist=[attribute]), attribute)
    return found
