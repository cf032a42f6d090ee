"""`tune chat`: what is typed is answered, with what was said before; Ctrl-C stops an answer."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from mytune.cli.main import main
from mytune.generation import generate
from mytune.models.llama3 import llama3_tokenizer
from mytune.tokenizers import Message
from tests.generation.conftest import VARIED
from tests.hf import load, tiny_llama

GREEDY = ("device=cpu", "dtype=fp32", "temperature=0", "max_new_tokens=12")


@pytest.fixture(scope="module")
def endless(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with so many positions that an answer takes its time."""
    folder = tmp_path_factory.mktemp("endless")
    model = tiny_llama(vocab_size=512, max_position_embeddings=100_000, **VARIED)
    with torch.no_grad():  # no special tokens, so no end
        model.lm_head.weight[256:] = -model.lm_head.weight[:256]
        model.lm_head.weight[256:] *= 0
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    return folder


@pytest.fixture
def chat(base, monkeypatch, capfd):
    """Type lines into a chat with the base model; return code, answers and notes."""

    def run(*lines, words=(), code=0, folder=base):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", str(folder), *GREEDY, *map(str, words)]) == code
        return capfd.readouterr()

    return run


@pytest.fixture
def answers(base):
    """Return what the base model answers, turn by turn, without keeping anything."""
    model = load(base)
    tokenizer = llama3_tokenizer(base / "tokenizer.model")

    def ask(*questions, system=None):
        turns = [Message("system", system)] if system else []
        for question in questions:
            turns.append(Message("user", question))
            ids, _ = tokenizer.tokenize_messages(turns, add_generation_prompt=True)
            stops = tokenizer.stop_tokens
            new = list(generate(model, ids, max_new_tokens=12, stop_tokens=stops))
            text = "".join(c for c in tokenizer.decode(new) if c >= " " and not 127 <= ord(c) < 160)
            turns.append(Message("assistant", text))
        return [turn.content for turn in turns if turn.role == "assistant"]

    return ask


def test_answers_know_what_was_said_before(chat, answers):
    out, err = chat("Hello", "", "How are you?", "/quit", "never")
    assert out == "".join(f"{text}\n" for text in answers("Hello", "How are you?"))
    assert answers("Hello", "How are you?")[1] != answers("How are you?")[0]
    assert err.count("(cut: max_new_tokens is reached)") == 2


def test_reset_and_system_begin_anew(chat, answers):
    out, err = chat("Hello", "/reset", "Hello", "/system Be  brief.", "Hello", "/system")
    brief = answers("Hello", system="Be  brief.")
    assert out == "".join(f"{text}\n" for text in [*answers("Hello") * 2, *brief])
    assert brief != answers("Hello")
    assert err.splitlines()[-1] == "Be  brief."
    out, err = chat("Hello", "/reset", "/system", words=["system=Be  brief."])
    assert out == f"{brief[0]}\n"
    assert err.splitlines()[-1] == "Be  brief."


def test_commands_are_not_messages(chat):
    out, err = chat("/help", "/nonsense", "/reset now", "/system")
    assert out == ""
    assert "/reset        forget the conversation" in err
    assert "/nonsense is not known; there are /system, /reset, /help and /quit" in err
    assert "/reset takes nothing after it" in err
    assert err.splitlines()[-1].startswith("nothing")


def test_a_message_is_read_once(chat, monkeypatch):
    read = []
    forward = torch.nn.Embedding.forward
    monkeypatch.setattr(
        torch.nn.Embedding,
        "forward",
        lambda self, ids: read.append(ids.shape[1]) or forward(self, ids),
    )
    chat("Hello", "How are you?", words=["max_new_tokens=1"])
    # BOS, header, 5 bytes, end, header; end, header, 12 bytes, end, header; and the one new token,
    # which is read as it was said or, if it is no text, as the text that it is.
    assert read[0] == 1 + 8 + 5 + 1 + 13
    assert 1 <= len(read) - 1 <= 2
    assert read[1] <= 1 + 1 + 8 + 12 + 1 + 13 + 3


def test_what_is_oldest_is_forgotten_when_there_is_no_room(chat, answers):
    out, err = chat("Hello", "How are you?", "x" * 200, "Again", words=["max_seq_len=60"])
    assert out.splitlines()[0] == answers("Hello")[0]
    assert "(the oldest message and its answer are forgotten" in err
    assert "too long: 223 tokens of 60" in err
    assert len(out.splitlines()) == 3


def test_a_system_message_that_never_fits_is_not_taken(chat, answers):
    out, err = chat("/system " + "x" * 300, "Hello", words=["max_seq_len=250"])
    assert "too long" in err
    assert out.splitlines() == answers("Hello")


def test_messages_need_a_stdin(monkeypatch, capfd, base):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", str(base), *GREEDY]) == 2
    assert "stdin, which is closed" in capfd.readouterr().err


def test_a_message_that_never_fits_costs_nothing_of_what_was_said(chat, answers):
    out, err = chat("Hello", "x" * 300, "How are you?", words=["max_seq_len=250"])
    assert "too long" in err and "forgotten" not in err
    assert out.splitlines() == answers("Hello", "How are you?")


