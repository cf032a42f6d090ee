"""Losses that never hold all logits: head and cross entropy are computed together, in chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mytune._triton import HAS_TRITON
from mytune.errors import ConfigError
from mytune.modules.decoder import Decoder
from mytune.modules.masks import packed_mask
from mytune.quantization.nf4 import NF4Embedding, NF4Linear

IGNORE_INDEX = -100


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden W^T)[label]; both gradients are made in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Any, labels: Tensor, chunk: int) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        loss = hidden.new_zeros((), dtype=torch.float32)
        ctx.grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        ctx.grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        ctx.dtypes = hidden.dtype, weight.dtype
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            part, grad = _loss_and_gradient(
                hidden[rows], weight, labels[rows], needs_hidden or needs_weight
            )
            loss += part
            if needs_hidden:
                _grad_hidden(grad, weight, out=ctx.grad_hidden[rows])
            if needs_weight:
                _add_product(ctx.grad_weight, grad.T, hidden[rows])
            del grad  # before the next chunk's logits are made
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if not hasattr(ctx, "grad_hidden"):
            raise RuntimeError("the gradient of a linear cross entropy can be taken only once")
        grads = [
            None if grad is None else grad.mul_(grad_loss).to(dtype)
            for grad, dtype in zip((ctx.grad_hidden, ctx.grad_weight), ctx.dtypes, strict=True)
        ]
        del ctx.grad_hidden, ctx.grad_weight
        return grads[0], grads[1], None, None


def _loss_and_gradient(
    hidden: Tensor, weight: Tensor | NF4Linear, labels: Tensor, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy of a chunk, and the gradient [n, v] of its logits.

    Without `gradient` there is none; something else is returned.
    """
    logits = _logits(hidden, weight)
    if logits.is_cuda and HAS_TRITON and not torch.compiler.is_compiling():
        from mytune.modules.loss_triton import cross_entropy_kernel

        return cross_entropy_kernel(logits, labels, gradient), logits
    dtype, picked = logits.dtype, labels[:, None]
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    del logits
    loss = -log_p.gather(-1, picked).sum()
    if not gradient:
        return loss, log_p
    grad = log_p.exp_()
    grad.scatter_add_(-1, picked, torch.full_like(grad[:, :1], -1.0))
    return loss, grad.to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to a float32 total; without a product in between where that is float32, too."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _logits(hidden: Tensor, weight: Tensor | NF4Linear) -> Tensor:
    """Return the logits [n, v]; of a 4-bit head only slices are dequantized at a time."""
    if isinstance(weight, Tensor):
        return F.linear(hidden, weight)
    logits = hidden.new_empty(len(hidden), weight.out_features)
    for outputs, part in weight.slices(hidden.dtype):
        logits[:, outputs] = F.linear(hidden, part)
    return logits


def _grad_hidden(grad: Tensor, weight: Tensor | NF4Linear, out: Tensor) -> None:
    """Write the gradient [n, d] of the hidden states, given that of the logits [n, v]."""
    if isinstance(weight, Tensor):
        torch.mm(grad, weight, out=out)
        return
    total = torch.zeros_like(out, dtype=torch.float32)
    for outputs, part in weight.slices(grad.dtype):
        total += grad[:, outputs] @ part
    out.copy_(total)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor | NF4Linear, labels: Tensor, chunk: int
) -> Tensor:
    """Return the summed cross entropy (float32, 0-d) of `hidden` [n, d] and a head [v, d].

    Args:
        weight: the head's, or a frozen head in 4 bits.
        labels: [n], all of them valid ids.
        chunk: rows whose logits are held at a time.
    """
    if not torch.is_grad_enabled():  # inside, a weight that trains would ask for its gradient
        hidden = hidden.detach()
        weight = weight.detach() if isinstance(weight, Tensor) else weight
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk)  # type: ignore[no-untyped-call]


class LinearCrossEntropyLoss:
    """Cross entropy summed over the trained tokens of a batch; called with the model and the batch.

    Rows that are not trained are dropped before the head; the loss is float32 for any model.

    Args:
        num_output_chunks: pieces to cut the trained rows into; else `chunk_size` decides.
        ignore_index: label of a token that is not trained; every dataset writes -100.
        chunk_size: trained rows whose logits are held at a time.

    Raises:
        ConfigError: another `ignore_index`: steps would be divided by another number of tokens.
    """

    def __init__(
        self,
        num_output_chunks: int | None = None,
        ignore_index: int = IGNORE_INDEX,
        chunk_size: int = 512,
    ) -> None:
        if ignore_index != IGNORE_INDEX:
            raise ConfigError(
                f"loss.ignore_index is {ignore_index}; tokens that are not trained are labelled "
                f"{IGNORE_INDEX} by every dataset: leave it out"
            )
        self.num_output_chunks = num_output_chunks
        self.chunk_size = chunk_size

    def __call__(self, model: Decoder, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the sum (float32, 0-d) over labels that are not -100.

        Args:
            batch: `tokens` and `labels` [b, s], labels already shifted; for packed rows also
                `positions` and `document_ids` [b, s]. `target_index` [n], the flat places of the
                trained labels, spares the device a round trip.
        """
        return self._loss(model, *trained_hidden(model, batch))

    def _loss(self, model: Decoder, hidden: Tensor, labels: Tensor) -> Tensor:
        chunk = self.chunk_size
        if self.num_output_chunks:
            chunk = max(1, math.ceil(len(labels) / self.num_output_chunks))
        head: Any = model.embed_tokens if model.lm_head is None else model.lm_head
        if type(model).head is not Decoder.head:
            head = None  # one of its own does more, such as capping the logits
        if type(head) in (nn.Embedding, nn.Linear):
            return linear_cross_entropy(hidden, head.weight, labels, chunk)
        if type(head) in (NF4Embedding, NF4Linear):
            return linear_cross_entropy(hidden, head, labels, chunk)
        total = hidden.new_zeros((), dtype=torch.float32)  # other heads are recomputed instead
        for rows, picked in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            total = total + checkpoint(_head_loss, model, rows, picked, use_reentrant=False)
        return total


def trained_hidden(model: Decoder, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the hidden states [n, d] that predict the trained tokens of a batch, and those [n].

    `model.head` makes logits of them. Packed rows attend to their own document only.

    Args:
        batch: see `LinearCrossEntropyLoss`.
    """
    documents, sizes = batch.get("document_ids"), model.config
    mask = None
    if documents is not None:
        mask = packed_mask(documents, sizes.head_dim, sizes.attn_dropout)
    hidden = model(batch["tokens"], batch.get("positions"), mask, output_hidden=True)
    labels, index = batch["labels"].flatten(), batch.get("target_index")
    if index is None:
        index = target_index(labels)
    return hidden.flatten(0, 1)[index], labels[index]


def _head_loss(model: Decoder, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.head(hidden).float(), labels, reduction="sum")


def target_index(labels: Tensor) -> Tensor:
    """Return the flat places [n] of the labels that are trained."""
    return (labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
