"""Chat templates: text and ids equal those of transformers, and trained are exactly the assistant's turns."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from chat_templates import TEMPLATES, make_chat_folder
from transformers import AutoTokenizer

from ropepp_lit.errors import UsageError
from ropepp_lit.text.chat import NO_END, SPELLS_SPECIAL, ChatTemplate, ChatTemplateError, read_template
from ropepp_lit.text.conversations import Conversation, RowError
from ropepp_lit.text.tokenizer import TextTokenizer, byte_tokenizer, load_tokenizer

THINKING = "<think>\nIs it\n<|im_start|>assistant\n?\n</think>\n\n"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **others):
    return {"role": "assistant", "content": content, **others}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Function that returns the template of a family, with or without marks, and its folder for transformers."""
    families = {}

    def family(name, marks=False):
        if (name, marks) not in families:
            folder = make_chat_folder(name, tmp_path_factory.mktemp("chat") / name, marks=marks)
            template = ChatTemplate.from_tokenizer(load_tokenizer(str(folder)))
            families[name, marks] = SimpleNamespace(template=template, others=AutoTokenizer.from_pretrained(folder))
        return families[name, marks]

    return family


def template_of(text):
    """Create a template for the tokenizer with <|im_start|>, <|im_end|> and <|endoftext|>."""
    tokenizer = byte_tokenizer().tokenizer
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    return ChatTemplate.from_tokenizer(TextTokenizer(tokenizer=tokenizer, bos_token_id=0, eos_token_id=1), text)


def spans(template, messages, **options):
    rendered = template.render_trained(Conversation(messages=messages), **options)
    return [rendered.text[start:end] for start, end in rendered.spans]


def decoded_runs(tokenizer, ids, trained):
    """Decode each run of trained tokens."""
    runs = np.split(ids, np.flatnonzero(np.diff(trained.astype(int))) + 1)
    kept = [
        run
        for run, first in zip(runs, np.split(trained, np.flatnonzero(np.diff(trained)) + 1), strict=True)
        if first[0]
    ]
    return [tokenizer.decode(run, skip_special_tokens=False) for run in kept]


# The second question equals the first answer, and the answers resemble the text around them.
MESSAGES = [
    user("Hi there. "),
    assistant("assistant"),
    user("assistant"),
    assistant(" ### Answer: [/INST] Hi there.\n🙂 \n"),
]
ANSWER = " ### Answer: [/INST] Hi there.\n🙂 \n"
EXPECTED = {
    "chatml": ["assistant<|im_end|>", f"{ANSWER}<|im_end|>"],
    "llama3": ["assistant<|eot_id|>", f"{ANSWER.strip()}<|eot_id|>"],
    "mistral": ["assistant</s>", f"{ANSWER.strip()}</s>"],  # the decoder drops the space at the beginning
    "gemma": ["assistant<end_of_turn>", f"{ANSWER.strip()}<end_of_turn>"],
    "plain": [" assistant", f"{ANSWER.strip()}<|endoftext|>"],  # a token begins before the answer
    "reasoning": ["assistant<|im_end|>", f"<think>\n\n</think>\n\n{ANSWER}<|im_end|>"],
}


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_trained_tokens_decode_to_the_answers_and_end_marks(family, name, marks):
    template, others = family(name, marks).template, family(name, marks).others
    ids, trained = template.encode(Conversation(messages=MESSAGES))
    reference = others.apply_chat_template(MESSAGES, return_assistant_tokens_mask=marks)
    assert ids.tolist() == reference["input_ids"]
    assert decoded_runs(others, ids, trained) == EXPECTED[name]
    if marks:
        assert trained.astype(int).tolist() == reference["assistant_masks"]
    assert decoded_runs(others, *template.encode(Conversation(messages=MESSAGES), "last")) == EXPECTED[name][1:]
    assert template.encode(Conversation(messages=MESSAGES), "all")[1].all()
    completion = Conversation(messages=MESSAGES, prompt_messages=2)
    assert decoded_runs(others, *template.encode(completion)) == EXPECTED[name][1:]


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("chatml", ["<|im_end|>"]),
        ("llama3", ["<|eot_id|>"]),
        ("mistral", ["</s>"]),
        ("gemma", ["<end_of_turn>"]),
        ("plain", ["<|endoftext|>"]),
        ("reasoning", ["<|im_end|>"]),
    ],
)
def test_end_of_turn(family, name, ends):
    template, others = family(name).template, family(name).others
    assert others.convert_ids_to_tokens(template.end_of_turn) == ends
    assert family(name, True).template.end_of_turn == template.end_of_turn
    notices = template.render_trained(Conversation(messages=MESSAGES)).notices
    assert notices == ((NO_END,) if name == "plain" else ())
    assert template.render_trained(Conversation(messages=MESSAGES[:2])).notices == ()


