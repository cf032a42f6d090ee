"""Log-likelihoods of continuations: what is shared is computed once, and no more than is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mytune.errors import NumericalError
from mytune.evaluation.answers import KeptAnswers
from mytune.evaluation.batches import cut, run_batches
from mytune.generation.trees import MAX_TREE_TOKENS, Tree, build_trees, stack
from mytune.modules.decoder import Decoder
from mytune.training.signals import StopSignal

_LOGITS = 2**25  # logits at a time: 128 MiB


class Request(NamedTuple):
    """A context, and the continuation to score: ids."""

    context: Sequence[int]
    continuation: Sequence[int]

    @property
    def read(self) -> list[int]:
        """What the model reads: all but the last token, which is only predicted."""
        return [*self.context, *self.continuation][:-1]


def score(
    model: Decoder,
    requests: Sequence[Request],
    *,
    batch_size: int | str = "auto",
    stop: StopSignal | None = None,
    kept: KeptAnswers | None = None,
) -> list[tuple[float, bool]]:
    """Return each continuation's log-likelihood, and whether it is what greedy decoding gives.

    Logits are float32 before their softmax. Ranks share the work, and all know all results.

    Args:
        model: in eval mode; its weights say the device.
        requests: contexts of at least one token; continuations may be empty.
        batch_size: trees (see `mytune.generation.trees`) at once, or "auto".
        stop: see `run_batches`.
        kept: answers that are known, and where new ones are kept.

    Raises:
        NumericalError: a log-likelihood is not finite.
    """
    asked = [request for request in requests if request.continuation]
    trees = build_trees([request.read for request in asked], MAX_TREE_TOKENS)
    batches = cut(trees, len, batch_size, model.device)

    def work(batch: list[Tree]) -> dict[int, tuple[float, bool]]:
        return _score_trees(model, batch, asked)

    def of_tree(tree: Tree) -> list[tuple[int, Request]]:
        return [(i, asked[i]) for i in tree.paths]

    answer = kept.remembering(work, of_tree) if kept else work
    scores = run_batches(batches, answer, "log-likelihoods", model, stop=stop)
    found = (scores[i] for i in range(len(asked)))
    return [next(found) if request.continuation else (0.0, True) for request in requests]


@torch.no_grad()
def _score_trees(
    model: Decoder, trees: Sequence[Tree], requests: Sequence[Request]
) -> dict[int, tuple[float, bool]]:
    device = model.device
    tokens, positions, mask = stack(trees)
    hidden = model(
        tokens.to(device),
        positions.to(device),
        mask=None if mask is None else mask.to(device),
        output_hidden=True,
    )
    keys, counts, places, targets = _asked(trees, requests, tokens.shape[1])
    device = hidden.device  # where FSDP2 computes, if weights wait on the CPU
    found = _log_probabilities(model, hidden.flatten(0, 1), places.to(device), targets.to(device))
    if not found[0].isfinite().all():
        raise NumericalError(
            "log-likelihoods are not finite: the weights are damaged, or too large for dtype"
        )
    log_likelihoods, misses = (part.cpu().double().split(counts) for part in found)
    return {
        key: (float(log_likelihoods[i].sum()), not misses[i].any()) for i, key in enumerate(keys)
    }


def _asked(
    trees: Sequence[Tree], requests: Sequence[Request], width: int
) -> tuple[list[int], list[int], Tensor, Tensor]:
    """Return requests and their counts of tokens; of each token the place before it, and its id."""
    keys = [key for tree in trees for key in tree.paths]
    counts = [len(requests[key].continuation) for key in keys]
    places = [
        row * width + place
        for row, tree in enumerate(trees)
        for key, path in tree.paths.items()
        for place in path[len(path) - len(requests[key].continuation) :]
    ]
    targets = [token for key in keys for token in requests[key].continuation]
    return keys, counts, torch.tensor(places).long(), torch.tensor(targets).long()


def _log_probabilities(
    model: Decoder, hidden: Tensor, places: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the targets' log-probabilities at places of hidden [n, d], and where argmax misses."""
    needed, which = places.unique(return_inverse=True)
    found = torch.empty(len(places), device=hidden.device)
    misses = torch.empty(len(places), dtype=torch.bool, device=hidden.device)
    step = max(_LOGITS // model.config.vocab_size, 1)
    for start in range(0, len(needed), step):
        logits = model.head(hidden[needed[start : start + step]]).float()
        here = ((which >= start) & (which < start + step)).nonzero()[:, 0]
        rows = which[here] - start
        found[here] = logits[rows, targets[here]] - logits.logsumexp(dim=-1)[rows]
        misses[here] = logits.argmax(dim=-1)[rows] != targets[here]
    return found, misses
