"""Quantizers on CUDA: what runs, the same after saving, compiled; 4-bit weights stay on CUDA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mytune.errors import ResourceError
from mytune.evaluation import KeptAnswers
from mytune.generation import generate
from mytune.models import auto_model
from mytune.quantization import QUANTIZERS, Int4WeightOnlyQuantizer, Int8WeightOnlyQuantizer
from mytune.quantization.quantizers import runnable
from mytune.training import FullModelHFCheckpointer, load_for_inference
from tests.hf import tiny_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
    tiny_llama(**sizes, initializer_range=0.05).bfloat16().save_pretrained(folder)
    return folder


def load(folder, device="cuda", **how):
    with torch.device("meta"):
        model = auto_model(str(folder))
    checkpointer = FullModelHFCheckpointer(str(folder))
    return load_for_inference(model, checkpointer, torch.device(device), BF16, **how)


def logits(model):
    tokens = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode():
        return model(tokens).float()


def test_what_the_table_promises_runs_here():
    here = set(runnable(torch.device("cuda"), BF16))
    capability = torch.cuda.get_device_capability()
    promised = {kind.__name__ for kind in QUANTIZERS}
    promised -= {"Float8DynActFloat8WeightQuantizer"} if capability < (8, 9) else set()
    promised -= {"Int4WeightOnlyQuantizer"} if capability < (8, 0) else set()
    assert here == promised


@pytest.mark.parametrize("kind", QUANTIZERS, ids=lambda kind: kind.__name__)
def test_saved_and_loaded_it_computes_the_same(base, tmp_path, kind):
    if kind.__name__ not in runnable(torch.device("cuda"), BF16):
        pytest.skip(f"{kind.__name__} does not run on {torch.cuda.get_device_name()}")
    expected = logits(load(base))
    quantizer = kind()
    model = load(base, quantizer=quantizer)
    assert type(model.layers[0].attn.q_proj.weight) is not nn.Parameter
    worst = 0.6 if "Int4" in kind.__name__ else 0.15  # a CPU's are 0.43 and 0.10
    assert 0 < (logits(model) - expected).norm() / expected.norm() < worst
    FullModelHFCheckpointer(str(base)).save_quantized(tmp_path / "q", model, quantizer)
    again = load(tmp_path / "q")
    assert torch.equal(logits(again), logits(model))
    answers = [KeptAnswers(tmp_path, each, __file__).file for each in (again, model)]
    assert answers[0] == answers[1]  # the same weights
    assert list(generate(again, [5, 6, 7], max_new_tokens=8)) == list(
        generate(model, [5, 6, 7], max_new_tokens=8)
    )


def test_it_compiles(base):
    model = load(base, quantizer=Int8WeightOnlyQuantizer())
    expected = logits(model)
    assert (logits(torch.compile(model)) - expected).norm() / expected.norm() < 0.02


def test_4_bit_weights_are_of_their_device(base, tmp_path):
    quantizer = Int4WeightOnlyQuantizer()
    model = load(base, quantizer=quantizer)
    FullModelHFCheckpointer(str(base)).save_quantized(tmp_path / "q", model, quantizer)
    with pytest.raises(ResourceError, match="was quantized for cuda and cannot be read on cpu"):
        load(tmp_path / "q", "cpu")
