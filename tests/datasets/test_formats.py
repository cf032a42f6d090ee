"""Each format makes the messages that its users know, and says what is wrong with a row."""

from __future__ import annotations

import pytest

from mytune.datasets import (
    AlpacaToMessages,
    InputOutputToMessages,
    Message,
    OpenAIToMessages,
    ShareGPTToMessages,
    alpaca_dataset,
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


PAIR = {"input": "U", "output": "A"}
FORMATS = [  # a transform, and a row of its format without a system message
    (AlpacaToMessages, {"instruction": "U", "output": "A"}),
    (InputOutputToMessages, PAIR),
    (ShareGPTToMessages, {"conversations": SHAREGPT[1:]}),
    (OpenAIToMessages, {"messages": OPENAI[1:]}),
    (InputOutputToMessages, {"input": OPENAI[1:2], "output": OPENAI[2:]}),
]
each_format = pytest.mark.parametrize(("transform", "row"), FORMATS)


@each_format
@pytest.mark.parametrize("trained", [True, False])
def test_a_system_column_is_the_rows_system_message(transform, row, trained):
    turns = transform(trained)(row)
    system = Message("system", "S", masked=not trained)
    assert transform(trained)({**row, "system": "S"}) == [system, *turns]
    renamed = transform(trained, {"system": "persona"})
    assert renamed({**row, "persona": "S", "system": "other"}) == [system, *turns]
    assert renamed({**row, "persona": None}) == turns
    new = transform(trained, None, "New.")({**row, "system": "S"})
    assert new == [Message("system", "New.", masked=True), *turns]


@each_format
@pytest.mark.parametrize("system", ["", None, "  ", 3, {"os": "linux"}])
def test_a_system_column_without_text_is_none(transform, row, system):
    assert transform()({**row, "system": system}) == transform()(row)


@each_format
def test_an_empty_new_system_prompt_leaves_system_messages_out(transform, row):
    found = transform(new_system_prompt="")({**row, "system": "S"})
    assert found == [each for each in transform()(row) if each.role != "system"]


@each_format
def test_a_system_column_that_is_named_is_there_and_text(transform, row):
    with pytest.raises(DataError, match="no column 'persona'"):
        transform(column_map={"system": "persona"})(row)
    with pytest.raises(DataError, match="'persona' is 3, not text"):
        transform(column_map={"system": "persona"})({**row, "persona": 3})


def test_a_column_named_system_can_be_something_else():
    transform = InputOutputToMessages(column_map={"input": "system"})
    assert [m.role for m in transform({"system": "U", "output": "A"})] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("transform", "row"),
    [
        (ShareGPTToMessages, {"conversations": SHAREGPT}),
        (OpenAIToMessages, {"messages": OPENAI}),
        (InputOutputToMessages, {"input": OPENAI[:2], "output": OPENAI[2:]}),
    ],
)
def test_a_system_column_and_a_system_turn_are_the_same_text(transform, row):
    assert transform()({**row, "system": "S"}) == transform()(row)
    with pytest.raises(DataError, match=r"'system' says something else.*or set new_system_prompt"):
        transform()({**row, "system": "T"})
    new = transform(new_system_prompt="New.")({**row, "system": "T"})
    assert [message.content for message in new] == ["New.", "U", "A"]


def test_every_dataset_reads_system_columns(tokenizer, write_rows):
    datasets = [
        alpaca_dataset(tokenizer, source=write_rows([{**QUESTION, "system": "SYS"}])),
        instruct_dataset(tokenizer, source=write_rows([{**PAIR, "system": "SYS"}])),
        chat_dataset(
            tokenizer,
            source=write_rows([{"conversations": SHAREGPT[1:], "system": "SYS"}]),
            conversation_column="conversations",
            conversation_style="sharegpt",
        ),
    ]
    for ds in datasets:
        assert ds[0]["tokens"].tolist()[:6] == [1, 10, *map(ord, "SYS"), 3]
    prompted = alpaca_dataset(tokenizer, source=write_rows([QUESTION]), new_system_prompt="NEW")
    assert prompted[0]["tokens"].tolist()[:6] == [1, 10, *map(ord, "NEW"), 3]
    assert prompted[0]["labels"].tolist()[:6] == [-100] * 6


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize(("transform", "row"), FORMATS[2:])
def test_tools_beside_the_turns_are_an_error_unless_there_are_none(transform, row, key):
    for none in (None, [], "", "[]"):
        assert transform()({**row, key: none}) == transform()(row)
    with pytest.raises(DataError, match=f"the row has '{key}'.*into the system message"):
        transform()({**row, key: [{"type": "function"}]})


