"""NF4, QLoRA's 4-bit data type, and a frozen linear and embedding that hold their weight in it.

https://arxiv.org/abs/2305.14314: each block of 64 weights is divided by its largest magnitude and
rounded to the nearest of 16 levels; the blocks' scales are 8-bit codes themselves, in groups of 256
that share one step. 4 + 8/64 + 16/(64 * 256) = 4.126 bits per weight. The 4-bit codes are those of
bitsandbytes, byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mytune._sharded import own_rows, sharded_as, whole
from mytune._triton import HAS_TRITON

BLOCK = 64  # weights that share a scale
GROUP = 256  # scales that share a step
_PIECE = 8192  # blocks that a CPU looks up at a time: they stay in its cache
_QUANTIZED_AT_ONCE = 1024 * BLOCK * GROUP  # weights, whose float32 copies take 0.4 GB

# Quantiles of the normal distribution, as float32: appendix E of the paper.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight of any shape; the last block and group are padded with zeros.

    Returns:
        Codes uint8 [blocks, 32], two weights per byte, the first in the high half; scales uint8
        [groups, 256]; steps bfloat16 [groups, 1], scale * step being a block's largest magnitude.
        Steps are bfloat16 so that casting a model cannot change them.
    """
    pieces = weight.detach().flatten().split(_QUANTIZED_AT_ONCE)
    codes, scales, steps = zip(*map(_quantize_piece, pieces), strict=True)
    return torch.cat(codes), torch.cat(scales), torch.cat(steps)


