"""End of generated texts, and equality of single and batched generation."""

import dataclasses

import pytest
from others import make_tokenizer

from ropepp_lit.errors import UsageError
from ropepp_lit.inference.completion import Completion, Stream, complete
from ropepp_lit.inference.model import GenerationSettings, load_model, parse_stop
from ropepp_lit.nn.generation import Row
from ropepp_lit.nn.sampling import Sampling
from ropepp_lit.text.stream import StoppingStream
from ropepp_lit.text.tokenizer import load_tokenizer

TEXT = "Naïve café, 漢字 and 🙂: a fox.\nThe end of the fox, the endless end."
STOPS = {
    "none": ((), TEXT),
    "inside a word": (("fé, 漢",), "Naïve ca"),
    "the first of two": (("fox.", "字 a"), "Naïve café, 漢"),
    "whichever begins first": (("end of the fox, the endless ends", "of the"), TEXT[: TEXT.index("of the")]),
    "a beginning that goes on otherwise": (("the endless end!", "the endx"), TEXT),
    "overlapping itself": (("e e ende", "dless end."), TEXT[: TEXT.index("dless end.")]),
    "at the beginning": (("N",), ""),
    "at the very end": (("end.",), TEXT[:-4]),
    "a line end": (("\n",), TEXT[: TEXT.index("\n")]),
}


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "chat"])
@pytest.mark.parametrize("stops", STOPS)
def test_texts_end_before_a_stop_text(kind, stops, tmp_path):
    """Tokens are bytes, parts of characters and complete words; yielded text is final."""
    make_tokenizer(kind, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    stop_texts, expected = STOPS[stops]
    stream, streamed = StoppingStream(tokenizer, stop_texts=stop_texts), ""
    for token in tokenizer.encode_text(TEXT):
        streamed += stream.push(token)
        assert expected.startswith(streamed)
        if stream.is_stopped:
            break
    assert streamed + stream.finish() == expected
    assert stream.is_stopped == (expected != TEXT)


def test_text_is_yielded_as_soon_as_it_is_final(tmp_path):
    make_tokenizer("gpt2", tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    stream = StoppingStream(tokenizer, stop_texts=["aab"])
    assert [stream.push(tokenizer.encode_text(letter)[0]) for letter in "xaaac"] == ["x", "", "", "a", "aac"]


def test_a_stop_token_ends_the_text(tmp_path):
    make_tokenizer("chat", tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    stream = StoppingStream(tokenizer, stop_token_ids=tokenizer.stop_token_ids, stop_texts=["xy"])
    ids = [*tokenizer.encode_text("a fox"), tokenizer.encode_text("x")[0], tokenizer.eos_token_id]
    assert "".join(stream.push(token) for token in ids) == "a foxx"  # including the withheld x
    assert (stream.is_stopped, stream.num_tokens, stream.finish()) == (True, len(ids), "")


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", ()), ("###", ("###",)), (r"\n\n", ("\n\n",)), (r"\\n", ("\\n",)), ("[INST]", ("[INST]",)), ("[", ("[",)),
     ('["a\\n", "b"]', ("a\n", "b")), ("null", ("null",))],
)  # fmt: skip
def test_parsing_of_stop_texts(value, expected):
    assert parse_stop(value) == expected
    assert GenerationSettings(stop_texts=parse_stop(value)).check()
    for wrong in ("[1]", '["a", ""]'):
        with pytest.raises(UsageError, match=r"^stop: "):
            GenerationSettings(stop_texts=parse_stop(wrong)).check()


PROMPTS = ["", "The quick brown fox", "漢字", "def add(first, second):\n    return", "A model reads"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batched_texts_equal_single_ones(base, temperature):
    """Texts end at stop tokens, stop texts, max_new_tokens and the end of the context."""
    model = load_model(str(base))
    sampling = Sampling(temperature=temperature, min_p=0.01)
    stop_texts = ("e", "\n")
    generation = GenerationSettings(max_new_tokens=40, sampling=sampling, seed=5, stop_texts=stop_texts)
    long = model.tokenizer.encode_prompt("The lazy dog " * 20)[: model.context_length - 9]
    prompts = [*(model.tokenizer.encode_prompt(prompt) for prompt in PROMPTS), long]
    together = complete(model, prompts, generation, indices=range(6))
    for index, (ids, completion) in enumerate(zip(prompts, together, strict=True)):
        stream = Stream(model, Row(model.decoder), ids, generation, index=index)
        assert completion == Completion("".join(stream), stream.finish_reason, stream.num_tokens)
        assert complete(model, [ids], generation, indices=[index]) == [completion]
        assert completion.finish_reason == "stop" or completion.num_tokens == (9 if ids is long else 40)
        assert not any(stop in completion.text for stop in stop_texts)
    if temperature:
        others = complete(model, prompts, dataclasses.replace(generation, seed=6), indices=range(6))
        assert others != together
    else:
        assert {completion.finish_reason for completion in together} == {"stop", "length"}


def test_a_special_token_as_stop_text(talker):
    """Special tokens are not part of the decoded text, so they cannot be searched in it."""
    model = load_model(str(talker))
    token = model.tokenizer.tokenizer.token_to_id("<|endoftext|>")
    assert token not in model.tokenizer.stop_token_ids
    for stop_texts in ((), ("x", "<|endoftext|>")):
        stream = model.stream([], GenerationSettings(stop_texts=stop_texts))
        assert (stream.push(token), stream.is_stopped) == ("", bool(stop_texts))


def test_context_length_option(base):
    assert load_model(str(base)).context_length == 96
    model = load_model(str(base), context_length=10)
    assert (model.remaining_tokens([0] * 7), model.limit([0] * 7, 40), model.remaining_tokens([0] * 11)) == (3, 3, 0)
    with pytest.raises(UsageError, match=r"^context_length: 1 must be 2"):
        load_model(str(base), context_length=1)
