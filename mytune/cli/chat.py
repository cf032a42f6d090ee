"""`tune chat`: the chat recipe, with a config made from a model's directory."""

from __future__ import annotations

import json
from pathlib import Path

from mytune.cli import registry
from mytune.cli.parser import Parser
from mytune.cli.run import Job, execute, load
from mytune.errors import CheckpointError, ConfigError

# What describes the model in a directory, and who reads the weights beside it.
_CHECKPOINTERS = {
    "config.json": "mytune.training.FullModelHFCheckpointer",
    "params.json": "mytune.training.FullModelMetaCheckpointer",
}


def parser() -> Parser:
    parser = Parser(
        "chat",
        description="Chat in the terminal with the model in a directory: downloaded, or saved by a"
        " run (epoch_N).",
        epilog="Settings are those of recipes/chat.py, such as device=cpu, temperature=0,"
        " max_new_tokens=200 or system='Be brief.'",
    )
    parser.add_argument("checkpoint_dir", metavar="CHECKPOINT_DIR", help="model and tokenizer")
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter to use with the model")
    parser.add_argument(
        "--recipe", metavar="FILE", default="chat", help="a copy of yours (tune cp chat FILE)"
    )
    parser.add_config_arguments()
    return parser


def main(argv: list[str]) -> int:
    args = parser().parse_intermixed_args(argv)
    folder = Path(args.checkpoint_dir).expanduser()
    settings = {
        "checkpoint_dir": str(folder),
        "checkpointer._component_": checkpointer_of(folder),
    }
    if args.adapter:
        settings["checkpointer.adapter_checkpoint"] = str(adapter_in(Path(args.adapter)))
    made = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    job = Job(
        registry.find_recipe(args.recipe), None, [*made, *args.overrides], args.allow_component
    )
    return execute(job, load(job))


def checkpointer_of(folder: Path) -> str:
    """Return the checkpointer for a model's directory, or say what the directory is instead."""
    if not folder.is_dir():
        raise ConfigError(f"there is no directory {folder}; `tune download` makes one")
    for name, checkpointer in _CHECKPOINTERS.items():
        if (folder / name).is_file():
            return checkpointer
    raise CheckpointError(
        f"{folder} holds no whole model: neither {' nor '.join(_CHECKPOINTERS)} is there",
        _hints(folder),
    )


def _hints(folder: Path) -> list[str]:
    from mytune.config.check import adapters_in, base_of

    models = sorted({file.parent for name in _CHECKPOINTERS for file in folder.glob(f"*/{name}")})
    return [
        *(
            f"it is an adapter: tune chat {base_of(each)} --adapter {each}"
            for each in adapters_in(folder)
        ),
        *(f"a model is there: tune chat {each}" for each in models),
    ]


def adapter_in(path: Path) -> Path:
    """Return the directory of an adapter, which may be a checkpoint's that has it in `adapter`."""
    from mytune.config.check import adapters_in

    path = path.expanduser()
    if found := adapters_in(path):
        return found[0].resolve()
    if not path.is_dir():
        raise ConfigError(f"--adapter {path}: there is no such directory")
    raise CheckpointError(f"--adapter {path}: there is no adapter_config.json in it")
