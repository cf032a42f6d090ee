"""Secrets kept out of logs, saved configs and errors: known by key, by value, by shape."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from mytune.config.types import children

HIDDEN = "<redacted>"

# Not every `*_token` is a secret: `eos_token`, `pad_token`, `max_new_tokens` are a tokenizer's.
_NAME = (
    r"token|(?:\w*_)?(?:(?:hf|hub|auth|access|api|bearer|refresh|session|github|mlflow)_?token"
    r"|(?:api|access|private|secret|auth)_?key|secret|pass(?:word|wd|phrase)|credentials?)"
)
_KEY = re.compile(_NAME, re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"(?<!\w)((?:{_NAME})['\"]?\s*(?:=\s*|:\s*(?=['\"])))"  # key= or key: 'text
    r"(?!['\"]?\$\{)('[^']*'|\"[^\"]*\"|[^\s,}'\"]+)",  # the value, if it is no ${...}
    re.IGNORECASE,
)
# Not hf_ and any word: `hf_dataset_of_2024` is a name.
_SHAPE = re.compile(
    r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}(?:[\w-]|\.(?=\w))*"
    r"|\bsk-(?=[\w-]*[A-Z])(?=[\w-]*\d)[\w-]{16,}"
    r"|\bsk-(?:[a-z0-9]+-)*(?:[a-z0-9]{20,}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
    r"|(?<=Bearer )\S+|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_VARIABLE = re.compile(
    r"(?:\w*_)?(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS|(?:API|ACCESS|SECRET)_?KEY)"
)


def redact(value: Any) -> Any:
    """Return `value` (text, or plain mappings and lists of it) with every secret replaced.

    A secret is what stands under a key like `token` or `api_key`, what an environment variable
    like `HF_TOKEN` holds, and what looks like a token or a password in a URL. `${...}` stays.
    """
    return _redact(value, _environment_secrets())


def misplaced_secrets(tree: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the paths of values that hold a secret of the environment under a key of no secret."""
    secrets = _environment_secrets()

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for key, value in children(node):
            yield from walk(value, (*path, str(key)))
            text = value if isinstance(value, str) and not _is_secret(key, value) else ""
            if any(secret in text for secret in secrets):
                yield *path, str(key)

    yield from walk(tree, ())


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, dict):
        return {k: HIDDEN if _is_secret(k, v) else _redact(v, secrets) for k, v in value.items()}
    if isinstance(value, list):
        return [_redact(each, secrets) for each in value]
    if not isinstance(value, str):
        return value
    for secret in secrets:
        value = value.replace(secret, HIDDEN)
    return _ASSIGNED.sub(rf"\g<1>{HIDDEN}", _SHAPE.sub(HIDDEN, value))


def _is_secret(key: object, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return False
    return bool(_KEY.fullmatch(str(key))) and not str(value).startswith("${")


def _environment_secrets() -> list[str]:
    """Return what variables named like secrets hold; a short one would hide ordinary words."""
    found = [v for k, v in os.environ.items() if len(v) >= 8 and _VARIABLE.fullmatch(k)]
    return sorted(found, key=len, reverse=True)
