"""What rows tell of their format: which special tokens are in them, and how turns end."""

from __future__ import annotations

import logging
from typing import NamedTuple

from mytune.datasets.tokens import Dataset
from mytune.tokenizers import ModelTokenizer

log = logging.getLogger("mytune")

_LOOKED_AT = 100  # samples


class RowFormat(NamedTuple):
    """How rows are written.

    Args:
        special_tokens: those in the rows, by name, but for the one that begins them.
        stop_tokens: those of the tokenizer's that are trained, so that the model writes them.
        chat_template: of conversations, in Jinja; None for other rows, or where there is none.
    """

    special_tokens: dict[str, int]
    stop_tokens: list[int]
    chat_template: str | None


def find_row_format(dataset: Dataset, tokenizer: ModelTokenizer) -> RowFormat:
    """Look at some samples from all of a dataset; warn of a chat format that no template tells."""
    seen: set[int] = set()
    trained: set[int] = set()
    for index in range(0, len(dataset), -(-len(dataset) // _LOOKED_AT)):
        sample = dataset[index]
        seen.update(sample["tokens"].tolist())
        trained.update(sample["labels"].tolist())
    seen.discard(tokenizer.bos_id)
    stops = [token for token in tokenizer.stop_tokens if token in trained]
    template = None
    if set(stops) - {tokenizer.eos_id}:  # turns end
        template = getattr(tokenizer, "chat_template", None)  # one of yours may lack it
        if template is None:
            log.warning(
                "the tokenizer has no chat_template: checkpoints keep that of their base, by which "
                "other programs may write conversations otherwise than these rows"
            )
    special = {name: i for name, i in tokenizer.special_tokens.items() if i in seen}
    return RowFormat(special, stops, template)
