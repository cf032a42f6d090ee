"""What is known of tasks before a model is asked, and what becomes of results on the disk."""

from __future__ import annotations

import gc
import json
import weakref
from itertools import pairwise
from types import SimpleNamespace

import pytest
import yaml

from mytune.errors import ConfigError
from mytune.evaluation import (
    HarnessModel,
    check_output,
    check_tasks,
    differing,
    read_results,
    write_results,
)
from mytune.evaluation.adapter import read_generation
from mytune.evaluation.tasks import _manager
from tests.hf import twins


def task(kind="generate_until", generation=None, **traits):
    return SimpleNamespace(
        OUTPUT_TYPE=kind,
        get_config={"generation_kwargs": generation}.get,
        aggregation=dict,
        **traits,
    )


def test_all_tasks_that_cannot_be_measured_are_named_at_once():
    fine = {"fine": task(generation={"max_gen_toks": 99}), "choice": task("multiple_choice")}
    check_tasks({"tasks": fine}, positions=100)
    wrong = {
        "code": task(UNSAFE_CODE=True, generation={"max_gen_toks": 9}),
        "picture": task("multiple_choice", MULTIMODAL=True),
        "unscored": task("loglikelihood", _metric_fn_list={"bypass": None}),
        "beams": task(generation={"num_beams": 4, "max_gen_toks": 9}),
        "long": task(),  # the harness's own 256
    }
    with pytest.raises(ConfigError) as caught:
        check_tasks({"tasks": {**fine, **wrong}}, positions=100)
    told = str(caught.value)
    assert all(name in told for name in wrong) and "choice" not in told
    assert "num_beams is not supported" in told and "256 tokens" in told


@pytest.mark.parametrize(
    ("asked", "most", "sampling"),
    [
        ({}, 256, {}),
        ({"num_beams": 1, "max_gen_toks": 7}, 7, {}),
        ({"temperature": 0.7, "top_p": 0.9}, 256, {"temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.3}, 256,
         {"repetition_penalty": 1.3}),
        ({"do_sample": True, "top_k": 4}, 256, {"temperature": 1.0, "top_k": 4}),
    ],
)  # fmt: skip
def test_generation_is_what_the_harness_makes_of_it(asked, most, sampling):
    assert read_generation(asked) == (most, [], sampling)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"until": [5]}, r"until is \[5\]"),
        ({"max_gen_toks": "x"}, "invalid literal"),
        ({"top_k": "x"}, "top_k is 'x'"),
        ({"beams": 2}, "beams is not supported"),
    ],
)
def test_generation_that_cannot_be_is_told(asked, message):
    with pytest.raises(ConfigError, match=message):
        read_generation(asked)


def test_a_group_of_ones_own_may_hold_the_harnesss_tasks(tmp_path):
    group = {"group": "mine", "task": ["truthfulqa_mc2"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(group))
    assert "truthfulqa_mc2" in _manager(["mine"], tmp_path).all_tasks


def results(tasks=("a",), **facts):
    found = {name: {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": name} for name in tasks}
    return {"results": found, "higher_is_better": {}, "versions": {}, "n-shot": {}, **facts}


def test_earlier_results_are_kept(tmp_path):
    for score in (1, 2, 3):
        found = results()
        found["results"]["a"]["acc,none"] = score
        write_results(tmp_path, found, f"score: {score}")
    names = ["evaluation.json", "evaluation_1.json", "evaluation_2.json"]
    scores = [
        json.loads((tmp_path / name).read_text())["results"]["a"]["acc,none"] for name in names
    ]
    assert scores == [3, 1, 2]
    assert len(list(tmp_path.glob("*.md"))) == 3


def test_results_to_compare_with_must_be_other_ones_of_the_same_tasks(tmp_path):
    write_results(tmp_path, results(["a", "b"]), "")
    file = tmp_path / "evaluation.json"
    assert read_results(file, ["b", "c"])["results"].keys() == {"a", "b"}
    with pytest.raises(ConfigError, match=r"has results of a, b, and of none of c"):
        read_results(file, ["c"])
    check_output(tmp_path, None)
    check_output(tmp_path / "new", str(file))
    with pytest.raises(ConfigError, match="choose another output_dir"):
        check_output(tmp_path, str(file))


def test_results_that_were_not_measured_alike_are_told():
    counts = {"a": {"original": 9, "effective": 3}, "b": {"original": 9, "effective": 3}}
    base = results(**{"n-shot": {"a": 0, "b": 5}, "n-samples": counts})
    counts = {**counts, "b": {"original": 9, "effective": 4}}
    tuned = results(**{"n-shot": {"a": 2, "c": 1}, "n-samples": counts})
    assert differing(base, tuned, "seed: 1") == [
        "a: n-shot was 0 for the base and is 2",
        "b: n-samples was 3 for the base and is 4",
    ]


def test_an_earlier_evaluation_can_be_from_anywhere(tmp_path):
    file = tmp_path / "evaluation.json"
    tuned = results(["a"], **{"n-shot": {"a": 2}, "versions": {"a": 1}})
    for odd in ({"versions": [1]}, {"n-shot": {"a": 2}, "versions": None}, {"config": "- seed"}):
        file.write_text(json.dumps(results(["a"], **odd)))
        assert differing(read_results(file, ["a"]), tuned, "seed: 1") == []
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijkl")
    )
    file.write_text(json.dumps(results(["a"], config=f"{bomb}seed: *l\ndtype: fp32\n")))
    assert read_results(file, ["a"])["config"] == {"dtype": "fp32"}
    for wrong in ({"config": "a: ["}, {"results": {"a": [["acc,none", 0.5]]}}):
        file.write_text(json.dumps(results(["a"]) | wrong))
        with pytest.raises(ConfigError, match="holds no results of an earlier evaluation"):
            read_results(file, ["a"])
    file.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="holds no results of an earlier evaluation"):
        read_results(file, ["a"])


def test_a_continuation_that_never_fits_is_shown(random_pair):
    adapter = HarnessModel(twins()[0], random_pair.tokenizer, max_seq_length=4)
    fits, long = (("a", "b"), [1], [2]), (("a", "what is long"), [1], [2, 3, 4, 5, 6])
    assert len(adapter._loglikelihood_tokens([fits])) == 1
    with pytest.raises(ConfigError, match=r"room for 4 tokens.* has 5, begins with 'what is long'"):
        adapter._loglikelihood_tokens([fits, long])


def test_an_evaluated_model_is_freed_at_once(random_pair):
    model, _ = twins()
    adapter = HarnessModel(model, random_pair.tokenizer)
    assert adapter.tok_encode("a context") == adapter.tok_encode("a context")
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model, adapter
        assert gone() is None
    finally:
        gc.enable()