def test_the_end_mark_is_trained_even_if_it_is_the_padding_token(family):
    tokenizer = family("chatml").others
    assert tokenizer.pad_token == "<|im_end|>"
    ids, trained = family("chatml").template.encode(Conversation(messages=MESSAGES))
    assert trained[ids == tokenizer.pad_token_id].tolist() == [False, True, False, True]


REASONING = {
    "reasoning of earlier turns is left out": (
        [user("a"), assistant("yes", reasoning_content="long"), user("b"), assistant("no", reasoning_content="short")],
        ["yes<|im_end|>", "<think>\nshort\n</think>\n\nno<|im_end|>"],
    ),
    "reasoning within the content, with what opens a turn in it": (
        [user("a"), assistant(f"{THINKING}yes"), user("b"), assistant(f"{THINKING}no")],
        ["yes<|im_end|>", f"{THINKING}no<|im_end|>"],
    ),
    "tools": (
        [
            user("add"),
            assistant("", tool_calls=[call("add", {"a": 1}), call("add", '{"a": 2}')]),
            {"role": "tool", "content": "add <|im_start|>assistant\n1"},
            {"role": "tool", "content": "2"},
            assistant("Now", tool_calls=[call("add", {"a": "<tool_call>"})]),
            {"role": "tool", "content": "3"},
            assistant("3"),
        ],
        [
            '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
            '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
            'Now\n<tool_call>\n{"name": "add", "arguments": {"a": "<tool_call>"}}\n</tool_call><|im_end|>',
            "<think>\n\n</think>\n\n3<|im_end|>",
        ],
    ),
    "reasoning before a call": (
        [user("add"), assistant("<think>\nhm\n</think>", tool_calls=[call("add", {})])],
        ['<think>\nhm\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>'],
    ),
    "a tool's response within a user's message": (
        [user("a"), assistant("b"), user("<tool_response>c</tool_response>"), assistant("d", reasoning_content="r")],
        ["b<|im_end|>", "<think>\nr\n</think>\n\nd<|im_end|>"],
    ),
}


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("case", REASONING)
def test_reasoning_and_tool_calls(family, case, tools):
    messages, expected = REASONING[case]
    for marks in (False, True):
        template, others = family("reasoning", marks).template, family("reasoning", marks).others
        conversation = Conversation(messages=messages, tools=tools)
        ids, trained = template.encode(conversation)
        assert ids.tolist() == others.apply_chat_template(messages, tools=tools)["input_ids"]
        assert decoded_runs(others, ids, trained) == expected
        last = template.render_trained(conversation, "last")
        assert [last.text[start:end] for start, end in last.spans] == expected[-1:]


def test_template_variables_can_change_the_opening_of_a_turn(family):
    template = family("reasoning").template
    messages = [user("a"), assistant("b")]
    conversation = Conversation(messages=messages, options={"enable_thinking": False})
    rendered = template.render_trained(conversation)
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["b<|im_end|>"]


BEGIN = "{% for m in messages %}"
HEADER = "<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURNS = [user("a"), assistant("b"), user("c"), assistant("d")]

PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

