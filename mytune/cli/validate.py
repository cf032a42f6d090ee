"""`tune validate`: everything that can be known about a config before a run."""

from __future__ import annotations

from mytune.cli import registry
from mytune.cli.parser import Parser
from mytune.cli.report import say
from mytune.errors import ConfigError


def parser() -> Parser:
    parser = Parser(
        "validate",
        description="Check a config: keys and types, components' arguments, input files.",
        epilog="A file is checked against the recipe that it fits best, unless --recipe names one.",
    )
    parser.add_argument("config", metavar="CONFIG", help="a name of `tune ls`, or a YAML file")
    parser.add_argument("--recipe", metavar="RECIPE", help="what CONFIG is for: a name or a file")
    parser.add_config_arguments()
    return parser


def main(argv: list[str]) -> int:
    from mytune.cli.run import Job, load

    args = parser().parse_intermixed_args(argv)
    config = registry.find_config(args.config)
    recipe = registry.find_recipe(args.recipe) if args.recipe else registry.recipe_for(args.config)
    name = args.recipe or ""
    try:
        loaded = load(Job(recipe, config, args.overrides, args.allow_component, name=name))
    except ConfigError:
        if not args.recipe and args.config not in registry.configs():
            told = "--recipe NAME checks it against another"
            say(f"notice: checked as a config of {recipe.name}; {told}")
        raise
    print(
        f"Config is well-formed: {args.config}\n"
        f"  Checked against {recipe.name}: {len(loaded.values())} keys and types,"
        " components, arguments, input files"
    )
    return 0
