"""What one block keeps for its backward pass, and its work, per token: counters, no clocks. Bytes
are those of all distinct storages that autograd keeps beside parameters and RoPE's angles; FLOPs
are those of matrix products and attention, forward and backward. The block is Llama-3-8B's with
all widths divided by 4, run eagerly on the CPU in bfloat16; LoRA has rank 16 on every linear.
`autograd` is the same block without the functions of `mytune/modules/derived.py`.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mytune.modules import derived, lora
from mytune.modules.decoder import Block, DecoderConfig, rope_angles
from mytune.quantization import apply_nf4
from tests.benchmarks.common import THREADS, Row

TITLE = "Activations"
SIZES = DecoderConfig(
    vocab_size=8,
    num_layers=1,
    num_heads=8,
    num_kv_heads=2,
    embed_dim=1024,
    intermediate_dim=3584,
    head_dim=128,
    max_seq_len=128,
)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHORT, LONG = 16, 32  # tokens: what does not grow with them drops out of the difference


def measure(quick: bool) -> list[Row]:
    """Return a row per method and way of keeping; `quick` changes nothing."""
    torch.set_num_threads(THREADS)
    return [
        {"method": method, "kept by": way, **count(make(), way)}
        for method, make in METHODS.items()
        for way in WAYS
    ]


def build(adapted: bool = True, nf4: bool = False, dropout: float = 0.0) -> Block:
    torch.manual_seed(0)
    block = Block(SIZES, 0).bfloat16()
    if nf4:
        apply_nf4(block)
    if adapted:
        lora.apply_lora(block, lora.LoRAConfig(LINEARS, rank=16, dropout=dropout))
        lora.init_adapters(block, seed=0)
    return block


METHODS = {
    "LoRA": build,
    "LoRA, dropout 0.05": partial(build, dropout=0.05),
    "QLoRA": partial(build, nf4=True),
    "full": partial(build, adapted=False),
}


def _derive(make: Any, *sources: Tensor) -> derived.Derived:
    return derived.Derived(make(*sources))


def _dropped(x: derived.Derived, rate: float) -> derived.Derived:
    return derived.Derived(F.dropout(x.value, rate))


WAYS: dict[str, dict[str, Any]] = {
    "autograd": {
        "mytune.modules.derived.derive": _derive,
        "mytune.modules.lora.dropped": _dropped,
    },
    "mytune": {},
}


def count(block: Block, way: str) -> Row:
    """Return the counters of a block whose tensors are kept in one of the `WAYS`."""
    with ExitStack() as patches:
        for name, function in WAYS[way].items():
            patches.enter_context(mock.patch(name, function))
        short, long = step(block, SHORT), step(block, LONG)
    kept = (long["kept"] - short["kept"]) / (LONG - SHORT)
    return {
        "kept, bytes per token": kept,
        "in hidden states": kept / (2 * SIZES.embed_dim),
        "MFLOP per token": long["flops"] / LONG / 1e6,
    }


def step(block: nn.Module, tokens: int) -> dict[str, int]:
    """Run a block forward and backward; return the bytes it kept and its FLOPs."""
    rope = rope_angles(SIZES, torch.arange(tokens)[None])
    given = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *rope)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(1, tokens, SIZES.embed_dim, dtype=torch.bfloat16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = block(x, rope)
        y.sum().backward()
    sizes = (t.untyped_storage().nbytes() for at, t in kept.items() if at not in given)
    return {"kept": sum(sizes), "flops": counter.get_total_flops()}
