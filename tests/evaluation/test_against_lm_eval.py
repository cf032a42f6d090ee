"""Same weights, same tasks: what our adapter answers, and what lm_eval's own HFLM does."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from mytune.evaluation import ChatTemplate
from tests.evaluation.conftest import TASKS, responses, run_lm_eval


def compare(pair, names, folder, *, ours=None, theirs=None, **settings):
    """Assert equal answers and scores; return the results."""
    left = run_lm_eval(pair.ours(**(ours or {})), names, folder, **settings)
    theirs = {"batch_size": 4, **(theirs or {})}
    right = run_lm_eval(pair.hflm(**theirs), names, folder, **settings)
    assert_same(responses(left), responses(right))
    for task, metrics in right["results"].items():
        ours_too = left["results"][task]
        assert ours_too.keys() == metrics.keys()
        for name, value in metrics.items():
            # A perplexity is e to the log-likelihood, and mc2 is made of such.
            expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
            assert ours_too[name] == expected, (task, name)
    return left


def assert_same(left, right):
    """Compare answers: texts exactly, log-likelihoods to 1e-4, or two of float32's steps.

    HFLM adds up in float32, whose steps are 6e-5 beyond -512, and 1.2e-4 beyond -1024.
    """
    assert left.keys() == right.keys()
    for a, b in zip(flat(left), flat(right), strict=True):
        if isinstance(a, tuple):
            (a, greedy), (b, theirs) = a, b
            assert greedy == theirs
        assert a == (b if isinstance(b, str) else pytest.approx(b, rel=2.0**-22, abs=1e-4))


def flat(answers):
    return [each for docs in answers.values() for doc in docs for r in doc for each in r]


SETTINGS = {
    "plain": {},
    "fewshot": {"num_fewshot": 2},
    "chat": {"apply_chat_template": True},
    "chat, examples as turns": {
        "apply_chat_template": True,
        "num_fewshot": 2,
        "fewshot_as_multiturn": True,
        "system_instruction": "Be the user.",
    },
    "limit": {"limit": 3},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_choices_score_alike(random_pair, tasks_folder, settings):
    compare(random_pair, ["choice"], tasks_folder, **settings)


def test_all_kinds_of_tasks_score_alike(pair, tasks_folder):
    results = compare(pair, list(TASKS), tasks_folder)
    assert results["results"].keys() == TASKS.keys()


@pytest.mark.parametrize("name", ["writing"])
def test_generation_answers_a_chat_alike(random_pair, tasks_folder, name):
    compare(random_pair, [name], tasks_folder, apply_chat_template=True)


# As Llama 3.1's: a system message that is always there, and what transformers alone knows.
OWN_TEMPLATE = """{{- bos_token }}
{%- set year = strftime_now("%Y") if strftime_now is defined else "2024" %}
{%- if not tools is defined or tools is not none %}{{ raise_exception("no tools") }}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nIn " + year + ", as " }}
{{- {"is": "üsual"} | tojson }} {{ system + eos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if loop.index > 99 %}{% break %}{% endif %}
    {% generation %}
    {{- message['content'] | trim }}<|eot_id|>
    {%- endgeneration -%}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
TURNS = [
    {"role": "system", "content": " Be the user. "},
    {"role": "user", "content": "What\n"},
    {"role": "assistant", "content": " The end of "},
]


@pytest.mark.parametrize("trimmed", [True, False])
@pytest.mark.parametrize("named", ["folder", "tokenizer_config.json", "chat_template.jinja"])
def test_a_checkpoints_own_template_is_as_in_transformers(random_pair, tmp_path, named, trimmed):
    theirs = copy.deepcopy(random_pair.their_tokenizer)
    theirs.chat_template = OWN_TEMPLATE if trimmed else OWN_TEMPLATE.replace(" | trim }}<", " }}<")
    in_json = named == "tokenizer_config.json"
    theirs.save_pretrained(tmp_path, save_jinja_files=not in_json)
    assert (tmp_path / "chat_template.jinja").exists() is not in_json
    ours = ChatTemplate(tmp_path if named == "folder" else tmp_path / named)
    for turns in (TURNS, TURNS[1:]):
        for said, answers in ((turns[:-1], True), (turns, False)):
            expected = theirs.apply_chat_template(
                said,
                tokenize=False,
                add_generation_prompt=answers,
                continue_final_message=not answers,
            )
            assert ours(said, answers) == expected


def test_chats_in_a_checkpoints_own_template_score_alike(random_pair, tasks_folder, tmp_path):
    theirs = copy.deepcopy(random_pair.their_tokenizer)
    theirs.chat_template = OWN_TEMPLATE
    theirs.save_pretrained(tmp_path)
    own = dataclasses.replace(random_pair, their_tokenizer=theirs)
    template = {"chat_template": ChatTemplate(tmp_path)}
    names = ["choice", "writing"]
    chat = compare(own, names, tasks_folder, ours=template, apply_chat_template=True)
    plain = run_lm_eval(own.ours(), names, tasks_folder, apply_chat_template=True)
    assert responses(chat) != responses(plain)


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_a_batch_size_changes_nothing(random_pair, tasks_folder, batch_size):
    compare(random_pair, list(TASKS), tasks_folder, ours={"batch_size": batch_size})


def test_what_is_too_long_loses_its_beginning_and_is_counted(random_pair, tasks_folder, caplog):
    short = ({"max_seq_length": 40}, {"max_length": 40})
    compare(random_pair, list(TASKS), tasks_folder, ours=short[0], theirs=short[1])
    told = [r.getMessage() for r in caplog.records if r.name == "mytune"]
    # Choices and answers are one kind of request, texts to go on with another.
    assert [line.partition(":")[0] for line in told] == [
        "14 of 35 requests are longer than max_seq_length=40 allows",
        "7 of 7 requests are longer than max_seq_length=40 allows",
    ]


@pytest.mark.data
def test_truthfulqa_scores_alike(pair, truthfulqa):
    compare(pair, ["local_truthfulqa_mc1"], truthfulqa, limit=6)
    # Of 817 questions, which take two minutes; `bench_evaluate` asks stories260K all of them.
    compare(pair, ["local_truthfulqa_mc2"], truthfulqa, theirs={"batch_size": 16}, limit=100)
