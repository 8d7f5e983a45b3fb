"""Graph walks, MRCR and RULER's tasks: answers follow from the prompts, and scores."""

import collections
import difflib
import re
from pathlib import Path

import pytest
import torch
from others import make_tokenizer

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import Model, load_model
from ropepp_lit.eval.tasks import EvaluationSettings, Request, examples, graph_walks, mrcr, ruler
from ropepp_lit.eval.tasks.examples import make_examples
from ropepp_lit.text.tokenizer import byte_tokenizer, load_tokenizer

SUITES = {"graphwalks": graph_walks.FAMILIES, "mrcr": mrcr.FAMILIES, "ruler": ruler.FAMILIES}
FAMILIES = [family for suite in SUITES.values() for family in suite.values()]
LENGTH = 3600
ESSAYS = ["Nobody saw it.  Why?\nThe sea was calm, as always in May! We sat on the stones.", "One more: the end."]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Set essays, and fewer repetitions that fit into short contexts."""
    monkeypatch.setattr(ruler.RulerTask, "length", 1000)
    monkeypatch.setattr(ruler.RulerTask, "essays", " ".join(ESSAYS).replace("  ", " ").replace("? ", "?\n").split("\n"))


def _prompts(family, *, length=LENGTH, count=4, tokenizer=None):
    tokenizer = tokenizer or byte_tokenizer()
    created = make_examples(family, tokenizer, length=length, numbers=range(count), seed=0)
    return [(tokenizer.decode(example.input_ids), example) for example in created]


@pytest.mark.parametrize(
    ("kind", "family"),
    [("bytes", family) for family in FAMILIES]
    + [(kind, next(iter(suite.values()))) for kind in ("chat", "llama2") for suite in SUITES.values()],
    ids=str,
)
def test_prompts_have_the_exact_length_and_contain_the_answers(tmp_path, kind, family):
    """The chat tokenizer has truncation to 64 tokens, Llama 2's prepends a space to every text."""
    tokenizer = byte_tokenizer()
    if kind != "bytes":
        make_tokenizer(kind, tmp_path)
        tokenizer = load_tokenizer(str(tmp_path))
    room, texts = family.max_new_tokens(tokenizer, seed=0), set()
    for text, example in _prompts(family, count=3, tokenizer=tokenizer):
        assert len(example.input_ids) + room == LENGTH
        assert len(tokenizer.encode_text(example.ideal)) <= room
        assert all(answer in text for answer in example.answers)
        assert tuple(example.input_ids[: len(tokenizer.opening)]) == tokenizer.opening
        assert family.score(example.answers, example.ideal) == 1
        assert family.score(example.answers, "") == 0
        texts.add(text)
    assert len(texts) == 3


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_perfect_answer_scores_100_and_that_of_another_example_0(monkeypatch, family):
    """The answer of another example is a guess without the context."""
    monkeypatch.setattr(Model, "device", torch.device("cpu"))
    model = Model(name="", path="", decoder=None, tokenizer=byte_tokenizer(), fingerprint="")
    request = Request(length=LENGTH, lengths=(LENGTH,), limit=4, texts=ESSAYS)
    family.check(model, request)
    ideals = [f"{example.ideal}\nand so on" for _, example in _prompts(family)]
    for answers, score in ((ideals, 100), (ideals[1:] + ideals[:1], 0)):
        generated = iter(answers)
        monkeypatch.setattr(
            examples,
            "write_answers",
            lambda model, prompts, generated=generated, **_: [next(generated) for _ in prompts],
        )
        assert family.measure(model, request)[0].value == score


@pytest.mark.parametrize("suite", SUITES)
def test_a_random_model_scores_0(small_checkpoints, suite):
    model = load_model(str(small_checkpoints["ec"]), dtype=torch.float32, device=torch.device("cpu"))
    family = next(iter(SUITES[suite].values()))
    assert family.measure(model, Request(length=1024, lengths=(1024,), limit=2))[0].value == 0


