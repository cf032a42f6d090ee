"""Prompt templates change what messages say; messages come in an order."""

from __future__ import annotations

from pathlib import Path

import pytest

import mytune.tokenizers as tokenizers
from mytune.errors import ConfigError, DataError
from mytune.tokenizers import Llama3Tokenizer, Message, PromptTemplate, validate_messages

TURNS = [
    Message("system", "S", masked=True),
    Message("user", "U", masked=True),
    Message("assistant", "A", eot=False, ipython=True),
    Message("ipython", "I", masked=True),
]


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        (
            "GrammarErrorCorrectionTemplate",
            ["S", "Correct this to standard English: U\n---\nCorrected: ", "A", "I"],
        ),
        ("SummarizeTemplate", ["S", "Summarize this dialogue:\nU\n---\nSummary:\n", "A", "I"]),
        ("QuestionAnswerTemplate", ["S", "Question: U\n\nAnswer: ", "A", "I"]),
        (
            "ChatMLTemplate",
            [
                "<|im_start|>system\nS<|im_end|>\n",
                "<|im_start|>user\nU<|im_end|>\n",
                "<|im_start|>assistant\nA<|im_end|>",
                "I",
            ],
        ),
    ],
)
def test_templates_wrap_the_content_and_nothing_else(name: str, contents: list[str]) -> None:
    wrapped = getattr(tokenizers, name)()(TURNS)
    assert [message.content for message in wrapped] == contents
    settings = [(m.role, m.masked, m.eot, m.ipython) for m in wrapped]
    assert settings == [(m.role, m.masked, m.eot, m.ipython) for m in TURNS]


@pytest.mark.parametrize(
    "spec",
    [
        {"user": ["Question: ", "\n\nAnswer: "]},
        "mytune.tokenizers.QuestionAnswerTemplate",
        tokenizers.QuestionAnswerTemplate(),
    ],
)
def test_a_template_is_applied_before_tokenizing(
    spec: object, tiny_file: Path, tiny: Llama3Tokenizer
) -> None:
    tokenizer = Llama3Tokenizer(tiny_file, prompt_template=spec)  # type: ignore[arg-type]
    asked = [Message("user", "Question: why?\n\nAnswer:", masked=True), Message("assistant", "A")]
    plain = [Message("user", "why?", masked=True), Message("assistant", "A")]
    assert tokenizer.tokenize_messages(plain) == tiny.tokenize_messages(asked)
    assert plain[0].content == "why?"


def test_a_wrong_template_lists_every_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        PromptTemplate({"usr": ["a", "b"], "user": ["a"], "assistant": "ab", "system": [1, 2]})
    firsts = [line.split(" ")[0] for line in caught.value.details]
    assert firsts == ["'usr'", "user:", "assistant:", "system:"]
    assert "did you mean 'user'" in caught.value.details[0]


@pytest.mark.parametrize(
    "roles", ["system user assistant", "user", "user assistant ipython ipython assistant user"]
)
def test_turns_that_alternate_are_valid(roles: str) -> None:
    validate_messages([Message(role, "") for role in roles.split()])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ("", "without messages"),
        ("assistant user", "message 0 is 'assistant' after 'the start'"),
        ("user user", "message 1 is 'user' after 'user'"),
        ("user assistant assistant", "message 2 is 'assistant' after 'assistant'"),
        ("user system", "message 1 is 'system' after 'user'; it may only come after the start"),
        ("user ipython", "message 1 is 'ipython' after 'user'"),
    ],
)
def test_turns_out_of_order_are_named(roles: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        validate_messages([Message(role, "") for role in roles.split()])  # type: ignore[arg-type]


def test_a_message_of_an_unknown_role_is_refused() -> None:
    with pytest.raises(DataError, match=r"'asistant' is not .*did you mean 'assistant'"):
        Message("asistant", "hi")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="only the assistant calls tools"):
        Message("user", "hi", ipython=True)
