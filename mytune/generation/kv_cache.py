"""The KV cache: keys and values of all layers, allocated once for the prompt and the new tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mytune.modules.decoder import Cache, DecoderConfig


class KVCache(Cache):
    """Keys and values of earlier positions.

    Only the newest positions are copied, and what is returned is a view of those filled: a token
    costs the same at every position, but for attention over the keys that there are. To forget the
    newest positions, set `filled` to a lower number.

    Args:
        length: positions of a row, prompt and new tokens.
    """

    first = 0  # position of what is kept first

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


class SharedPrefixKVCache(KVCache):
    """Keys and values of rows that begin alike: those of the common positions are kept once.

    All rows together attend to the common positions, as queries of one row, and each to its own;
    the two are merged by their log-sum-exps, which only the CPU's attention returns.

    Args:
        common: positions that are the same in all rows.
        length: positions of a row, with these.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        common: int,
        batch_size: int,
        length: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(
            config, batch_size=batch_size, length=length - common, device=device, dtype=dtype
        )
        self.common = KVCache(config, batch_size=1, length=common, device=device, dtype=dtype)
        self.first = common

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend with one query [b, h, 1, e], see `attend_one_query`; the mask is of k and v."""
        heads = k.shape[1]
        q = q.view(len(q), heads, -1, q.shape[-1])
        own, own_sum = _attend(q, k, v, mask)
        queries = q.transpose(0, 1).flatten(1, 2)[None]
        common, common_sum = _attend(queries, self.common.keys[layer], self.common.values[layer])
        share = torch.sigmoid(common_sum.view(heads, len(q), -1).transpose(0, 1) - own_sum)
        common = common.view(heads, len(q), -1, q.shape[-1]).transpose(0, 1)
        return own.float().lerp(common.float(), share[..., None]).to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return attention's output [b, k, q, e] and the log of what it was divided by, [b, k, q]."""
    out: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=mask
    )
    return out