def _quantize_piece(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize weights [n] that end with a group, or are the last."""
    blocks = _rows(weights.float(), BLOCK)
    tiny = torch.finfo(torch.float32).tiny
    largest = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(LEVELS, device=weights.device)
    scaled = blocks * largest.clamp(min=tiny).reciprocal()  # not a division: bitsandbytes' rounding
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)
    groups = _rows(largest, GROUP)
    steps = (groups.amax(dim=1, keepdim=True) / 255).bfloat16()
    scales = (groups / steps.float().clamp(min=tiny)).round().clamp(max=255).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales, steps


def dequantize_nf4(
    codes: Tensor, scales: Tensor, steps: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Return the weight of `shape` that `quantize_nf4` made the tensors of."""
    if codes.is_cuda and HAS_TRITON:
        from mytune.quantization.nf4_triton import dequantize_kernel

        weight: Tensor = dequantize_kernel(codes, scales, steps, *shape, dtype)
        return weight
    largest = (scales.float() * steps).flatten()[: len(codes), None]
    return _look_up(codes, largest, dtype).flatten()[: math.prod(shape)].view(shape)


def _look_up(codes: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights [blocks, 64] of codes [blocks, 32] and largest magnitudes [blocks, 1].

    Products are made in float32 and rounded once. On the CPU piece by piece, which in bfloat16 is
    1.4 times as fast, and never holds the weight in float32 too.
    """
    pairs = _constant_pairs(codes.device)
    if codes.device.type != "cpu" or torch.compiler.is_compiling():
        return (_levels_of(codes, pairs) * largest).to(dtype)
    weight = torch.empty(len(codes), BLOCK, dtype=dtype)
    for *piece, out in zip(*(x.split(_PIECE) for x in (codes, largest, weight)), strict=True):
        torch.mul(_levels_of(piece[0], pairs), piece[1], out=out)
    return weight


def _levels_of(codes: Tensor, pairs: Tensor) -> Tensor:
    """Return the levels, float32 [blocks, 64], that codes [blocks, 32] stand for."""
    return pairs.index_select(0, codes.flatten().int()).view(torch.float32).view(-1, BLOCK)


def _rows(tensor: Tensor, length: int) -> Tensor:
    """Cut a tensor into rows of `length`, the last one filled up with zeros."""
    flat = F.pad(tensor.flatten(), (0, -tensor.numel() % length))
    return flat.view(flat.numel() // length, length)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two levels of each byte, float32 [256, 2] seen as int64 [256].

    Looking up one number of 8 bytes is three times as fast as a row of two of 4.
    """
    levels = torch.tensor(LEVELS)
    return torch.cartesian_prod(levels, levels).view(torch.int64).flatten().to(device)


# A compiled graph holds the table as a constant, and not the making of it.
_constant_pairs: Callable[[torch.device], Tensor] = torch.compiler.assume_constant_result(  # type: ignore[no-untyped-call]
    lambda device: _pairs(device)
)


class _NF4Product(torch.autograd.Function):
    """x W^T, keeping the codes for the backward pass and not the weight they stand for."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, steps: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, steps)
        ctx.shape = shape
        return F.linear(x, dequantize_nf4(codes, scales, steps, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        codes, scales, steps = ctx.saved_tensors
        weight = dequantize_nf4(codes, scales, steps, ctx.shape, grad.dtype)
        return grad @ weight, None, None, None, None


@torch.library.custom_op("mytune::nf4_product", mutates_args=())
def nf4_product(x: Tensor, codes: Tensor, scales: Tensor, steps: Tensor, rows: int) -> Tensor:
    """Return x W^T as `_NF4Product` does, for torch.compile.

    That looks into a Function, merges the two dequantizations, and keeps what they made.
    """
    return F.linear(x, dequantize_nf4(codes, scales, steps, (rows, x.shape[-1]), x.dtype))


@torch.library.custom_op("mytune::nf4_product_backward", mutates_args=())
def nf4_product_backward(
    grad: Tensor, codes: Tensor, scales: Tensor, steps: Tensor, columns: int
) -> Tensor:
    """Return grad W."""
    return grad @ dequantize_nf4(codes, scales, steps, (grad.shape[-1], columns), grad.dtype)


@nf4_product.register_fake
@nf4_product_backward.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, steps: Tensor, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *packed, _ = inputs
    ctx.save_for_backward(*packed)
    ctx.columns = x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return nf4_product_backward(grad, *ctx.saved_tensors, ctx.columns), None, None, None, None


nf4_product.register_autograd(_backward, setup_context=_keep)


class NF4Linear(nn.Module):
    """A linear whose weight is frozen in NF4; gradients go through it to its input.

    Its parameters are uninitialised until `quantize_`, or until a state dict is loaded.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        device: of the parameters, `"meta"` for none yet.
        dtype: of what `dequantize` returns, unless `quantize_` sees another; products are made in
            the dtype of the input.
    """

    codes: nn.Parameter
    scales: nn.Parameter
    steps: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype or torch.get_default_dtype()
        blocks = -(-in_features * out_features // BLOCK)
        groups = -(-blocks // GROUP)
        for name, shape, of in (
            ("codes", (blocks, BLOCK // 2), torch.uint8),
            ("scales", (groups, GROUP), torch.uint8),
            ("steps", (groups, 1), torch.bfloat16),
        ):
            empty = torch.empty(shape, dtype=of, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    @torch.no_grad()
    def quantize_(
        self,
        weight: Tensor,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Take a full-precision weight [out, in], on a device and in a dtype: by default its own.

        Where the parameters are sharded, a rank reads and moves no more than what it keeps.
        """
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"the weight is {list(weight.shape)}, not [{self.out_features}, {self.in_features}]"
            )
        self.dtype = dtype or weight.dtype
        flat = weight.detach().flatten()

        def rows(parameter: Tensor, length: int) -> Tensor:
            own = own_rows(parameter)
            ends = (None if end is None else end * length for end in (own.start, own.stop))
            return flat[slice(*ends)].to(device, self.dtype)

        # A block's codes need that block alone, its scale the others of its group.
        codes, scales, steps = quantize_nf4(rows(self.codes, BLOCK))
        if own_rows(self.codes) != slice(None):
            _, scales, steps = quantize_nf4(rows(self.scales, BLOCK * GROUP))
        for name, tensor in (("codes", codes), ("scales", scales), ("steps", steps)):
            tensor = sharded_as(getattr(self, name), tensor)
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def dequantize(self) -> Tensor:
        """Return the weight [out, in] that the codes stand for, whole on every rank."""
        codes, scales, steps = (whole(each) for each in (self.codes, self.scales, self.steps))
        return dequantize_nf4(codes, scales, steps, self._shape, self.dtype)

    def slices(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weight in pieces: which outputs, and their rows [rows, in]; none is kept.

        A slice is BLOCK * GROUP rows, so that it is made of whole groups whatever their length.
        """
        for start in range(0, self.out_features, BLOCK * GROUP):
            rows = slice(start, min(start + BLOCK * GROUP, self.out_features))
            first, last = rows.start * self.in_features, rows.stop * self.in_features
            blocks = slice(first // BLOCK, -(-last // BLOCK))
            groups = slice(blocks.start // GROUP, -(-blocks.stop // GROUP))
            packed = self.codes[blocks], self.scales[groups], self.steps[groups]
            yield rows, dequantize_nf4(*packed, (rows.stop - start, self.in_features), dtype)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if torch.compiler.is_compiling():
            y = nf4_product(x, self.codes, self.scales, self.steps, self.out_features)
        else:
            y = _NF4Product.apply(x, self.codes, self.scales, self.steps, self._shape)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.dtype}"
        )


class NF4Embedding(NF4Linear):
    """An embedding whose table is frozen in NF4: the linear's rows, of which it looks some up.

    As a linear it is the head of a model that ties the two.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embedding_dim, num_embeddings, device, dtype)

    @property
    def weight(self) -> Tensor:
        """The whole table [num_embeddings, embedding_dim], dequantized anew at each look."""
        return self.dequantize()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the rows [..., embedding_dim] of ids [...]; only these are dequantized."""
        blocks_per_row, rest = divmod(self.in_features, BLOCK)
        if rest:  # a block belongs to two rows
            return F.embedding(tokens, self.dequantize())
        row = torch.arange(blocks_per_row, device=tokens.device)
        blocks = (tokens.reshape(-1, 1) * blocks_per_row + row).flatten()
        scales = self.scales.flatten()[blocks].float() * self.steps.flatten()[blocks // GROUP]
        rows = _look_up(self.codes[blocks], scales[:, None], self.dtype)
        return rows.view(*tokens.shape, self.in_features)


def apply_nf4(
    model: nn.Module, skip: Collection[str] = ("lm_head",), embeddings: bool = False
) -> None:
    """Put an `NF4Linear` in the place of every linear whose last name is not in `skip`.

    One with a bias stays as it is: a Llama has none.
    Weights that exist are quantized; on the meta device the new ones wait for `quantize_`.

    Args:
        embeddings: put an `NF4Embedding` in the place of every embedding, too.
    """
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            kind: type[NF4Linear]
            if type(module) is nn.Linear and module.bias is None and name not in skip:
                kind, sizes = NF4Linear, (module.in_features, module.out_features)
            elif type(module) is nn.Embedding and embeddings:
                kind, sizes = NF4Embedding, (module.num_embeddings, module.embedding_dim)
            else:
                continue
            quantized = kind(*sizes, "meta", module.weight.dtype)
            if not module.weight.is_meta:
                quantized.quantize_(module.weight)
            setattr(parent, name, quantized)
