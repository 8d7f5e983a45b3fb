"""Tasks by position, with key tokens and with essays, through the command."""

import json

import pytest

TEXT = " ".join(f"{k} times {k} is {k * k}." for k in range(120))


@pytest.mark.end_to_end
def test_page_has_a_section_for_each_task(run, small_checkpoints, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    models = [f"A={small_checkpoints['rope']}", f"B={small_checkpoints['ec']}"]
    tasks = "recall:2,induction,longppl,graphwalks:parents,ruler:niah_single_2,noise:recall:2"
    options = ["--lengths", "800,900", "--limit", 2, "--text", "text.txt", "--noise_std", 1]
    output = run("evaluate", *models, "--tasks", tasks, *options, "--out", "out", cwd=tmp_path).stdout
    assert "finds no key tokens among" in output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    measured = {
        (row["task"], row["part"], row["metric"], row["length"])
        for row in results["scores"]
        if row["model"] == "B" and row["position"] is None and row["depth"] is None and not row["heads"]
    }
    assert {name for name in measured if name[0] != "longppl"} == {
        (task, part, metric, length)
        for task, part, metrics in (
            ("recall", "2", ("score", "loss")), ("induction", "", ("score", "loss")),
            ("graphwalks", "parents", ("score",)), ("ruler", "niah_single_2", ("score",)),
        )
        for metric in metrics
        for length in (800, 900)
    }  # fmt: skip
    assert {name[2:] for name in measured if name[0] == "longppl"} == {("key_tokens", 900), ("gain", 900)}
    assert {row["heads"] for row in results["scores"] if row["task"] == "recall"} == {"", "real", "imaginary"}
    for metric in ("recall-loss", "induction-score", "longppl-gain"):
        assert (tmp_path / "out" / f"task-{metric}-by-position.png").exists()
    assert not (tmp_path / "out" / "task-graphwalks-score-by-position.png").exists()
    page = (tmp_path / "out" / "index.html").read_text()
    for title in ("Associative recall", "Induction", "Perplexity over key tokens", "Graph walks", "RULER"):
        assert f">{title}</h2>" in page
    assert "Score (0 to 100), by position or distance (first of each range)" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "ruler:niah_single_2"], "tasks: ruler:niah_single_2 needs essays; pass files of"),
        (["--tasks", "retrieval:"], "tasks: retrieval:: no part after the colon; remove the colon, or add a part"),
        (["--tasks", "recall:0"], "tasks: recall:0: give numbers of pairs from 1 to 68, such as recall:4+16"),
        (["--tasks", "mrcr:3"], "tasks: mrcr has no family '3'; choose from 2, 4, 8"),
        (["--tasks", "longppl", "--text", "text.txt"], "lengths: longppl compares longer contexts with the shortest"),
        (["--tasks", "longppl:no.ckpt", "--text", "text.txt", "--lengths", "64,128"], "no.ckpt: no such"),
        (["--tasks", "noise:longppl"], "tasks: noise is for perplexity and prompts, not longppl"),
    ],
)
def test_invalid_options(mistake, small_checkpoints, tmp_path, options, message):
    (tmp_path / "text.txt").write_text(TEXT)
    lengths = [] if "--lengths" in options else ["--lengths", "1k"]
    options = [small_checkpoints["ec"], *options, *lengths, "--out", "out"]
    assert message in mistake(*options, subcommand="evaluate")