@pytest.mark.parametrize("part", graph_walks.FAMILIES)
def test_walks_match_a_reference_search(part):
    for text, example in _prompts(graph_walks.FAMILIES[part]):
        shown, _, graph = text.partition("\n\n")
        answered = set(re.findall("[a-z]{4}", re.search(r"\[(.*)\]", shown).group(1)))
        for prompt, expected in ((shown, answered), (graph, set(example.answers))):
            edges = re.findall(r"([a-z]{4}) -> ([a-z]{4})\b", prompt)
            start = re.search(r"(?:from|of) ([a-z]{4})[,:]", prompt.splitlines()[-1]).group(1)
            frontier, seen = {start}, {start}
            if part == "parents":
                frontier = {source for source, target in edges if target == start}
            for _ in range(0 if part == "parents" else int(part[-1])):
                frontier = {target for source, target in edges if source in frontier} - seen
                seen |= frontier
            assert frontier == expected
            assert 2 <= len(expected) <= 5
        edges = re.findall(r"([a-z]{4}) -> ([a-z]{4})\b", graph)
        assert len(edges) > 80
        # Other nodes have as many edges, so the number of occurrences does not reveal the answers.
        counts = [sum(node in edge for edge in edges) for node in {node for edge in edges for node in edge}]
        assert sum(count > 2 for count in counts) > 10


def test_scores_of_walks():
    score = graph_walks.FAMILIES["parents"].score
    assert score(["abcd", "efgh"], " [efgh, abcd]\n[wxyz]") == 1
    assert score(["abcd", "efgh"], " [abcd, wxyz]") == 0.5
    assert score(["abcd", "efgh"], "abcd") == pytest.approx(2 / 3)
    assert score(["abcd", "efgh"], " []\nabcd, efgh") == 0


@pytest.mark.parametrize("part", mrcr.FAMILIES)
def test_the_answer_belongs_to_the_queried_request(part):
    for text, example in _prompts(mrcr.FAMILIES[part], length=4000):
        shown, _, conversation = text.partition("\n\n")
        shown_answer = shown.rpartition("Assistant: ")[2].split(" ", 1)
        for prompt, (code, answer) in ((shown, shown_answer), (conversation, example.answers)):
            query = re.search(rf"User: Write {code} and then the (\w+) (\w+) on the (\w+) again\.\nAssistant:", prompt)
            number, form, subject = query.groups()
            answers_in_context = re.findall(rf"User: Write a {form} on the {subject}\.\nAssistant: (.*)", prompt)
            assert len(answers_in_context) == (2 if prompt is shown else int(part))
            assert answers_in_context[mrcr.ORDINALS.index(number)] == answer
        kinds = re.findall(r"User: Write (a \w+) on the (\w+)\.\n", conversation)
        near = [kind for kind in kinds if (kind[0] == f"a {form}") != (kind[1] == subject)]
        assert len(kinds) > 20
        assert len(near) > 3


def test_scores_of_mrcr():
    score = mrcr.FAMILIES["2"].score
    answer = "wolf rain path coin"
    assert score(["ABCD", answer], f" ABCD {answer}\nUser: Write") == 1
    assert score(["ABCD", answer], f" {answer}") == 0
    other = difflib.SequenceMatcher(None, "wolf rain", answer).ratio()
    assert score(["ABCD", answer], "ABCD wolf rain") == other > 0.5


def test_templates_match_ruler():
    """The reference are the templates in lm-eval."""
    folder = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks" / "ruler"
    for file, texts in {
        "niah_utils.py": [ruler.NIAH[0]],
        "prepare_niah.py": [
            ruler.NEEDLE,
            ruler.NOISE,
            ruler.NIAH[1].strip().replace("are", "").split("{query}")[1].strip(),
        ],
        "vt_utils.py": [*ruler.VARIABLE_TRACKING, ruler.NOISE],
        "cwe_utils.py": [*ruler.COMMON_WORDS],
        "fwe_utils.py": [*ruler.FREQUENT_WORDS],
    }.items():
        source = (folder / file).read_text()
        assert all(text.replace("\n", "\\n") in source for text in texts), file


