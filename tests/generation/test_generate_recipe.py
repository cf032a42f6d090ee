"""`tune run generate` with base, merged and adapted models: text on stdout, figures on stderr."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch

import mytune.generation
from mytune.cli.main import main
from mytune.generation import complete, generate
from mytune.models import qlora_auto_model
from mytune.models.llama3 import llama3_tokenizer
from mytune.tokenizers import Message
from mytune.training import FullModelHFCheckpointer, load_adapters, load_weights
from tests.generation.conftest import VARIED
from tests.hf import tiny_llama

FIGURES = [
    r"Time for inference: \d+\.\d\d sec total, \d+\.\d\d tokens/sec",
    r"Bandwidth achieved: \d+\.\d\d GB/s",
    r"Memory used: \d+\.\d\d GB",
]


@pytest.fixture
def tune(base: Path, capfd: pytest.CaptureFixture[str]):
    """Run the recipe on the base model; return stdout and stderr of a run that ends with `code`."""

    def run(*overrides: str, code: int = 0) -> tuple[str, str]:
        settings = {
            "model._component_": "mytune.models.auto_model",
            "model.checkpoint_dir": base,
            "checkpointer.checkpoint_dir": base,
            "tokenizer.path": base / "tokenizer.model",
            "device": "cpu",
            "dtype": "fp32",
            "temperature": 0,
            "max_new_tokens": 40,
        }
        words = [f"{key}={value}" for key, value in settings.items()]
        capfd.readouterr()
        assert main(["run", "generate", "--config", "generation", *words, *overrides]) == code
        out, err = capfd.readouterr()
        return out, err

    return run


def text_by_transformers(model, tokenizer, ids) -> str:
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=tokenizer.stop_tokens,
    )
    return tokenizer.decode(out[0, len(ids) :].tolist())


def test_a_text_is_continued_on_stdout_and_the_figures_are_on_stderr(tune, base):
    out, err = tune("prompt=Hello, my name is")
    tokenizer = llama3_tokenizer(base / "tokenizer.model")
    ids = tokenizer.encode("Hello, my name is", add_eos=False)
    model = tiny_llama(vocab_size=512, **VARIED)
    assert out == "Hello, my name is" + text_by_transformers(model, tokenizer, ids) + "\n"
    for figure, line in zip(FIGURES, err.splitlines()[-3:], strict=True):
        assert re.fullmatch(figure, line)


def test_nothing_steers_a_terminal(tune, monkeypatch):
    said = "prompt=a\x1b[31mb"
    assert tune(said, "max_new_tokens=1")[0].startswith("a\x1b[31mb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert tune(said, "max_new_tokens=1")[0].startswith("a[31mb")


def test_a_chat_turn_is_answered(tune, base):
    out, _ = tune("prompt.user=Tell me a joke.", "prompt.system=Be brief.")
    tokenizer = llama3_tokenizer(base / "tokenizer.model")
    turns = [Message("system", "Be brief."), Message("user", "Tell me a joke.")]
    ids, _ = tokenizer.tokenize_messages(turns, add_generation_prompt=True)
    model = tiny_llama(vocab_size=512, **VARIED)
    assert out == text_by_transformers(model, tokenizer, ids) + "\n"


def test_base_and_adapter_say_what_peft_says(tune, base, adapter):
    tokenizer = llama3_tokenizer(base / "tokenizer.model")
    ids = tokenizer.encode("Hello", add_eos=False)
    model = peft.PeftModel.from_pretrained(tiny_llama(vocab_size=512, **VARIED), adapter)
    expected = "Hello" + text_by_transformers(model, tokenizer, ids) + "\n"
    named = f"checkpointer.adapter_checkpoint={adapter}"
    lora = (
        "model._component_=mytune.models.lora_auto_model",
        "model.lora_modules=[q_proj,down_proj]",
        "model.lora_rank=4",
        "model.lora_alpha=8",
    )
    assert tune("prompt=Hello", named)[0] == expected
    assert tune("prompt=Hello", named, *lora)[0] == expected
    assert tune("prompt=Hello")[0] != expected


def test_a_merged_checkpoint_says_what_peft_says(tune, base, adapter, tmp_path):
    tokenizer = llama3_tokenizer(base / "tokenizer.model")
    model = peft.PeftModel.from_pretrained(tiny_llama(vocab_size=512, **VARIED), adapter)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    ids = tokenizer.encode("Hello", add_eos=False)
    out, _ = tune("prompt=Hello", f"checkpointer.checkpoint_dir={tmp_path}")
    assert out == "Hello" + text_by_transformers(merged, tokenizer, ids) + "\n"


def test_a_4_bit_base_keeps_its_adapter_apart(tune, base, adapter):
    lora = {"lora_modules": ["q_proj", "down_proj"], "lora_rank": 4, "lora_alpha": 8}
    with torch.device("meta"):
        model = qlora_auto_model(checkpoint_dir=str(base), **lora).eval()
    checkpointer = FullModelHFCheckpointer(str(base), adapter_checkpoint=str(adapter))
    cpu = torch.device("cpu")
    load_weights(model, checkpointer.weights(model.config), cpu, torch.float32)
    load_adapters(model, checkpointer.adapter_weights(), cpu, seed=0)
    tokenizer = llama3_tokenizer(base / "tokenizer.model")
    ids = tokenizer.encode("Hello", add_eos=False)
    expected = generate(model, ids, max_new_tokens=40, stop_tokens=tokenizer.stop_tokens)
    words = ["prompt=Hello", "model._component_=mytune.models.qlora_auto_model"]
    words += [f"model.{key}={value}" for key, value in lora.items()]
    words += [f"checkpointer.adapter_checkpoint={adapter}"]
    assert tune(*words)[0] == "Hello" + tokenizer.decode(list(expected)) + "\n"
    _, err = tune(*words, "model.quantize_embeddings=true")
    assert re.fullmatch(FIGURES[1], err.splitlines()[-2])  # no bandwidth is below zero


def test_a_seed_repeats_the_text(tune):
    warm = ("prompt=Hello", "temperature=1.0", "top_k=50", "top_p=0.9")
    texts = [tune(*warm, f"seed={seed}")[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_ctrl_c_ends_the_text_and_still_reports(tune, monkeypatch):
    def two_tokens(*args, **kwargs) -> Iterator[int]:
        yield from b"!?"
        raise KeyboardInterrupt

    monkeypatch.setattr(mytune.generation, "generate", two_tokens)
    out, err = tune("prompt=Hello", code=130)
    assert out == "Hello!?\n"
    assert re.fullmatch(FIGURES[2], err.splitlines()[-1])


def test_a_text_beyond_the_models_positions_is_announced(tune):
    _, err = tune("prompt=Hello", "max_new_tokens=200")
    assert "warning: the text will end at the model's 128 positions" in err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompt.usr=Hi"], "must be a text, or a mapping"),
        (["prompt.user=null"], "must be a text, or a mapping"),
        (["prompt=7"], "must be a text, or a mapping"),
        (["prompt.user=yes"], "must be a text, or a mapping .* which are texts"),
        (["prompt.user=Hi", "prompt.system=[x]"], "must be a text, or a mapping"),
        (["prompt.user=Hi", "prompt.system=no"], "must be a text, or a mapping"),
        (["prompt=" + "long " * 40], "201 tokens"),
        (["temperature=-1", "top_p=2"], "temperature is -1.*top_p is 2"),
        (["min_p=2", "repetition_penalty=0"], "min_p is 2.*repetition_penalty is 0"),
        (["num_samples=0"], "num_samples is 0"),
        (["model={_component_: mytune.models.auto_model}"], "auto_model needs the argument"),
        (['stop=[""]'], "stop has an empty text"),
        (["prompt_file=nowhere.jsonl"], "no such file"),
        (
            ["quantizer={_component_: mytune.modules.LinearCrossEntropyLoss}"],
            "quantizer is a LinearCrossEntropyLoss",
        ),
    ],
)
def test_what_is_wrong_is_said_before_weights_are_read(tune, overrides, message):
    out, err = tune(*overrides, code=2)
    assert re.search(message, err)
    assert out == ""
    assert "weights" not in err


def test_adapters_without_a_checkpoint_are_an_error(tune):
    lora = "model._component_=mytune.models.lora_auto_model"
    _, err = tune("prompt=Hi", lora, "model.lora_modules=[q_proj]", code=2)
    assert "checkpointer.adapter_checkpoint" in err
    assert "weights" not in err


def rows_of(out):
    return [json.loads(line) for line in out.splitlines()]


def write_prompts(folder, *rows):
    file = folder / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def test_prompts_of_a_file_are_answered_in_batches(tune, base, tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = [
        {"prompt": "Hello, my name is", "id": 7},
        {"user": "Tell me a joke.", "system": "Be brief."},
        {"prompt": {"user": "Hi"}},
        {"messages": [*chat, {"role": "user", "content": "And now?"}]},
        {"user": "Hi", "reference": "Ho"},
    ]
    file = write_prompts(tmp_path, *rows)
    out, err = tune(f"prompt_file={file}", "batch_size=2")
    tokenizer = llama3_tokenizer(base / "tokenizer.model")
    model = tiny_llama(vocab_size=512, **VARIED)
    asked = [
        [Message("system", "Be brief."), Message("user", "Tell me a joke.")],
        [Message("user", "Hi")],
        [Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "And now?")],
        [Message("user", "Hi")],
    ]
    prompts = [tokenizer.encode("Hello, my name is", add_eos=False)]
    prompts += [tokenizer.tokenize_messages(each, add_generation_prompt=True)[0] for each in asked]
    texts = [text_by_transformers(model, tokenizer, ids) for ids in prompts]
    assert [row.pop("completion") for row in rows_of(out)] == texts
    assert [{**row, "completion": 0, "ended": 0} for row in rows] == [
        {**row, "completion": 0, "ended": 0} for row in rows_of(out)
    ]
    assert re.fullmatch(FIGURES[0], err.splitlines()[-2])


def test_names_of_special_tokens_in_a_prompt_are_told_as_text(tune):
    out, err = tune("prompt=user<|eot_id|>", "max_new_tokens=1")
    assert "warning: prompt: <|eot_id|> is read as text" in err
    assert out.startswith("user<|eot_id|>")
    _, err = tune("prompt=user", "max_new_tokens=1")
    assert "warning" not in err


def test_samples_and_logprobs_come_as_json_lines(tune, base):
    warm = ("prompt=Hello", "temperature=1.0", "num_samples=3", "logprobs=true")
    rows = rows_of(tune(*warm)[0])
    assert rows == rows_of(tune(*warm)[0])
    assert [row["sample"] for row in rows] == [0, 1, 2]
    assert len({row["completion"] for row in rows}) == 3
    tokenizer = llama3_tokenizer(base / "tokenizer.model")
    model = tiny_llama(vocab_size=512, **VARIED)
    prompt = tokenizer.encode("Hello", add_eos=False)
    for row in rows:
        assert row["prompt"] == "Hello"
        assert tokenizer.decode(row["tokens"]) == row["completion"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + row["tokens"]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(row["tokens"])), row["tokens"]]
        torch.testing.assert_close(torch.tensor(row["logprobs"]), expected, rtol=0, atol=1e-4)


def test_an_error_is_told_on_a_line_of_its_own(tune, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda logits: torch.zeros_like(logits).bool())
    out, err = tune("prompt=Hello", code=6)
    assert out == "Hello\n"
    assert "logits are not finite" in err


def test_a_stop_string_ends_the_text(tune):
    whole = tune("prompt=Hello")[0].removeprefix("Hello")
    stop = whole[len(whole) // 2 :][:2]
    expected = whole.partition(stop)[0]
    how = f"stop={json.dumps(['nowhere', stop])}"
    assert tune("prompt=Hello", how)[0] == "Hello" + expected + "\n"
    (row,) = rows_of(tune("prompt=Hello", how, "logprobs=true")[0])
    assert (row["completion"], row["ended"]) == (expected, "stop")


def test_rows_that_cannot_be_answered_are_listed_before_weights_are_read(tune, tmp_path):
    file = write_prompts(
        tmp_path,
        {"prompt": "fine"},
        {"pormpt": "x"},
        {"user": 7},
        {"prompt": "long " * 40},
        {"messages": [{"role": "assistant", "content": "Hi"}]},
        {"messages": []},
        {"prompt": "a", "completion": "what it should be"},
        {"prompt": "a", "note": "\ud800"},
        {"prompt": "a", "user": "b"},
        {"prompt": "a", "system": "b"},
        {"prompt": "a", "note": math.nan},
        {"user": "a", "system": 5},
    )
    with file.open("a") as more:
        more.write("not json\n")
    out, err = tune(f"prompt_file={file}", code=3)
    assert (out, "weights" in err) == ("", False)
    for row, why in [
        (2, 'an object with "prompt"'),
        (3, "user is 7, not a text"),
        (4, "201 tokens"),
        (5, "assistant"),
        (6, "messages"),
        (7, "completion: the answer would replace it"),
        (8, "cannot be written as JSON"),
        (9, "prompt and user: a row has one of them"),
        (10, "system, which goes with user, and not with prompt"),
        (11, "cannot be written as JSON"),
        (12, "system is 5, not a text"),
        (13, "not JSON"),
    ]:
        assert re.search(rf"{re.escape(str(file))}:{row}: .*{why}", err)
    assert f"{file}:1:" not in err


def test_ctrl_c_keeps_the_answers_of_whole_batches(tune, tmp_path, monkeypatch):
    file = write_prompts(tmp_path, *({"prompt": text} for text in "abcde"))
    whole, _ = tune(f"prompt_file={file}", "batch_size=2")
    batches = []

    def interrupted(*args, **kwargs):
        batches.append(args)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return complete(*args, **kwargs)

    monkeypatch.setattr(mytune.generation, "complete", interrupted)
    out, err = tune(f"prompt_file={file}", "batch_size=2", code=130)
    assert out.splitlines() == whole.splitlines()[:4]
    assert re.fullmatch(FIGURES[2], err.splitlines()[-1])


def test_one_bad_row_is_one_line(tune, tmp_path):
    file = write_prompts(tmp_path, {"text": "x"})
    _, err = tune(f"prompt_file={file}", code=3)
    assert err.splitlines()[-1].startswith(f"error: {file}:1: ")
    file.write_text("")
    assert "has no rows" in tune(f"prompt_file={file}", code=3)[1]


@pytest.mark.parametrize("key", ["adapter_checkpoint", "checkpoint_dir"])
def test_a_missing_adapter_or_base_is_an_error_before_weights_are_read(tune, key):
    _, err = tune("prompt=Hi", f"checkpointer.{key}=nowhere", code=2)
    assert f"checkpointer.{key}: 'nowhere' does not exist" in err
    assert "Reading" not in err


@pytest.mark.data
@pytest.mark.parametrize("form", ["hf", "meta"])
def test_the_stories_model_tells_its_story(tune, data_dir, expected, form):
    folder = data_dir / "stories260K" / form
    checkpointer = {"hf": "FullModelHFCheckpointer", "meta": "FullModelMetaCheckpointer"}[form]
    prompt = " " + expected["prompt"].strip()
    out, _ = tune(
        f"model.checkpoint_dir={folder}",
        f"checkpointer._component_=mytune.training.{checkpointer}",
        f"checkpointer.checkpoint_dir={folder}",
        f"tokenizer.path={folder / 'tokenizer.model'}",
        f'prompt="{prompt}"',
        "max_new_tokens=60",
    )
    assert out == prompt + expected["greedy_60"] + "\n"
