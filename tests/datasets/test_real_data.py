"""Published data sets, read with Llama 3's tokenizer."""

from __future__ import annotations

import json

import pytest

from mytune.datasets import alpaca_dataset, chat_dataset, text_completion_dataset
from mytune.tokenizers import llama3_tokenizer

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def llama3(data_dir):
    return llama3_tokenizer(str(data_dir / "llama3-tokenizer/tokenizer.model"))


def trained_text(tokenizer, sample):
    """What a sample trains, end tokens left out."""
    return tokenizer.decode([label for label in sample["labels"].tolist() if label >= 0])


def test_instructions_train_their_outputs(data_dir, llama3):
    file = data_dir / "instruct/instruction-data.json"
    ds = alpaca_dataset(llama3, source=str(file), train_on_input=False)
    expected = [row["output"].strip() for row in json.loads(file.read_text())]
    assert [trained_text(llama3, sample) for sample in ds] == expected
    assert len(expected) == 1100


@pytest.mark.parametrize(
    ("name", "column", "style", "role", "answer", "content"),
    [
        ("sharegpt_200.json", "conversations", "sharegpt", "from", "gpt", "value"),
        ("squad_train_300.jsonl", "messages", "openai", "role", "assistant", "content"),
    ],
)
def test_chats_train_the_assistants_turns(
    data_dir, llama3, name, column, style, role, answer, content
):
    file = data_dir / "messages" / name
    ds = chat_dataset(
        llama3, source=str(file), conversation_column=column, conversation_style=style
    )
    lines = file.read_text()
    rows = json.loads(lines) if name.endswith("json") else map(json.loads, lines.splitlines())
    expected = [
        "".join(turn[content].strip() for turn in row[column] if turn[role] == answer)
        for row in rows
    ]
    assert [trained_text(llama3, sample) for sample in ds] == expected


def test_a_text_is_packed_without_losing_a_character(data_dir, llama3):
    file = data_dir / "text/input.txt"
    packed = text_completion_dataset(
        llama3, str(file), packed=True, max_seq_len=512, sample_by="document"
    )
    ids = [token for pack in packed for token in pack["tokens"].tolist()]
    assert llama3.decode(ids) == file.read_text()
    assert packed.lengths[:-1].tolist() == [512] * (len(packed) - 1)
    assert packed.stats.trainable_tokens == len(ids) - 1
