"""Reading tokens: what a decoder says comes next, with a growing, a static or no KV cache.

Letters in shape comments: b batch, s tokens read at once, t keys, v vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from mytune.generation.kv_cache import KVCache, SharedPrefixKVCache
from mytune.generation.trees import Tree, stack
from mytune.modules.decoder import Cache, Decoder, Rope, rope_angles

_WARM_UP = 3  # steps before a CUDA graph is recorded: kernels are compiled and chosen in them


class CachedReader:
    """Keeps keys and values, and attends to views of those that there are.

    Args:
        model: a decoder.
        cache: what it has read; for `b` rows.
        pads: how many of the first tokens of each row are padding, [b]; None if none are.
    """

    def __init__(self, model: Decoder, cache: KVCache, pads: Tensor | None = None) -> None:
        self.model, self.cache, self.pads = model, cache, pads
        self._slots = torch.arange(cache.length, device=model.device)

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """Read the next tokens [b, s] of every row; return the logits after the last, [b, v]."""
        end = self.cache.filled + tokens.shape[1]
        slots = self._slots[self.cache.filled : end]
        positions, mask = slots[None], None
        if self.pads is not None:
            positions = positions_of(slots, self.pads)
            mask = padded_mask(slots, self._slots[:end], self.pads)
            if tokens.shape[1] == 1:
                mask = additive(mask, self.model.dtype)
        positions = positions + self.cache.first
        hidden = self.model(tokens, positions, mask, self.cache, output_hidden=True)
        return self.model.head(hidden[:, -1])

    @torch.inference_mode()
    def read_trees(self, trees: Sequence[Tree]) -> None:
        """Read the rows of trees as if they were left-padded; what they share is read once."""
        longest = max(len(path) for tree in trees for path in tree.paths.values())
        tokens, positions, mask = stack(trees)
        device, spread = self.model.device, _Spread(self.cache, trees, longest, self.model.device)
        if mask is not None:
            mask = mask.to(device)
        self.model(tokens.to(device), positions.to(device), mask, spread, output_hidden=True)
        self.cache.filled = longest - self.cache.first

    def repeat(self, times: int) -> None:
        """Make `times` rows of every row, side by side."""
        self.cache.repeat(times)
        if self.pads is not None:
            self.pads = self.pads.repeat_interleave(times)


class _Spread(Cache):
    """Copies keys and values of trees' tokens to all the rows that they belong to."""

    def __init__(
        self, cache: KVCache, trees: Sequence[Tree], longest: int, device: torch.device
    ) -> None:
        copies = [
            np.broadcast_arrays(number, path, row, np.arange(longest - len(path), longest))
            for number, tree in enumerate(trees)
            for row, path in tree.paths.items()
        ]
        own = [np.stack(each)[:, cache.first :] for each in copies]
        self._cache = cache
        self._copies = torch.from_numpy(np.concatenate(own, axis=1)).to(device)
        self._copies[3] -= cache.first

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        tree, place, row, slot = self._copies
        self._cache.keys[layer][row, :, slot] = k[tree, :, place]
        self._cache.values[layer][row, :, slot] = v[tree, :, place]
        if isinstance(self._cache, SharedPrefixKVCache):  # a tree begins with its first path
            first = self._cache.first
            self._cache.common.update(layer, k[:1, :, :first], v[:1, :, :first])
        return k, v


