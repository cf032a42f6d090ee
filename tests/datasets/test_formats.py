"""Each format makes the messages that its users know, and says what is wrong with a row."""

from __future__ import annotations

import pytest

from mytune.datasets import (
    AlpacaToMessages,
    InputOutputToMessages,
    Message,
    OpenAIToMessages,
    ShareGPTToMessages,
    chat_dataset,
    instruct_dataset,
)
from mytune.errors import ConfigError, DataError

QUESTION = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
TURNS = [("system", "S"), ("user", "U"), ("assistant", "A")]
SHAREGPT_NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": SHAREGPT_NAMES[role], "value": text} for role, text in TURNS]
OPENAI = [{"role": role, "content": text} for role, text in TURNS]


def test_alpaca_puts_instruction_and_input_into_stanfords_prompt():
    user, assistant = AlpacaToMessages()(QUESTION)
    assert user.content == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n"
    )
    assert assistant == Message("assistant", "2")
    assert not user.masked  # as torchtune: the prompt is trained unless train_on_input is off


@pytest.mark.parametrize("empty", [{"input": ""}, {"input": None}, {}])
def test_alpaca_without_input_has_the_shorter_prompt(empty):
    row = {"task": "Sing {this}.", "output": "La", **empty}
    user, _ = AlpacaToMessages(False, {"instruction": "task"})(row)
    assert user == Message(
        "user",
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing {this}.\n\n### Response:\n",
        masked=True,
    )


@pytest.mark.parametrize("trained", [True, False])
def test_input_and_output_become_a_turn_each(trained):
    transform = InputOutputToMessages(trained, {"input": "q", "output": "a"}, "Be brief.")
    assert transform({"q": "Q", "a": "A", "input": "other"}) == [
        Message("system", "Be brief.", masked=True),
        Message("user", "Q", masked=not trained),
        Message("assistant", "A"),
    ]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("transform", "column", "turns"),
    [(ShareGPTToMessages, "conversations", SHAREGPT), (OpenAIToMessages, "messages", OPENAI)],
)
def test_conversations_keep_their_turns(transform, column, turns, trained):
    assert transform(trained)({column: turns}) == [
        Message("system", "S", masked=not trained),
        Message("user", "U", masked=not trained),
        Message("assistant", "A"),
    ]
    new = transform(trained, {column: "c"}, "New.")({"c": turns})
    assert [message.content for message in new] == ["New.", "U", "A"]
    assert new[0].masked


def test_openai_content_may_be_text_parts_and_tools_may_answer():
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "done"},
    ]
    messages = OpenAIToMessages()({"messages": turns})
    assert [(m.role, m.content, m.masked) for m in messages] == [
        ("user", "ab", True),
        ("assistant", "call", False),
        ("ipython", "result", True),
        ("assistant", "done", False),
    ]


@pytest.mark.parametrize("said", [{"weight": 0}, {"train": False}])
@pytest.mark.parametrize("trained", [True, False])
def test_a_turn_that_is_not_to_be_trained_is_not(said, trained):
    turns = [*OPENAI[1:], OPENAI[1], {**OPENAI[2], **said}, {**OPENAI[2], "weight": 1}]
    masked = [message.masked for message in OpenAIToMessages(trained)({"messages": turns})]
    assert masked == [not trained, False, not trained, True, False]


def test_sharegpts_roles_of_tools_are_known():
    turns = [("human", "U"), ("function_call", "{}"), ("observation", "4"), ("gpt", "A")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    assert [(m.role, m.content, m.masked) for m in ShareGPTToMessages()(row)] == [
        ("user", "U", True),
        ("assistant", "{}", False),
        ("ipython", "4", True),
        ("assistant", "A", False),
    ]


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}


def test_tool_calls_that_are_null_are_none():
    message = OpenAIToMessages()(openai(**{**CALL, "content": "x", "tool_calls": None}))[0]
    assert message == Message("assistant", "x")


def openai(**turn):
    return {"messages": [turn]}


@pytest.mark.parametrize(
    ("transform", "row", "words"),
    [
        (AlpacaToMessages(), {"instruction": "x", "response": "y"}, ["'output'", "response"]),
        (AlpacaToMessages(), {**QUESTION, "output": None}, ["'output' is None, not text"]),
        (InputOutputToMessages(), {"input": 3, "output": "y"}, ["'input' is 3, not text"]),
        (OpenAIToMessages(), {"messages": "hello"}, ["'messages' is 'hello', not a list"]),
        (OpenAIToMessages(), openai(content="x"), ["'role' and 'content'"]),
        (OpenAIToMessages(), openai(role="usr", content="x"), ["'usr' is not one of", "user"]),
        (OpenAIToMessages(), openai(role="user", content=None), ["None", "not text"]),
        (OpenAIToMessages(), openai(role="user", content=[{"type": "image"}]), ["image"]),
        (OpenAIToMessages(), openai(**CALL), ["'tool_calls'", "into 'content'"]),
        (ShareGPTToMessages(), {"conversations": ["hi"]}, ["'hi'", "'from' and 'value'"]),
    ],
)
def test_a_bad_row_is_told_what_it_lacks(transform, row, words):
    with pytest.raises(DataError) as error:
        transform(row)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_column_map_knows_its_columns():
    with pytest.raises(ConfigError, match=r"'outptu'; did you mean 'output'\?"):
        InputOutputToMessages(column_map={"outptu": "answer"})


def test_labels_are_the_next_tokens_of_what_is_trained(tokenizer, write_rows):
    file = write_rows([{"input": "hi", "output": "yo"}])
    sample = instruct_dataset(tokenizer, source=file)[0]
    h, i, y, o = map(ord, "hiyo")
    assert sample["tokens"].tolist() == [1, 11, h, i, 3, 12, y, o, 3]
    assert sample["labels"].tolist() == [-100, -100, -100, -100, -100, y, o, 3, -100]
    sample = instruct_dataset(tokenizer, source=file, train_on_input=True)[0]
    assert sample["labels"].tolist() == [-100, h, i, 3, -100, y, o, 3, -100]


def test_chat_style_and_order_of_turns_are_checked(tokenizer, write_rows):
    file = write_rows([{"conversations": SHAREGPT}, {"conversations": SHAREGPT[2:]}])
    chat = {"source": file, "conversation_column": "conversations"}
    with pytest.raises(ConfigError, match="'shargpt'; it can be sharegpt, openai"):
        chat_dataset(tokenizer, conversation_style="shargpt", **chat)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: message 0 is 'assistant'"):
        chat_dataset(tokenizer, conversation_style="sharegpt", **chat)
