"""Formats of conversations: Alpaca, input and output, ShareGPT, OpenAI; a row becomes messages."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mytune.errors import ConfigError, DataError, did_you_mean
from mytune.tokenizers.messages import Message, Role

ColumnMap = Mapping[str, str] | None
Columns = Mapping[str, Any]

# The text that Alpaca models are trained with: https://github.com/tatsu-lab/stanford_alpaca
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "ipython",
    "observation": "ipython",
}
_OPENAI_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "ipython",
    "function": "ipython",
    "ipython": "ipython",
}
_CALLS = ("tool_calls", "function_call")


@dataclass(frozen=True)
class AlpacaToMessages:
    """Columns `instruction`, `input` (may be missing or empty) and `output`, in Alpaca's prompt.

    Args:
        train_on_input: train the prompt too.
        column_map: other names for these columns, `{"output": "answer"}`.
    """

    train_on_input: bool = True
    column_map: ColumnMap = None

    def __post_init__(self) -> None:
        _check_map(self.column_map, ("instruction", "input", "output"))

    def __call__(self, row: Columns) -> list[Message]:
        """Return the prompt and the answer."""
        column = {"instruction": "instruction", "input": "input", "output": "output"}
        column |= self.column_map or {}
        more = text_of(row, column["input"]) if row.get(column["input"]) else ""
        prompt = _ALPACA_WITH_INPUT if more else _ALPACA
        content = prompt.format(instruction=text_of(row, column["instruction"]), input=more)
        return [
            Message("user", content, masked=not self.train_on_input),
            Message("assistant", text_of(row, column["output"])),
        ]


@dataclass(frozen=True)
class InputOutputToMessages:
    """Columns `input` and `output`: a question and its answer.

    Args:
        train_on_input: train the question too.
        column_map: other names for these columns, `{"input": "question", "output": "answer"}`.
        new_system_prompt: a system message to put before them; never trained.
    """

    train_on_input: bool = False
    column_map: ColumnMap = None
    new_system_prompt: str | None = None

    def __post_init__(self) -> None:
        _check_map(self.column_map, ("input", "output"))

    def __call__(self, row: Columns) -> list[Message]:
        """Return question and answer."""
        column = {"input": "input", "output": "output"} | dict(self.column_map or {})
        return [
            *_system(self.new_system_prompt),
            Message("user", text_of(row, column["input"]), masked=not self.train_on_input),
            Message("assistant", text_of(row, column["output"])),
        ]


@dataclass(frozen=True)
class _ConversationToMessages:
    """A column with a list of turns, each an object with a role and a text.

    A turn that says `"weight": 0` or `"train": false` is not trained.

    Args:
        train_on_input: train what is not the assistant's too.
        column_map: another name for the column.
        new_system_prompt: a system message that replaces the row's own, if any; never trained.
    """

    train_on_input: bool = False
    column_map: ColumnMap = None
    new_system_prompt: str | None = None

    # What a format sets: its column, the keys of a turn, and the roles that a turn may name.
    column = role_key = text_key = ""
    roles = _OPENAI_ROLES

    def __post_init__(self) -> None:
        _check_map(self.column_map, (self.column,))

    def __call__(self, row: Columns) -> list[Message]:
        """Return the turns."""
        column = (self.column_map or {}).get(self.column, self.column)
        turns = _value(row, column)
        if not isinstance(turns, list):
            raise DataError(f"column {column!r} is {reprlib.repr(turns)}, not a list of messages")
        messages = [self._message(turn) for turn in turns]
        if self.new_system_prompt:
            messages = [message for message in messages if message.role != "system"]
        return [*_system(self.new_system_prompt), *messages]

    def _message(self, turn: Any) -> Message:
        if not isinstance(turn, Mapping) or self.role_key not in turn:
            raise DataError(
                f"a message is {reprlib.repr(turn)}, not an object with "
                f"{self.role_key!r} and {self.text_key!r}"
            )
        name = str(turn[self.role_key])
        if name not in self.roles:
            raise DataError(f"role {name!r} is not one of {', '.join(self.roles)}")
        if calls := [key for key in _CALLS if turn.get(key)]:
            raise DataError(
                f"a message has {calls[0]!r}, which no chat format here writes: put the call, as "
                f"the model is to write it, into {self.text_key!r}, and leave {calls[0]!r} out"
            )
        role = self.roles[name]
        content = _joined(turn.get(self.text_key))
        left_out = turn.get("weight") == 0 or turn.get("train") is False
        asked = role != "assistant" and not self.train_on_input
        return Message(role, content, masked=asked or left_out)


class ShareGPTToMessages(_ConversationToMessages):
    """Column `conversations`: turns `{"from": "human", "value": "..."}`, answered by `gpt`."""

    column, role_key, text_key, roles = "conversations", "from", "value", _SHAREGPT_ROLES


class OpenAIToMessages(_ConversationToMessages):
    """Column `messages`: turns `{"role": "user", "content": "..."}`; content may be text parts."""

    column, role_key, text_key, roles = "messages", "role", "content", _OPENAI_ROLES


def _system(prompt: str | None) -> list[Message]:
    return [Message("system", prompt, masked=True)] if prompt else []


def _joined(content: Any) -> str:
    """Return the text of a message, whose parts may be listed as OpenAI's API does."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise DataError(f"the content of a message is {reprlib.repr(part)}, not text")
    return "".join(part["text"] for part in parts)


def text_of(row: Columns, column: str) -> str:
    """Return a text column. Raises DataError for one that is missing, null or no text."""
    value = _value(row, column)
    if not isinstance(value, str):
        raise DataError(f"column {column!r} is {reprlib.repr(value)}, not text")
    return value


def _value(row: Columns, column: str) -> Any:
    if column not in row:
        raise DataError(
            f"no column {column!r}; the row has {', '.join(map(str, row)) or 'none'}: say which to "
            "take with the dataset's column_map, column or conversation_column"
        )
    return row[column]


def _check_map(column_map: ColumnMap, known: tuple[str, ...]) -> None:
    for name in set(column_map or {}) - set(known):
        raise ConfigError(
            f"column_map maps {name!r}{did_you_mean(name, known)}; it can map {', '.join(known)} "
            "to the names of columns"
        )
