"""The KV cache: keys and values of all layers, allocated once for the prompt and the new tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mytune.modules.decoder import DecoderConfig


class KVCache:
    """Keys and values of earlier positions, [layers, b, kv_heads, length, head_dim] each.

    The decoder calls `update` once per layer, and generation `advance` once per forward. What is returned
    is a view of what has been filled, so a step costs what its position costs and nothing is copied.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        batch_size: int,
        length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, length, config.head_dim)
        self._keys = torch.empty(shape, device=device, dtype=dtype).unbind()
        self._values = torch.empty(shape, device=device, dtype=dtype).unbind()
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the newest keys and values [b, kv_heads, s, head_dim]; return all so far, as views."""
        keys, values = self._keys[layer], self._values[layer]
        end = self.length + k.shape[2]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count the positions that all layers have now written."""
        self.length += tokens
