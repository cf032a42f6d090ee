"""The `tune` command: finds the verb and runs it; the verb's module is imported only then."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

from mytune import __version__
from mytune.cli.huge_pages import restart_with_huge_pages
from mytune.cli.registry import RECIPES, VERBS
from mytune.cli.report import open_streams, report, take_debug
from mytune.errors import ConfigError, did_you_mean

HELP = """usage: tune [--version] [--debug] COMMAND ...

Fine-tune language models with recipes to read, copy and change.

commands:
{}

`tune COMMAND --help` explains a command; --debug, anywhere, shows the traceback of an error."""

# What commands of other libraries do, and what does it here.
_ELSEWHERE = {
    "train finetune fine-tune fine_tune sft lora": (
        "tune run lora_finetune_single_device --config CONFIG (`tune ls` lists them)"
    ),
    "eval evaluate": "tune run eleuther_eval --config eleuther_evaluation",
    "infer inference predict": "tune run generate --config generation",
    "merge export": (
        "a LoRA run itself saves the merged model, in output_dir/epoch_N, in Hugging Face's format"
    ),
    "serve": (
        "`tune chat DIR` talks with a model; `vllm serve DIR` and `transformers serve DIR` serve it"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tune` with these arguments (default: the process's) and return the exit code."""
    words = take_debug(sys.argv[1:] if argv is None else argv)
    if argv is None:
        restart_with_huge_pages(words)
        open_streams()
    code = report(lambda: _run(words))
    if argv is None:  # all is said: Ctrl-C while Python ends needs no traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


def _run(words: list[str]) -> int:
    match words:
        case [] | ["-h" | "--help", *_]:
            print(HELP.format("\n".join(f"  {verb:<11} {text}" for verb, text in VERBS.items())))
            return 0
        case ["--version", *_]:
            print(f"mytune {__version__}")
            return 0
        case [verb, *rest] if verb in VERBS:
            code: int = importlib.import_module(f"mytune.cli.{verb}").main(rest)
            return code
    if words[0] in RECIPES:
        raise ConfigError(f"{words[0]} is a recipe, no command: tune run {' '.join(words)}")
    here = [told for names, told in _ELSEWHERE.items() if words[0] in names.split()]
    near = f"; here it is: {here[0]}" if here else did_you_mean(words[0], VERBS)
    raise ConfigError(f"there is no command {words[0]!r} (`tune --help` lists them){near}")
