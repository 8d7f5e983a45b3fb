"""Files of a report: results, plots and TensorBoard events."""

import csv
import io
import json

import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ropepp_lit.eval.report import folder_names, write_report
from ropepp_lit.eval.report.panels import to_png
from ropepp_lit.eval.report.plots import PLOTS
from ropepp_lit.eval.results import CLEAN, COLUMNS, select


def test_results_are_equal_after_a_json_round_trip(results, folder):
    assert json.loads((folder / "results.json").read_text()) == results


def test_csv_has_every_row(results, folder):
    with (folder / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    expected = [{name: "" if row[name] is None else str(row[name]) for name in COLUMNS} for row in results["scores"]]
    assert rows == expected


def test_plots_have_a_small_size_and_a_sufficient_resolution(folder):
    for name in PLOTS:
        png = (folder / f"{name}.png").read_bytes()
        assert 5_000 < len(png) < 80_000, name
        height, width = imread(io.BytesIO(png)).shape[:2]
        assert width >= 1000, name
        assert 0.2 < height / width < 1.2, name


def test_folder_has_only_the_files_of_the_report(folder):
    assert not list(folder.glob(".*"))
    assert {path.name for path in folder.iterdir()} == {
        "results.json", "scores.csv", "answers.jsonl", "index.html", "tensorboard", "attention-RoPE-layer-0.png",
        *(f"{name}.png" for name in PLOTS),
    }  # fmt: skip


def test_tensorboard_has_a_run_of_scalars_for_each_model(results, folder):
    runs = {path.name for path in (folder / "tensorboard").iterdir()}
    assert runs == {"RoPE", "RoPE++_EH", "RoPE++_EC", "plots"}
    events = EventAccumulator(str(folder / "tensorboard" / "RoPE++_EC"), size_guidance={"scalars": 0})
    events.Reload()
    for tag, columns in {
        "retrieval/single/score": {"task": "retrieval", "part": "single"} | CLEAN,
        "retrieval/single/score/depth_0.5": {"task": "retrieval", "part": "single"} | CLEAN | {"depth": 0.5},
        "retrieval/all/score/noise_imaginary_2": {"task": "retrieval", "heads": "imaginary", "noise_std": 2.0},
        "perplexity/bits_per_byte": {"task": "perplexity", "metric": "bits_per_byte"} | CLEAN,
        "attention/attention/real/by_position_1024": {"task": "attention", "heads": "real"},
        "harness/piqa/acc": {"task": "harness", "part": "piqa"},
    }.items():
        rows = select(results["scores"], model="RoPE++ EC", **columns)
        expected = {row["length"] if row["position"] is None else row["position"]: row["value"] for row in rows}
        actual = {event.step or (0 if 0 in expected else None): event.value for event in events.Scalars(tag)}
        assert actual == pytest.approx(expected), tag


def test_tensorboard_has_the_plots(folder):
    events = EventAccumulator(str(folder / "tensorboard" / "plots"), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == set(PLOTS)
    for name in PLOTS:
        image = events.Images(name)[0]
        assert (image.height, image.width) == imread(folder / f"{name}.png").shape[:2]
        assert imread(io.BytesIO(image.encoded_image_string)).std() > 0.05, name  # not blank


def test_a_failed_write_keeps_the_previous_file(make, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("earlier")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(make(names=["a"], tasks=["harness"], runs=1), tmp_path)
    assert (tmp_path / "results.json").read_text() == "earlier"


def test_file_names_that_are_not_utf8_are_escaped(make, tmp_path):
    results = make(names=["a\udcff"], tasks=["harness"], runs=1)
    write_report({**results, "command": "evaluate \ud800"}, tmp_path)
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert (written["models"][0]["name"], written["command"]) == (r"a\xff", r"evaluate \ud800")
    for name in ("scores.csv", "index.html"):
        assert r"a\xff" in (tmp_path / name).read_text(encoding="utf-8")


def test_a_model_has_one_colour_in_all_plots(make):
    results = make(names=[f"model {number}" for number in range(8)], runs=1)
    colours = {}
    for name, plot in PLOTS.items():
        figure = plot(results)
        for legend in figure.legends:
            for label, line in zip(legend.get_texts(), legend.get_lines(), strict=True):
                colours.setdefault(label.get_text(), set()).add(to_hex(line.get_color()))
        assert name == "retrieval-by-depth" or len(figure.legends) == 1
    assert len(colours) == 8
    assert len(set().union(*colours.values())) == 8


@pytest.mark.parametrize("name", ["loss-by-length", "retrieval-families", "retrieval-by-depth"])
def test_plots_of_eight_models_have_a_small_size(make, name):
    tasks = ["perplexity"] if name == "loss-by-length" else ["retrieval"]
    results = make(names=[f"model {number}" for number in range(8)], tasks=tasks, runs=1)
    assert len(to_png(PLOTS[name](results))) < 100_000


def test_file_names_of_models_are_unique():
    names = ["a b", "a-b", "A_b", "plots", "../up", "漢" * 300, "漢" * 299, "\n"]
    folders = folder_names(names)
    assert len({name.lower() for name in folders}) == len(names)
    assert all(len(name.encode()) < 200 and "/" not in name and name[0] != "." for name in folders)
