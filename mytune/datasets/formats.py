"""Formats of conversations: Alpaca, input and output, ShareGPT, OpenAI; a row becomes messages."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

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
_TOOLS = ("tools", "functions")  # beside the turns: what may be called
_NO_TOOLS: tuple[Any, ...] = (None, False, "", "[]", "{}", "null", [], {}, [None])


@dataclass(frozen=True)
class _RowToMessages:
    """What all formats share: a text in the row's column `system` is its system message.

    Args:
        train_on_input: train what is not the assistant's too.
        column_map: other names for the columns, `{"output": "answer", "system": "persona"}`.
        new_system_prompt: a system message that replaces the row's own, if any; never trained. An
            empty one leaves the row's out.
        mask_history: train the last of the answers alone.
    """

    train_on_input: bool = False
    column_map: ColumnMap = None
    new_system_prompt: str | None = None
    mask_history: bool = False

    columns: ClassVar[tuple[str, ...]] = ()  # which a format reads, beside `system`

    def __post_init__(self) -> None:
        _check_map(self.column_map, (*self.columns, "system"))
        if self.mask_history and self.train_on_input:
            raise ConfigError(
                "mask_history trains the last answer alone, train_on_input what is before it too; "
                "set one of them to false"
            )

    def __call__(self, row: Columns) -> list[Message]:
        """Return the row's turns."""
        messages = self._messages(row)
        if not self.mask_history:
            return messages
        answers = [at for at, message in enumerate(messages) if message.role == "assistant"]
        return [
            message if at in answers[-1:] else replace(message, masked=True)
            for at, message in enumerate(messages)
        ]

    def _messages(self, row: Columns) -> list[Message]:
        raise NotImplementedError

    def _column(self, name: str) -> str:
        return (self.column_map or {}).get(name, name)

    def _text(self, row: Columns, name: str) -> str:
        return text_of(row, self._column(name))

    def _system(self, row: Columns) -> list[Message]:
        """Return the system message that stands outside of a row's turns, or none."""
        if self.new_system_prompt is not None:
            new = self.new_system_prompt
            return [Message("system", new, masked=True)] if new else []
        names = self.column_map or {}
        if "system" in names:
            text = self._text(row, "system") if _value(row, names["system"]) else ""
        else:  # a column of that name may hold something else
            found = None if "system" in names.values() else row.get("system")
            text = found if isinstance(found, str) else ""
        return [Message("system", text, not self.train_on_input)] if text.strip() else []

    def _exchanges(self, pairs: list[tuple[str, str]]) -> list[Message]:
        masked = not self.train_on_input
        return [
            message
            for question, answer in pairs
            for message in (Message("user", question, masked), Message("assistant", answer))
        ]


@dataclass(frozen=True)
class AlpacaToMessages(_RowToMessages):
    """Columns `instruction`, `input` (may be missing or empty) and `output`, in Alpaca's prompt.

    A list in a column `history` is pairs of an instruction and its answer before this one, trained
    in the same way.
    """

    train_on_input: bool = True

    columns = ("instruction", "input", "output")

    def _messages(self, row: Columns) -> list[Message]:
        more = self._text(row, "input") if row.get(self._column("input")) else ""
        prompt = _ALPACA_WITH_INPUT if more else _ALPACA
        question = prompt.format(instruction=self._text(row, "instruction"), input=more)
        earlier = [(_ALPACA.format(instruction=asked), said) for asked, said in _history(row)]
        pairs = [*earlier, (question, self._text(row, "output"))]
        return [*self._system(row), *self._exchanges(pairs)]


@dataclass(frozen=True)
class InputOutputToMessages(_RowToMessages):
    """Columns `input` and `output`: a question and its answer; `history` as in Alpaca's rows.

    Both may be lists of OpenAI's messages, as in TRL's rows: of those only what the assistant says
    in the second is trained.
    """

    columns = ("input", "output")

    def _messages(self, row: Columns) -> list[Message]:
        prompt, completion = (row.get(self._column(name)) for name in self.columns)
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._conversation(row, prompt, completion)
        pairs = [*_history(row), (self._text(row, "input"), self._text(row, "output"))]
        return [*self._system(row), *self._exchanges(pairs)]

    def _conversation(
        self, row: Columns, prompt: list[Any], completion: list[Any]
    ) -> list[Message]:
        names = {"system": self._column("system")} if "system" in (self.column_map or {}) else {}
        chat = OpenAIToMessages(self.train_on_input, names, self.new_system_prompt)
        if not self.train_on_input:
            prompt = [{**t, "train": False} if isinstance(t, Mapping) else t for t in prompt]
        return chat({**row, chat.column: prompt + completion})


class _ConversationToMessages(_RowToMessages):
    """A column with a list of turns, each an object with a role and a text.

    A turn that says `"weight": 0` or `"train": false` is not trained.
    """

    # What a format sets: its column, the keys of a turn, and the roles that a turn may name.
    column = role_key = text_key = ""
    roles = _OPENAI_ROLES

    def _messages(self, row: Columns) -> list[Message]:
        column = self._column(self.column)
        turns = _value(row, column)
        if not isinstance(turns, list):
            raise DataError(f"column {column!r} is {reprlib.repr(turns)}, not a list of messages")
        tools = [key for key in _TOOLS if row.get(key) not in _NO_TOOLS]
        if tools and self.new_system_prompt is None:
            raise DataError(
                f"the row has {tools[0]!r}, which no chat format here writes: put what the model "
                "is to read of it into the system message, or into new_system_prompt"
            )
        messages = [self._message(turn) for turn in turns]
        if self.new_system_prompt is not None:
            messages = [message for message in messages if message.role != "system"]
        system = self._system(row)
        own = [m.content.strip() for m in messages if m.role == "system" and m.content.strip()]
        if system and own and own[0] != system[0].content.strip():
            raise DataError(
                f"column {self._column('system')!r} says something else than the conversation's "
                "system message: leave one of them out, or set new_system_prompt"
            )
        if system and not own:
            return [*system, *(message for message in messages if message.role != "system")]
        return messages

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
    columns = (column,)


class OpenAIToMessages(_ConversationToMessages):
    """Column `messages`: turns `{"role": "user", "content": "..."}`; content may be text parts."""

    column, role_key, text_key, roles = "messages", "role", "content", _OPENAI_ROLES
    columns = (column,)


def _history(row: Columns) -> list[tuple[str, str]]:
    """Return the questions and answers before a row's own, which LLaMA-Factory's rows have."""
    pairs = row.get("history")
    if not isinstance(pairs, list) or not pairs or not isinstance(pairs[0], list):
        return []  # a column with something else in it
    for pair in pairs:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise DataError(
                f"column 'history' has {reprlib.repr(pair)}, not a question and its answer"
            )
    return [(question, answer) for question, answer in pairs]


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
