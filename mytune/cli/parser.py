"""The argument parser of every command."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from mytune.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises a `ConfigError` where argparse would print its usage and exit."""

    def __init__(self, verb: str, **options: Any) -> None:
        super().__init__(prog=f"tune {verb}", allow_abbrev=False, **options)

    def add_config_arguments(self) -> None:
        """Add what `run` and `validate` share: overrides, and which components they may name."""
        self.add_argument("overrides", nargs="*", metavar="key=value", help="or ~key to remove one")
        self.add_argument(
            "--allow-component",
            action="append",
            default=[],
            metavar="NAME",
            help="let the config name components of the package NAME; repeatable",
        )

    def error(self, message: str) -> NoReturn:
        told = message.replace(", key=value", "")  # which need not be there
        raise ConfigError(f"{told}; see `{self.prog} --help`")
