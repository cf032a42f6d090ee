"""`tune validate`: everything that can be known about a config before a run."""

from __future__ import annotations

from pathlib import Path

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
    if not args.recipe:
        _check_kind(args.config, config)
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


def _check_kind(name: str, config: Path) -> None:
    """Refuse a file of which few keys are a recipe's: it is of another library, or another recipe.

    Of its keys it is said what they are called in fine-tuning here.
    """
    from mytune.config.foreign import called_here
    from mytune.config.schema import read_schema
    from mytune.config.torchtune import RETIRED
    from mytune.config.yaml_text import read_yaml

    values = read_yaml(config.read_text(encoding="utf-8")).values
    keys = [key for key in values if key not in RETIRED]
    recipes = {each.file for each in registry.RECIPES.values() if each.file.is_file()}
    most = max(len(read_schema(file).names.keys() & {*keys}) for file in recipes)
    if len(keys) <= 2 * most:
        return
    finetune = read_schema(registry.RECIPES["lora_finetune_single_device"].file).names
    here = {key: called_here(key, finetune) for key in keys}
    raise ConfigError(
        f"{name} is no config of a recipe here: of its {len(keys)} keys none has more than {most}; "
        "begin with `tune cp CONFIG my.yaml` (`tune ls` lists them), or name a recipe of yours: "
        "--recipe FILE",
        [f"{key}: here it is {told}" for key, told in here.items() if told],
    )
