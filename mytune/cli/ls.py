"""`tune ls`: the recipes and their configs."""

from __future__ import annotations

from mytune.cli import registry
from mytune.cli.parser import Parser


def parser() -> Parser:
    parser = Parser("ls", description="List the recipes and the configs that belong to each.")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="only this recipe's configs")
    return parser


def main(argv: list[str]) -> int:
    wanted = parser().parse_args(argv).recipe
    if wanted is not None and wanted not in registry.RECIPES:
        raise registry.unknown("recipe", wanted, registry.RECIPES)
    rows = [("RECIPE", "CONFIG")]
    for recipe in registry.RECIPES.values():
        if wanted in (None, recipe.name) and recipe.file.is_file():
            first, *more = recipe.configs() or ["(no config)"]
            rows += [(recipe.name, first), *(("", config) for config in more)]
    print("\n".join(f"{recipe:<40} {config}" for recipe, config in rows))
    return 0
