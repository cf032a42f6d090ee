"""What a compiled block keeps: torch.compile's own cut between forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from functorch.compile import (  # type: ignore[import-untyped]
    aot_function,
    min_cut_rematerialization_partition,
    nop,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from mytune.modules.decoder import Decoder


def partition_blocks(model: Decoder, forward: Callable[[], Any]) -> None:
    """Let every block of a model on the meta device keep what it would keep if it were compiled.

    The products and attention of the two graphs are run one by one, without fusion: what is alive
    only inside a pass is then somewhat more than on the device.

    Args:
        model: not recomputed yet.
        forward: runs a forward pass of it, to learn what blocks are called with.
    """
    calls = _arguments(model, forward)
    # Blocks are alike, but for an input that needs no gradient, as the first one's may.
    graphs = {args[0].requires_grad: _graphs(model.layers[0], args) for args in calls}
    for layer in model.layers:
        layer.forward = partial(_run, graphs, layer)


def _arguments(model: Decoder, forward: Callable[[], Any]) -> list[Any]:
    """Return what the first and the last block are called with."""
    calls: list[Any] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: calls.append(args))
        for layer in (model.layers[0], model.layers[-1])
    ]
    forward()
    for hook in hooks:
        hook.remove()
    return calls


def _graphs(block: nn.Module, args: Any) -> Callable[..., Tensor]:
    """Trace a block and return the function that runs its forward and backward graph."""

    def call(parameters: dict[str, Tensor], args: Any) -> Tensor:
        result: Tensor = functional_call(block, parameters, args)
        return result

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(tensor: Tensor) -> Tensor:
            return mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)

        traced: Callable[..., Tensor] = aot_function(
            call, nop, bw_compiler=nop, partition_fn=min_cut_rematerialization_partition
        )
        traced(*tree_map_only(Tensor, fake, (dict(block.named_parameters()), args)))
    return traced


def _run(graphs: dict[bool, Callable[..., Tensor]], block: nn.Module, *args: Any) -> Tensor:
    return graphs[args[0].requires_grad](dict(block.named_parameters()), args)
