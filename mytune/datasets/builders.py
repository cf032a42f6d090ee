"""The datasets that a config names: where rows come from, what is in them, how they are packed."""

from __future__ import annotations

import inspect
import logging
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from mytune.datasets.cache import cache_key, load_or_write
from mytune.datasets.formats import (
    AlpacaToMessages,
    ColumnMap,
    Columns,
    InputOutputToMessages,
    OpenAIToMessages,
    ShareGPTToMessages,
    text_of,
)
from mytune.datasets.packing import PackedDataset
from mytune.datasets.sources import DataFiles, Row, open_source
from mytune.datasets.tokens import Encode, Stats, TokenDataset, raise_with_row, write_tokens
from mytune.errors import ConfigError, DataError, did_you_mean
from mytune.tokenizers.base import ModelTokenizer
from mytune.tokenizers.messages import Message, validate_messages

log = logging.getLogger("mytune")

Built = TokenDataset | PackedDataset
Builder = TypeVar("Builder", bound=Callable[..., Built])
MessageTransform = Callable[[Columns], list[Message]]

_CONVERSATIONS = {"sharegpt": ShareGPTToMessages, "openai": OpenAIToMessages}


def _build(
    encode: Encode,
    about: str | None,
    split_across_pack: bool,
    tokenizer: ModelTokenizer,
    *,
    source: str | list[str],
    packed: bool = False,
    max_seq_len: int | None = None,
    split: str = "train",
    data_files: DataFiles = None,
    data_dir: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    sample_by: str = "line",
    filter_fn: Callable[[Columns], bool] | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
) -> Built:
    """Tokenize rows, or take them from the cache, and pack them.

    Args:
        encode: a row's tokens and which are trained.
        about: names `encode` in the cache; None keeps the tokens out of it, as a tokenizer without
            a fingerprint does.
        source, split, data_files, data_dir, name, revision, sample_by: see `open_source`.
        max_seq_len: the longest row or the room of a pack; if not given, the tokenizer's.
        filter_fn: keep rows for which it is true; such a dataset is not cached.
        on_bad_row: `error` to stop at a row that cannot be used, `skip` to leave out and count it.
    """
    if max_seq_len is not None and max_seq_len < 1:
        raise ConfigError(f"dataset.max_seq_len is {max_seq_len}; at least 1, or null")
    room = max_seq_len or tokenizer.max_seq_len
    limit = None if packed and split_across_pack else room
    rows = open_source(source, split, data_files, data_dir, name, revision, sample_by)

    def write(folder: Path) -> None:
        kept = (row for row in rows.read() if filter_fn is None or _keeps(filter_fn, row))
        write_tokens(folder, kept, encode, limit, on_bad_row)

    known = (rows.identity, tokenizer.fingerprint, about)
    cached = all(known) and not filter_fn
    ds = load_or_write(cache_key(*known, limit, on_bad_row) if cached else None, write)
    _warn_of_untrained(ds.stats, source, limit)
    return PackedDataset(ds, room, split_across_pack) if packed else ds


def _keeps(filter_fn: Callable[[Columns], bool], row: Row) -> bool:
    """Ask for a row; one without columns is kept, to be reported or skipped like others."""
    try:
        return not isinstance(row.values, Mapping) or filter_fn(row.values)
    except Exception as error:
        raise_with_row(error, row.where)


def _warn_of_untrained(stats: Stats, source: str | list[str], limit: int | None) -> None:
    """Say so if more than a tenth of the rows train nothing; few are what data sets have."""
    if stats.untrained * 10 <= stats.rows:
        return
    why = "they have no answer, or one that is not to be trained"
    if stats.truncated * 2 >= stats.untrained:
        why = f"max_seq_len ({limit:,}) cuts their answers off: raise it, or take shorter rows"
    log.warning(
        "%s: %s of %s rows train nothing, likely as %s",
        source,
        f"{stats.untrained:,}",
        f"{stats.rows:,}",
        why,
    )


def _spelled_out(builder: Builder) -> Builder:
    """Show in a builder's signature what its `**options` are, so that a misspelt one is found."""
    own = inspect.signature(builder)
    parameters = {name: p for name, p in own.parameters.items() if p.kind != p.VAR_KEYWORD}
    shared = inspect.signature(_build).parameters.values()
    options = {p.name: p for p in shared if p.kind == p.KEYWORD_ONLY and p.name not in parameters}
    every = [*parameters.values(), *options.values()]
    builder.__signature__ = own.replace(parameters=every)  # type: ignore[attr-defined]
    return builder


