"""Conversations: Llama 3's format, id for id, and which of the ids are trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mytune.tokenizers import Llama3Tokenizer, Message

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def conversations(data_dir: Path) -> list[list[Message]]:
    lines = (data_dir / "messages" / "squad_train_300.jsonl").read_text().splitlines()
    roles = {"human": "user", "gpt": "assistant"}
    shared = json.loads((data_dir / "messages" / "sharegpt_200.json").read_text())
    return [
        *([Message(m["role"], m["content"]) for m in json.loads(x)["messages"]] for x in lines),
        *([Message(roles[t["from"]], t["value"]) for t in x["conversations"]] for x in shared),
        [Message("user", "  \n spaces around \x1c \t"), Message("assistant", "")],
    ]


@pytest.mark.data
@pytest.mark.parametrize("prompt", [False, True])
def test_chat_ids_equal_transformers_chat_template(
    data_dir: Path, llama3: Llama3Tokenizer, llama3_json_file: Path, prompt: bool
) -> None:
    from transformers import PreTrainedTokenizerFast

    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(llama3_json_file), bos_token="<|begin_of_text|>", chat_template=TEMPLATE
    )
    for messages in conversations(data_dir):
        dicts = [{"role": m.role, "content": m.content} for m in messages]
        expected = oracle.apply_chat_template(
            dicts, add_generation_prompt=prompt, return_dict=False
        )
        ids, mask = llama3.tokenize_messages(messages, add_generation_prompt=prompt)
        assert ids == expected
        assert len(mask) == len(ids) and ids.count(llama3.bos_id) == 1


@pytest.mark.data
def test_dialog_ids_of_metas_own_test(llama3: Llama3Tokenizer) -> None:
    messages = [
        Message("system", "This is a test sentence."),
        Message("user", "This is a response."),
    ]
    text = [2028, 374, 264]
    system = [128006, 9125, 128007, 271, *text, 1296, 11914, 13, 128009]
    user = [128006, 882, 128007, 271, *text, 2077, 13, 128009]
    ids, _ = llama3.tokenize_messages(messages, add_generation_prompt=True)
    assert ids == [128000, *system, *user, 128006, 78191, 128007, 271]


def test_only_the_assistants_content_and_end_are_trained(tiny: Llama3Tokenizer) -> None:
    messages = [
        Message("system", "the system", masked=True),
        Message("user", "<|eot_id|> the user", masked=True),
        Message("assistant", " the answer "),
        Message("user", "again", masked=True),
        Message("assistant", "not this", masked=True),
        Message("user", "last", masked=True),
        Message("assistant", "end"),
    ]
    ids, mask = tiny.tokenize_messages(messages)
    trained = [i for i, masked in zip(ids, mask, strict=True) if not masked]
    answers = [tiny.encode(text, False, False) for text in ("the answer", "end")]
    assert trained == [*answers[0], tiny.eot_id, *answers[1], tiny.eot_id]
    assert ids[-1] == tiny.eot_id and tiny.eos_id not in ids and ids.count(tiny.bos_id) == 1


def test_a_tool_call_is_trained_from_its_tag_to_its_end_of_message(tiny: Llama3Tokenizer) -> None:
    call = Message("assistant", "is(1)", eot=False, ipython=True)
    ids, mask = tiny.tokenize_messages([Message("user", "u", masked=True), call])
    body = [tiny.python_tag_id, *tiny.encode("is(1)", False, False), tiny.eom_id]
    assert ids[-len(body) :] == body
    assert mask == [True] * (len(ids) - len(body)) + [False] * len(body)


def test_the_generation_prompt_is_masked(tiny: Llama3Tokenizer) -> None:
    messages = [Message("user", "u")]
    ids, _ = tiny.tokenize_messages(messages)
    prompt_ids, prompt_mask = tiny.tokenize_messages(messages, add_generation_prompt=True)
    assert prompt_ids[: len(ids)] == ids
    header = tiny.decode(prompt_ids[len(ids) :], skip_special_tokens=False)
    assert header == "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert prompt_mask[len(ids) :] == [True] * (len(prompt_ids) - len(ids))


def test_tokenizing_a_conversation_never_truncates(tiny_file: Path, tiny: Llama3Tokenizer) -> None:
    messages = [Message("user", "the " * 50), Message("assistant", "is")]
    short = Llama3Tokenizer(tiny_file, max_seq_len=8)
    assert short.tokenize_messages(messages) == tiny.tokenize_messages(messages)