class StaticReader(CachedReader):
    """Reads one token per row with the same kernels on the same memory, at every position.

    So on CUDA a step is recorded once, as a CUDA graph, and played again: the CPU then launches one
    graph instead of a thousand kernels. More tokens than one are read as `CachedReader` does.

    Args:
        compile: fuse a step's kernels with `torch.compile` first.
    """

    def __init__(
        self, model: Decoder, cache: KVCache, pads: Tensor | None = None, compile: bool = False
    ) -> None:
        super().__init__(model, cache, pads)
        # Looked up, not computed: a step has a dozen small kernels less.
        self._rope = [each[0, 0] for each in rope_angles(model.config, self._slots[None])]
        self._block: Callable[..., Tensor] = _static_block
        if compile:
            # torch says so of torchao's tensors, in the middle of a text.
            warnings.filterwarnings("ignore", message=".* not implement _stable_hash_for_caching")
            self._block = torch.compile(_static_block)
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def repeat(self, times: int) -> None:
        """Make `times` rows of every row, side by side."""
        super().repeat(times)
        self._inputs = self._graph = self._logits = None
        self._steps = 0

    # Not inference_mode: its tensors have no version, which what compiles and records may ask for.
    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Read the next tokens [b, s] of every row; return the logits after the last, [b, v]."""
        if tokens.shape[1] > 1 or not self.cache.filled:
            return super().read(tokens)
        if self.cache.filled == self.cache.length:
            raise RuntimeError(f"the KV cache is full: it has {self.cache.length} positions")
        if self._inputs is None:
            self._inputs = self._make_inputs(len(tokens))
        token, slot, _ = self._inputs
        token.copy_(tokens)
        slot.fill_(self.cache.filled)
        logits = self._run()
        self.cache.filled += 1
        return logits

    def _make_inputs(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the memory that a step reads: tokens [b, 1], their slot [1], pads [b]."""
        device = self._slots.device
        pads = torch.zeros(rows, dtype=torch.long, device=device)
        if self.pads is not None:
            pads.copy_(self.pads)
        return torch.zeros(rows, 1, dtype=torch.long, device=device), self._slots[:1].clone(), pads

    def _run(self) -> Tensor:
        if self._graph is None and self._slots.is_cuda and self._steps == _WARM_UP:
            self._record()
        self._steps += 1
        if self._graph is None or self._logits is None:
            return self._call()
        self._graph.replay()
        return self._logits

    def _call(self) -> Tensor:
        """Read one token per row; every shape and address is the same at every position."""
        assert self._inputs is not None
        token, slot, pads = self._inputs
        positions = positions_of(slot, pads)
        rope = tuple(each[positions][:, None] for each in self._rope)
        hidden = self.model.embed_tokens(token)
        mask = additive(padded_mask(slot, self._slots, pads), hidden.dtype)
        for layer, keys, values in zip(
            self.model.layers, self.cache.keys, self.cache.values, strict=True
        ):
            hidden = self._block(layer, hidden, rope, mask, keys, values, slot)
        return self.model.head(self.model.norm(hidden)[:, -1])

    def _record(self) -> None:
        """Record a step, if it can be: not if the CPU must wait for what the device has found."""
        with torch.cuda.device(self._slots.device):
            torch.cuda.synchronize()
            if _waits(self._call):
                return
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=_capture_stream(self._slots.device)):
                self._logits = self._call()
            self._graph = graph


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that is recorded: torch has one, of the first device that recorded."""
    return torch.cuda.Stream(device)


def _waits(work: Callable[[], object]) -> bool:
    """Do some work on a GPU; return whether the CPU would have to wait for it in between."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


class _StaticKeys(Cache):
    """A block's keys and values in a static step: the slot is a tensor, all keys are seen."""

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor) -> None:
        self._keys, self._values, self._slot = keys, values, slot

    def update(self, _: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self._keys.index_copy_(2, self._slot, k)
        self._values.index_copy_(2, self._slot, v)
        return self._keys, self._values


def _static_block(
    block: nn.Module,
    hidden: Tensor,
    rope: Rope,
    mask: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
) -> Tensor:
    """Run a block on one token per row. All blocks are alike, so it is compiled once."""
    out: Tensor = block(hidden, rope, mask, _StaticKeys(keys, values, slot))
    return out


def positions_of(slots: Tensor, pads: Tensor) -> Tensor:
    """Return the positions [b, s] of slots [s] in rows that begin with padding."""
    return (slots[None] - pads[:, None]).clamp(min=0)


def padded_mask(queries: Tensor, keys: Tensor, pads: Tensor) -> Tensor:
    """Return which slots [t] the queries in slots [s] may see, bool [b, 1, s, t].

    Those from a row's first token up to the query itself. Padding sees itself: attention to nothing
    would be nan.
    """
    q, k = queries[:, None], keys[None]
    return ((k <= q) & (k >= pads[:, None, None]) | (k == q))[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to add to the scores where a mask is False."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