@_spelled_out
def sft_dataset(
    tokenizer: ModelTokenizer,
    *,
    source: str | list[str],
    message_transform: MessageTransform,
    **options: Any,
) -> Built:
    """Conversations in any format: `message_transform` makes messages of a row.

    Tokens are cached if the transform is one of mytune's.
    """

    def encode(row: Columns) -> tuple[list[int], list[bool]]:
        messages = message_transform(row)
        _check_messages(messages)
        validate_messages(messages)
        tokens, masked = tokenizer.tokenize_messages(messages)
        return tokens, [not each for each in masked]

    module = type(message_transform).__module__
    ours = is_dataclass(message_transform) and module.startswith("mytune.")
    about = repr(message_transform) if ours else None
    return _build(encode, about, False, tokenizer, source=source, **options)


def _check_messages(messages: Any) -> None:
    """Raise DataError for what a transform may have made by mistake, or of an odd row."""
    if not isinstance(messages, list | tuple):
        raise DataError(f"the transform made {reprlib.repr(messages)}, not a list of messages")
    for message in messages:
        if not isinstance(message, Message) or not isinstance(message.content, str):
            raise DataError(f"the transform made {reprlib.repr(message)}, not a message with text")
    turns = [message for message in messages if message.role != "system"]
    if turns and turns[0].role == "assistant":
        raise DataError(
            "the conversation begins with the assistant: put what it answers before that turn, "
            "or leave it out"
        )


@_spelled_out
def alpaca_dataset(
    tokenizer: ModelTokenizer,
    *,
    source: str | list[str] = "tatsu-lab/alpaca",
    column_map: ColumnMap = None,
    train_on_input: bool = True,
    new_system_prompt: str | None = None,
    mask_history: bool = False,
    **options: Any,
) -> Built:
    """Instructions with optional inputs, in Alpaca's prompt; see `AlpacaToMessages`."""
    transform = AlpacaToMessages(train_on_input, column_map, new_system_prompt, mask_history)
    return sft_dataset(tokenizer, source=source, message_transform=transform, **options)


@_spelled_out
def instruct_dataset(
    tokenizer: ModelTokenizer,
    *,
    source: str | list[str],
    column_map: ColumnMap = None,
    train_on_input: bool = False,
    new_system_prompt: str | None = None,
    mask_history: bool = False,
    **options: Any,
) -> Built:
    """Questions and answers; see `InputOutputToMessages`."""
    transform = InputOutputToMessages(train_on_input, column_map, new_system_prompt, mask_history)
    return sft_dataset(tokenizer, source=source, message_transform=transform, **options)


@_spelled_out
def chat_dataset(
    tokenizer: ModelTokenizer,
    *,
    source: str | list[str],
    conversation_column: str,
    conversation_style: str,
    train_on_input: bool = False,
    new_system_prompt: str | None = None,
    mask_history: bool = False,
    **options: Any,
) -> Built:
    """Conversations of several turns, in the style `sharegpt` or `openai`."""
    if conversation_style not in _CONVERSATIONS:
        raise ConfigError(
            f"conversation_style is {conversation_style!r}; it can be {', '.join(_CONVERSATIONS)}"
            f"{did_you_mean(conversation_style, _CONVERSATIONS)}"
        )
    style = _CONVERSATIONS[conversation_style]
    names = {style.column: conversation_column}
    transform = style(train_on_input, names, new_system_prompt, mask_history)
    return sft_dataset(tokenizer, source=source, message_transform=transform, **options)


@_spelled_out
def text_completion_dataset(
    tokenizer: ModelTokenizer,
    source: str | list[str],
    column: str = "text",
    add_eos: bool = True,
    split_across_pack: bool = True,
    **options: Any,
) -> Built:
    """Plain text, every token of it trained.

    Args:
        add_eos: end every row with the end-of-text token.
        split_across_pack: if packed, cut the stream of all rows into full packs; truncate none.
    """

    def encode(row: Columns) -> tuple[list[int], list[bool]]:
        tokens = tokenizer.encode(text_of(row, column), add_bos=True, add_eos=add_eos)
        return tokens, [True] * len(tokens)

    about = f"text {column!r} {add_eos}"
    return _build(encode, about, split_across_pack, tokenizer, source=source, **options)


# torchtune's names for data sets on the hub.
alpaca_cleaned_dataset = partial(alpaca_dataset, source="yahma/alpaca-cleaned")
grammar_dataset = partial(instruct_dataset, source="liweili/c4_200m")
samsum_dataset = partial(
    instruct_dataset, source="Samsung/samsum", column_map={"input": "dialogue", "output": "summary"}
)
slimorca_dataset = partial(
    chat_dataset,
    source="Open-Orca/SlimOrca-Dedup",
    conversation_column="conversations",
    conversation_style="sharegpt",
)
wikitext_dataset = partial(
    text_completion_dataset,
    source="EleutherAI/wikitext_document_level",
    name="wikitext-103-v1",
    column="page",
)
cnn_dailymail_articles_dataset = partial(
    text_completion_dataset, source="ccdv/cnn_dailymail", name="3.0.0", column="article"
)