@pytest.mark.parametrize("part", ruler.FAMILIES)
def test_prompts_match_the_templates(part):
    family = ruler.FAMILIES[part]
    ((text, example),) = _prompts(family, length=8000, count=1)
    if part.startswith("niah"):
        kind = "uuid" if part[-1] == "3" else "number"
        end = text.rpartition("special magic ")[2]
        query = re.fullmatch(r"\w+ for (.*) mentioned in the provided text (?:is|are)", end).group(1)
        names = query.replace("and ", "").split(", ")
        answers_in_context = dict.fromkeys(names, ())
        for name, value in re.findall(rf"One of the special magic {kind}s for (\S+) is: (\S+)\.", text):
            if name in answers_in_context:
                answers_in_context[name] += (value,)
        assert sorted(value for values in answers_in_context.values() for value in values) == sorted(example.answers)
        one = len(example.answers) == 1
        words = f"A special magic {kind} is hidden" if one else "Some special magic numbers are hidden"
        assert text.startswith(
            f"{words} within the following text. Make sure to memorize it. I will quiz you about the"
        )
        assert (example.depth is not None) == one
        assert ("Nobody saw it." in text) == family.needs_text
        assert (len(re.findall("One of the special", text)) > 20) == (part in ("niah_multikey_2", "niah_multikey_3"))
    elif part == "vt":
        shown, query = text.split("\n\n\n\n")
        for prompt in (shown, query):
            value, names = re.search(r"are assgined the value (\d+), they are:((?: [A-Z]+)*)$", prompt).groups()
            reachable = {value}
            for name, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", prompt):
                assert source in reachable
                reachable.add(name)
            assert reachable - {value} == set(names.split() if prompt is shown else example.answers)
            assert len(reachable) == 6
    elif part == "cwe":
        shown, query = text.split("\nBelow")
        words = re.findall(r"\d+\. ([a-z]+-[a-z]+)", query)
        assert set(example.answers) == {word for word, _ in collections.Counter(words).most_common(10)}
        assert [int(number) for number in re.findall(r"(\d+)\. ", query)] == list(range(2, len(words) + 2))
    else:
        words = text.partition("coded words. ")[2].partition("\n")[0].split()[1:]
        (dots, often), *ranked = collections.Counter(words).most_common(6)
        assert (dots, [word for word, _ in ranked[:3]]) == ("...", example.answers)
        assert ranked[2][1] > ranked[3][1]
        assert often / len(words) == pytest.approx(6 / 9.87, abs=0.03)


def test_words_of_long_contexts_are_repeated_more_often(monkeypatch):
    monkeypatch.setattr(ruler.RulerTask, "length", 4096)
    created = ruler.FAMILIES["cwe"].numbered_draft(units=1000, seed="0")
    counts = collections.Counter(word for _, word in created.needles)
    assert set(counts.values()) == {30}
    assert set(collections.Counter(created.take(300)).values()) == {3}


def test_tasks_with_essays_require_text():
    settings = EvaluationSettings(tasks=("ruler",), lengths=(512,), has_essays=False)
    assert {task.part for task, _ in settings.parsed} == {
        "niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe",
    }  # fmt: skip
    (line,) = settings.notices
    assert line.startswith("ruler: niah_single_2, ")
    assert line.endswith(" need essays and are skipped; pass files of them by --text.")
    assert not settings.needs_text
    with pytest.raises(UsageError, match="tasks: ruler:niah_single_2 needs essays; pass files of them"):
        EvaluationSettings(tasks=("ruler:vt+niah_single_2",), lengths=(512,), has_essays=False)
    settings = EvaluationSettings(tasks=("ruler",), lengths=(512,))
    assert len(settings.parsed) == 11
    assert settings.needs_text
    assert not settings.notices
