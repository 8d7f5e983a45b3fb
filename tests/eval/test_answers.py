"""Answers to held-out prompts: loss of the expected answers, and comparison with the generated ones."""

import json

import pytest
import torch
from others import make_folder

from ropepp_lit.eval.models import load_model
from ropepp_lit.eval.tasks import Request, answers

PAIRS = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}", "id": n} for n in range(1, 8)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n} and {n}?"},
            {"role": "assistant", "content": "Let me see."},
            {"role": "user", "content": "Well?"},
            {"role": "assistant", "content": f"It is {2 * n}."},
        ]
    }
    for n in range(1, 5)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path):
    return load_model(str(path), dtype=torch.float64, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    return make_folder("chat", tmp_path_factory.mktemp("chat") / "model")


@pytest.mark.parametrize(
    ("written", "expected", "exact", "rouge"),
    [
        ("Return the name.", "Return the name.", 1, 1),
        (" Return the name.\n", "Return the name.", 1, 1),
        ("return the name", "Return the name.", 0, 1),  # ROUGE ignores case and punctuation
        ("Return a name", "Return the name", 0, 2 / 3),
        ("name the return", "return the name", 0, 1 / 3),
        ("", "Return the name.", 0, 0),
        ("¿…?", "…", 0, 0),
    ],
)
def test_scores(written, expected, exact, rouge):
    assert answers.score(written, expected) == (exact, pytest.approx(rouge))


@torch.inference_mode()
@pytest.mark.parametrize("variant", ["rope", "ec"])
def test_loss_covers_only_the_answers(small_checkpoints, tmp_path, variant):
    model = load(small_checkpoints[variant])
    source = write(tmp_path / "pairs.jsonl", PAIRS)
    loss, exact, rouge = answers.Answers(str(source)).measure(model, Request(length=None, lengths=(512,), limit=50))
    nats, tokens = [], []
    for row in PAIRS:
        prompt = model.tokenizer.encode_prompt(row["prompt"])
        answer = [*model.tokenizer.encode_text(row["completion"]), model.tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *answer]])
        log_probabilities = model.decoder(ids).log_softmax(-1)[0, len(prompt) - 1 : -1]
        nats.append(-sum(float(row[token]) for row, token in zip(log_probabilities, answer, strict=True)))
        tokens.append(len(answer))
    assert sorted(loss.denominators) == sorted(tokens)
    assert sorted(loss.numerators) == pytest.approx(sorted(nats), rel=1e-9)
    assert exact.is_proportion
    assert rouge.is_proportion
    assert not loss.is_proportion


def test_batched_answers_equal_single_ones(small_checkpoints, tmp_path):
    model = load(small_checkpoints["ec"])
    pairs = answers.read_pairs(model, str(write(tmp_path / "pairs.jsonl", PAIRS)), limit=50)
    single = [text for pair in pairs for text in answers.generate_answers(model, [pair])]
    assert single == answers.generate_answers(model, pairs)


def test_the_last_answer_of_a_conversation_is_the_expected_one(chat_folder, tmp_path):
    model = load(chat_folder)
    pairs = answers.read_pairs(model, str(write(tmp_path / "chats.jsonl", CHATS)), limit=50)
    decoded = {(model.tokenizer.decode(pair.prompt), model.tokenizer.decode(pair.answer).strip()) for pair in pairs}
    assert {answer for _, answer in decoded} == {f"It is {2 * n}." for n in range(1, 5)}
    assert all("Let me see." in prompt and "It is" not in prompt for prompt, _ in decoded)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "no pair"}], r"'chat_template_kwargs'; use the columns prompt and completion, or messages"),
        ([], "pairs.jsonl: no rows; name files of prompts and answers"),
        ([{"messages": [{"role": "user", "content": "Well?"}]}], "no prompt before an answer"),
        ([{"prompt": "x", "completion": ""}], "an empty completion"),
        ([{"messages": []}], "messages has no messages"),
        ([PAIRS[0], "text"], "pairs.jsonl:2"),
    ],
)
def test_rows_without_prompt_and_answer_are_rejected(chat_folder, tmp_path, run, rows, message):
    source = write(tmp_path / "pairs.jsonl", rows)
    options = ["--tasks", f"answers:{source}", "--out", tmp_path / "out"]
    process = run("evaluate", chat_folder, *options, cwd=tmp_path, returncode=2)
    assert message in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1


def test_conversations_require_a_chat_template(small_checkpoints, tmp_path, run):
    source = write(tmp_path / "chats.jsonl", CHATS)
    options = ["--tasks", f"answers:{source}", "--out", tmp_path / "out"]
    process = run("evaluate", small_checkpoints["ec"], *options, cwd=tmp_path, returncode=2)
    assert "no chat template" in process.stderr


def test_page_shows_answers(small_checkpoints, tmp_path, run):
    source = write(tmp_path / "pairs.jsonl", PAIRS)
    models = [small_checkpoints["rope"], small_checkpoints["ec"]]
    options = ["--tasks", f"answers:{source}", "--out", tmp_path / "out", "--limit", 5]
    first = run("evaluate", *models, *options, cwd=tmp_path).stdout
    assert "index.html" in first
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    assert {(row["metric"], row["examples"]) for row in scores} == {("loss", 5), ("exact", 5), ("rouge_l", 5)}
    assert all(row["difference"] is not None for row in scores if row["model"] == "ec")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Answers to held-out prompts" in page
    assert "ROUGE-L" in page
    write(source, PAIRS[:4])  # changed content is measured again
    run("evaluate", *models, *options, cwd=tmp_path)
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    assert {row["examples"] for row in scores} == {4}
