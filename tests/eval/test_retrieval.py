"""Retrieval: examples and scores."""

import dataclasses
import itertools
import random
import re
import tracemalloc

import pytest
import torch
from copier import Copier
from others import make_tokenizer
from tokenizers import Regex, Tokenizer, models
from tokenizers.normalizers import Replace

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import Model, load_model
from ropepp_lit.eval.recall import recall_documents
from ropepp_lit.eval.tasks import Request, averages, examples, stock
from ropepp_lit.eval.tasks.base import DEPTHS
from ropepp_lit.eval.tasks.retrieval import FAMILIES
from ropepp_lit.text.tokenizer import TextTokenizer, byte_tokenizer, load_tokenizer, train_tokenizer

ONCE = ("single", "multikey", "multivalue", "multiquery")
"""Families with one occurrence of each answer in the context."""


def make_examples(family, tokenizer, **options):
    return examples.make_examples(FAMILIES[family], tokenizer, **options)


def answer_tokens(family, tokenizer, *, seed):
    return FAMILIES[family].max_new_tokens(tokenizer, seed=seed)


def measure(model, family, *, length, **options):
    return FAMILIES[family].measure(model, Request(length=length, lengths=(length,), **options))


score = FAMILIES["single"].score


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    if request.param == "bytes":
        return byte_tokenizer()
    documents = recall_documents(list(FAMILIES), units=(5, 30), seed=3)
    return train_tokenizer([next(documents) for _ in range(200)], vocab_size=600)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_answer_have_the_exact_length(tokenizer, family):
    decode = tokenizer.tokenizer.decode
    for length in (1000, 1024, 3333):
        room = answer_tokens(family, tokenizer, seed=0)
        examples = make_examples(family, tokenizer, length=length, numbers=range(10), seed=0)
        for example in examples:
            assert len(example.input_ids) + room == length
            assert example.input_ids[0] == tokenizer.bos_token_id
            assert len(tokenizer.tokenizer.encode(example.ideal, add_special_tokens=False).ids) <= room
            text = decode(example.input_ids)
            if family in ONCE:
                assert [text.count(answer) for answer in example.answers] == [1] * len(example.answers)
            else:
                assert all(answer in text for answer in example.answers)
        assert len({decode(example.input_ids) for example in examples}) == 10
    again = make_examples(family, tokenizer, length=3333, numbers=range(2), seed=0)
    assert again == examples[:2]
    assert make_examples(family, tokenizer, length=3333, numbers=range(1), seed=1)[0] != examples[0]


@pytest.mark.parametrize("family", ["single", "multikey"])
def test_the_answer_is_at_the_given_depth(tokenizer, family):
    for example in make_examples(family, tokenizer, length=4000, numbers=range(10), seed=0):
        text = tokenizer.tokenizer.decode(example.input_ids)
        assert text.index(example.answers[0]) / len(text) == pytest.approx(example.depth, abs=0.06)
    assert {e.depth for e in make_examples(family, tokenizer, length=1000, numbers=range(5), seed=0)} == set(DEPTHS)


def test_answers_are_the_most_frequent_words(tokenizer):
    for family, count in (("frequent_words", 3), ("common_words", 10)):
        for length in (1000, 4000):
            for example in make_examples(family, tokenizer, length=length, numbers=range(3), seed=0):
                words = tokenizer.tokenizer.decode(example.input_ids).partition("The ")[0].replace(",", "").split()
                counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
                assert {word for _, word in counts[:count]} == set(example.answers)
                assert counts[count - 1][0] > counts[count][0]


def test_all_examples_fit_if_the_first_do(tokenizer):
    examples = make_examples("frequent_words", tokenizer, length=512, numbers=range(60), seed=0)
    assert len({len(example.input_ids) for example in examples}) == 1


def test_assignments_are_in_order(tokenizer):
    for example in make_examples("tracking", tokenizer, length=2000, numbers=range(5), seed=0):
        text = tokenizer.tokenizer.decode(example.input_ids)
        places = [text.index(f"Let {name} = ") for name in example.answers]
        assert places == sorted(places)
        sources = [text[place:].split("= ")[1].split(".")[0] for place in places]
        assert sources[1:] == example.answers[:-1]
        assert text.endswith(f"that equal {sources[0]} are")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_length_is_rejected_with_a_sufficient_one(tokenizer, family):
    with pytest.raises(UsageError, match=f"are too few for retrieval:{family} .*; give [0-9]+ or more") as refused:
        make_examples(family, tokenizer, length=30, numbers=range(3), seed=0)
    least = int(str(refused.value).split("give ")[1].split()[0])
    assert len(make_examples(family, tokenizer, length=least, numbers=range(3), seed=0)) == 3


