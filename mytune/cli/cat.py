"""`tune cat`: a whole config, with a comment on every key."""

from __future__ import annotations

from mytune.cli import registry
from mytune.cli.parser import Parser


def parser() -> Parser:
    parser = Parser(
        "cat", description="Print a whole config: what its file says and the recipe's defaults."
    )
    parser.add_argument("config", metavar="CONFIG", help="a name of `tune ls`, or a YAML file")
    parser.add_argument("--sort", action="store_true", help="order the keys by name")
    return parser


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    print(whole_config(args.config, sort=args.sort), end="")
    return 0


def whole_config(name: str, sort: bool = False) -> str:
    """Return the YAML text of a config with the defaults filled in."""
    from mytune.config import load_config

    file = registry.find_config(name)
    return load_config(registry.recipe_for(name), file).to_yaml(sort=sort)