UNUSUAL = {
    "another end mark after the last turn": (
        BEGIN + HEADER + "{{ m.content }}{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}{% endfor %}" + PROMPT,
        TURNS, ["b<|im_end|>", "d<|endoftext|>"], ["<|endoftext|>", "<|im_end|>"],
    ),
    "a token after the conversation": (
        BEGIN + HEADER + "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if not add_generation_prompt %}<|endoftext|>{% endif %}" + PROMPT,
        TURNS, ["b<|im_end|>", "d<|im_end|>"], ["<|im_end|>"],
    ),
    "no generation prompt": (
        BEGIN + HEADER + "{{ m.content }}<|im_end|>\n{% endfor %}",
        TURNS, ["b<|im_end|>", "d<|im_end|>"], ["<|im_end|>"],
    ),
    "reasoning opened by the prompt, and left out of earlier turns": (
        BEGIN + HEADER + "{{ '<think>' if loop.last }}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}",
        TURNS, ["b<|im_end|>", "d<|im_end|>"], ["<|im_end|>"],
    ),
    "answers in a row become one": (
        BEGIN + "{% if loop.first or m.role != loop.previtem.role %}" + HEADER + "{% else %}{{ '\n' }}{% endif %}"
        "{{ m.content }}{% if loop.last or m.role != loop.nextitem.role %}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT,
        [user("a"), assistant("b"), assistant("c"), user("d"), assistant("e")], ["b", "\nc<|im_end|>", "e<|im_end|>"],
        ["<|im_end|>"],
    ),
    "an end mark of several tokens": (
        BEGIN + "{{ m.role }}: {{ m.content }}\n===\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        TURNS, ["b\n===", "d\n==="], [],
    ),
    "nothing ends a turn": (
        BEGIN + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        TURNS, ["b", "d"], [],
    ),
    "questions in capitals": (
        BEGIN + HEADER + "{{ m.content | upper if m.role == 'user' else m.content }}<|im_end|>\n{% endfor %}" + PROMPT,
        [user("<|im_start|>assistant\n"), assistant("Assistant")], ["Assistant<|im_end|>"], ["<|im_end|>"],
    ),
    "contents in parts": (
        BEGIN + HEADER + "{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT,
        [user(PARTS), assistant(PARTS)],
        ["ab<|im_end|>"], ["<|im_end|>"],
    ),
    "contents in parts where the template reads text": (
        BEGIN + HEADER + "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT,
        [user(PARTS), assistant(PARTS)],
        ["ab<|im_end|>"], ["<|im_end|>"],
    ),
    "text where the template reads parts": (
        BEGIN + HEADER + "{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT,
        TURNS, ["b<|im_end|>", "d<|im_end|>"], ["<|im_end|>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_templates(case):
    text, messages, expected, ends = UNUSUAL[case]
    template = template_of(text)
    assert spans(template, messages) == expected
    assert [byte_token(template, token) for token in template.end_of_turn] == ends
    assert (NO_END in template.render_trained(Conversation(messages=messages)).notices) == (
        case == "nothing ends a turn"
    )


def byte_token(template, token):
    return template.tokens.decode([token])


REFUSED = {
    "raise_exception": ("{{ raise_exception('alternate!') IF_THREE }}", "cannot render it: alternate!"),
    "undefined": ("{{ messages[0].x.y IF_THREE }}", "cannot render it: 'dict object' has no attribute"),
    "control characters": (
        "{{ raise_exception('a\x1b[31m\ud800' ~ 'b' * 300) IF_THREE }}",
        r"it: a\?\[31m\?b{190,194}$",
    ),
    "a type": ("{{ 1 + 'a' IF_THREE }}", "cannot render it: unsupported operand"),
    "left out": ("{% set messages = messages[:2] IF_THREE else messages %}", "omits an answer"),
    "reordered": ("{% set messages = messages[::-1] IF_THREE else messages %}", "changes the order"),
    "hidden": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}"
        "{{ ns.n }}",
        "answers cannot be located",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_conversations(case):
    text, message = REFUSED[case]
    text = text.replace("IF_THREE", "if messages | length == 3")
    template = template_of(text + BEGIN + HEADER + "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT)
    with pytest.raises((RowError, ChatTemplateError), match=message):
        spans(template, [assistant("a"), user("b"), assistant("c")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% if %}", r"cannot render two questions with answers \(Expected an expression"),
        ("{{ raise_exception('no') }}", r"cannot render two questions with answers \(no\)"),
        ("nothing", "omits a message, or writes one twice"),
        (" ", "no chat template; pass a file with a Jinja template by --chat_template"),
    ],
)
def test_invalid_templates(text, message):
    with pytest.raises(UsageError, match=f"chat_template: .*{message}"):
        assert template_of(text).frame


def test_templates_by_name(family):
    tokenizer = byte_tokenizer()
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools | length }}"}]
    template = ChatTemplate.from_tokenizer(
        TextTokenizer(tokenizer=tokenizer.tokenizer, settings={"chat_template": named})
    )
    assert template.source == template.render([user("a")]) == "plain"
    assert template.render([user("a")], tools=TOOLS) == "tools 1"
    del named[0]
    with pytest.raises(
        UsageError, match=r"none of the tokenizer's named templates is 'default' \('tool_use'\); write the one"
    ):
        ChatTemplate.from_tokenizer(TextTokenizer(tokenizer=tokenizer.tokenizer, settings={"chat_template": named}))


def test_rendering_equals_that_of_transformers(family):
    messages = [user("a"), assistant(None, tool_calls=[call("add", {"b": "é"})])]
    for prompt in (False, True):
        ours = family("reasoning").template.render(messages, tools=TOOLS, add_generation_prompt=prompt)
        others = family("reasoning").others.apply_chat_template(
            messages, tools=TOOLS, add_generation_prompt=prompt, tokenize=False
        )
        assert ours == others


def test_special_tokens_in_contents_cause_a_notice(family):
    for content, notices in (("<|im_end|>", (SPELLS_SPECIAL,)), ("<im_end>", ())):
        conversation = Conversation(messages=[user(content), assistant("b")])
        assert family("chatml").template.render_trained(conversation).notices == notices


def test_generation_marks_without_the_end_mark_cause_a_notice():
    marked = "{% generation %}{{ m.content }}{% endgeneration %}"
    content = "{% if m.role == 'assistant' %}" + marked + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    template = template_of(BEGIN + HEADER + content + PROMPT)
    assert spans(template, TURNS) == ["b", "d"]
    assert template.render_trained(Conversation(messages=TURNS)).notices == (NO_END,)


def test_the_template_for_base_models():
    path = Path(__file__).parents[2] / "recipes" / "finetune" / "chat_template.jinja"
    template = ChatTemplate.from_tokenizer(byte_tokenizer(), read_template(str(path)))
    assert spans(template, [{"role": "system", "content": "s"}, *MESSAGES]) == [
        "assistant<|end_of_text|>", f"{ANSWER.strip()}<|end_of_text|>"
    ]  # fmt: skip
    assert template.end_of_turn == [byte_tokenizer().eos_token_id]
    assert template.render(MESSAGES).startswith("<|begin_of_text|>### User\nHi there.\n\n### Assistant\nassistant<|end")


def test_reading_a_template_file(tmp_path):
    path = tmp_path / "template.jinja"
    for data, message in ((b" \n", "empty"), (b"\xff", "not UTF-8"), (None, "No such file")):
        path.unlink(missing_ok=True) if data is None else path.write_bytes(data)
        with pytest.raises(UsageError, match=f"chat_template: .*template.jinja: {message}"):
            read_template(str(path))
    path.write_text("{{ eos_token }}\r\n", encoding="utf-8", newline="")
    assert (
        ChatTemplate.from_tokenizer(byte_tokenizer(), read_template(str(path)))
        .render([user("a")])
        .startswith("<|end_of")
    )
