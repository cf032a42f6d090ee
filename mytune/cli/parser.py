"""The argument parser of every verb."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from mytune.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises a `ConfigError` where argparse would print its usage and exit."""

    def __init__(self, verb: str, **options: Any) -> None:
        super().__init__(prog=f"tune {verb}", allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")
