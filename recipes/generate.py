"""Generate text from a prompt with a base model, a fine-tuned one, or a base model and an adapter.

    tune run generate --config generation prompt="Hello, my name is"
    tune run generate --config generation prompt.user="Tell me a joke." prompt.system="Be brief."
    tune run generate --config generation checkpointer.adapter_checkpoint=run/epoch_0/adapter

The text goes to stdout as it comes, everything else to stderr. Copy it with
`tune cp generate my_generate.py` and change what you like.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mytune.config import Component, instantiate
from mytune.errors import ConfigError
from mytune.generation import check_prompt, check_sampling, generate, pack_linears
from mytune.modules import Decoder
from mytune.quantization import stored_bytes
from mytune.tokenizers import Message, ModelTokenizer, StreamDecoder
from mytune.training import (
    get_device,
    get_dtype,
    load_for_inference,
    log,
    memory_stats,
    set_deterministic,
    set_seed,
    setup_logging,
)


@dataclass(kw_only=True)
class Config:
    """Every key of a generation config."""

    # Builder of the model; an adapter needs no builder of its own.
    model: Component
    # Tokenizer and its file.
    tokenizer: Component
    # Which files hold the weights; adapter_checkpoint names a PEFT adapter to use with them.
    checkpointer: Component
    # Nothing is written; here for configs whose checkpointer refers to it.
    output_dir: str = "."

    # A text to continue, or a turn of a chat to answer: {system: ..., user: ...}.
    prompt: Any
    # Stop after this many tokens, if no stop token comes before.
    max_new_tokens: int = 300
    # 0 always takes the likeliest token; higher is more varied.
    temperature: float = 0.6
    # Draw from this many likeliest tokens; null for all.
    top_k: int | None = 300
    # Draw from the likeliest tokens that together reach this probability; null for all.
    top_p: float | None = None
    # The same seed gives the same text; a random one, which is logged, if null.
    seed: int | None = 1234

    # cuda, cuda:1, cpu, mps or xpu.
    device: str = "cuda"
    # Of weights and computation: bf16 or fp32.
    dtype: str = "bf16"
    # Keep keys and values of earlier tokens; without, every token reads the whole text again.
    enable_kv_cache: bool = True
    # Quantize the linears once they are loaded; a quantized checkpoint needs none.
    quantizer: Component | None = None
    # Deterministic kernels: default, warn, or error where there is none.
    cudnn_deterministic_mode: str | int | None = None
    # DEBUG, INFO, WARNING or ERROR.
    log_level: str = "INFO"


def main(cfg: Config) -> int:
    """Load, generate, report the speed; returns 130 after Ctrl-C."""
    setup_logging(cfg.log_level)
    check_sampling(cfg.temperature, cfg.top_k, cfg.top_p)
    device = get_device(cfg.device)
    dtype = get_dtype(cfg.dtype, device)
    set_deterministic(cfg.cudnn_deterministic_mode)
    generator = torch.Generator(device).manual_seed(set_seed(cfg.seed))

    # What can be wrong with the prompt is found before the weights are read.
    tokenizer = instantiate(cfg.tokenizer)
    prompt_ids = tokenize_prompt(cfg.prompt, tokenizer)
    checkpointer, quantizer = instantiate(cfg.checkpointer), instantiate(cfg.quantizer)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    check_prompt(prompt_ids, model.config)
    if len(prompt_ids) + cfg.max_new_tokens > model.config.max_seq_len:
        log.warning("the text will end at the model's %d positions", model.config.max_seq_len)

    model = load_for_inference(model, checkpointer, device, dtype, quantizer=quantizer)
    bytes_read = bytes_per_token(model)
    pack_linears(model)

    started = time.perf_counter()
    tokens = generate(
        model,
        prompt_ids,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        stop_tokens=tokenizer.stop_tokens,
        generator=generator,
        enable_kv_cache=cfg.enable_kv_cache,
    )
    if isinstance(cfg.prompt, str):
        print(cfg.prompt, end="", flush=True)
    count, interrupted = stream(tokens, tokenizer.stream_decoder())
    report(count, time.perf_counter() - started, bytes_read, device)
    return 130 if interrupted else 0


def tokenize_prompt(prompt: Any, tokenizer: ModelTokenizer) -> list[int]:
    """Return the ids of a text to continue, or of a chat up to where the answer begins."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_bos=True, add_eos=False)
    roles = ("system", "user")
    if not isinstance(prompt, Mapping) or set(prompt) - set(roles) or not prompt.get("user"):
        raise ConfigError(
            f"prompt is {prompt!r}; it must be a text, or a mapping with user and perhaps system; "
            "what YAML takes for something else than a text needs quotes: prompt='\"Q: why?\"'"
        )
    messages = [Message(role, str(prompt[role])) for role in roles if prompt.get(role)]
    return tokenizer.tokenize_messages(messages, add_generation_prompt=True)[0]


def bytes_per_token(model: Decoder) -> int:
    """Return the bytes of weights that a step reads: all but an embedding that is no head."""
    size = sum(stored_bytes(parameter) for parameter in model.parameters())
    return size if model.lm_head is None else size - stored_bytes(model.embed_tokens.weight)


def stream(tokens: Iterator[int], decoder: StreamDecoder) -> tuple[int, bool]:
    """Print tokens as they come; return how many there were and whether Ctrl-C ended them."""
    count, interrupted = 0, False
    try:
        for token in tokens:
            count += 1
            print(decoder.put(token), end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    print(decoder.flush(), flush=True)
    return count, interrupted


def report(tokens: int, seconds: float, bytes_read: int, device: torch.device) -> None:
    """Log speed and memory in the words of torchtune's tutorials."""
    log.info("Time for inference: %.2f sec total, %.2f tokens/sec", seconds, tokens / seconds)
    log.info("Bandwidth achieved: %.2f GB/s", bytes_read * tokens / seconds / 1e9)
    memory = memory_stats(device)
    used = max((memory[name] for name in memory if name.endswith(("alloc", "rss"))), default=0.0)
    log.info("Memory used: %.2f GB", used * 2**30 / 1e9)
