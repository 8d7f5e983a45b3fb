"""Sampling against transformers' logits processors, and batched against unbatched generation."""

import pytest
import torch
from transformers.generation import logits_process

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import ALiBi, Decoder, DecoderConfig, FoPE, Frequencies, NoPE, PartialRoPE, RNoPE, RoPE, RoPEPP
from ropepp_lit.nn.generation import Batch, Row, generate
from ropepp_lit.nn.sampling import RandomNumbers, Sampling, process, sample, seed_of

CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
SCHEMES = {
    "rope": RoPE(),
    "ec": RoPEPP(variant="ec"),
    "eh": RoPEPP(variant="eh"),
    "alibi": ALiBi(),
    "fope": FoPE(context_length=64),
    "partial": PartialRoPE(),
    "nope": NoPE(),
    "rnope": RNoPE(nope_layers=[1]),
}
LENGTHS = (7, 1, 23, 12, 23)


def make(scheme, dtype=torch.float64):
    torch.manual_seed(0)
    return Decoder(CONFIG, SCHEMES[scheme], Frequencies()).to(dtype).eval()


def prompts():
    torch.manual_seed(1)
    return [torch.randint(0, 96, (length,)).tolist() for length in LENGTHS]


def finish(batch, counts):
    """Generate a different number of tokens for each row."""
    written = {number: [] for number in batch.numbers}
    while batch.numbers:
        for number, token in batch.step().items():
            written[number].append(token)
        batch.end([number for number in batch.numbers if len(written[number]) == counts[number]])
    return list(written.values())


@pytest.mark.parametrize("chunk_tokens", [4096, 9, 30])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_batched_generation_equals_unbatched(scheme, chunk_tokens):
    """Rows end at different steps, the longest prompt's first; chunks split long prompts and pack short ones."""
    decoder, counts = make(scheme), [30, 9, 3, 30, 17]
    actual = finish(Batch(decoder, prompts(), max_new_tokens=30, chunk_tokens=chunk_tokens), counts)
    for prompt, count, tokens in zip(prompts(), counts, actual, strict=True):
        alone = generate(decoder, torch.tensor([prompt]), max_new_tokens=count)
        assert tokens == [int(token) for token in alone]
        assert len(set(tokens)) > 2 or count == 3  # no constant text, which any fault would write too


@pytest.mark.parametrize("scheme", ["ec", "alibi"])
def test_batched_logits_equal_unbatched(scheme):
    decoder, seen = make(scheme), []
    decoder.lm_head.register_forward_hook(lambda module, inputs, logits: seen.append(logits.reshape(-1, 96)))
    batch = Batch(decoder, prompts(), max_new_tokens=4, chunk_tokens=30)
    del seen[:]
    rows = [batch.step() for _ in range(4)]
    for number, prompt in enumerate(prompts()):
        ids = prompt + [row[number] for row in rows[:3]]
        expected = decoder(torch.tensor([ids]))[0, -3:]
        torch.testing.assert_close(torch.stack([logits[number] for logits in seen[:3]]), expected, atol=1e-12, rtol=0)


def test_random_numbers_depend_only_on_the_seed_of_the_row():
    decoder, sampling = make("ec"), Sampling(temperature=1.0, top_k=40, top_p=0.95, repetition_penalty=1.2)
    seeds = [seed_of(3, number) for number in range(5)]
    actual = finish(Batch(decoder, prompts(), max_new_tokens=80, sampling=sampling, seeds=seeds), [80, 70, 3, 66, 80])
    pair = Batch(decoder, prompts()[3:], max_new_tokens=66, sampling=sampling, seeds=seeds[3:])
    assert finish(pair, [66, 66]) == [actual[3], actual[4][:66]]
    for number in (0, 1):
        row = Row(decoder).generate(prompts()[number], max_new_tokens=70, sampling=sampling, seed=seeds[number])
        assert list(row) == actual[number][:70]
    assert len({seed_of(seed, index) for seed in range(30) for index in range(30)}) == 900
    drawn = [
        RandomNumbers([5], torch.device("cpu")).next().item(),
        RandomNumbers([6, 5], torch.device("cpu")).next()[1],
    ]
    assert drawn[0] == drawn[1].item()


def test_row_computes_only_new_tokens():
    decoder, lengths = make("ec"), []
    decoder.model.embed_tokens.register_forward_hook(lambda module, inputs, out: lengths.append(inputs[0].shape[1]))
    row, ids = Row(decoder, chunk_tokens=200), prompts()[2]
    first = list(row.generate(ids, max_new_tokens=5))
    assert (lengths, row.num_cached) == ([23, 1, 1, 1, 1], 27)
    for new, read in (
        ([*ids, *first[:4], 3, 4, 5], [3, 1]),  # goes on
        ([*ids[:20], 9, 9], [2, 1]),  # the end has changed
        ([*ids[:20], 9, 9], [1, 1]),  # the same again
        (ids[:10], [1, 1]),  # shorter
        ([*range(95, 0, -1)] * 6, [200, 200, 170, 1]),  # another, which needs more room
    ):
        del lengths[:]
        assert list(row.generate(new, max_new_tokens=2)) == list(Row(decoder).generate(new, max_new_tokens=2))
        assert lengths[: len(read)] == read


def test_row_after_an_interruption():
    decoder, row = make("ec"), Row(make("ec"))
    ids = prompts()[2]
    expected = list(row.generate(ids, max_new_tokens=6))
    calls = []

    def interrupt(module, inputs, output):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    decoder.model.layers[1].register_forward_hook(interrupt)
    row = Row(decoder)
    with pytest.raises(KeyboardInterrupt):
        list(row.generate(ids, max_new_tokens=6))
    assert list(row.generate(ids, max_new_tokens=6)) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 0.9, "min_p": 0.2},
        {"temperature": 0.9, "min_p": 1.0},
        {"temperature": 0.0, "repetition_penalty": 1.7},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 0.8},
    ],
)
@pytest.mark.parametrize("has_ties", [False, True])
def test_scores_equal_those_of_transformers(settings, has_ties):
    torch.manual_seed(0)
    logits, input_ids = 3 * torch.randn(4, 96), torch.randint(0, 96, (4, 11))
    if has_ties:  # as bfloat16 makes them
        logits = logits.round()
    sampling = Sampling(**settings).check()
    processors = logits_process.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(logits_process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature:
        processors.append(logits_process.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(logits_process.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(logits_process.TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            processors.append(logits_process.MinPLogitsWarper(sampling.min_p))
    seen = torch.zeros(4, 96, dtype=torch.bool).scatter_(1, input_ids, True)
    assert torch.equal(process(logits, sampling, seen), processors(input_ids, logits.clone()))


def test_frequencies_of_sampled_tokens():
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log()
    random = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = sample(logits.expand(1000, -1), Sampling(temperature=1.0), random=random)
    assert torch.bincount(tokens, minlength=4).tolist() == [500, 0, 300, 200]
    for number, shift, expected in ((0.0, -1, 1), (1 - 2**-53, 2, 2)):  # the ends of the interval
        random = torch.tensor([number], dtype=torch.float64)
        assert sample(logits.roll(shift)[None], Sampling(temperature=1.0), random=random).item() == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": -1.0}, "temperature: -1.0 must be 0"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_k": -1}, "top_k: -1 must be 0"),
        ({"top_p": 0.0}, "top_p: 0.0 must be above 0"),
        ({"min_p": 1.5}, "min_p: 1.5 must be 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 must be above 0"),
    ],
)
def test_invalid_settings(settings, expected):
    with pytest.raises(UsageError, match=rf"^sample\.{expected}"):
        Sampling(**settings).check("sample.")
