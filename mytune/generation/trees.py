"""Token sequences as trees: a token that several of them begin with is there once.

A tree is one row of a batch. Its tokens stand depth first; a token's position is its depth, and it
attends to its ancestors. So the few-shot examples of a task and the question before its answers
are computed once for all that come after them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_TREE_TOKENS = 2048  # a larger tree shares more, but its tokens attend to more


class Branch(NamedTuple):
    """Tokens [start, end) of a tree that hang on token `parent`, or on nothing (-1)."""

    start: int
    end: int
    parent: int


class Tree:
    """Sequences with common prefixes; `paths` holds the places of each one's tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.branches: list[Branch] = []
        self.paths: dict[int, np.ndarray] = {}  # not lists: there are many
        self._path = np.empty(0, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, key: int, sequence: Sequence[int], shared: int) -> None:
        """Add a sequence whose first `shared` tokens are those of the one added before."""
        start, parent = len(self), int(self._path[shared - 1]) if shared else -1
        self.tokens += sequence[shared:]
        self.positions += range(shared, len(sequence))
        own = np.arange(start, len(self), dtype=np.int32)
        self._path = np.concatenate((self._path[:shared], own))
        self.paths[key] = self._path
        if len(self) > start:
            self.branches.append(Branch(start, len(self), parent))

    def fill_mask(self, mask: Tensor) -> None:
        """Set where each token looks, bool [s, s], to itself and what is above it."""
        for start, end, parent in self.branches:
            if parent >= 0:
                mask[start:end] = mask[parent]
            size = end - start
            mask[start:end, start:end] = torch.ones(size, size, dtype=torch.bool).tril()


def build_trees(sequences: Sequence[Sequence[int]], room: int) -> list[Tree]:
    """Return trees that together hold all sequences, the largest first.

    A sequence joins the tree of its lexicographic neighbour if they share a quarter of its tokens
    and the tree stays within `room` tokens, or within twice the sequence's length.
    """
    arrays = [np.asarray(each, dtype=">i4") for each in sequences]  # big-endian: bytes sort alike
    trees: list[Tree] = []
    before = np.empty(0, dtype=">i4")
    for key in sorted(range(len(arrays)), key=lambda i: arrays[i].tobytes()):
        array = arrays[key]
        shared, length = _common_prefix(before, array), len(array)
        fits = trees and len(trees[-1]) + length - shared <= max(room, 2 * length)
        if not fits or 4 * shared < length:
            trees.append(Tree())
            shared = 0
        trees[-1].add(key, array.tolist(), shared)
        before = array
    return sorted(trees, key=len, reverse=True)


def trees_if_shared(sequences: Sequence[Sequence[int]]) -> list[Tree]:
    """Return trees that hold all sequences, or none if they save less than a quarter of them."""
    trees = build_trees(sequences, MAX_TREE_TOKENS)
    padded = len(trees) * len(trees[0])
    return trees if 4 * padded <= 3 * len(sequences) * max(map(len, sequences)) else []


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all sequences begin with alike."""
    first, *others = (np.asarray(each) for each in sequences)
    return min((_common_prefix(first, each) for each in others), default=len(first))


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def stack(trees: Sequence[Tree]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return tokens [b, s], positions [b, s] and mask bool [b, 1, s, s] of trees, padded right.

    The mask is None, which means causal, where no tree branches.
    """
    width = max(map(len, trees))
    tokens = _padded((t.tokens for t in trees), width)
    positions = _padded((t.positions for t in trees), width)
    if all(len(tree.branches) == 1 for tree in trees):
        return tokens, positions, None
    # Padding looks at itself: a row of False would be a softmax over nothing, which is NaN.
    mask = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1, 1)
    for tree, rows in zip(trees, mask[:, 0], strict=True):
        tree.fill_mask(rows)
    return tokens, positions, mask


def _padded(rows: Iterable[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