@pytest.mark.parametrize("trained", [True, False])
def test_a_history_is_earlier_turns_whose_answers_are_trained(trained):
    history = [["Q1", "A1"], ["Q2", "A2"]]
    messages = InputOutputToMessages(trained)({**PAIR, "history": history, "system": "S"})
    assert [(m.role, m.content, m.masked) for m in messages] == [
        ("system", "S", not trained),
        ("user", "Q1", not trained),
        ("assistant", "A1", False),
        ("user", "Q2", not trained),
        ("assistant", "A2", False),
        ("user", "U", not trained),
        ("assistant", "A", False),
    ]
    alpaca = AlpacaToMessages(trained)
    asked = alpaca({**QUESTION, "history": history})
    first = alpaca({"instruction": "Q1", "output": "A1"})
    second = alpaca({"instruction": "Q2", "output": "A2"})
    assert asked == [*first, *second, *alpaca(QUESTION)]


@pytest.mark.parametrize(("transform", "row"), FORMATS[:2])
def test_what_is_no_history_is_no_turn(transform, row):
    for other in (None, [], "He was ill in May.", ["a", "b"], [{"role": "user", "content": "U"}]):
        assert transform()({**row, "history": other}) == transform()(row)
    for pair in ("Q", ["Q"], ["Q", None]):
        with pytest.raises(DataError, match=r"'history' has .*, not a question and its answer"):
            transform()({**row, "history": [["Q", "A"], pair]})


def test_a_prompt_and_a_completion_of_messages_train_the_completion():
    prompt = [*OPENAI, {"role": "user", "content": "U2"}]
    completion = [
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "A2"},
    ]
    row = {"prompt": prompt, "completion": completion}
    names = {"input": "prompt", "output": "completion"}
    messages = InputOutputToMessages(column_map=names)(row)
    assert [(m.content, m.masked) for m in messages] == [
        *((text, True) for text in ("S", "U", "A", "U2")),
        *(("call", False), ("4", True), ("A2", False)),
    ]
    assert not any(m.masked for m in InputOutputToMessages(True, names)(row))
    with pytest.raises(DataError, match="a message is 'hi', not an object"):
        InputOutputToMessages(column_map=names)({**row, "prompt": ["hi"]})
    with pytest.raises(DataError, match=r"'completion' is \[.*not text"):
        InputOutputToMessages(column_map=names)({**row, "prompt": "U"})


@pytest.mark.parametrize(
    ("transform", "row"),
    [
        (ShareGPTToMessages, {"conversations": SHAREGPT + SHAREGPT[1:]}),
        (OpenAIToMessages, {"messages": OPENAI + OPENAI[1:]}),
        (InputOutputToMessages, {**PAIR, "system": "S", "history": [["U", "A"]]}),
    ],
)
def test_mask_history_trains_the_last_answer_alone(transform, row):
    messages = transform(mask_history=True)(row)
    assert [message.masked for message in messages] == [True] * 4 + [False]
    assert [message.masked for message in transform()(row)] == [True, True, False, True, False]
    with pytest.raises(ConfigError, match="mask_history trains the last answer alone"):
        transform(train_on_input=True, mask_history=True)


def test_mask_history_does_not_train_what_a_row_leaves_out():
    turns = [*OPENAI, OPENAI[1], {**OPENAI[2], "weight": 0}]
    assert all(m.masked for m in OpenAIToMessages(mask_history=True)({"messages": turns}))


def test_every_dataset_of_conversations_can_mask_history(tokenizer, write_rows):
    history = {"history": [["Q", "first"]]}
    chat = {"conversation_column": "messages", "conversation_style": "openai"}
    turns = [OPENAI[1], {**OPENAI[2], "content": "first"}, *OPENAI[1:]]
    for build, row, options in (
        (alpaca_dataset, {**QUESTION, "output": "A", **history}, {"train_on_input": False}),
        (instruct_dataset, {**PAIR, **history}, {}),
        (chat_dataset, {"messages": turns}, chat),
    ):
        ds = build(tokenizer, source=write_rows([row]), mask_history=True, **options)
        learned = [label for label in ds[0]["labels"].tolist() if label >= 0]
        assert learned == [ord("A"), tokenizer.eot_id], build


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
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*begins with the assistant.*leave it"):
        chat_dataset(tokenizer, conversation_style="sharegpt", **chat)
