"""Decoding, checkpoints, NF4, and a plain transformers loop: what is measured beside training."""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import mytune.quantization
from mytune.generation import PromptCache, generate, pack_linears
from mytune.models.llama3 import llama3
from mytune.modules.decoder import Decoder, DecoderConfig
from mytune.quantization import dequantize_nf4, quantize_nf4
from mytune.quantization.tensors import stored_bytes
from mytune.training import FullModelHFCheckpointer, load_weights
from mytune.training.checkpointing.formats import HF
from tests.gpu import DEVICE, TINY
from tests.gpu.flops import flop_per_token, seconds, wait
from tests.gpu.parts import SIZES, RandomWeights, arguments, llama, sizes
from tests.gpu.training import BATCH, LORA, SHORT, TIMED, WARM_UP, Row

NEW_TOKENS = 16 if TINY else 256


def random_model(config: DecoderConfig) -> Decoder:
    """Return a model in bfloat16 with random weights, in eval mode."""
    with torch.device("meta"):
        model = llama3(**arguments(config))
    load_weights(model, RandomWeights(config, DEVICE), DEVICE, torch.bfloat16)
    return model.eval()


def decode(weights: str, keys: dict[str, Any], copy_rate: float) -> Row:
    """Return the tokens per second of one row, greedy, after 64 ids of prompt and a first one.

    Args:
        weights: bf16, or the name of a quantizer.
        keys: more for `PromptCache`.
        copy_rate: bytes per second of the device's memory.
    """
    model = random_model(SIZES).requires_grad_(False)
    if weights != "bf16":
        getattr(mytune.quantization, weights)().quantize(model)
    read = sum(stored_bytes(p) for n, p in model.named_parameters() if "embed" not in n)
    pack_linears(model)
    cache, spent = PromptCache(model, 65 + NEW_TOKENS, **keys), []
    for _ in range(3):  # the first one compiles and records
        tokens = generate(model, range(3, 67), max_new_tokens=1 + NEW_TOKENS, prompt_cache=cache)
        next(tokens)
        wait()
        start = time.perf_counter()
        count = sum(1 for _ in tokens)
        spent.append((time.perf_counter() - start) / count)
    return {
        "weights": weights,
        "levers": ", ".join(keys) or "none",
        "tokens/s": 1 / min(spent[1:]),
        "of memory's rate, %": 100 * read / min(spent[1:]) / copy_rate,
    }


def nf4() -> list[Row]:
    """Return the milliseconds to dequantize a weight of 14336 x 4096: ours, bitsandbytes'."""
    rows, columns = (256, 128) if TINY else (14_336, 4096)
    weight = torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
    packed = quantize_nf4(weight)
    calls = {"mytune": lambda: dequantize_nf4(*packed, (rows, columns), torch.bfloat16)}
    try:
        from bitsandbytes import functional
    except ImportError:
        pass
    else:
        theirs = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        calls["bitsandbytes"] = lambda: functional.dequantize_4bit(*theirs)
    moved = 2 * weight.numel() + sum(p.numel() * p.element_size() for p in packed)
    return [
        {
            "library": name,
            "dequantize, ms": 1e3 * (spent := seconds(call, 50)),
            "GB/s": moved / spent / 1e9,
        }
        for name, call in calls.items()
    ]


def checkpoint() -> list[Row]:
    """Return the seconds to load a checkpoint onto the device and to save it from there.

    It has a quarter of the blocks, which keeps the disk's part of the time small.
    """
    config = sizes(max(1, SIZES.num_layers // 4))
    folder = Path(tempfile.mkdtemp())
    try:
        source, out = folder / "source", folder / "out"
        write(source, config)
        checkpointer = FullModelHFCheckpointer(str(source), output_dir=str(out))
        with torch.device("meta"):
            model = llama3(**arguments(config))
        start = time.perf_counter()
        load_weights(model, checkpointer.weights(config), DEVICE, torch.bfloat16)
        wait()
        loaded = time.perf_counter() - start
        weights, start = dict(model.named_parameters()), time.perf_counter()
        checkpointer.save("epoch_0", step=1, dtype=torch.bfloat16, weights=weights, config=config)
        saved = time.perf_counter() - start
        size = sum(p.numel() * p.element_size() for p in weights.values()) / 1e9
    finally:
        shutil.rmtree(folder)
    return [
        {"direction": what, "GB": size, "seconds": spent, "GB/s": size / spent}
        for what, spent in (("load", loaded), ("save, with hashes, and read back", saved))
    ]


def write(folder: Path, config: DecoderConfig) -> None:
    """Write random weights as Hugging Face's file."""
    folder.mkdir()
    weights = RandomWeights(config, DEVICE)
    state = {HF.table.theirs(name): weights[name].cpu() for name in weights}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")


def transformers(length: int, recompute: bool, product_rate: float) -> Row:
    """Return speed and memory of LoRA by transformers and peft, its defaults, not compiled."""
    from peft import LoraConfig, get_peft_model

    length = SHORT if TINY else length
    model = llama(SIZES, torch.bfloat16)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    names = [*LORA["lora_attn_modules"], "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=LORA["lora_rank"], lora_alpha=LORA["lora_alpha"], target_modules=names)
    model = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    tokens = torch.randint(3, SIZES.vocab_size, (BATCH, length), device=DEVICE)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    spent = [step(model, optimizer, tokens) for _ in range(WARM_UP + TIMED)][WARM_UP:]
    speed = tokens.numel() / statistics.median(spent)
    work = flop_per_token(SIZES, length, LORA["lora_rank"])
    return {
        "method": "LoRA, transformers + peft",
        "batch": f"{BATCH} x {length}",
        "levers": "recompute" if recompute else "none",
        "tokens/s": speed,
        "MFU, %": 100 * speed * work / product_rate,
        "peak, GiB": torch.cuda.max_memory_allocated() / 2**30 if not TINY else None,
        "result": "measured",
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    """Do an optimizer step; return its seconds."""
    wait()
    start = time.perf_counter()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    wait()
    return time.perf_counter() - start


def tidy() -> None:
    """Give back the memory of what is gone."""
    gc.collect()
    torch._dynamo.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
