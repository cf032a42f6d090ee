"""An optimizer's state survives the disk bit for bit, whatever the optimizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mytune.errors import CheckpointError, ConfigError
from mytune.training.checkpointing.optimizer import _reader, load_optimizer_state, optimizer_state
from mytune.training.checkpointing.safetensors_io import write_safetensors

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": torch.optim.AdamW,
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "AdamW lr as a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "SGD": torch.optim.SGD,
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    **{
        name: getattr(torch.optim, name)
        for name in "Adadelta Adafactor Adagrad Adam Adamax ASGD NAdam RAdam RMSprop Rprop".split()
    },
    "LBFGS": torch.optim.LBFGS,
}


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False)).to(dtype)


def train(net: nn.Module, optimizer: Any, steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    dtype = next(net.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(5, 4, generator=generator).to(dtype)

        def loss(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            value = net(x).float().square().sum()
            value.backward()
            return value

        optimizer.step(loss)


def through_the_disk(state: Any, folder: Path) -> Any:
    tensors, said = state
    (folder / "state.json").write_text(json.dumps(said))
    if tensors:
        (folder / "o.safetensors").unlink(missing_ok=True)
        write_safetensors(folder / "o.safetensors", tensors)
        tensors = load_file(folder / "o.safetensors", backend="pread")
    return tensors, json.loads((folder / "state.json").read_text())


def resumed_equals_uninterrupted(make: Any, folder: Path, dtype: torch.dtype) -> None:
    net = model(dtype)
    optimizer = make(net.parameters())
    train(net, optimizer, 3)
    saved = through_the_disk(optimizer_state(net, optimizer), folder)
    other = model(dtype)
    other.load_state_dict(net.state_dict())
    fresh = make(other.parameters())
    load_optimizer_state(other, fresh, *saved)
    again = optimizer_state(other, fresh)
    assert through_the_disk(again, folder)[1] == saved[1]
    assert all(torch.equal(tensor, saved[0][name]) for name, tensor in again[0].items())
    assert all(tensor.dtype == saved[0][name].dtype for name, tensor in again[0].items())
    train(net, optimizer, 2)
    train(other, fresh, 2)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_goes_on_exactly(name: str, tmp_path: Path) -> None:
    resumed_equals_uninterrupted(OPTIMIZERS[name], tmp_path, torch.float32)


def test_float32_state_of_bfloat16_weights_keeps_every_bit(tmp_path: Path) -> None:
    net = model(torch.bfloat16)
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        exact = torch.randn(parameter.shape)
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": exact}
    tensors, said = through_the_disk(optimizer_state(net, optimizer), tmp_path)
    fresh = torch.optim.AdamW(net.parameters())
    load_optimizer_state(net, fresh, tensors, said)
    for parameter in net.parameters():
        kept = fresh.state[parameter]["exp_avg"]
        assert kept.dtype == torch.float32
        assert torch.equal(kept, optimizer.state[parameter]["exp_avg"])


def test_torchaos_8_bit_state_is_kept(tmp_path: Path) -> None:
    kind = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit
    net = nn.Linear(64, 128, bias=False)
    optimizer, fresh = torch.optim.AdamW(net.parameters()), torch.optim.AdamW(net.parameters())
    own = kind.zeros((128, 64), signed=False, dtype=torch.bfloat16)
    own.codes.copy_(torch.randint(256, (128, 64)))
    optimizer.state[net.weight] = {"step": torch.tensor(3.0), "exp_avg": own}
    load_optimizer_state(net, fresh, *through_the_disk(optimizer_state(net, optimizer), tmp_path))
    kept = fresh.state[net.weight]["exp_avg"]
    assert (type(kept), kept.signed, kept.dtype) == (kind, False, torch.bfloat16)
    assert torch.equal(kept.codes, own.codes) and torch.equal(kept.qmap, own.qmap)


class Offloading:
    """What torchao's CPUOffloadOptimizer keeps: twins, each with an optimizer of its own."""

    def __init__(self, parameters: Any) -> None:
        first, *rest = parameters
        self.param_d2h_map = {first: nn.Parameter(first.detach().clone())}
        self.optim_dict = {p: torch.optim.AdamW([twin]) for p, twin in self.param_d2h_map.items()}
        self.d_opt = torch.optim.AdamW(rest)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups = [group for each in self.optim_dict.values() for group in each.param_groups]
        return self.d_opt.param_groups + groups

    def zero_grad(self) -> None:
        self.d_opt.zero_grad()
        for parameter in self.param_d2h_map:
            parameter.grad = None

    def step(self, closure: Any) -> None:
        closure()
        self.d_opt.step()
        for parameter, twin in self.param_d2h_map.items():
            twin.grad = parameter.grad
            self.optim_dict[parameter].step()
            parameter.data.copy_(twin)


def test_state_that_is_kept_on_the_cpu_is_found_and_resumed(tmp_path: Path) -> None:
    resumed_equals_uninterrupted(Offloading, tmp_path, torch.float32)


