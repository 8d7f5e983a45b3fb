"""`--json`, `--quiet` and progress bars: what a script reads, and what only a terminal shows."""

import contextlib
import io
import json
import sys

import pytest

from ropepp_lit import terminal
from ropepp_lit.eval.results import COLUMNS


def only_line(finished):
    """The JSON on stdout, which has nothing else."""
    (line,) = finished.stdout.splitlines()
    return json.loads(line)


@pytest.mark.end_to_end
def test_prepare(run, texts, tmp_path):
    options = ["--tokenizer", "bytes", "--validation_fraction", "0.2", "--min_tokens", "250"]
    finished = run("prepare", texts, *options, "--out", "shards", "--json", cwd=tmp_path)
    result = only_line(finished)
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert result["out"] == "shards"
    assert result["fingerprint"] == manifest["fingerprint"]
    assert result["skipped"] == manifest["skipped"] != {}
    assert {name: split["tokens"] for name, split in result["splits"].items()} == {
        name: split["tokens"] for name, split in manifest["splits"].items()
    }
    assert "The shards are in shards" in finished.stderr
    assert only_line(run("prepare", "--verify", "shards", "--json", cwd=tmp_path)) == [result]
    assert only_line(run("prepare", "--verify", "shards", "--json", "--quiet", cwd=tmp_path)) == [result]

    for number in (1, 2):
        part = ["--part", f"{number}/2", "--out", f"part{number}", "--json"]
        assert only_line(run("prepare", texts, *options, *part, cwd=tmp_path))["part"] == {"number": number, "count": 2}
    merged = run("prepare", "--merge", "part1", "part2", "--out", "merged", "--json", cwd=tmp_path)
    assert only_line(merged) == {**result, "out": "merged"}

    quiet = run("prepare", texts, *options, "--out", "other", "--quiet", cwd=tmp_path)
    assert (quiet.stdout, quiet.stderr) == ("", "")
    assert (tmp_path / "other" / "manifest.json").read_bytes() == (tmp_path / "shards" / "manifest.json").read_bytes()
    wrong = run("prepare", "nowhere", *options, "--out", "third", "--quiet", "--json", cwd=tmp_path, returncode=2)
    assert wrong.stdout == ""
    assert wrong.stderr.startswith("ropepp-lit: error: ")


@pytest.mark.end_to_end
def test_plan(run, tiny, tmp_path):
    finished = run("plan", *tiny, "--device_memory", "1GiB", "--json", cwd=tmp_path)
    result = only_line(finished)
    assert result["tokens"] == result["tokens_per_step"] * result["steps"]
    assert result["flops"] == result["flops_per_token"] * result["tokens"]
    memory = result["memory_bytes"]
    assert memory.pop("total") == sum(memory.values())
    assert result["device_memory_bytes"] == 2**30
    assert result["fits"] is True
    assert result["simulation"] is None
    assert f"parameters        {result['parameters']:,}\n" in finished.stderr
    simulated = only_line(run("plan", *tiny, "--simulate", "true", "--json", cwd=tmp_path))["simulation"]
    assert simulated["flops_per_step"] > 0
    assert simulated["memory_bytes"]["total"] > 0


@pytest.mark.end_to_end
def test_evaluate_and_conversions(run, tiny, tmp_path):
    run("fit", *tiny, "--trainer.max_steps", "1", "--trainer.default_root_dir", "run", cwd=tmp_path)
    options = ["--tasks", "perplexity", "--lengths", "32", "--limit", "2", "--out", "scores"]
    finished = run("evaluate", "run/checkpoints/last.ckpt", *options, "--json", cwd=tmp_path)
    result = only_line(finished)
    stored = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert result == {"out": "scores", "notices": stored["notices"], "scores": stored["scores"]}
    assert set(COLUMNS) <= set(result["scores"][0])
    assert "Everything is in scores" in finished.stderr
    quiet = run("evaluate", "run/checkpoints/last.ckpt", *options, "--quiet", cwd=tmp_path)
    assert (quiet.stdout, quiet.stderr) == ("", "")

    quiet = run("export", "run/checkpoints/last.ckpt", "folder", "--check", "false", "--quiet", cwd=tmp_path)
    assert quiet.stdout == ""
    assert (tmp_path / "folder" / "config.json").is_file()


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "show", "quiet", "drawn"),
    [
        (FakeTerminal, True, False, True),
        (FakeTerminal, False, False, False),
        (FakeTerminal, True, True, False),
        (io.StringIO, True, False, False),  # a file or a pipe
    ],
)
def test_progress_bars(monkeypatch, stream, show, quiet, drawn):
    monkeypatch.setattr(sys, "stderr", stream())
    with (
        terminal.output(as_json=False, quiet=quiet),
        terminal.progress_bar("Prompts", unit="rows", total=4, initial=1, show=show) as bar,
    ):
        bar.update(3)
        bar.refresh()
    text = sys.stderr.getvalue()
    assert ("Prompts: 100%" in text and "4/4" in text and " rows/s" in text) == drawn
    assert drawn or text == ""


def test_output_is_as_before_behind_it(capsys):
    with contextlib.suppress(ZeroDivisionError), terminal.output(as_json=True, quiet=True) as print_result:
        print("a notice")
        print_result({"a": "\udcff"})
        raise ZeroDivisionError
    print("later")
    assert capsys.readouterr() == ('{"a": "\\udcff"}\nlater\n', "")
    with terminal.output(as_json=False, quiet=False) as print_result:
        print("a notice")
        print_result({"a": 1})
    assert capsys.readouterr() == ("a notice\n", "")
