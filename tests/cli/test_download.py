"""`tune download` against a hub of our own on 127.0.0.1."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from mytune import assets
from mytune.cli import download
from mytune.errors import ResourceError
from tests.cli.conftest import Ended, finish, start

REPO = "org/Llama-9-8B"
SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "secret-token-of-a-user"
FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"a" * 3000,
    "model-00002-of-00002.safetensors": b"b" * 2000,
    "model.safetensors.index.json": b"{ }",
    "original/consolidated.00.pth": b"c" * 5000,
    "original/params.json": b"{  }",
    "original/tokenizer.model": b"tokens",
    "pytorch_model.bin": b"d" * 5000,
}
SHARD = "model-00001-of-00002.safetensors"
DEFAULT = {name for name in FILES if not name.endswith((".pth", ".bin"))}


class Hub:
    """What the hub serves and to whom; `asked` holds method, path and Authorization."""

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.gated = False
        self.sizes = True
        self.failing: set[str] = set()  # announced, then answered with 500
        self.cut: set[str] = set()  # answered with half of the file, once
        self.asked: list[tuple[str, str, str | None]] = []

    def answer(self, path: str, token: str | None) -> tuple[int, bytes, dict[str, str]]:
        if token not in (None, f"Bearer {TOKEN}"):
            error = "Invalid credentials in Authorization header"
            return 401, b"", {"X-Error-Message": error}
        info = [{"rfilename": name, "blobId": _etag(b)} for name, b in self.files.items()]
        if self.sizes:
            info = [each | {"size": len(self.files[each["rfilename"]])} for each in info]
        tree = [
            {"type": "file", "path": name, "size": len(b), "oid": _etag(b)}
            for name, b in self.files.items()
        ]
        if re.fullmatch(f"/api/models/{REPO}(/revision/{SHA})?", path):
            return 200, json.dumps({"id": REPO, "sha": SHA, "siblings": info}).encode(), {}
        if path == f"/api/models/{REPO}/tree/{SHA}":
            return 200, json.dumps(tree).encode(), {}
        name = path.removeprefix(f"/{REPO}/resolve/{SHA}/")
        if name not in self.files:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        if self.gated:
            return 403, b"", {"X-Error-Code": "GatedRepo"}
        body = self.files[name]
        return 200, body, {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": SHA}


def _etag(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            token = self.headers["Authorization"]
            hub.asked.append((self.command, path, token))
            status, body, headers = hub.answer(path, token)
            name = path.rpartition("/")[2]
            if self.command == "GET" and name in hub.failing:
                status, body = 500, b""
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if name in hub.cut else body)
                hub.cut.discard(name)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path):
    """Run `tune download REPO --output-dir MODEL` with a home of its own."""
    home = tmp_path / "home"

    def run(*words: str, repo: str = REPO, stdin: str = "", **variables: str) -> Ended:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env = (
            kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"} | variables
        )
        words = ("-m", "mytune", "download", repo, "--output-dir", str(tmp_path / "model"), *words)
        return finish(start(*words, env=env, stdin=subprocess.PIPE), stdin)

    run.home, run.model = home, tmp_path / "model"  # type: ignore[attr-defined]
    return run


def taken(folder: Path) -> dict[str, bytes]:
    files = (f for f in folder.rglob("*") if f.is_file() and ".cache" not in f.parts)
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def fetched(hub: Hub) -> list[str]:
    """Return the files that the hub was asked to send."""
    return [
        path.partition(f"{SHA}/")[2]
        for how, path, _ in hub.asked
        if how == "GET" and SHA in path and "resolve" in path
    ]


def test_safetensors_are_preferred_and_everything_else_kept(fetch, hub):
    ended = fetch()
    model = fetch.model
    assert ended.code == 0, ended.err
    extra = {"original_repo_id.json": json.dumps({"repo_id": REPO}).encode()}
    assert taken(model) == {name: FILES[name] for name in DEFAULT} | extra
    assert "Leaving out original/consolidated.00.pth, pytorch_model.bin" in ended.out
    assert f"checkpointer.checkpoint_dir={model}" in ended.out
    assert f"tokenizer.path={model}/original/tokenizer.model" in ended.out
    assert not fetch.home.exists()  # nothing is written elsewhere


@pytest.mark.parametrize(
    ("words", "left_out"),
    [
        (["--ignore-patterns", ""], set()),
        (
            ["--ignore-patterns", "*.safetensors, *.bin"],
            {n for n in FILES if n.endswith(("rs", "bin"))},
        ),
        (
            ["--ignore-patterns", "original/*", "--ignore-patterns=*.bin"],
            {n for n in FILES if n[0] == "o"} | {"pytorch_model.bin"},
        ),
    ],
)
def test_ignore_patterns_decide_alone(fetch, words, left_out):
    assert fetch(*words).code == 0
    assert taken(fetch.model).keys() - {"original_repo_id.json"} == FILES.keys() - left_out


def test_pth_is_taken_where_there_are_no_safetensors(fetch, hub):
    hub.files = {n: b for n, b in FILES.items() if "safetensors" not in n}
    assert fetch().code == 0
    assert "original/consolidated.00.pth" in taken(fetch.model)


def test_file_that_was_cut_off_is_fetched_again(fetch, hub):
    hub.cut = {SHARD}
    codes = [fetch().code, fetch().code]  # whether it tries again by itself is the library's
    assert codes in ([0, 0], [5, 0])
    assert (fetch.model / SHARD).read_bytes() == FILES[SHARD]
    assert fetched(hub).count(SHARD) == 2


def test_failed_download_goes_on_with_what_is_missing(fetch, hub):
    hub.failing = {SHARD}
    ended = fetch()
    assert ended.code == 5 and "the same command goes on" in ended.err.splitlines()[-1]
    assert not (fetch.model / "original_repo_id.json").exists()
    (fetch.model / "config.json").write_text("cut")  # not what the hub has
    hub.failing, hub.asked = set(), []
    assert fetch().code == 0
    assert {SHARD, "config.json"} <= set(fetched(hub)) < DEFAULT
    assert {name: taken(fetch.model)[name] for name in DEFAULT} == {n: FILES[n] for n in DEFAULT}


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["--hf-token", TOKEN], {}),
        (["--hf-token", "-"], {"stdin": TOKEN + "\n"}),
        ([], {"HF_TOKEN": TOKEN}),
        ([], {"HF_TOKEN_PATH": "login"}),
    ],
)
def test_token_is_sent_and_neither_printed_nor_written(fetch, hub, tmp_path, words, given):
    login = tmp_path / "login"
    login.write_text(TOKEN)
    ended = fetch(*words, **{k: str(login) if v == "login" else v for k, v in given.items()})
    assert ended.code == 0 and TOKEN not in ended.out + ended.err
    assert {token for _, path, token in hub.asked if REPO in path} == {f"Bearer {TOKEN}"}
    assert all(TOKEN.encode() not in f.read_bytes() for f in fetch.model.rglob("*") if f.is_file())


@pytest.mark.parametrize(
    ("repo", "gated", "words", "code", "hint"),
    [
        (
            "org/none",
            False,
            [],
            2,
            "there is no model 'org/none' on the Hugging Face Hub; if it is private, pass",
        ),
        ("org/none", False, ["--hf-token", TOKEN], 2, "your token needs access to it"),
        ("a/b/c", False, [], 2, "is not the name of a repository"),
        (
            REPO,
            True,
            [],
            2,
            f"{REPO} is gated: ask for access at https://huggingface.co/{REPO}; then pass",
        ),
        (REPO, True, ["--hf-token", TOKEN], 2, "your token's account has no access yet"),
        (REPO, False, ["--hf-token", "wrong-token"], 2, "refuses your token (401)"),
        (REPO, False, ["--source", "kaggle"], 2, "--source kaggle is not supported"),
        ("mytune/tinny", False, [], 2, "the package has no model 'mytune/tinny'"),
    ],
)
def test_each_refusal_has_its_own_line(fetch, hub, repo, gated, words, code, hint):
    hub.gated = gated
    ended = fetch(*words, repo=repo)
    last = ended.err.splitlines()[-1]
    assert ended.code == code and last.startswith("error: ") and hint in last
    assert "Traceback" not in ended.err


def test_no_network_is_exit_5(fetch):
    ended = fetch(HF_ENDPOINT="http://127.0.0.1:9")
    assert ended.code == 5 and "could not be downloaded" in ended.err.splitlines()[-1]
    ended = fetch(HF_HUB_OFFLINE="1")
    assert ended.code == 5 and "HF_HUB_OFFLINE" in ended.err.splitlines()[-1]


def test_disk_too_small_is_exit_5_before_anything_is_fetched(tune, tmp_path, monkeypatch):
    sizes = [SimpleNamespace(rfilename="model.safetensors", size=2**50)]
    info = SimpleNamespace(sha=SHA, siblings=sizes)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    code, _, err = tune("download", REPO, "--output-dir", str(tmp_path / "new" / "model"))
    assert code == 5 and "1048576.00 GiB are to come" in err and not (tmp_path / "new").exists()


def test_space_counts_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    (tmp_path / "done").write_bytes(b"x" * 90)
    download._check_space({"done": 90, "more": 10, "nobody knows": None}, tmp_path)
    with pytest.raises(ResourceError):
        download._check_space({"done": 90, "more": 11}, tmp_path)


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: make room"),
        (RuntimeError("xet: IO error: No space left on device"), "the disk is full: make room"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x/model"),
            "Permission denied: /x/model",
        ),
    ],
)
def test_disk_failure_on_the_way_is_exit_5(tune, tmp_path, monkeypatch, error, hint):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(sha=SHA, siblings=[])
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    code, _, err = tune("download", REPO, "--output-dir", str(tmp_path))
    assert code == 5 and hint in err


def test_file_that_did_not_arrive_is_no_success(tune, tmp_path, monkeypatch):
    info = SimpleNamespace(sha=SHA, siblings=[SimpleNamespace(rfilename="config.json", size=2)])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: None)
    code, _, err = tune("download", REPO, "--output-dir", str(tmp_path))
    assert code == 5 and "not complete" in err and "  config.json\n" in err


def test_hub_that_tells_no_sizes_is_enough(fetch, hub):
    hub.sizes = False
    assert fetch().code == 0
    assert taken(fetch.model).keys() == DEFAULT | {"original_repo_id.json"}


def test_file_outside_the_folder_is_refused(fetch, hub, tmp_path):
    (tmp_path / "victim.json").write_text("mine")
    hub.files["../victim.json"] = b"theirs"
    ended = fetch()
    assert ended.code == 4 and "  ../victim.json" in ended.err
    assert (tmp_path / "victim.json").read_text() == "mine" and fetched(hub) == []


def test_embedded_model_is_copied(tune, tmp_path, monkeypatch):
    source = tmp_path / "assets" / "tiny"
    source.mkdir(parents=True)
    for name in ("config.json", "tokenizer.model"):
        (source / name).write_text(name)
    monkeypatch.setattr(assets, "ASSETS", source.parent)
    target = tmp_path / "models" / "tiny"
    code, out, err = tune(
        "download", "mytune/tiny", "--output-dir", str(target), "--output-dir-use-symlinks", "False"
    )
    assert (code, err) == (0, "notice: --output-dir-use-symlinks is ignored: there are no links\n")
    assert taken(target) == taken(source)
    assert (
        f"tune run lora_finetune_single_device --config tiny/lora_single_device"
        f" checkpointer.checkpoint_dir={target} tokenizer.path={target}/tokenizer.model\n"
    ) in out


def test_next_command_names_the_config_of_the_model(tmp_path):
    name = "Meta-Llama-3-8B-Instruct"
    assert "--config llama3/8B_lora_single_device " in download._next_command(name, tmp_path)
    assert "--config <one of `tune ls`> " in download._next_command("Meta-Llama-3-8B", tmp_path)
