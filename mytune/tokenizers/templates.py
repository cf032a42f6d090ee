"""Prompt templates: text put around the content of messages before they are tokenized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mytune.errors import ConfigError, did_you_mean
from mytune.tokenizers.messages import ROLES, Message

ApplyTemplate = Callable[[Sequence[Message]], list[Message]]
TemplateSpec = str | Mapping[str, Sequence[str]] | ApplyTemplate | None


class PromptTemplate:
    """Put a prefix and a suffix around every message of a role.

    Args:
        template: role -> [prefix, suffix]; other roles stay as they are.
    """

    def __init__(self, template: Mapping[str, Sequence[str]]) -> None:
        problems = [line for role, pair in template.items() for line in _problems(role, pair)]
        if problems:
            raise ConfigError("wrong prompt_template, change tokenizer.prompt_template:", problems)
        self.template = {role: (pair[0], pair[1]) for role, pair in template.items()}

    def __call__(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with their prefixes and suffixes."""
        return [self._apply(message) for message in messages]

    def _apply(self, message: Message) -> Message:
        prefix, suffix = self.template.get(message.role, ("", ""))
        return replace(message, content=prefix + message.content + suffix)


# torchtune's templates.
GrammarErrorCorrectionTemplate = partial(
    PromptTemplate, {"user": ("Correct this to standard English: ", "\n---\nCorrected: ")}
)
SummarizeTemplate = partial(
    PromptTemplate, {"user": ("Summarize this dialogue:\n", "\n---\nSummary:\n")}
)
QuestionAnswerTemplate = partial(PromptTemplate, {"user": ("Question: ", "\n\nAnswer: ")})
ChatMLTemplate = partial(
    PromptTemplate,
    {
        "system": ("<|im_start|>system\n", "<|im_end|>\n"),
        "user": ("<|im_start|>user\n", "<|im_end|>\n"),
        "assistant": ("<|im_start|>assistant\n", "<|im_end|>"),
    },
)


def resolve_template(spec: TemplateSpec) -> ApplyTemplate | None:
    """Return the template that a config gives: a class's dotted path, a mapping, or itself."""
    if isinstance(spec, str):
        from mytune.config import instantiate  # knows what a config may name

        template: ApplyTemplate = instantiate({"_component_": spec})
        return template
    return PromptTemplate(spec) if isinstance(spec, Mapping) else spec


def _problems(role: str, pair: Any) -> list[str]:
    if role not in ROLES:
        hint = did_you_mean(str(role), ROLES)
        return [f"{role!r} is not a role ({', '.join(ROLES)}){hint}"]
    if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
        return [f"{role}: {pair!r} is not [prefix, suffix]"]
    return []
