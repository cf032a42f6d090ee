"""NF4: the format against bitsandbytes and torchao, the linear against plain products."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mytune.quantization import NF4Linear, apply_nf4, quantize_nf4

SHAPES = [(1, 1), (3, 5), (7, 64), (33, 129), (130, 256)]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(weight: Tensor) -> NF4Linear:
    linear = NF4Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.quantize_(weight)
    return linear


def relative_rms(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("scale", [1e-3, 0.02, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_of_normal_weights_is_within_0_095(dtype: torch.dtype, scale: float) -> None:
    weight = normal(256, 512, dtype=dtype) * scale
    linear = filled(weight)
    assert linear.dequantize().dtype == dtype
    assert 0.085 < relative_rms(linear.dequantize(), weight) < 0.095


def test_memory_is_4_127_bits_per_weight() -> None:
    linear = NF4Linear(4096, 4096, device="meta")
    bits = 8 * sum(p.numel() * p.element_size() for p in linear.parameters())
    assert bits / 4096**2 < 4.127


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_is_quantized_block_by_block(shape: tuple[int, int]) -> None:
    """Every weight is within half a gap of its neighbour levels, whatever the shape."""
    weight = normal(*shape)
    found = filled(weight).dequantize()
    assert found.shape == shape
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True).expand_as(blocks).flatten()[: weight.numel()]
    half_gap = (1 - 0.6961928) / 2
    assert ((found - weight).abs().flatten() <= (half_gap + 0.01) * largest).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_are_those_of_bitsandbytes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = normal(*shape, dtype=dtype)
    expected, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, scales, steps = quantize_nf4(weight)
    assert torch.equal(codes.flatten()[: expected.numel()], expected.flatten())
    largest = (scales.float() * steps).flatten()[: len(codes)]
    torch.testing.assert_close(largest, state.absmax, rtol=0.004, atol=float(steps.max()) / 2)


def test_error_is_that_of_bitsandbytes_with_double_quantization() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = normal(512, 512)
    packed = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = relative_rms(bnb.dequantize_4bit(*packed), weight)
    assert relative_rms(filled(weight).dequantize(), weight) == pytest.approx(theirs, rel=0.002)


def test_weights_are_those_of_torchao() -> None:
    nf4 = pytest.importorskip("torchao.quantization")
    weight = normal(512, 512)
    theirs = nf4.to_nf4(weight, block_size=64, scaler_block_size=256).get_original_weight()
    ours = filled(weight).dequantize()
    assert relative_rms(ours, weight) == pytest.approx(relative_rms(theirs, weight), rel=0.002)
    assert relative_rms(ours, theirs) < 0.01


def test_zeros_stay_zeros_and_nan_stays_visible() -> None:
    assert torch.equal(filled(torch.zeros(8, 64)).dequantize(), torch.zeros(8, 64))
    weight = normal(8, 64)
    weight[3, 5] = torch.nan
    assert filled(weight).dequantize()[3].isnan().all()


def test_casting_the_module_changes_nothing() -> None:
    linear = filled(normal(64, 96))
    before = linear.dequantize()
    assert torch.equal(linear.to(torch.bfloat16).float().dequantize(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_the_dequantized_weight(dtype: torch.dtype) -> None:
    linear = filled(normal(40, 72, dtype=dtype))
    x = normal(2, 3, 72, dtype=dtype, seed=2).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    expected = F.linear(twin, linear.dequantize())
    found = linear(x)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(found, expected)
    assert torch.equal(x.grad, twin.grad)
    assert all(p.grad is None for p in linear.parameters())


def test_backward_keeps_the_codes_and_not_the_weight() -> None:
    linear = filled(normal(64, 128))
    x = normal(2, 128).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x)
    assert {t.data_ptr() for t in kept} == {
        p.data_ptr() for p in (linear.codes, linear.scales, linear.steps)
    }


def test_recomputed_gradients_are_the_same() -> None:
    linear = filled(normal(64, 128))
    x = normal(2, 128).requires_grad_()
    linear(x).square().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(linear, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_compiles_into_one_graph() -> None:
    linear = filled(normal(64, 128))
    x = normal(2, 128).requires_grad_()
    expected = linear(x)
    expected.square().sum().backward()
    gradient, x.grad = x.grad, None
    found = torch.compile(linear, fullgraph=True)(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_keep_no_weight_for_the_backward_pass(backend: str) -> None:
    layers = nn.Sequential(filled(normal(96, 64)), nn.SiLU(), filled(normal(64, 96)))
    x = normal(2, 64).requires_grad_()
    y = torch.compile(layers, backend=backend)(x)
    kept = y.grad_fn.saved_tensors
    assert max(each.numel() for each in kept) == 96 * 64 // 2  # the codes


def test_state_dict_goes_through_safetensors_bit_for_bit(tmp_path: Path) -> None:
    linear = filled(normal(33, 129))
    save_file(linear.state_dict(), tmp_path / "nf4.safetensors")
    assigned = NF4Linear(129, 33, device="meta")
    assigned.load_state_dict(load_file(tmp_path / "nf4.safetensors"), assign=True)
    copied = NF4Linear(129, 33, device="meta").to_empty(device="cpu")
    copied.load_state_dict(load_file(tmp_path / "nf4.safetensors"))
    for other in (assigned, copied):
        for name, tensor in linear.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name
        assert torch.equal(other.dequantize(), linear.dequantize())
        assert not any(p.requires_grad for p in other.parameters())


def test_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 4\], not \[4, 3\]"):
        NF4Linear(3, 4, device="meta").quantize_(torch.zeros(3, 4))


def tiny() -> nn.Module:
    model = nn.Module()
    model.layers = nn.Sequential(
        nn.Linear(64, 32, bias=False), nn.Linear(32, 64, bias=False), nn.Linear(64, 64)
    )
    model.lm_head = nn.Linear(64, 10, bias=False)
    return model


def test_apply_replaces_linears_on_the_meta_device_but_not_the_head() -> None:
    with torch.device("meta"):
        model = tiny()
    apply_nf4(model)
    kinds = [type(m) for m in (*model.layers, model.lm_head)]
    assert kinds == [NF4Linear, NF4Linear, nn.Linear, nn.Linear]
    assert all(p.is_meta for p in model.parameters())


def test_apply_quantizes_weights_that_exist() -> None:
    model = tiny()
    plain = copy.deepcopy(model)
    apply_nf4(model, skip=("lm_head", "1"))
    assert [type(m) for m in model.layers] == [NF4Linear, nn.Linear, nn.Linear]
    assert torch.equal(model.layers[0].dequantize(), filled(plain.layers[0].weight).dequantize())


def test_repr_names_the_sizes() -> None:
    expected = "NF4Linear(in_features=8, out_features=4, dtype=torch.bfloat16)"
    assert repr(NF4Linear(8, 4, device="meta", dtype=torch.bfloat16)) == expected
