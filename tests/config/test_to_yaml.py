"""The whole config as YAML: every key with its comment, reads back the same, tells no secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from mytune.config import load_config, redact
from mytune.config.redact import HIDDEN
from tests.config.conftest import CONFIG, Load


def test_every_key_stands_below_its_comment(load: Load) -> None:
    lines = load().to_yaml().splitlines()
    assert lines[:7] == [
        "# Where things go",
        "",
        "# the folder that everything is written to",
        "output_dir: out",
        "# null draws one",
        "seed: null",
        "",
    ]
    for field in load().schema.fields:
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}:"))
        above = "\n".join(lines[:at])
        assert above.endswith("\n".join(f"# {line}" for line in field.comment.splitlines()))


def test_what_is_written_loads_to_the_same_values_and_text(load: Load, folder: Path) -> None:
    yaml = (
        CONFIG
        + "note: 'a: ${output_dir} \\${x} #'\n"
        + "extra: {t: '00005', u: '1e-4', v: [1, {w: null}], y: 'no'}\n"
    )
    loaded = load("lr_scale=1e-5", "output_dir=/a b", "tags=['1', 'x y']", yaml=yaml)
    for sort in (False, True):
        (folder / "again.yaml").write_text(loaded.to_yaml(sort=sort))
        again = load_config(Path("recipe.py"), Path("again.yaml"))
        assert again.values() == loaded.values()
        assert again.to_yaml() == loaded.to_yaml()


def test_sorted_keys_are_sorted(load: Load) -> None:
    text = load().to_yaml(sort=True)
    keys = [line.split(":")[0] for line in text.splitlines() if line[:1] not in ("", " ", "#", "-")]
    assert keys == sorted(keys) and len(keys) == 13


def test_a_config_sends_no_secret_of_the_environment_elsewhere(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_elevenletters")
    extra = "extra: {api_key: '${oc.env:HF_TOKEN}', url: 'http://there/${oc.env:HF_TOKEN}'}\n"
    assert load(yaml=CONFIG + extra).problems == [
        "c.yaml:5: extra.url: a secret of the environment is no part of url"
    ]
    assert load("extra.url=http://there/${oc.env:HF_TOKEN}", yaml=CONFIG).problems == []


def test_the_environment_stays_a_reference_on_disk(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse")
    loaded = load(
        "extra.api_key=${oc.env:MY_API_KEY}", "note=${output_dir}/x", "extra.password=hunter22"
    )
    assert loaded.values()["extra"]["api_key"] == "correct-horse"
    text = loaded.to_yaml()
    assert "api_key: ${oc.env:MY_API_KEY}" in text and "note: ${output_dir}/x" in text
    assert "hunter22" not in text and f"password: {HIDDEN}" in text and "correct-horse" not in text


def test_problems_and_notices_hide_secrets(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh12345678XYZ")
    loaded = load(
        "extra.api_key=swordfish",
        "seed=hf_abcdefgh12345678XYZ",
        "token=swordfish",
        "modle.secret=swordfish",
    )
    text = "\n".join(
        [*loaded.problems, *loaded.notices, loaded.where("extra.api_key"), loaded.to_yaml()]
    )
    assert len(loaded.problems) == 3
    assert "swordfish" not in text and "abcdefgh" not in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"hf_token": "x", "max_new_tokens": 3}, {"hf_token": HIDDEN, "max_new_tokens": 3}),
        (
            {"eos_token": "<s>", "a": [{"api_key": 5}]},
            {"eos_token": "<s>", "a": [{"api_key": HIDDEN}]},
        ),
        ({"use_auth_token": True, "token": None}, {"use_auth_token": True, "token": None}),
        (
            {"token": "${oc.env:T}", "tokenizer": {"path": "p"}},
            {"token": "${oc.env:T}", "tokenizer": {"path": "p"}},
        ),
        ("a.api_key=abc b=2", f"a.api_key={HIDDEN} b=2"),
        ("{'password': 'abc', 'b': 2}", f"{{'password': {HIDDEN}, 'b': 2}}"),
        ("pad_token=abc tokens=3 key=4", "pad_token=abc tokens=3 key=4"),
        ("https://me:secret@host/x", f"https://{HIDDEN}@host/x"),
        ("see hf_ABCDEFGHIJKLMNOPQRST.", f"see {HIDDEN}."),
        ("key sk-proj-aB3_xYz0123456789.", f"key {HIDDEN}."),
        ("key sk-0123456789abcdef0123.", f"key {HIDDEN}."),
        ("key sk-or-v1-0123456789abcdef0123456789abcdef", f"key {HIDDEN}"),
        ("key sk-lf-01234567-89ab-cdef-0123-456789abcdef", f"key {HIDDEN}"),
        ("key hf_oauth_abcdefghijklmnop", f"key {HIDDEN}"),
        ("data/hf_dataset_of_the_year_2024.jsonl", "data/hf_dataset_of_the_year_2024.jsonl"),
        ("runs/sk-learn-experiments-2024", "runs/sk-learn-experiments-2024"),
        (3, 3),
    ],
)
def test_secrets_are_known_by_key_and_shape(value: object, shown: object) -> None:
    assert redact(value) == shown


def test_secrets_are_known_by_the_value_of_their_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abcdefgh")
    monkeypatch.setenv("MY_SECRET", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "certainly")
    assert redact("abcdefgh short certainly") == f"{HIDDEN} short certainly"