@pytest.mark.parametrize(
    "name", "AdamW8bit PagedAdamW8bit PagedAdamW Lion8bit AdEMAMix AdEMAMix8bit RMSprop8bit".split()
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_bitsandbytes_state_is_kept(name: str, tmp_path: Path) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    # Its states of 8 bits begin at 4096 numbers.
    make = partial(getattr(optim, name), lr=1e-2, **({"min_8bit_size": 1} if "8" in name else {}))
    resumed_equals_uninterrupted(make, tmp_path, torch.float32)


def test_another_learning_rate_wins_also_where_it_is_a_tensor() -> None:
    net = model()
    make = partial(torch.optim.AdamW, list(net.parameters()))
    saved = optimizer_state(net, make(lr=torch.tensor(0.01)))
    fresh = make(lr=torch.tensor(0.02))
    load_optimizer_state(net, fresh, *saved)
    assert fresh.param_groups[0]["lr"] == torch.tensor(0.02)


@pytest.mark.parametrize("known", [True, False], ids=["", "checkpoint that knows no defaults"])
def test_what_the_config_changed_wins_in_each_group_and_what_is_learned_stays(known: bool) -> None:
    net = model()
    first, *rest = net.parameters()

    def make(lr: float, decay: float, momentum: float) -> torch.optim.Optimizer:
        groups = [{"params": [first], "lr": lr, "weight_decay": decay}, {"params": rest}]
        return torch.optim.SGD(groups, lr=0.1, momentum=momentum)

    trained = make(0.01, 0.5, 0.9)
    for group in trained.param_groups:
        group |= {"initial_lr": group["lr"], "lr": group["lr"] / 2, "dampening": 0.25}
    tensors, said = optimizer_state(net, trained)
    if not known:
        del said["defaults"]
    same, other = make(0.01, 0.5, 0.9), make(0.02, 0.6, 0.8)
    for fresh in (same, other):
        load_optimizer_state(net, fresh, tensors, said)
    keys = ("initial_lr", "weight_decay", "momentum", "dampening")
    learned = 0.25 if known else 0
    assert [[group[key] for key in keys] for group in same.param_groups] == [
        [0.01, 0.5, 0.9, learned],
        [0.1, 0, 0.9, learned],
    ]
    assert [[group[key] for key in keys] for group in other.param_groups] == [
        [0.02, 0.6, 0.8, learned],
        [0.1, 0, 0.8, learned],
    ]


def test_a_checkpoint_cannot_name_other_classes() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters())
    _, said = optimizer_state(net, optimizer)
    bad = {"class": "os.system", "parts": {}, "attributes": {"list": []}}
    said["state"] = {"0.weight": {"x": bad}}
    with pytest.raises(CheckpointError, match=r"names 'os\.system'"):
        load_optimizer_state(net, optimizer, {}, said)


@pytest.mark.parametrize("shape", [(3,), (1,), ()])
@pytest.mark.parametrize("key", ["exp_avg", "step"])
def test_state_of_another_shape_never_reaches_a_kernel(key: str, shape: tuple[int, ...]) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    train(net, optimizer, 1)
    tensors, said = optimizer_state(net, optimizer)
    damaged = {**tensors, f"optimizer/0.weight/{key}": torch.zeros(shape)}
    if (key, shape) == ("step", ()):
        return load_optimizer_state(net, optimizer, damaged, said)
    with pytest.raises(
        CheckpointError, match=rf"{key} of 0.weight has the shape \[.*\] is expected"
    ):
        load_optimizer_state(net, optimizer, damaged, said)
    del damaged[f"optimizer/0.weight/{key}"]
    with pytest.raises(CheckpointError, match=rf"damaged: KeyError: 'optimizer/0.weight/{key}'"):
        load_optimizer_state(net, optimizer, damaged, said)


def test_another_optimizer_or_other_parameters_are_refused() -> None:
    net = model()
    saved = optimizer_state(net, torch.optim.AdamW(net.parameters()))
    with pytest.raises(CheckpointError, match=r"is of torch\.optim\.adamw\.AdamW"):
        load_optimizer_state(net, torch.optim.SGD(net.parameters()), *saved)
    with pytest.raises(CheckpointError) as caught:
        load_optimizer_state(net, torch.optim.AdamW(net[0].parameters()), *saved)
    assert caught.value.details == ["only in the checkpoint: 1.weight"]


def test_state_that_cannot_be_stored_is_refused_by_name() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters())
    optimizer.state[net[0].weight]["callback"] = print
    with pytest.raises(ConfigError, match=r"optimizer/0\.weight/callback"):
        optimizer_state(net, optimizer)


@pytest.mark.parametrize(
    ("key", "group", "device"),
    [("exp_avg", {}, "meta"), ("step", {}, "cpu"), ("step", {"fused": True}, "meta")],
)
def test_state_goes_where_the_optimizer_wants_it(key: str, group: Any, device: str) -> None:
    read = _reader({"saved": torch.ones(3)}, torch.empty(3, device="meta"), key, group)
    assert read("saved").device.type == device
