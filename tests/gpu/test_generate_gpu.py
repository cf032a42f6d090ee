"""Generation on CUDA: a recorded step says what an eager one says, and is faster."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F

from mytune import quantization
from mytune.generation import KVCache, PromptCache, generate, generate_batch, pack_linears
from mytune.generation.reading import CachedReader, StaticReader
from mytune.generation.row_linear import RowLinear, TileLinear
from mytune.models.llama3_2 import llama3_2_1b
from tests.generation.conftest import VARIED
from tests.generation.tiles import tiles_of, weight_of
from tests.hf import twins

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

PROMPTS = [[1, 5, 9], [1], [(7 * i + 1) % 160 for i in range(40)], [1, 80, 3, 20, 11, 9, 30]]


@pytest.fixture
def model():
    # TF32 and reordered sums would decide between tokens that are as good as equal.
    torch.set_float32_matmul_precision("highest")
    return twins(**VARIED)[0].cuda()


def readers(model, rows, length):
    for kind in (CachedReader, StaticReader):
        cache = KVCache(
            model.config, batch_size=rows, length=length, device="cuda", dtype=torch.float32
        )
        yield kind(model, cache)


def test_a_recorded_steps_logits_equal_those_of_the_growing_cache(model):
    growing, static = readers(model, 3, 256)
    draw = torch.Generator().manual_seed(0)
    for new in [7, *[1] * 30, 5, *[1] * 10]:  # a conversation: the graph outlives a longer reading
        tokens = torch.randint(0, 160, (3, new), generator=draw).cuda()
        torch.testing.assert_close(static.read(tokens), growing.read(tokens), rtol=0, atol=2e-5)
    assert static._graph is not None


@pytest.mark.parametrize("compile", [False, True])
def test_a_batch_says_what_the_cpu_says(model, compile):
    expected = generate_batch(twins(**VARIED)[0], PROMPTS, max_new_tokens=60)
    assert generate_batch(model, PROMPTS, max_new_tokens=60, compile=compile) == expected


def test_a_seed_repeats_samples(model):
    def draw(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        how = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}
        return generate_batch(
            model, PROMPTS, max_new_tokens=30, num_samples=2, generator=generator, **how
        )

    assert draw(1) == draw(1) != draw(2)


def test_a_conversation_goes_on_with_its_graph(model):
    cache, prompt = PromptCache(model, 256), [1, 5, 9]
    for question in ([20, 21], [30], [40, 41, 42]):
        prompt = prompt + question
        expected = list(generate(model, prompt, max_new_tokens=12))
        assert list(generate(model, prompt, max_new_tokens=12, prompt_cache=cache)) == expected
        prompt += expected


def test_a_step_waits_for_the_device_only_to_read_the_token(model):
    _, static = readers(model, 1, 256)
    token = torch.ones(1, 1, dtype=torch.long, device="cuda")
    for _ in range(6):
        static.read(token)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            token = static.read(token).argmax(-1, keepdim=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def wide(kind):
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8}
    model = twins(**sizes)[0].to("cuda", torch.bfloat16).requires_grad_(False)
    if kind:
        getattr(quantization, kind)().quantize(model)
    return model


@pytest.mark.parametrize(
    "kind", [None, *(f"{name}WeightOnlyQuantizer" for name in ("Int8", "Float8", "Int4"))]
)
def test_packed_linears_are_as_exact(kind):
    """One row by the kernel, more by plain products: no further from float32 than those of torch's.

    The same numbers in float32 are the measure.
    """
    plain, packed, exact = wide(kind), wide(kind), twins_of_numbers(kind)
    pack_linears(packed)
    count = sum(isinstance(module, RowLinear | TileLinear) for module in packed.modules())
    assert count == 4 * len(packed.layers) + 1
    for tokens in (torch.tensor([[5]]), torch.tensor([[7, 80, 9, 3, 11]])):
        expected = exact(tokens.cuda())
        theirs, ours = ((m(tokens.cuda()).float() - expected).norm() for m in (plain, packed))
        assert ours < 1.25 * theirs + 1e-3 * expected.norm()


@pytest.mark.parametrize(("group", "tiles"), [(32, 131), (64, 512), (128, 1024), (256, 131)])
def test_a_row_times_torchs_tiles(group, tiles):
    from mytune.generation.tile_triton import tile_product

    numbers = torch.randint(0, 16, (8 * tiles, 2048))
    pairs = (numbers[:, ::2] << 4 | numbers[:, 1::2]).to(torch.uint8)
    theirs = torch._convert_weight_to_int4pack(pairs.cuda(), 8)
    assert torch.equal(theirs.cpu(), tiles_of(numbers))
    scales = torch.randn(2048 // group, len(numbers), 2, device="cuda").bfloat16()
    x = torch.randn(1, 1, 2048, device="cuda").bfloat16()
    expected = x.double() @ weight_of(theirs, scales).T
    found = tile_product(x, theirs, scales).double()
    assert (found - expected).norm() < 3e-3 * expected.norm()


def twins_of_numbers(kind):
    """Return the model that `wide` makes, with its numbers in float32."""
    model = wide(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and kind:
            weight = module.weight
            if kind == "Int4WeightOnlyQuantizer":
                exact = weight_of(weight.qdata, weight.scale_and_zero)
            else:
                exact = weight.dequantize()
            module.weight = torch.nn.Parameter(exact.float())
    return model.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [256, 8192])
def test_one_query_attends_as_many_do(length, dtype):
    from mytune.modules.attention_triton import attend_one

    draw = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, 8, 4, 128, device="cuda", generator=draw)
    k, v = torch.randn(2, 2, 8, length, 128, device="cuda", generator=draw)
    mask = torch.zeros(2, 1, 1, length, device="cuda")
    mask[..., length // 2 + 5 :] = -torch.inf
    mask[1, ..., :70] = -torch.inf
    exact = F.scaled_dot_product_attention(*(each.double() for each in (q, k, v, mask)))
    found = attend_one(*(each.to(dtype) for each in (q, k, v, mask)))
    assert (found - exact).norm() < {torch.float32: 1e-6, torch.bfloat16: 6e-3}[
        dtype
    ] * exact.norm()


@pytest.mark.parametrize("compile", [False, True])
def test_tokens_per_second_of_a_1b_model(compile, capsys):
    """Prints the speed; it must reach a third of what the memory allows."""
    with torch.device("cuda"):
        model = llama3_2_1b().to(torch.bfloat16).eval()
    pack_linears(model)
    cache, prompt = PromptCache(model, 1024, compile=compile), list(range(1, 65))
    settings = {"max_new_tokens": 256, "prompt_cache": cache}
    list(generate(model, prompt, **settings))
    torch.cuda.synchronize()
    start = time.perf_counter()
    count = len(list(generate(model, prompt, **settings)))
    speed = count / (time.perf_counter() - start)
    # The head is tied, and laid out beside the embedding, of which a row is read.
    read = [p for name, p in model.named_parameters() if "embed" not in name]
    size = sum(p.numel() * p.element_size() for p in read)
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        b.copy_(a)
    torch.cuda.synchronize()
    bandwidth = 10 * 2 * 2**30 / (time.perf_counter() - start)
    with capsys.disabled():
        print(f"\n{speed:.0f} tokens/s, {speed * size / bandwidth:.0%} of memory bandwidth")
    assert speed * size > bandwidth / 3
