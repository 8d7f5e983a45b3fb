"""Associative recall and induction: what the texts repeat, and what is predicted of it."""

import itertools
import random
import re

import numpy as np
import pytest

from ropepp_lit.eval import reading
from ropepp_lit.eval.reading import MAX_PAIRS, RUN, WORDS, draft, reading_documents

KINDS = ("recall", "induction")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_predicted_stood_in_the_text_before(kind):
    for number in range(5):
        made = draft(kind, random.Random(number), units=100, pairs=12)
        text, spans = made.text(list(itertools.islice(made.fillers, 100)))
        assert len(spans) == len(made.repeated) == (12 if kind == "recall" else 100 // 32)
        for source, start, end in spans:
            told = text[start:end]
            assert text[source : source + end - start] == told
            assert source + len(told) < start
            if kind == "recall":
                key = text[:start].split()[-1]
                assert re.findall(rf"\b{key} (\w+)", text) == [told, told]
            else:
                assert len(told.split()) == RUN - 1
                run = [text[:start].split()[-1], *told.split()]
                assert all(text.split().count(word) == 2 for word in run)


@pytest.mark.parametrize("kind", KINDS)
def test_distances_reach_over_the_whole_text(kind):
    """Each doubling of the distance has about as many predictions, and both ends of the text are met."""
    distances, size = [], 0
    for number in range(100):
        made = draft(kind, random.Random(number), units=300, pairs=8)
        text, spans = made.text(list(itertools.islice(made.fillers, 300)))
        distances += [(start - source) / len(text) for source, start, _ in spans]
        size = max(size, len(text))
    found, _ = np.histogram(np.log2(distances), bins=[-5, -4, -3, -2, -1, 0])
    assert found.min() > 0.6 * found.max() > 50


def test_documents_are_of_other_random_numbers_than_tests():
    documents = list(itertools.islice(reading_documents(KINDS, words=(8, 200), seed=0), 100))
    assert len(set(documents)) == 100
    assert documents == list(itertools.islice(reading_documents(KINDS, words=(8, 200), seed=0), 100))
    assert documents[0] != next(reading_documents(KINDS, words=(8, 200), seed=1))
    recall, induction = documents[::2], documents[1::2]
    told = {pair for text in recall for pair in re.findall(r"\w+: \w+\.", text)}
    made = draft("recall", random.Random("0/recall/0"), units=100, pairs=MAX_PAIRS)
    tested = {item.text for item in made.repeated}
    assert len(told) > 300
    assert len(told & tested) < 10  # by chance: of 406 * 405 pairs
    assert {word for text in induction for word in text.split()} <= set(WORDS)


def test_words_are_told_apart():
    assert len(set(WORDS)) == len(WORDS) > reading.MAX_RUNS * RUN
    assert all(re.fullmatch("[a-z]{2,7}", word) for word in WORDS)
