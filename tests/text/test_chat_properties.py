"""Property-based tests of trained spans: conversations of any texts, with the templates of six model families."""

from types import SimpleNamespace

import numpy as np
import pytest
from chat_templates import TEMPLATES, make_chat_folder
from chat_templates import template_of as source_of
from hypothesis import assume, given
from hypothesis import strategies as st

from ropepp_lit.text.chat import ChatTemplate
from ropepp_lit.text.conversations import Conversation
from ropepp_lit.text.tokenizer import TextTokenizer, byte_tokenizer, load_tokenizer

PIECES = [
    "assistant", "yes", " ", "\n", "\t", "\u00a0", "🙂", "漢字", "<|im_end|>", "<|im_start|>assistant\n", "</s>",
    "### Answer: ", " [/INST] ", "<start_of_turn>model\n", "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<think>", "</think>", "<think>\nIs it\n<|im_start|>assistant\n?\n</think>\n\n", "\U000f0000",
]  # fmt: skip
CONTENTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=5).map("".join)
ANSWERS = CONTENTS.filter(lambda text: text.rpartition("</think>")[2].strip())


@st.composite
def conversations(draw, name):
    messages = []
    if name != "gemma" and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(CONTENTS)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(CONTENTS)})
        for _ in range(1 if name == "mistral" else draw(st.sampled_from([1, 1, 2]))):
            messages.append({"role": "assistant", "content": draw(ANSWERS)})
            if name == "reasoning" and draw(st.booleans()):
                messages[-1]["reasoning_content"] = draw(CONTENTS)
    return messages


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Templates of each family, without and with `{% generation %}` marks."""
    templates = {}
    for name in TEMPLATES:
        folders = [make_chat_folder(name, tmp_path_factory.mktemp(name) / "f", marks=marks) for marks in (False, True)]
        plain, marked = (ChatTemplate.from_tokenizer(load_tokenizer(str(folder))) for folder in folders)
        templates[name] = SimpleNamespace(plain=plain, marked=marked)
    return templates


@given(name=st.sampled_from(sorted(TEMPLATES)), data=st.data())
def test_spans_equal_those_of_generation_marks(family, name, data):
    conversation = Conversation(messages=data.draw(conversations(name)))
    found = family[name].plain.render_trained(conversation)
    assert found == family[name].marked.render_trained(conversation)
    assert len(found.spans) == sum(message["role"] == "assistant" for message in conversation.messages)


ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
"""End marks of families in which all turns have the same one."""


@pytest.fixture(scope="module")
def by_bytes():
    """Templates with a tokenizer of bytes and special tokens, in which no token crosses the bounds of a turn."""
    templates = {}
    for name, end in ENDS.items():
        tokenizer = byte_tokenizer().tokenizer
        tokenizer.add_special_tokens([end, "<|im_start|>", "<|start_header_id|>", "<|end_header_id|>"])
        templates[name] = ChatTemplate.from_tokenizer(
            TextTokenizer(tokenizer=tokenizer, bos_token_id=0, eos_token_id=1), source_of(name, marks=False)
        )
    return templates


@given(name=st.sampled_from(sorted(ENDS)), data=st.data())
def test_trained_tokens_decode_to_the_answers(by_bytes, name, data):
    template = by_bytes[name]
    messages = data.draw(conversations(name))
    trim = name != "chatml"
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    expected = [(answer.strip() if trim else answer) + ENDS[name] for answer in answers]
    assume(all(answer.strip() for answer in answers))
    ids, trained = template.encode(Conversation(messages=messages))
    bounds = np.flatnonzero(np.diff(trained.astype(int), prepend=0, append=0)).reshape(-1, 2)
    assert [template.tokens.decode(ids[start:end]) for start, end in bounds] == expected
    last = template.encode(Conversation(messages=messages), "last")[1]
    assert np.array_equal(np.flatnonzero(last), np.arange(*bounds[-1]))