def test_an_adapter_answers_as_generate_does(chat, base, adapter, tmp_path, capfd):
    plain = chat("Hello").out
    adapted = chat("Hello", words=["--adapter", adapter]).out
    assert adapted != plain
    (tmp_path / "epoch_0").mkdir()
    (tmp_path / "epoch_0" / "adapter").symlink_to(adapter)
    assert chat("Hello", words=["--adapter", tmp_path / "epoch_0"]).out == adapted
    words = ["run", "generate", "--config", "tiny/generation", "dtype=fp32", "temperature=0"]
    words += [f"checkpointer.checkpoint_dir={base}", f"checkpointer.adapter_checkpoint={adapter}"]
    assert main([*words, "prompt={user: Hello}", "max_new_tokens=12"]) == 0
    assert capfd.readouterr().out == adapted


@pytest.mark.data
def test_a_copy_of_the_recipe_is_chatted_with(chat, tmp_path, capfd):
    copy = tmp_path / "mine.py"
    assert main(["cp", "chat", str(copy)]) == 0
    copy.write_text(copy.read_text().replace("Type a message", "Say something"))
    capfd.readouterr()
    plain, mine = chat("Hello"), chat("Hello", words=["--recipe", copy])
    assert mine.out == plain.out and "Say something" in mine.err
    assert main(["run", "chat"]) == 2
    assert "a YAML file (`tune chat` makes one)" in capfd.readouterr().err


def test_metas_format_is_known_by_its_files(chat, data_dir):
    folders = [data_dir / "stories260K" / form for form in ("hf", "meta")]
    said = [chat("Once upon a time", folder=folder).out for folder in folders]
    assert said[0] == said[1] != "\n"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere"], 2, "there is no directory nowhere"),
        (
            ["."],
            4,
            "no whole model: neither config.json nor params.json.*a model is there: tune chat",
        ),
        (["adapted"], 4, "it is an adapter: tune chat BASE --adapter adapted/adapter"),
        (["model", "--adapter", "nowhere"], 2, "--adapter nowhere: there is no such directory"),
        (["model", "--adapter", "model"], 4, "--adapter model: there is no adapter_config.json"),
        (["model", "temprature=0"], 2, "unknown key 'temprature'; did you mean 'temperature'"),
        (["model", "top_k=0", "device=cpu"], 2, "top_k is 0"),
        (["model", "max_seq_len=0", "device=cpu"], 2, "max_seq_len is 0"),
        (["model", "max_seq_len=5", "device=cpu"], 2, "max_seq_len is 5; a first message has"),
        (["model", "device=xpu"], 5, "device is xpu"),
        ([], 2, "CHECKPOINT_DIR"),
    ],
)
def test_what_is_wrong_is_said(base, tmp_path, monkeypatch, capfd, words, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(base)
    (tmp_path / "adapted" / "adapter").mkdir(parents=True)
    settings = {"base_model_name_or_path": "elsewhere"}
    (tmp_path / "adapted" / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    assert main(["chat", *words]) == code
    err = capfd.readouterr().err
    assert re.search(message, " ".join(err.split())), err
    assert "weights" not in err


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, *words):
        self._unread = ""
        self.process, self._fd = pty.fork()
        if not self.process:
            os.execv(sys.executable, [sys.executable, "-m", "mytune", "chat", *words])

    def expect(self, text, timeout=60):
        """Read until `text` has come; return what was read."""
        end = time.monotonic() + timeout
        while text not in self._unread:
            ready = select.select([self._fd], [], [], max(0, end - time.monotonic()))[0]
            assert ready, f"{text!r} did not come: {self._unread[-2000:]!r}"
            self._unread += os.read(self._fd, 4096).decode(errors="replace")
        seen, found, self._unread = self._unread.partition(text)
        return seen + found

    def type(self, text):
        os.write(self._fd, text.encode())

    def leave(self):
        """Press Ctrl-C until the chat ends; return its code.

        One is not always enough: Python does not see a signal that comes just before it waits for
        a key.
        """
        for tenth in range(300):
            if tenth % 100 == 0:  # ending takes a while, and another one would then kill it
                self.type("\x03")
            time.sleep(0.1)
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self.process = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("the chat goes on")

    def close(self):
        os.close(self._fd)
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)


@pytest.fixture
def terminal(endless, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    settings = (*GREEDY[:3], "max_new_tokens=90000", "max_seq_len=100000")
    opened = Terminal(str(endless), *settings)
    yield opened
    opened.close()


def test_ctrl_c_stops_an_answer_and_then_the_chat(terminal):
    terminal.expect("> ")
    for _ in range(2):
        terminal.type("Hello\n")
        terminal.expect("Hello\r\n")
        time.sleep(0.5)
        terminal.type("\x03")
        terminal.expect("(stopped)")
        terminal.expect("> ")
    terminal.type("/help\n")
    terminal.expect("/reset")
    terminal.expect("> ")
    assert terminal.leave() == 130
