"""Property-based tests of streaming: for any tokens and tokenizer, the joined text equals that of one decode."""

import others
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropepp_lit.text.stream import StoppingStream, TextStream
from ropepp_lit.text.tokenizer import byte_tokenizer, load_tokenizer

TEXTS = st.text(
    st.one_of(st.sampled_from("aefox the,.\n"), st.sampled_from("é漢字🙂\u0301\ufffd▁Ġ"), st.characters(codec="utf-8")),
    max_size=12,
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    tokenizers = {"bytes": byte_tokenizer()}
    for kind in others.KINDS:
        others.make_tokenizer(kind, folder := tmp_path_factory.mktemp(kind))
        tokenizers[kind] = load_tokenizer(str(folder))
    return tokenizers


KINDS = st.sampled_from(["bytes", *others.KINDS])


def draw_ids(data, tokenizer):
    """Draw the tokens of a text, or arbitrary tokens, such as invalid bytes and special tokens."""
    if data.draw(st.booleans()):
        return tokenizer.encode_text(data.draw(TEXTS))
    # Ids below 270 are special tokens and bytes in every kind.
    ids = st.one_of(st.integers(0, 269), st.integers(0, tokenizer.vocab_size - 1))
    return data.draw(st.lists(ids, max_size=12)) * data.draw(st.sampled_from([1, 1, 1, 9]))


@given(kind=KINDS, prompt=TEXTS, data=st.data())
def test_streamed_text_equals_that_of_one_decode(tokenizers, kind, prompt, data):
    tokenizer = tokenizers[kind]
    prompt_ids = tokenizer.encode_prompt(prompt) if data.draw(st.booleans()) else []
    ids = draw_ids(data, tokenizer)
    stream = TextStream(tokenizer, prompt_ids)
    streamed = "".join([*map(stream.push, ids), stream.finish()])
    assert streamed == tokenizer.decode(prompt_ids + ids)[len(tokenizer.decode(prompt_ids)) :]


@given(kind=KINDS, stop_texts=st.lists(st.text("aefo x🙂", min_size=1, max_size=3), max_size=2), data=st.data())
def test_a_text_ends_before_the_first_stop_text(tokenizers, kind, stop_texts, data):
    tokenizer = tokenizers[kind]
    ids = draw_ids(data, tokenizer)
    ends = set(data.draw(st.lists(st.sampled_from(ids), max_size=1))) if ids else set()
    before = ids[: next((position for position, token in enumerate(ids) if token in ends), len(ids))]
    full_text = tokenizer.decode(before)
    for start in data.draw(st.lists(st.integers(0, len(full_text)), max_size=3)):  # strings that occur in the text
        stop_texts = [*stop_texts, full_text[start : start + 2] or "a"]
    stream, given_text = StoppingStream(tokenizer, stop_token_ids=ends, stop_texts=stop_texts), ""
    count = 0
    for token in ids:
        given_text += stream.push(token)
        count += 1
        if stream.is_stopped:
            break
    given_text += stream.finish()
    positions = [position for position in map(full_text.find, stop_texts) if position >= 0]
    assert given_text == full_text[: min(positions, default=len(full_text))]
    assert stream.num_tokens == count <= len(before) + 1
    assert stream.is_stopped == bool(positions or set(ids) & ends)
