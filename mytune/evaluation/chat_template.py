"""A checkpoint's own chat template: Jinja, with the names that transformers gives it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mytune.errors import ConfigError
from mytune.training.checkpointing.files import inside, read_json

_CONFIG = "tokenizer_config.json"
_END = "<the end of what was said> "


class ChatTemplate:
    """Writes conversations as `apply_chat_template` of transformers' tokenizers does.

    A template is a program that came with a checkpoint: it runs in Jinja's sandbox. The date that
    one may ask for is today's.

    Args:
        path: a `chat_template.jinja`, a `tokenizer_config.json`, or a directory with one of them.

    Raises:
        ConfigError: there is no template, or Jinja cannot read it.
        CheckpointError: `tokenizer_config.json` is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, source, tokens = _read(Path(path).expanduser())
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        del environment.globals["lipsum"]  # makes texts of any length
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        today = datetime.now().strftime
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": today,
            **tokens,
        }
        # Marks what an assistant says, which matters to those who train on it.
        source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)
        source = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source)
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            raise self._wrong(error) from error

    def __call__(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation up to where the answer begins, or the last message goes on.

        Raises:
            ConfigError: the template fails, or refuses the conversation.
        """
        said = [dict(message) for message in messages]
        if not add_generation_prompt:
            said[-1]["content"] += _END
        settings = {"add_generation_prompt": add_generation_prompt, "tools": None}
        try:
            text = self._template.render(messages=said, documents=None, **settings)
        except Exception as error:
            raise self._wrong(error) from error
        if add_generation_prompt:
            return text
        before, end, after = text.rpartition(_END.strip())
        if not end:
            raise self._wrong("it leaves out the message that should go on")
        return before if after.startswith(" ") else before.rstrip()  # it strips messages

    def _wrong(self, what: object) -> ConfigError:
        return ConfigError(f"chat_template: {self._path}: {str(what) or type(what).__name__}")


def read_chat_template(said: bool | str) -> bool | ChatTemplate:
    """Return what a config says of the format of chats: whether to use one, or whose."""
    return ChatTemplate(said) if isinstance(said, str) else said


def _read(path: Path) -> tuple[Path, str, dict[str, str]]:
    """Return the file of a template, the template, and the special tokens that it may name."""
    files = [path / "chat_template.jinja", path / _CONFIG] if path.is_dir() else [path]
    path = next((inside(file.parent, file.name) for file in files if file.is_file()), path)
    config = (path if path.is_dir() else path.parent) / _CONFIG
    known = read_json(config) if config.is_file() else {}
    template = known.get("chat_template")
    if path != config:
        template = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    if isinstance(template, list):
        known_as = [each for each in template if isinstance(each, dict)]
        usual = [each for each in known_as if each.get("name") == "default"]
        template = usual[0].get("template") if usual else None
    if not isinstance(template, str):
        raise ConfigError(
            f"chat_template: no template in {path}; give true for the tokenizer's own format, a "
            f"chat_template.jinja, a {_CONFIG} that has one, or a directory with either"
        )
    tokens = {name: value for name, value in known.items() if name.endswith("_token")}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in tokens.items()}
    return path, template, {name: text for name, text in texts.items() if isinstance(text, str)}


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
