"""Answers of models: answers.jsonl, and the selected examples on the page."""

import json

import pytest
from others import make_folder

from ropepp_lit.eval.report.examples import MAX_CHARACTERS, choose_examples


def test_examples_are_correct_and_wrong_answers_at_the_longest_length_with_both(folder):
    ((key, section_examples),) = choose_examples(folder / "answers.jsonl").items()
    assert (key, section_examples["caption"]) == (("retrieval", "single"), "single at 1,024 tokens")
    assert [line["expected"] for line in section_examples["lines"]] == ["00.", "10.", "30.", "40."]
    assert [[text["is_correct"] for text in line["written"]] for line in section_examples["lines"]] == [
        [True] * 3
    ] * 2 + [[False] * 3] * 2
    assert [text["model"] for text in section_examples["lines"][0]["written"]] == ["RoPE", "RoPE++ EH", "RoPE++ EC"]
    assert all(len(line["prompt"]) == MAX_CHARACTERS + 1 for line in section_examples["lines"])
    assert choose_examples(folder / "none.jsonl") == {}


def test_page_shows_examples_and_escapes_generated_text(folder):
    page = (folder / "index.html").read_text()
    section = page.partition('<h2 id="retrieval">')[2].partition("</section>")[0]
    examples = section.partition("Examples of correct and wrong answers")[2].partition("</details>")[0]
    assert examples.count("End of the prompt") == 4
    assert "&lt;b&gt;key 0&lt;/b&gt;\n &amp;amp; its value:" in examples
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in examples
    assert "<script" not in page


@pytest.mark.end_to_end
def test_answers_are_written_as_json_lines(run, small_checkpoints, tmp_path):
    pairs = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    make_folder("gpt2", tmp_path / "gpt2")
    models = [f"A={small_checkpoints['rope']}", "B=gpt2"]
    options = ["--lengths", 700, "--limit", 3, "--noise_std", 1, "--out", "out"]
    tasks = "retrieval:single,answers:pairs.jsonl,noise:retrieval:single"
    run("evaluate", *models, "--tasks", tasks, *options, cwd=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [(line["model"], line["part"], line["noise_std"], line["number"]) for line in lines] == [
        (model, part, noise, number)
        for model in "AB"
        for part, noise in (("single", None), ("pairs.jsonl", None), ("single", 1.0))
        for number in range(3)
    ]
    assert set(lines[0]) == {
        "model", "path", "task", "part", "length", "heads", "noise_std", "depth", "number", "prompt", "expected",
        "written", "score",
    }  # fmt: skip
    single = [line for line in lines if line["part"] == "single" and line["noise_std"] is None]
    assert [line["expected"] for line in single[:3]] == [line["expected"] for line in single[3:]]  # the same examples
    assert all(line["prompt"].endswith(":") and 5 <= len(line["expected"]) <= 7 for line in single)
    assert all(len(line["prompt"]) == 400 for line in single[:3])
    assert [line["depth"] for line in single[:3]] == [0.0, 0.25, 0.5]
    answers = [line for line in lines if line["task"] == "answers"]
    assert {(line["prompt"], line["expected"]) for line in answers} == {(f"{n} + {n} =", str(2 * n)) for n in range(3)}
    assert "Examples of correct and wrong answers" in (tmp_path / "out" / "index.html").read_text()
    again = run("evaluate", models[0], "--tasks", "answers:pairs.jsonl", *options, cwd=tmp_path).stdout
    assert (
        "Note: the report in out also had the task retrieval:single, the task noise:retrieval:single, B (gpt2)" in again
    )
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 3