@pytest.mark.parametrize("kind", ["chat", "llama2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_examples_have_the_exact_length_with_other_tokenizers(tmp_path, kind, family):
    """The chat tokenizer has truncation to 64 tokens, Llama 2's prepends a space to every text."""
    make_tokenizer(kind, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    room = answer_tokens(family, tokenizer, seed=0)
    for example in make_examples(family, tokenizer, length=2000, numbers=range(2), seed=0):
        assert len(example.input_ids) + room == 2000
        assert tuple(example.input_ids[: len(tokenizer.opening)]) == tokenizer.opening
        assert all(answer in tokenizer.decode(example.input_ids) for answer in example.answers)


def _bytes_behind(normalizer):
    tokenizer = byte_tokenizer()
    tokenizer.tokenizer.normalizer = normalizer
    return dataclasses.replace(tokenizer, is_bytes=False)


def _one_word():
    return TextTokenizer(tokenizer=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")), eos_token_id=0)


NOT_DIGITS, DIGITS = Regex(r"\D+"), Regex(r"\d")


@pytest.mark.parametrize(
    ("make", "family", "message"),
    [
        (
            _one_word,
            "single",
            "retrieval:single: this tokenizer cannot represent its answers: '[0-9]{5}.' is decoded as",
        ),
        (lambda: _bytes_behind(Replace(DIGITS, "")), "tracking", "cannot represent its answers"),
        (
            lambda: _bytes_behind(Replace(NOT_DIGITS, "")),
            "single",
            "retrieval:single at 512 tokens: its text of .* has",
        ),
        (lambda: _bytes_behind(Replace(NOT_DIGITS, " ")), "single", "tokens with this tokenizer, and more of it would"),
    ],
)
def test_texts_that_cannot_fill_a_length_are_rejected(make, family, message):
    with pytest.raises(UsageError, match=message) as refused:
        make_examples(family, make(), length=512, numbers=range(3), seed=0)
    assert "\n" not in str(refused.value)


def test_a_family_with_too_few_fillers_is_rejected(monkeypatch):
    """With 90,000 keys `multikey` has used all numbers of five digits."""
    values = stock.numbers
    monkeypatch.setattr(stock, "numbers", lambda rng: itertools.islice(values(rng), 50))
    with pytest.raises(UsageError, match=r"retrieval:multikey at 4,096 tokens: its text of .* has"):
        make_examples("multikey", byte_tokenizer(), length=4096, numbers=range(3), seed=0)


def test_long_examples_need_few_tokenizer_calls(monkeypatch):
    read = []
    encode = examples._encode
    monkeypatch.setattr(examples, "_encode", lambda tokenizer, text: read.append(len(text)) or encode(tokenizer, text))
    for family in ("single", "multikey"):
        read.clear()
        (example,) = make_examples(family, byte_tokenizer(), length=32_768, numbers=[0], seed=0)
        assert len(example.input_ids) + answer_tokens(family, byte_tokenizer(), seed=0) == 32_768
        assert sum(read) < 5 * 32_768


def test_scores():
    assert score(["12", "34"], " 12, 34.") == 1
    assert score(["12", "34"], "it is 34") == 0.5
    assert score(["AB"], "ab") == 1
    assert score(["12"], "") == 0


@pytest.fixture
def copier(tokenizer, monkeypatch):
    monkeypatch.setattr(Model, "device", torch.device("cpu"))
    return Model(name="copier", path="", decoder=Copier(tokenizer), tokenizer=tokenizer, fingerprint="")


@pytest.mark.parametrize("family", ["single", "multikey"])
def test_a_copier_scores_100(copier, family):
    (overall, *by_depth) = measure(copier, family, length=1000, limit=10, seed=0)
    assert overall.value == 100
    assert [(item.depth, item.value, sum(item.denominators)) for item in by_depth] == [(d, 100, 2) for d in DEPTHS]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perfect_answer_scores_100_and_a_random_model_0(small_checkpoints, monkeypatch, family):
    model = load_model(str(small_checkpoints["ec"]), dtype=torch.float32, device=torch.device("cpu"))
    assert measure(model, family, length=1000, limit=5, seed=0)[0].value == 0
    ideals = iter([e.ideal for e in make_examples(family, model.tokenizer, length=1000, numbers=range(5), seed=0)])
    monkeypatch.setattr(examples, "write_answers", lambda model, prompts, **_: [next(ideals) for _ in prompts])
    assert measure(model, family, length=1000, limit=5, seed=0)[0].value == 100


def test_answers_of_other_examples_score_0():
    """The answer of another example is a guess without the context."""
    examples = make_examples("single", byte_tokenizer(), length=600, numbers=range(50), seed=0)
    answers = [example.answers for example in examples]
    guesses = answers[1:] + answers[:1]
    assert sum(score(right, " ".join(guess)) for right, guess in zip(answers, guesses, strict=True)) == 0


@torch.no_grad()
def test_answers_match_greedy_decoding_without_a_cache(small_checkpoints):
    model = load_model(str(small_checkpoints["eh"]), dtype=torch.float64, device=torch.device("cpu"))
    prompts = torch.randint(2, 258, (3, 40), generator=torch.Generator().manual_seed(0))
    expected = []
    for prompt in prompts:
        ids = prompt[None]
        for _ in range(12):
            ids = torch.cat((ids, model.decoder(ids)[:, -1:].argmax(-1)), dim=1)
        written = ids[0, 40:].tolist()
        eos = model.tokenizer.eos_token_id
        written = written[: written.index(eos)] if eos in written else written
        expected.append(model.tokenizer.tokenizer.decode(written))
    for chunk_tokens in (None, 11):
        actual = examples.write_answers(model, prompts.tolist(), max_new_tokens=12, chunk_tokens=chunk_tokens)
        assert actual == expected


def test_averages_weight_all_examples_equally(small_checkpoints):
    model = load_model(str(small_checkpoints["rope"]), dtype=torch.float32, device=torch.device("cpu"))
    parts = [measure(model, family, length=700, limit=3, seed=0) for family in ("single", "multikey")]
    (overall,) = averages([item for part in parts for item in part])
    assert (overall.part, len(overall.numerators), overall.length) == ("all", 6, 700)


def test_training_documents_contain_answers_but_no_evaluation_entries():
    choose = random.Random(0)
    documents = recall_documents(list(FAMILIES), units=(10, 40), seed=0)
    texts = [next(documents) for _ in range(70)]
    assert len(set(texts)) == 70
    assert all(text.endswith(".") for text in texts)
    candidates = [text for text in texts if re.fullmatch(r"([a-z-]+: [0-9]{5}\.( |$))+", text)]
    queried = choose.choice(candidates)
    last = queried.rstrip(".").split(". ")[-1]
    assert queried.count(last) == 2  # in the context and in the question
    stated = {entry for text in texts for entry in re.findall(r"[a-z]+-[a-z]+: [0-9]{5}", text)}
    assert len(stated) > 200
    tokenizer = byte_tokenizer()
    for example in make_examples("multikey", tokenizer, length=2000, numbers=range(20), seed=0):
        tested = re.findall(r"[a-z]+-[a-z]+: [0-9]{5}", tokenizer.tokenizer.decode(example.input_ids))
        assert len(tested) > 50
        assert not stated & set(tested)


def test_half_of_the_training_documents_have_questions_in_text_order():
    in_order = 0
    for text in itertools.islice(recall_documents(["multikey"], units=(4, 9), seed=0), 100):
        entries = re.findall(r"[a-z]+-[a-z]+: [0-9]{5}", text)
        stated, queried = entries[: len(entries) // 2], entries[len(entries) // 2 :]
        assert sorted(stated) == sorted(queried)
        first = stated.index(queried[0])
        in_order += queried == stated[first:] + stated[:first]
    assert 40 < in_order < 60


def test_memory_does_not_grow_with_the_number_of_examples(small_checkpoints):
    model = load_model(str(small_checkpoints["rope"]), dtype=torch.float32, device=torch.device("cpu"))

    def peak(limit):
        tracemalloc.start()
        measure(model, "single", length=4096, limit=limit, seed=0)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    peak(4)  # one-time allocations
    assert peak(48) < 1.3 * peak(12)
