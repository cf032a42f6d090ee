"""Attention with one query per row on a GPU: keys are shared out, what each part found is merged.

Library kernels give a row's keys to one multiprocessor. After Flash-Decoding
(https://pytorch.org/blog/flash-decoding/): here as many work on a row as it has pieces of keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS = 64  # of a piece
_ROWS = 16  # the fewest that a matrix unit multiplies


@triton.jit  # type: ignore[untyped-decorator]
def _attend_piece(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    mask,
    found,
    peaks,
    totals,
    length,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)  # of keys, of all rows of the batch
    piece = tl.program_id(1)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    key = piece * KEYS + tl.arange(0, KEYS)
    here = key < length
    bias = tl.load(mask + head // HEADS * length + key, mask=here, other=float("-inf"))
    bias = bias.to(tl.float32)
    at = (head * tl.num_programs(1) + piece) * GROUP + row
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if tl.max(bias, 0) > float("-inf"):
        queries = tl.load(
            q + (head * GROUP + row)[:, None] * DIM + column[None, :],
            mask=(row < GROUP)[:, None],
            other=0.0,
        )
        keys = tl.load(
            k + (head * length + key)[None, :] * DIM + column[:, None],
            mask=here[None, :],
            other=0.0,
        )
        scores = tl.dot(queries, keys, input_precision="ieee") * scale + bias[None, :]
        peak = tl.max(scores, 1)
        weights = tl.exp(scores - peak[:, None])
        total = tl.sum(weights, 1)
        values = tl.load(
            v + (head * length + key)[:, None] * DIM + column[None, :],
            mask=here[:, None],
            other=0.0,
        )
        out = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        tl.store(found + at[:, None] * DIM + column[None, :], out, mask=(row < GROUP)[:, None])
    tl.store(peaks + at, peak, mask=row < GROUP)
    tl.store(totals + at, total, mask=row < GROUP)


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    found,
    peaks,
    totals,
    out,
    pieces,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PIECES: tl.constexpr,
    STEP: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    head, row = query // GROUP, query % GROUP
    column = tl.arange(0, DIM)
    every = tl.arange(0, PIECES)
    all_peaks = peaks + (head * pieces + every) * GROUP + row
    peak = tl.max(tl.load(all_peaks, mask=every < pieces, other=float("-inf")), 0)
    total = tl.full((), 0.0, tl.float32)
    whole = tl.zeros((DIM,), tl.float32)
    for start in range(0, PIECES, STEP):
        piece = start + tl.arange(0, STEP)
        at = (head * pieces + piece) * GROUP + row
        share = tl.exp(tl.load(peaks + at, mask=piece < pieces, other=float("-inf")) - peak)
        total += tl.sum(share * tl.load(totals + at, mask=piece < pieces, other=0.0), 0)
        some = (share > 0)[:, None]  # a piece that sees nothing wrote nothing
        parts = tl.load(found + at[:, None] * DIM + column[None, :], mask=some, other=0.0)
        whole += tl.sum(share[:, None] * parts, 0)
    tl.store(out + query * DIM + column, (whole / total).to(out.dtype.element_ty))


def takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Say whether queries, keys, values and a mask are such as `attend_one` reads."""
    dim = q.shape[-1]
    return (
        mask is not None
        and mask.is_floating_point()
        and mask.shape[1:3] == (1, 1)
        and k.is_contiguous()
        and v.is_contiguous()
        and 16 <= dim <= 512 // q.element_size()  # of shared memory there is no more
        and dim & (dim - 1) == 0
        and q.shape[2] <= _ROWS
    )


@torch.library.custom_op("mytune::attend_one", mutates_args=())
def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return attention's output [b, k, g, e] for one position.

    Args:
        q: the queries of the heads that share a head of keys, [b, k, g, e].
        k: keys [b, k, t, e], contiguous.
        v: values, alike.
        mask: added to the scores, [b, 1, 1, t]; -inf hides a key. Each row sees at least one.
    """
    q, mask = q.contiguous(), mask.expand(len(q), 1, 1, -1).contiguous()
    batch, heads, group, dim = q.shape
    length = k.shape[2]
    pieces = triton.cdiv(length, _KEYS)
    found = q.new_empty((batch * heads, pieces, group, dim), dtype=torch.float32)
    peaks, totals = q.new_empty((2, batch * heads, pieces, group), dtype=torch.float32)
    out = torch.empty_like(q)
    with torch.cuda.device_of(q):
        _attend_piece[(batch * heads, pieces)](
            q, k, v, mask, found, peaks, totals, length, dim**-0.5, heads, group, _ROWS, dim, _KEYS
        )
        most = triton.next_power_of_2(pieces)
        _merge[(batch * heads * group,)](
            found, peaks, totals, out, pieces, group, dim, most, min(most, 32)
        )
    return out


@attend_one.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return q.new_empty(q.shape)
