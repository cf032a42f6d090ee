"""`tune completion`: a script that completes commands, names and flags in a shell."""

from __future__ import annotations

import importlib

from mytune.cli import registry
from mytune.cli.parser import Parser

_BASH = """_tune() {{
  local words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{verbs}"
  else
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _tune tune
"""

_ZSH = """#compdef tune
_tune() {{
  if (( CURRENT == 2 )); then
    compadd -- {verbs}
  else
    local candidates=""
    case "$words[2]" in
{cases}
    esac
    compadd -- ${{=candidates}}
    _files
  fi
}}
compdef _tune tune
"""


def parser() -> Parser:
    parser = Parser(
        "completion",
        description="Print a completion script.",
        epilog='For bash, put eval "$(tune completion bash)" into ~/.bashrc; likewise for zsh.'
        " For fish: tune completion fish > ~/.config/fish/completions/tune.fish",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def main(argv: list[str]) -> int:
    shell = parser().parse_args(argv).shell
    words = {verb: " ".join(_words(verb)) for verb in registry.VERBS}
    verbs = " ".join([*registry.VERBS, "--help", "--version"])
    if shell == "fish":
        print(f"complete -c tune -n __fish_use_subcommand -a '{verbs}'")
        for verb, each in words.items():
            print(f"complete -c tune -n '__fish_seen_subcommand_from {verb}' -a '{each}'")
        return 0
    name, script = ("words", _BASH) if shell == "bash" else ("candidates", _ZSH)
    cases = "\n".join(f'      {verb}) {name}="{each}" ;;' for verb, each in words.items())
    print(script.format(verbs=verbs, cases=cases), end="")
    return 0


def _words(verb: str) -> list[str]:
    """Return what may follow a verb: the names it takes and its flags."""
    recipes, configs = list(registry.RECIPES), registry.configs()
    names = {
        "ls": recipes,
        "cp": recipes + configs,
        "run": recipes + configs,
        "cat": configs,
        "validate": configs,
        "completion": ["bash", "zsh", "fish"],
    }
    flags = importlib.import_module(f"mytune.cli.{verb}").parser()._option_string_actions
    return [*names.get(verb, []), *flags]
