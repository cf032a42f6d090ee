"""What each lever saves and costs, counted and not timed: Llama 3 8B in bfloat16, 2 x 4096 tokens,
not compiled, on tensors without content; counts are those of a real run. LoRA has rank 8 in all
linears of the blocks. `kept` is what a forward pass leaves for its backward pass on the device, a
kB being 1,000 bytes. `optimizer` is its state, `peak` weights, state and the most that a step
holds beside them; what kernels take for themselves is not counted. Operations of attention are not
counted either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from mytune.models.llama3 import llama3_8b, lora_llama3_8b, qlora_llama3_8b
from mytune.modules import Decoder, LinearCrossEntropyLoss
from mytune.quantization import NF4Linear
from mytune.training import (
    StepInBackward,
    checkpoint_activations,
    offload_activations,
    optimizer_state,
    recomputed_blocks,
)
from mytune.training.planning.simulate import Ledger
from tests.benchmarks.common import THREADS, Row

TITLE = "Memory"
ROWS, LENGTH = 2, 4096
TOKENS = ROWS * LENGTH


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
    Lever("ac_mode=full, offloading", "full", offload=True),
]
OPTIMIZER = [
    Lever("ac_mode=full, optimizer_in_bwd", "full", in_backward=True),
    Lever("ac_mode=full, bitsandbytes AdamW8bit", "full", optimizer="bitsandbytes.optim.AdamW8bit"),
    Lever("ac_mode=full, torchao AdamW8bit", "full", optimizer="torchao.optim.AdamW8bit"),
    Lever("ac_mode=full, torchao AdamW4bit", "full", optimizer="torchao.optim.AdamW4bit"),
    Lever("all of them", "full", None, True, True, "bitsandbytes.optim.AdamW8bit"),
]


def measure(quick: bool) -> list[Row]:
    """Return a row per method and lever; those of a package that is missing are left out."""
    torch.set_num_threads(THREADS)
    # NF4's table must be real: it outlives the tensors without content.
    linear = NF4Linear(64, 64)
    linear.quantize_(torch.ones(64, 64))
    linear.dequantize()
    linears: list[Any] = [["q_proj", "k_proj", "v_proj", "o_proj"], True]
    cases = [("full", llama3_8b, lever) for lever in (NONE, *ACTIVATIONS, *OPTIMIZER)]
    lora, qlora = (partial(build, *linears) for build in (lora_llama3_8b, qlora_llama3_8b))
    cases += [("LoRA", lora, lever) for lever in (NONE, *ACTIVATIONS[:3])]
    cases += [("QLoRA", qlora, ACTIVATIONS[2])]
    if quick:
        cases = [case for case in cases if case[2] in (NONE, ACTIVATIONS[2])]
    rows = []
    for case in cases:
        rows.append(measure_lever(*case))
        print(rows[-1], flush=True)
    return [row for row in rows if row]


def measure_lever(method: str, build: Callable[[], Decoder], lever: Lever) -> Row | None:
    """Return what one lever does; None where its package is missing."""
    try:
        dtype = torch.bfloat16 if method == "full" else torch.float32
        per_parameter = state_bytes(lever.optimizer, dtype)
    except ImportError:
        return None
    counted = count(build, lever.ac_mode, lever.ac_option, lever.offload, lever.in_backward)
    return {
        "method": method,
        "lever": lever.name,
        "kept, kB per token": counted.kept / TOKENS / 1e3,
        "on the CPU, kB per token": counted.away / TOKENS / 1e3,
        "GFLOP of products per token": counted.flop / TOKENS / 1e9,
        "optimizer, bytes per trained parameter": per_parameter,
        "peak, GiB": (counted.peak + per_parameter * counted.trained) / 2**30,
    }


class Counting(Ledger):
    """Counts floating-point operations, too: FlopCounterMode keeps tensors alive."""

    flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            self.flop += formula(*args, **(kwargs or {}), out_val=result)
        return result


@dataclass(frozen=True)
class Counted:
    """Bytes kept on the device and on the CPU, the peak with weights, FLOP, what trains."""

    kept: int
    away: int
    peak: int
    flop: int
    trained: int


@cache
def count(
    build: Callable[[], Decoder],
    mode: str | None,
    option: int | str | None,
    offload: bool,
    in_backward: bool,
) -> Counted:
    """Count a forward and a backward pass."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = in_bfloat16(build)
        blocks = recomputed_blocks(len(model.layers), False, mode, option)
        checkpoint_activations(model, blocks, keep_products=option == "op")
        trained = [p for p in model.parameters() if p.requires_grad]
        if in_backward:
            StepInBackward(torch.optim.SGD(trained))
        tokens = torch.zeros(ROWS, LENGTH, dtype=torch.long)
        places = torch.zeros(TOKENS, dtype=torch.long)  # every token is trained
        batch = {"tokens": tokens, "labels": tokens, "target_index": places}
        counting = Counting()
        with counting:
            with offload_activations(model, offload) as waiting:
                loss = LinearCrossEntropyLoss()(model, batch)
            away = waiting.nbytes if waiting else 0  # on the CPU a copy to the CPU is no copy
            kept = counting.now.total() - away
            loss.backward()
        weights = sum(p.nbytes for p in model.parameters())
        size = sum(p.numel() for p in trained)
    return Counted(kept, away, weights + counting.peak.total() - away, counting.flop, size)


def in_bfloat16(build: Callable[[], Decoder]) -> Decoder:
    """Build a model whose weights are bfloat16; adapters are float32 in any case."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return build()
    finally:
        torch.set_default_dtype(torch.float32)


@cache
def state_bytes(name: str, dtype: torch.dtype) -> float:
    """Return the bytes of state per parameter that an optimizer has after a real step."""
    module, _, attribute = name.rpartition(".")
    linear = nn.Linear(512, 512, bias=False, dtype=dtype)
    optimizer = getattr(import_module(module), attribute)(linear.parameters())
    linear.weight.grad = torch.ones_like(linear.weight)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        optimizer.step()
    tensors = optimizer_state(linear, optimizer)[0].values()
    return sum(tensor.nbytes for tensor in tensors) / linear.weight.numel()
