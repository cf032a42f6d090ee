"""`tune cp`: a recipe as it is, or a whole config, into a file of the user's."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

from mytune.cli import registry
from mytune.cli.parser import Parser
from mytune.errors import ConfigError, ResourceError


def parser() -> Parser:
    parser = Parser(
        "cp", description="Copy a recipe, or a config with every key and its comment, to change it."
    )
    add = parser.add_argument
    add("name", metavar="NAME", help="a recipe or config that `tune ls` lists")
    add("destination", metavar="DEST", help="a file, with or without suffix, or a folder")
    add("-n", "--no-clobber", action="store_true", help="leave a file that is there as it is")
    add("--make-parents", action="store_true", help="create the folders above DEST")
    return parser


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    recipe = registry.RECIPES.get(args.name)
    names = [*registry.RECIPES, *registry.configs()]
    if args.name not in names:
        raise registry.unknown("recipe or config", args.name, names)
    target = _target(args.destination, args.name, ".py" if recipe else ".yaml")
    if args.no_clobber and target.exists():
        print(f"File already exists at {target}, not overwriting.")
        return 0
    if args.make_parents:
        target.parent.mkdir(parents=True, exist_ok=True)
    elif not target.parent.is_dir():
        raise ConfigError(f"there is no folder {target.parent}: create it, or pass --make-parents")
    text = recipe.file.read_text(encoding="utf-8") if recipe else _config(args.name, target)
    kept = _keep(target) if target.is_file() and target.read_bytes() != text.encode() else ""
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"cannot write {target}: {error.strerror}{kept}") from error
    print(f"Copied file to {target}{kept}")
    return 0


def _keep(file: Path) -> str:
    """Rename what may hold somebody's changes, and say how it is called now."""
    number = next(n for n in count(1) if not file.with_name(f"{file.name}.{n}").exists())
    kept = file.rename(file.with_name(f"{file.name}.{number}"))
    return f"; what was there is now {kept}"


def _target(destination: str, name: str, suffix: str) -> Path:
    """Return the file to write: in a folder it is called as `name`; the suffix may be missing."""
    target = Path(destination).expanduser()
    if target.is_dir() or destination.endswith(os.sep):
        target = target / Path(name).name
    elif target.suffix in (".py", ".yaml", ".yml") and target.suffix != suffix:
        raise ConfigError(f"{name} is a {suffix} file: {destination} has another suffix")
    return target if target.suffix == suffix else target.with_name(target.name + suffix)


def _config(name: str, target: Path) -> str:
    from mytune.cli.cat import whole_config

    recipe = registry.recipe_of(name)
    assert recipe is not None  # every config belongs to a recipe: a test holds it
    line = f"tune run {recipe.name} --config {target}"
    return f"# {name} with every key of its recipe.\n#   {line}\n\n{whole_config(name)}"
