"""The command `evaluate`, from checkpoints to the page."""

import csv
import json
import shutil
import time

import others
import pytest

from ropepp_lit.data.manifest import Manifest
from ropepp_lit.data.shards import TokenShards

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(6):
        (folder / f"{number}.txt").write_text(" ".join(f"{number} times {k} is {number * k}." for k in range(60)))
    return folder


@pytest.fixture(scope="module")
def evaluated(run, small_checkpoints, text, tmp_path_factory):
    """Folder and arguments of an evaluation of two models, one of them with two runs."""
    folder = tmp_path_factory.mktemp("evaluated")
    models = [f"{name}={small_checkpoints[key]}" for name, key in (("RoPE", "rope"), ("EC", "ec"), ("EC", "eh"))]
    tasks = "perplexity,retrieval:single+multikey,noise:perplexity,attention"
    options = ["--tasks", tasks, "--lengths", "256,512", "--limit", 4, "--text", text, "--noise_std", "0,1"]
    output = run("evaluate", *models, *options, "--out", "out", cwd=folder).stdout
    assert "Everything is in out; read out/index.html" in output
    return folder, [*models, *options]


def test_results_contain_scores_and_settings(evaluated, small_checkpoints):
    results = json.loads((evaluated[0] / "out" / "results.json").read_text())
    assert results["command"].startswith("ropepp-lit evaluate RoPE=")
    assert [model["name"] for model in results["models"]] == ["RoPE", "EC", "EC"]
    (notice,) = [line for line in results["notices"] if "differ in architecture" in line]
    assert notice.endswith("are runs of EC by their name, but differ in architecture; tell them apart by NAME=PATH.")
    assert all(len(model["fingerprint"]) == len("sha256:") + 64 for model in results["models"])
    assert [model["kv_cache_bytes_per_token"] for model in results["models"]] == [256, 256, 128]
    assert results["settings"]["lengths"] == [256, 512]
    assert results["settings"]["documents"] == 4
    rows = results["scores"]

    def pick(**columns):
        empty = {"position": None, "depth": None, "noise_std": None}
        return [row for row in rows if all(row[key] == value for key, value in {**empty, **columns}.items())]

    for model, runs in (("RoPE", 1), ("EC", 2)):
        for length in (256, 512):
            (loss,) = pick(model=model, task="perplexity", metric="loss", length=length)
            assert loss["low"] <= loss["value"] <= loss["high"]
            assert (loss["examples"], loss["runs"]) == (4, runs)
            assert (loss["difference"] is None) == (model == "RoPE")
            for part in ("single", "multikey", "all"):
                (score,) = pick(model=model, task="retrieval", part=part, length=length)
                assert score["value"] == 0
    (quiet,) = pick(model="EC", task="perplexity", metric="loss", length=512, heads="imaginary", noise_std=0.0)
    (loud,) = pick(model="EC", task="perplexity", metric="loss", length=512, heads="imaginary", noise_std=1.0)
    (plain,) = pick(model="EC", task="perplexity", metric="loss", length=512)
    assert quiet["value"] == pytest.approx(plain["value"], abs=1e-5)
    assert loud["value"] != quiet["value"]
    assert not pick(model="RoPE", task="perplexity", metric="loss", length=512, heads="imaginary", noise_std=1.0)
    with (evaluated[0] / "out" / "scores.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)


def test_page_plots_and_events_are_written(evaluated):
    out = evaluated[0] / "out"
    page = (out / "index.html").read_text()
    assert "RoPE" in page
    assert "data:image/png;base64," in page
    assert len(list(out.glob("attention-*.png"))) == 4  # for each name and length, of the last run
    assert list((out / "tensorboard").rglob("events.out.*"))


def test_the_same_command_reuses_cached_results(evaluated, run, tmp_path):
    folder, arguments = evaluated
    shutil.copytree(folder / "out", tmp_path / "out")
    before = json.loads((tmp_path / "out" / "results.json").read_text())
    parts = sorted((tmp_path / "out" / "parts").glob("*.json"))
    parts[0].unlink()
    stamps = {path: path.stat().st_mtime_ns for path in parts[1:]}
    started = time.monotonic()
    run("evaluate", *arguments, "--out", "out", cwd=tmp_path)
    assert time.monotonic() - started < 60
    assert {path: path.stat().st_mtime_ns for path in parts[1:]} == stamps
    assert parts[0].exists()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["scores"] == before["scores"]


def test_held_out_text_and_a_hugging_face_folder(run, tiny, tmp_path):
    run("fit", *tiny, "--trainer.max_steps", 2, "--trainer.default_root_dir", "trained", cwd=tmp_path)
    options = ["--tasks", "perplexity", "--lengths", 64, "--out"]
    run("evaluate", "trained/checkpoints/last.ckpt", *options, "one", cwd=tmp_path)
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    assert one["models"][0]["name"] == "trained"
    assert one["settings"]["text"] == "held-out documents of the first run"
    assert one["settings"]["documents"] > 3
    run("export", "trained/checkpoints/last.ckpt", "hf", "--check", "false", cwd=tmp_path)
    run("evaluate", "trained/checkpoints/last.ckpt", "hf", *options, "two", cwd=tmp_path)
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    values = {
        row["model"]: row["value"] for row in two["scores"] if row["metric"] == "loss" and row["position"] is None
    }
    assert values["hf"] == pytest.approx(values["trained"], abs=1e-5)
    failed = run("evaluate", "hf", *options, "three", cwd=tmp_path, returncode=2).stderr
    assert "text: hf does not store which text was held out; pass files by --text" in failed


def held_out_lengths(shards):
    """Return the number of tokens of each held-out document, without BOS and EOS."""
    manifest = Manifest.read(shards)
    return [len(ids) - 2 for ids in TokenShards(shards, manifest, "validation").documents()]


def test_mixtures_are_evaluated_by_set_with_notices_for_other_runs(run, tiny, texts, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for path in sorted(texts.iterdir())[name == "second" :: 2]:
            (tmp_path / name / path.name).write_text(f"{name}: {path.read_text()}")
        options = ["--tokenizer", "bytes", "--validation_fraction", 0.3]
        run("prepare", name, "--out", f"shards/{name}", *options, cwd=tmp_path)
    mixture = json.dumps({"shards/first": 1, "shards/second": 3})
    for name, source in (("mixed", mixture), ("other", "shards/first")):
        options = ["--trainer.max_steps", 1, "--trainer.default_root_dir", name, "--data.source", source]
        run("fit", *tiny, *options, cwd=tmp_path)
    models = ["mixed/checkpoints/last.ckpt", "other/checkpoints/last.ckpt"]
    options = ["--tasks", "perplexity", "--lengths", "32,64", "--limit", 3, "--out", "out"]
    output = run("evaluate", *models, *options, cwd=tmp_path).stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["sets"] == ["first", "second"]
    assert results["settings"]["documents"] == 6
    values = {}
    for row in results["scores"]:
        if row["metric"] == "loss" and row["position"] is None and row["length"] == 64 and row["model"] == "mixed":
            values[row["part"]] = (row["examples"], row["value"])
    assert {part: examples for part, (examples, _) in values.items()} == {"": 6, "first": 3, "second": 3}
    assert min(values["first"][1], values["second"][1]) < values[""][1] < max(values["first"][1], values["second"][1])
    (share,) = [row for row in results["scores"] if row["metric"] == "more_context" and row["model"] == "mixed"
                and not row["part"]]  # fmt: skip
    assert (share["length"], 30 < share["value"] < 60) == (64, True)
    (notice,) = results["notices"]
    assert notice.startswith("other was not trained on the first model's data")
    assert notice in output
    lengths = {name: held_out_lengths(tmp_path / "shards" / name) for name in ("first", "second")}
    most = min(max(sizes) for sizes in lengths.values())
    (short,) = [name for name, sizes in lengths.items() if max(sizes) == most]
    longer = [*options[:-1], "long", "--min_tokens", most + 1]
    output = run("evaluate", models[0], *longer, cwd=tmp_path).stdout
    assert f"the held-out set {short} has no document of {most + 1:,} tokens or more and is skipped" in output
    options = [*options[:-1], "text", "--text", "first"]
    run("evaluate", *models, *options, cwd=tmp_path)
    notices = json.loads((tmp_path / "text" / "results.json").read_text())["notices"]
    assert [line.split(",")[0] for line in notices] == ["mixed was trained on first", "other was trained on first"]


def test_text_key_and_split_with_models_without_training_data(run, small_checkpoints, tmp_path):
    rows = [{"body": f"Document {number}. " * 20} for number in range(5)] + [{"body": ""}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(lines) + "\n\n")
    (tmp_path / "parts.txt").write_text("One part.\n<end>\nAnother one.\n<end>\nA third.\n")
    options = ["--tasks", "perplexity", "--lengths", 64, "--out", "out", "--text", "rows.jsonl", "--text_key", "body"]
    models = [f"A={small_checkpoints['rope']}", f"B={small_checkpoints['ec']}"]
    output = run("evaluate", *models, *options, cwd=tmp_path).stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["documents"] == 5
    assert len(results["notices"]) == 2
    assert "Note: B does not store its training data" in output
    options = ["--tasks", "perplexity", "--lengths", 64, "--out", "parts", "--text", "parts.txt", "--split=<end>"]
    run("evaluate", *models, *options, cwd=tmp_path)
    assert json.loads((tmp_path / "parts" / "results.json").read_text())["settings"]["documents"] == 3


def test_only_one_model_is_in_memory_and_duplicate_runs_are_rejected(small_checkpoints, text, tmp_path, monkeypatch):
    import gc
    import weakref

    from ropepp_lit.commands.evaluate import evaluate
    from ropepp_lit.errors import UsageError
    from ropepp_lit.eval import models

    alive, load = [], models.load_model

    def watched(*arguments, **options):
        gc.collect()
        assert not [reference for reference in alive if reference() is not None]
        model = load(*arguments, **options)
        if options.get("weights", True):
            alive.append(weakref.ref(model.decoder))
        return model

    monkeypatch.setattr(models, "load_model", watched)
    paths = [str(small_checkpoints[key]) for key in ("rope", "ec", "eh")]
    options = {"tasks": "perplexity", "lengths": "64", "text": str(text), "limit": 2}
    evaluate(*paths, out=str(tmp_path / "out"), **options)
    assert len(alive) == 3
    evaluate(*paths, out=str(tmp_path / "out"), **options)
    assert len(alive) == 3  # all results are cached, so no weights are loaded
    with pytest.raises(UsageError, match=r"checkpoints: .*rope.ckpt and .*rope.ckpt are the same run of A; name it"):
        evaluate(f"A={paths[0]}", f"A={paths[0]}", out=str(tmp_path / "twice"), **options)


def test_a_checkpoint_that_changes_during_the_evaluation_is_rejected(small_checkpoints, text, tmp_path, monkeypatch):
    """For example `last.ckpt` during training; its results would be cached for the previous checkpoint."""
    from ropepp_lit.commands.evaluate import evaluate
    from ropepp_lit.errors import UsageError
    from ropepp_lit.eval import pieces

    path = shutil.copyfile(small_checkpoints["rope"], tmp_path / "last.ckpt")
    monkeypatch.setattr(pieces, "check_units", lambda *_, **__: shutil.copyfile(small_checkpoints["ec"], path))
    options = {"tasks": "perplexity", "lengths": "64", "text": str(text), "limit": 2}
    with pytest.raises(UsageError, match=r"last.ckpt: was changed after the evaluation began; run the command again"):
        evaluate(str(path), out=str(tmp_path / "out"), **options)
    assert not list((tmp_path / "out" / "parts").glob("*.json"))


@pytest.mark.parametrize(
    ("options", "output"),
    [
        (
            ["--tasks", "speed"],
            "tasks: no task 'speed'; choose from perplexity, longppl, retrieval, ruler, recall, induction",
        ),
        (["--tasks", "retrieval:none"], "tasks: retrieval has no family 'none'; choose from single, multikey"),
        (
            ["--tasks", "noise:attention"],
            "tasks: noise is for perplexity and prompts, not attention",
        ),
        (["--tasks", ","], "tasks: name at least one of"),
        (["--lengths", "long"], "lengths: 'long' is not a number of tokens such as 512 or 64k"),
        (["--lengths", "100000000k"], "lengths: 102,400,000,000 tokens need about"),
        (["--tasks", "retrieval:single", "--lengths", "20"], "lengths: 20 tokens are too few for retrieval:single"),
        (
            ["--tasks", "attention", "--lengths", "64k"],
            "text: attention at 65,536 tokens needs a document of this length",
        ),
        (["--limit", "0"], "limit: 0 must be 1 or more"),
        (["--stride", "4096"], "stride: 4096 must be 1 or more, and no more than the shortest of lengths"),
        (["--noise_std", "loud"], "noise_std: 'loud' must be numbers with commas"),
        (["--noise_std=-1"], "noise_std: give standard deviations of 0 or more"),
        (["--dtype", "int8"], "dtype: 'int8' must be float32 or bfloat16"),
        (["--text", "nowhere"], "text: nowhere: no such file or folder"),
        (["--text", "empty.txt"], "text: empty.txt has no document"),
        (["--text", "empty.txt,"], "text: a source has an empty name"),
        (
            ["--text", "latin.txt"],
            "text: latin.txt: not UTF-8; convert it by `iconv -f ENCODING -t UTF-8`, or leave the file out",
        ),
        (["--min_tokens", "100000"], "has no document of 100,000 tokens or more"),
        (["--out", "taken"], "out: taken is neither empty nor an evaluation"),
    ],
)
def test_invalid_options(mistake, small_checkpoints, text, tmp_path, monkeypatch, options, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    defaults = {"--tasks": "perplexity", "--lengths": "64", "--text": str(text), "--out": "out"}
    overrides = dict(zip(options[::2], options[1::2], strict=True)) if "=" not in options[0] else {}
    words = [word for pair in {**defaults, **overrides}.items() for word in pair] + ([] if overrides else options)
    assert output in mistake(str(small_checkpoints["ec"]), *words, subcommand="evaluate")


def test_invalid_checkpoints(mistake, small_checkpoints, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "checkpoints: name at least one" in mistake("--out", "out", subcommand="evaluate")
    for before in ([], [str(small_checkpoints["ec"])]):  # the other checkpoint is not evaluated first
        output = mistake(*before, "none.ckpt", "--text", str(text), "--out", "out", subcommand="evaluate")
        assert "none.ckpt: no such checkpoint" in output
    (tmp_path / "cut.ckpt").write_bytes(small_checkpoints["ec"].read_bytes()[:1000])
    assert "cut.ckpt: not a readable checkpoint" in mistake("cut.ckpt", "--out", "out", subcommand="evaluate")
    import torch

    from ropepp_lit.checkpoint import KEY, read_checkpoint

    contents = dict(read_checkpoint(small_checkpoints["ec"]))
    contents[KEY] = {**contents[KEY], "tokenizer": None}
    torch.save(contents, "mute.ckpt")
    message = "mute.ckpt: the checkpoint stores no tokenizer"
    assert message in mistake("mute.ckpt", "--out", "out", subcommand="evaluate")
    others.make_folder("gpt2", tmp_path / "gpt2")
    (tmp_path / "letter.txt").write_text("a")
    options = ["--tasks", "perplexity", "--text", "letter.txt", "--out", "out"]
    message = "text: no document has two tokens, so gpt2 has nothing to predict"
    assert message in mistake("gpt2", *options, subcommand="evaluate")
    assert not (tmp_path / "out").exists()
