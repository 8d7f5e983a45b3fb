"""Graph walks, same requests and RULER's tasks: what is asked follows from the prompt, and how answers are scored."""

import difflib
import re

import pytest
import torch
from others import make_tokenizer

from ropepp_lit.eval.models import load_model
from ropepp_lit.eval.tasks import Request, examples, graph_walks, mrcr
from ropepp_lit.eval.tasks.examples import make_examples
from ropepp_lit.text.tokenizer import byte_tokenizer, load_tokenizer

SUITES = {"graphwalks": graph_walks.FAMILIES, "mrcr": mrcr.FAMILIES}
FAMILIES = [family for suite in SUITES.values() for family in suite.values()]


@pytest.fixture(scope="module", params=["bytes", "chat", "llama2"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return byte_tokenizer()
    folder = tmp_path_factory.mktemp(request.param)
    make_tokenizer(request.param, folder)
    return load_tokenizer(str(folder))


def _prompts(family, *, length=2500, count=4, tokenizer=None):
    tokenizer = tokenizer or byte_tokenizer()
    made = make_examples(family, tokenizer, length=length, numbers=range(count), seed=0)
    return [(tokenizer.decode(example.input_ids), example) for example in made]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_prompts_have_their_length_and_hold_the_answers(tokenizer, family):
    room = family.max_new_tokens(tokenizer, seed=0)
    for text, example in _prompts(family, length=3000, count=3, tokenizer=tokenizer):
        assert len(example.input_ids) + room == 3000
        assert len(tokenizer.encode_text(example.ideal)) <= room
        assert all(answer in text for answer in example.answers)
        assert family.score(example.answers, example.ideal) == 1
        assert family.score(example.answers, "") == 0
    texts = [text for text, _ in _prompts(family, count=6)]
    assert len(set(texts)) == 6


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_perfect_answer_scores_100_and_a_random_model_nothing(small_checkpoints, monkeypatch, family):
    model = load_model(str(small_checkpoints["ec"]), dtype=torch.float32, device=torch.device("cpu"))
    request = Request(length=2500, lengths=(2500,), limit=4)
    assert family.measure(model, request)[0].value == 0
    ideals = iter([f"{example.ideal}\nand so on" for _, example in _prompts(family)])
    monkeypatch.setattr(examples, "write_answers", lambda model, prompts, **_: [next(ideals) for _ in prompts])
    assert family.measure(model, request)[0].value == 100


@pytest.mark.parametrize("part", graph_walks.FAMILIES)
def test_walks_are_those_of_a_plain_search(part):
    for text, example in _prompts(graph_walks.FAMILIES[part]):
        shown, graph = text.split("\n\n")
        answered = set(re.findall("[a-z]{4}", re.search(r"\[(.*)\]", shown).group(1)))
        for said, wanted in ((shown, answered), (graph, set(example.answers))):
            edges = re.findall(r"([a-z]{4}) -> ([a-z]{4})\b", said)
            start = re.search(r"(?:from|of) ([a-z]{4})[,:]", said.splitlines()[-1]).group(1)
            frontier, seen = {start}, {start}
            if part == "parents":
                frontier = {source for source, target in edges if target == start}
            for _ in range(0 if part == "parents" else int(part[-1])):
                frontier = {target for source, target in edges if source in frontier} - seen
                seen |= frontier
            assert frontier == wanted
            assert 2 <= len(wanted) <= 5
        edges = re.findall(r"([a-z]{4}) -> ([a-z]{4})\b", graph)
        assert len(edges) > 80
        # Other nodes have as many edges: neither one nor two mentions give an answer away.
        counts = [sum(node in edge for edge in edges) for node in {node for edge in edges for node in edge}]
        assert sum(count > 2 for count in counts) > 10


def test_scores_of_walks():
    score = graph_walks.FAMILIES["parents"].score
    assert score(["abcd", "efgh"], " [efgh, abcd]\n[wxyz]") == 1
    assert score(["abcd", "efgh"], " [abcd, wxyz]") == 0.5
    assert score(["abcd", "efgh"], "abcd") == pytest.approx(2 / 3)
    assert score(["abcd", "efgh"], " []\nabcd, efgh") == 0


@pytest.mark.parametrize("part", mrcr.FAMILIES)
def test_the_answer_is_that_to_the_request_that_is_meant(part):
    for text, example in _prompts(mrcr.FAMILIES[part], length=4000):
        shown, conversation = text.split("\n\n")
        shown_answer = shown.rpartition("Assistant: ")[2].split(" ", 1)
        for said, (code, answer) in ((shown, shown_answer), (conversation, example.answers)):
            asked = re.search(rf"User: Write {code} and then the (\w+) (\w+) on the (\w+) again\.\nAssistant:", said)
            number, form, subject = asked.groups()
            told = re.findall(rf"User: Write a {form} on the {subject}\.\nAssistant: (.*)", said)
            assert len(told) == (2 if said is shown else int(part))
            assert told[mrcr.ORDINALS.index(number)] == answer
        kinds = re.findall(r"User: Write (a \w+) on the (\w+)\.\n", conversation)
        near = [kind for kind in kinds if (kind[0] == f"a {form}") != (kind[1] == subject)]
        assert len(kinds) > 20
        assert len(near) > 3


def test_scores_of_same_requests():
    score = mrcr.FAMILIES["2"].score
    answer = "wolf rain path coin"
    assert score(["ABCD", answer], f" ABCD {answer}\nUser: Write") == 1
    assert score(["ABCD", answer], f" {answer}") == 0
    other = difflib.SequenceMatcher(None, "wolf rain", answer).ratio()
    assert score(["ABCD", answer], "ABCD wolf rain") == other > 0.5
