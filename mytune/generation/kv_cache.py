"""The KV cache: keys and values of all layers, allocated once for the prompt and the new tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mytune.modules.decoder import DecoderConfig


class KVCache:
    """Keys and values of earlier positions.

    Only the newest positions are copied, and what is returned is a view of those filled: a token
    costs the same at every position, but for attention over the keys that there are. To forget the
    newest positions, set `filled` to a lower number.

    Args:
        length: positions of a row, prompt and new tokens.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        batch_size: int,
        length: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (batch_size, config.num_kv_heads, length, config.head_dim)
        # Zeros: what a mask hides has weight 0, and 0 times what lay in the memory may be nan.
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
            for _ in range(2)
        )
        self.length = length
        self.filled = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest keys and values [b, kv_heads, s, head_dim] of a layer; return all so far.

        The layers of a forward write the same positions; the last one ends them.

        Raises:
            RuntimeError: more positions than the cache was made for.
        """
        new = k.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        # narrow, unlike a slice, refuses positions that are not there.
        keys.narrow(2, self.filled, new).copy_(k)
        values.narrow(2, self.filled, new).copy_(v)
        end = self.filled + new
        if layer == len(self.keys) - 1:
            self.filled = end
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def repeat(self, times: int) -> None:
        """Make `times` rows of every row, side by side."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor.repeat_interleave(times, dim=0)
