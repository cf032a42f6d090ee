"""Messages: one turn of a conversation, and the order in which turns may follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mytune.errors import DataError, did_you_mean

Role = Literal["system", "user", "assistant", "ipython"]
ROLES: tuple[str, ...] = get_args(Role)

# Which role may come right before; None is the start of the conversation.
_MAY_FOLLOW: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "ipython"),
    "ipython": ("assistant", "ipython"),
}


@dataclass(frozen=True)
class Message:
    """One turn.

    Args:
        role: who speaks; `ipython` is the output of a tool.
        content: the text, without any special token.
        masked: the turn is read but not trained.
        eot: False where the assistant waits for a tool: the turn ends in `<|eom_id|>`.
        ipython: the assistant calls a tool: the turn begins with `<|python_tag|>`.
    """

    role: Role
    content: str
    masked: bool = False
    eot: bool = True
    ipython: bool = False

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(
                f"message role {self.role!r} is not one of {', '.join(ROLES)}"
                + did_you_mean(str(self.role), ROLES)
            )
        if self.ipython and self.role != "assistant":
            raise DataError(
                f"only the assistant calls tools: ipython=True on a {self.role} message"
            )


def validate_messages(messages: Sequence[Message]) -> None:
    """Raise DataError unless the turns alternate as Llama's chat format expects.

    The system message, if any, is first; then user and assistant take turns; the output of tools
    stands between two messages of the assistant.
    """
    if not messages:
        raise DataError("a conversation without messages")
    before: str | None = None
    for position, message in enumerate(messages):
        if before not in _MAY_FOLLOW[message.role]:
            allowed = " or ".join(role or "the start" for role in _MAY_FOLLOW[message.role])
            raise DataError(
                f"message {position} is {message.role!r} after {before or 'the start'!r}; "
                f"it may only come after {allowed}"
            )
        before = message.role
