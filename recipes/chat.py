"""Chat in the terminal with a base model, a fine-tuned one, or a base model and an adapter.

    tune chat CHECKPOINT_DIR
    tune chat run/epoch_0 device=cpu system="Be brief."
    tune chat CHECKPOINT_DIR --adapter run/epoch_0/adapter temperature=0

Answers go to stdout as they come, everything else to stderr. What has been said stays in the KV
cache: for each answer, only what is new is read.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import torch

from mytune.config import Component, component, instantiate
from mytune.errors import ConfigError, check_at_least, printable
from mytune.generation import (
    COMPILES,
    Decoding,
    PromptCache,
    Sampling,
    TextStream,
    can_compile,
    check_prompt,
    check_sampling,
    pack_linears,
)
from mytune.modules import Decoder
from mytune.tokenizers import Message, ModelTokenizer, check_vocabulary
from mytune.training import (
    get_device,
    get_dtype,
    load_for_inference,
    log,
    set_seed,
    setup_logging,
)

HELP = """\
/system TEXT  say how to answer, and begin anew; without TEXT, show what was said
/reset        forget the conversation
/quit         leave
Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does."""

# The recipe hands nothing to components itself: a config names all that they need.
SUPPLIED: dict[str, list[str]] = {}


@dataclass(kw_only=True)
class Config:
    """Every key of a chat."""

    # Where model and tokenizer are.
    checkpoint_dir: str
    # Builder of the model; an adapter needs no builder of its own.
    model: Component = component("mytune.models.auto_model", checkpoint_dir="${checkpoint_dir}")
    # Tokenizer and its file.
    tokenizer: Component = component(
        "mytune.models.llama3.llama3_tokenizer", path="${checkpoint_dir}"
    )
    # Which files hold the weights; adapter_checkpoint names a PEFT adapter to use with them.
    checkpointer: Component = component(
        "mytune.training.FullModelHFCheckpointer", checkpoint_dir="${checkpoint_dir}"
    )

    # How the model is to answer; null to say nothing.
    system: str | None = None
    # Stop an answer after this many tokens, if no stop token comes before.
    max_new_tokens: int = 1024
    # Tokens of the whole conversation, at most the model's positions; what is oldest is forgotten.
    max_seq_len: int = 8192
    # 0 always takes the likeliest token; higher is more varied.
    temperature: float = 0.6
    # Draw from this many likeliest tokens; null for all.
    top_k: int | None = 300
    # Draw from the likeliest tokens that together reach this probability; null for all.
    top_p: float | None = None
    # Draw from the tokens at least this many times as likely as the likeliest one; null for all.
    min_p: float | None = None
    # Above 1: tokens that the conversation already has become less likely.
    repetition_penalty: float = 1.0
    # The same seed gives the same answers; a random one, which is logged, if null.
    seed: int | None = None

    # cuda, cuda:1, cpu, mps or xpu.
    device: str = "cuda"
    # Of weights and computation: bf16 or fp32.
    dtype: str = "bf16"
    # Compile the step for one token: it takes a while, then every token takes less. On a CPU only
    # with quantized weights; others are laid out for its own kernels instead.
    compile: bool = False
    # DEBUG, INFO, WARNING or ERROR.
    log_level: str = "INFO"


def main(cfg: Config) -> int:
    """Load and talk; returns 130 if Ctrl-C ended it."""
    setup_logging(cfg.log_level)
    sampling = read_sampling(cfg)
    device = get_device(cfg.device)
    dtype = get_dtype(cfg.dtype, device)
    generator = torch.Generator(device).manual_seed(set_seed(cfg.seed))

    # What can be wrong is found before the weights are read.
    tokenizer = instantiate(cfg.tokenizer)
    checkpointer = instantiate(cfg.checkpointer)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    check_vocabulary(tokenizer, model.config.vocab_size)
    length = min(cfg.max_seq_len, model.config.max_seq_len)
    turns = begin(cfg.system)
    shortest = tokenize([*turns, Message("user", "Hello")], tokenizer)
    check_prompt(shortest, model.config)
    if len(shortest) >= length:
        raise ConfigError(f"max_seq_len is {length}; a first message has {len(shortest)} tokens")

    model = load_for_inference(model, checkpointer, device, dtype)
    pack_linears(model)
    if cfg.compile:
        log.info("compile: %s", COMPILES[can_compile(model)])
    cache = PromptCache(model, length, compile=cfg.compile)
    settings = {"max_new_tokens": cfg.max_new_tokens, "generator": generator, **sampling}
    log.info("Type a message, or /help.")
    try:
        talk(turns, Speaker(model, tokenizer, cache, settings))
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def read_sampling(cfg: Config) -> Sampling:
    """Return how tokens are drawn; raise ConfigError for what cannot be, in other keys as well."""
    sampling = Sampling(
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        min_p=cfg.min_p,
        repetition_penalty=cfg.repetition_penalty,
    )
    check_sampling(**sampling)
    check_at_least(1, {key: getattr(cfg, key) for key in ("max_new_tokens", "max_seq_len")})
    return sampling


@dataclass(frozen=True)
class Speaker:
    """Who answers: a model, what it has read so far, and how it is sampled."""

    model: Decoder
    tokenizer: ModelTokenizer
    cache: PromptCache
    settings: dict[str, Any]


def talk(turns: list[Message], speaker: Speaker) -> None:
    """Read lines and answer them until one says /quit or there are no more."""
    if sys.stdin is None:
        raise ConfigError("messages are read from stdin, which is closed")
    typing = sys.stdin.isatty()
    if typing:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` editing and history)
    while True:
        try:
            line = input("> " if typing else "").strip()
        except EOFError:
            if typing:
                print()
            return
        match line.split(maxsplit=1):
            case []:
                continue
            case ["/quit"]:
                return
            case ["/help"]:
                say(HELP)
            case ["/reset"]:
                turns[:] = [turn for turn in turns if turn.role == "system"]
                say("(the conversation is forgotten)")
            case ["/system"]:
                said = [turn.content for turn in turns if turn.role == "system"]
                say(said[0] if said else "nothing; /system TEXT says how to answer")
            case ["/system", text]:
                if fits([*begin(text), Message("user", "Hello")], speaker):
                    turns[:] = begin(text)
                    say("(the system message is set, and the conversation forgotten)")
            case ["/quit" | "/help" | "/reset" as word, _]:
                say(f"{word} takes nothing after it")
            case [word, *_] if word.startswith("/"):
                say(f"{word} is not known; there are /system, /reset, /help and /quit")
            case _:
                turns.append(Message("user", line))
                answer(turns, speaker)


def say(text: str) -> None:
    """Tell what is not an answer."""
    print(text, file=sys.stderr, flush=True)


def begin(system: str | None) -> list[Message]:
    """Return the turns of a conversation that begins."""
    return [Message("system", system)] if system else []


def tokenize(turns: list[Message], tokenizer: ModelTokenizer) -> list[int]:
    """Return the ids of a conversation up to where the answer begins."""
    return tokenizer.tokenize_messages(turns, add_generation_prompt=True)[0]


def fits(turns: list[Message], speaker: Speaker) -> bool:
    """Say whether turns leave room for an answer, and tell it if they do not."""
    tokens, room = len(tokenize(turns, speaker.tokenizer)), speaker.cache.length
    if tokens >= room:
        say(f"too long: {tokens} tokens of {room} that there is room for")
    return tokens < room


def answer(turns: list[Message], speaker: Speaker) -> None:
    """Print the answer to the last turn as it comes, and add it to the turns."""
    system = [turn for turn in turns if turn.role == "system"]
    if not fits([*system, turns[-1]], speaker):
        turns.pop()
        return
    prompt = make_room(turns, speaker)
    stops = speaker.tokenizer.stop_tokens
    decoding = Decoding(
        speaker.model, [prompt], stop_tokens=stops, prompt_cache=speaker.cache, **speaker.settings
    )
    stream, text, note = TextStream(speaker.tokenizer.stream_decoder()), "", ""
    try:
        for (token,) in decoding:
            if token is not None:
                text += show(stream.put(token))
        note = cut(decoding, speaker)
    except KeyboardInterrupt:
        note = "(stopped)"
    text += show(stream.flush() + "\n")
    if note:
        say(note)
    turns.append(Message("assistant", text))


def cut(decoding: Decoding, speaker: Speaker) -> str:
    """Say what cut an answer off, if it did not end by itself."""
    (row,) = decoding.rows
    if row.ended == "stop":
        return ""
    full = len(row.tokens) < speaker.settings["max_new_tokens"]
    return f"(cut: {'max_seq_len' if full else 'max_new_tokens'} is reached)"


def show(text: str) -> str:
    """Print a piece of an answer; return it as it was printed."""
    text = printable(text)
    print(text, end="", flush=True)
    return text


def make_room(turns: list[Message], speaker: Speaker) -> list[int]:
    """Return the conversation's ids; forget its oldest turns while the answer may not fit."""
    length = speaker.cache.length
    answer = min(speaker.settings["max_new_tokens"], length // 4)
    prompt = tokenize(turns, speaker.tokenizer)
    while len(prompt) + answer > length and sum(turn.role == "user" for turn in turns) > 1:
        oldest = next(i for i, turn in enumerate(turns) if turn.role == "user")
        del turns[oldest : oldest + 2]  # a message and its answer
        say("(the oldest message and its answer are forgotten: there is no room for them)")
        prompt = tokenize(turns, speaker.tokenizer)
    return prompt
