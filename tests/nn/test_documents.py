"""Packed documents against separate documents."""

import pytest
import torch

from ropepp_lit.nn import Decoder, DecoderConfig, Documents, Frequencies, RoPE, RoPEPP
from ropepp_lit.nn.generation import generate
from ropepp_lit.nn.kernels import attend

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
LENGTHS = [[9, 1, 14, 6], [30], [12, 18]]


def bounds():
    starts = torch.zeros(3, 30, dtype=torch.bool)
    for row, lengths in zip(starts, LENGTHS, strict=True):
        row[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    return Documents.from_starts(starts)


@pytest.fixture(params=["rope", "eh", "ec"])
def decoder(request):
    torch.manual_seed(0)
    scheme = RoPE() if request.param == "rope" else RoPEPP(variant=request.param)
    return Decoder(CONFIG, scheme, Frequencies())


@pytest.fixture
def rows():
    torch.manual_seed(1)
    return [[torch.randint(2, 64, (length,)) for length in row] for row in LENGTHS]


@pytest.fixture
def packed(rows):
    return torch.stack([torch.cat(row) for row in rows])


def test_bounds_and_positions():
    documents = bounds()
    assert documents.cu_seqlens.tolist() == [0, 9, 10, 24, 30, 60, 72, 90]
    assert documents.ids[0].tolist() == [0] * 9 + [1] + [2] * 14 + [3] * 6
    assert documents.positions[0].tolist() == [*range(9), 0, *range(14), *range(6)]
    again = Documents.from_ids(documents.ids)
    assert all(torch.equal(a, b) for a, b in zip(documents[:3], again[:3], strict=True))
    assert documents.longest == again.longest == 30


def test_a_row_that_begins_inside_a_document():
    starts = torch.zeros(2, 5, dtype=torch.bool)
    starts[0, 3] = True
    documents = Documents.from_starts(starts)
    assert documents.cu_seqlens.tolist() == [0, 3, 5, 10]
    assert not starts[:, 0].any()  # the argument is left as it was


def test_logits_equal_each_document_alone(decoder, rows, packed):
    actual = decoder(packed, documents=bounds())
    expected = torch.stack([torch.cat([decoder(document[None])[0] for document in row]) for row in rows])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(actual, decoder(packed), atol=1e-3)


def test_loss_and_gradients_equal_each_document_alone(decoder, rows, packed):
    labels = torch.randint(0, 64, packed.shape)
    decoder.loss(packed, labels, documents=bounds(), reduction="sum").backward()
    actual = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    decoder.zero_grad()
    for row, row_labels in zip(rows, labels, strict=True):
        for document, targets in zip(row, row_labels.split([len(d) for d in row]), strict=True):
            decoder.loss(document[None], targets[None], reduction="sum").backward()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_cached_generation_equals_the_last_document_alone(decoder, rows, packed):
    actual = torch.stack(list(generate(decoder, packed, max_new_tokens=12, documents=bounds())), 1)
    for row, tokens in zip(rows, actual, strict=True):
        alone = [int(token) for token in generate(decoder, row[-1][None], max_new_tokens=12)]
        assert tokens.tolist() == alone


def test_cached_logits_equal_uncached_ones(decoder, packed):
    documents = bounds()
    cache = decoder.allocate_cache(batch_size=3, max_tokens=30)
    parts, start = [], 0
    for size in (11, 1, 18):
        part = slice(start, start + size)
        piece = documents._replace(ids=documents.ids[:, part], positions=documents.positions[:, part])
        parts.append(decoder(packed[:, part], documents=piece, cache=cache))
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), decoder(packed, documents=documents), atol=1e-5, rtol=0)


def test_left_padding_as_a_separate_document(decoder):
    prompt = torch.randint(2, 64, (10,))
    padded = torch.stack([torch.cat([torch.zeros(4, dtype=torch.int64), prompt[4:]]), prompt])
    ids = torch.tensor([[0] * 4 + [1] * 6, [1] * 10])
    actual = torch.stack(list(generate(decoder, padded, max_new_tokens=8, documents=Documents.from_ids(ids))), 1)
    for tokens, text in zip(actual, (prompt[4:], prompt), strict=True):
        assert tokens.tolist() == [int(token) for token in generate(decoder, text[None], max_new_tokens=8)]


def test_one_call_per_document_equals_a_mask(packed):
    torch.manual_seed(0)
    documents = bounds()
    queries, keys, values = torch.randn(3, 30, 4, 8), torch.randn(3, 30, 2, 8), torch.randn(3, 30, 2, 8)
    mask = documents.ids[:, None, :, None] == documents.ids[:, None, None, :]
    mask = mask & torch.ones(30, 30, dtype=torch.bool).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (queries, keys, values)), mask, enable_gqa=True
    ).transpose(1, 2)
    actual = attend(queries, keys, values, documents=documents)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "implementation"), [(torch.float32, None), (torch.bfloat16, "varlen"), (torch.bfloat16, "flash_attn")]
)
def test_attention_on_a_gpu_equals_that_on_the_cpu(packed, dtype, implementation):
    if implementation == "flash_attn":
        pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    documents = bounds()
    heads = [torch.randn(3, 30, heads, 32).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    expected = attend(*heads, documents=documents)
    expected.sum().backward()
    on_gpu = Documents(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in documents))
    copies = [x.detach().cuda().requires_grad_() for x in heads]
    actual = attend(*copies, documents=on_gpu, implementation=implementation)
    actual.sum().backward()
    tolerance = {"atol": 1e-5 if dtype == torch.float32 else 2e-2, "rtol": 1e-2}
    torch.testing.assert_close(actual.cpu(), expected, **tolerance)
    for copy, original in zip(copies, heads, strict=True):
        torch.testing.assert_close(copy.grad.cpu(), original.grad, **tolerance)


def test_error_of_a_full_cache(decoder):
    cache = decoder.allocate_cache(batch_size=1, max_tokens=4)
    with pytest.raises(ValueError, match="capacity of 4 tokens, and 5 are needed"):
        decoder(torch.zeros(1, 5, dtype=torch.int64), cache=cache)
