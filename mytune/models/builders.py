"""Where public builders come from: a row of sizes makes a plain, a LoRA and a QLoRA builder."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mytune.errors import ConfigError
from mytune.modules.decoder import Decoder, DecoderConfig
from mytune.modules.lora import LoRAConfig, apply_lora
from mytune.quantization.nf4 import apply_nf4

Builder = Callable[..., Decoder]
SizeFunction = Callable[..., DecoderConfig]

MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
# torchtune's names for what Hugging Face, PEFT and we call otherwise.
_OTHER_NAMES = {
    "output_proj": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "output": "lm_head",
}


def lora_decoder(
    config: DecoderConfig,
    lora_attn_modules: Sequence[str] = (),
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    quantize_base: bool = False,
    use_dora: bool = False,
    lora_modules: Sequence[str] = (),
    use_rslora: bool = False,
    quantize_embeddings: bool = False,
) -> Decoder:
    """Build a decoder with LoRA adapters; everything else is frozen.

    Args:
        config: the sizes.
        lora_attn_modules: adapted projections of attention: q_proj, k_proj, v_proj, o_proj.
        apply_lora_to_mlp: adapt gate_proj, up_proj and down_proj too.
        apply_lora_to_output: adapt lm_head too.
        lora_rank: rank of the update.
        lora_alpha: the update is scaled by alpha / rank.
        lora_dropout: dropout before the update.
        quantize_base: hold the blocks' linears in 4-bit NF4 (QLoRA).
        use_dora: learn magnitude and direction apart (DoRA).
        lora_modules: adapted linears by their last name, beside or instead of the three above.
        use_rslora: scale by alpha / sqrt(rank).
        quantize_embeddings: hold the embedding and the head in NF4 too.

    Raises:
        ConfigError: a module that the model does not have, or embeddings alone to quantize.
    """
    names = [*lora_attn_modules, *lora_modules]
    names += MLP_MODULES if apply_lora_to_mlp else ()
    names += ["lm_head"] if apply_lora_to_output else []
    if "lm_head" in names and config.tie_word_embeddings:
        raise ConfigError(
            "LoRA on lm_head (apply_lora_to_output) needs a head of its own, "
            "and this model's is tied to its embeddings: leave it out"
        )
    modules = tuple(dict.fromkeys(_OTHER_NAMES.get(name, name) for name in names))
    model = Decoder(config)
    if quantize_base:
        kept = () if quantize_embeddings else ("lm_head",)
        apply_nf4(model, skip=kept, embeddings=quantize_embeddings)
    elif quantize_embeddings:
        raise ConfigError(
            "model: quantize_embeddings is True and quantize_base False; 4-bit embeddings come "
            "with a 4-bit base: use a qlora_... builder, or set quantize_base: true"
        )
    apply_lora(
        model, LoRAConfig(modules, lora_rank, lora_alpha, lora_dropout, use_dora, use_rslora)
    )
    return model


def builders(name: str, sizes: DecoderConfig | SizeFunction) -> tuple[Builder, Builder, Builder]:
    """Return the builders `name`, `lora_name` and `qlora_name` of a row of sizes.

    Args:
        name: of the plain builder.
        sizes: a row, or a function that makes one; the builders then take its arguments
            too, the LoRA builders by keyword.
    """
    make: SizeFunction
    if isinstance(sizes, DecoderConfig):
        make, what = (lambda: sizes), _describe(sizes)
    else:
        make, what = sizes, str(getattr(sizes, "func", sizes).__doc__)

    def build(*args: Any, **kwargs: Any) -> Decoder:
        return Decoder(make(*args, **kwargs))

    def lora(*args: Any, **kwargs: Any) -> Decoder:
        own = {key: kwargs.pop(key) for key in size_args if key in kwargs}
        return lora_decoder(make(**own), *args, **kwargs)

    def qlora(*args: Any, **kwargs: Any) -> Decoder:
        return lora(*args, **{"quantize_base": True, **kwargs})

    size_args = inspect.signature(make).parameters
    lora_args = list(inspect.signature(lora_decoder).parameters.values())[1:]
    lora_args += [p.replace(kind=p.KEYWORD_ONLY) for p in size_args.values()]
    caller = sys._getframe(1).f_globals["__name__"]
    for builder, prefix, how, args in (
        (build, "", "", size_args.values()),
        (lora, "lora_", " with LoRA, see `lora_decoder`", lora_args),
        (qlora, "qlora_", " for QLoRA, see `lora_decoder`", lora_args),
    ):
        builder.__name__ = builder.__qualname__ = prefix + name
        builder.__module__ = caller
        builder.__doc__ = f"Build {name}{how}: {what}"
        builder.__signature__ = inspect.Signature(list(args))  # type: ignore[attr-defined]
    return build, lora, qlora


def _describe(config: DecoderConfig) -> str:
    return (
        f"{config.num_layers} layers, dim {config.embed_dim}, {config.num_heads} heads, "
        f"{config.num_kv_heads} key/value heads, FFN {config.intermediate_dim}, "
        f"vocabulary {config.vocab_size}, {config.max_seq_len} positions."
    )
