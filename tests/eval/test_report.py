"""The evaluation page and its tables."""

import copy
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ropepp_lit.eval.report import write_report
from ropepp_lit.eval.report.plots import PLOTS
from ropepp_lit.eval.results import CLEAN, select

LENGTHS = [256, 512, 1024, 2048]


class Page(HTMLParser):
    """Parsed page: text, ids of headings, cells of tables by title, images, and references."""

    def __init__(self, text):
        super().__init__()
        self.text, self.headings, self.references, self.images = "", [], [], []
        self.tables, self._rows, self._in_cell = {}, [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.references += [value for name, value in values.items() if name in ("src", "href", "srcset", "action")]
        if tag == "h2":
            self.headings.append(values["id"])
        if tag == "img":
            self.images.append(values)
        if values.get("role") == "region":
            self._rows = self.tables[values["aria-label"]] = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td"):
            self._rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("th", "td")

    def handle_data(self, data):
        self.text += data
        if self._in_cell:
            self._rows[-1][-1] = " ".join(f"{self._rows[-1][-1]} {data}".split())


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "index.html").read_text())


@pytest.mark.parametrize(
    ("title", "columns", "digits"),
    [
        ("Loss (nats per token), by length in tokens", {"task": "perplexity", "metric": "loss"}, 3),
        ("Perplexity, by length in tokens", {"task": "perplexity", "metric": "perplexity"}, 2),
        ("Bits per byte, by length in tokens", {"task": "perplexity", "metric": "bits_per_byte"}, 3),
        ("Score (0 to 100), all families, by length in tokens", {"task": "retrieval", "part": "all"}, 1),
    ],
)
def test_main_tables_show_value_interval_and_difference(results, page, title, columns, digits):
    header, *lines = page.tables[title]
    assert header[1:] == ["256 trained", "512", "1,024", "2,048"]
    assert [line[0] for line in lines] == ["RoPE", "RoPE++ EH", "RoPE++ EC"]
    starred = 0
    for model, *cells in lines:
        for length, cell in zip(LENGTHS, cells, strict=True):
            (row,) = select(results["scores"], model=model, length=length, **columns, **CLEAN)
            value, low, high = (f"{row[key]:.{digits}f}" for key in ("value", "low", "high"))
            expected = f"{value} [{low}, {high}]"
            if model != "RoPE":
                keys = ("difference", "difference_low", "difference_high")
                difference, low, high = (shown(row[key], digits) for key in keys)
                star = " *" if row["difference_low"] > 0 or row["difference_high"] < 0 else ""
                starred += bool(star)
                expected += f" {difference}{star} [{low}, {high}]"
            assert cell.replace("*", " *").replace("  ", " ") == expected
    assert starred < 8
    assert (starred > 0) == (digits > 1)  # with two runs, some losses differ significantly, but no score


def shown(difference, digits):
    rounded = round(difference, digits)
    return f"{abs(rounded):.{digits}f}" if rounded == 0 else f"{rounded:+.{digits}f}".replace("-", "−")


def test_other_tables_show_their_values(results, page):
    for title, columns, digits in [
        ("Score (0 to 100), each family, by length in tokens", {"task": "retrieval"} | CLEAN, 1),
        ("Loss (nats per token), by noise", {"task": "perplexity", "metric": "loss", "position": None}, 3),
        ("Score (0 to 100), by noise", {"task": "retrieval", "depth": None}, 1),
        ("Share of attention (%), by distance (first of each range)", {"task": "attention"}, 2),
        ("Tasks of lm-eval", {"task": "harness"}, 4),
    ]:
        rows = select(results["scores"], **columns)
        if "noise" in title:
            rows = [row for row in rows if row["noise_std"] is not None]
        if "each family" in title:
            rows = [row for row in rows if row["part"] != "all"]
        cells = [cell.split()[0] for line in page.tables[title] for cell in line[1:] if "[" in cell]
        assert sorted(cells) == sorted(f"{row['value']:.{digits}f}" for row in rows), title


def test_better_and_worse_depend_on_the_metric(make, tmp_path):
    results = make(names=["first", "second"], tasks=["perplexity", "retrieval"], runs=1)
    for row in results["scores"]:
        if row["model"] == "second":
            row |= {"difference": -1.0, "difference_low": -1.5, "difference_high": -0.5}
    write_report(results, tmp_path)
    text = (tmp_path / "index.html").read_text()
    loss, retrieval = text.index('id="perplexity"'), text.index('id="retrieval"')
    assert 'title="better than first' in text[loss:retrieval]
    assert 'title="worse than first' not in text[loss:retrieval]
    assert 'title="worse than first' in text[retrieval:]
    assert 'title="better than first' not in text[retrieval:]


def test_summary_names_the_best_model_and_insignificant_differences(make, tmp_path):
    results = make(names=["first", "second"], tasks=["perplexity"], runs=1)
    for length, interval in ((256, (-0.2, 0.1)), (2048, (-0.2, -0.05))):
        one, two = select(results["scores"], metric="loss", length=length, **CLEAN)
        one["value"], two["value"], two["difference"] = 4.5, 4.375, -0.125
        two["difference_low"], two["difference_high"] = interval
    write_report(results, tmp_path)
    text = " ".join(Page((tmp_path / "index.html").read_text()).text.split())
    expected = (
        "second has the lowest loss with 4.375; first has 4.500. The difference to first is −0.125, 95% interval "
    )
    assert f"Loss at 256 tokens (training length): {expected}[−0.200, +0.100], which includes 0" in text
    assert f"Loss at 2,048 tokens (8 × training length): {expected}[−0.200, −0.050]. " in text


def test_equal_values_have_no_best_model_and_no_star(make, tmp_path):
    results = make(names=["first", "second"], tasks=["perplexity"], runs=1)
    for row in select(results["scores"], metric="loss", **CLEAN):
        row["value"] = 4.5
        if row["difference"] is not None:
            row["difference"], row["difference_low"], row["difference_high"] = 1e-7, 1e-8, 2e-7
    write_report(results, tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert "All models have 4.500." in text
    assert 'title="worse than first' not in text.split("by length in tokens")[1]


@pytest.mark.parametrize("other", [512, None])
def test_a_length_is_marked_as_trained_only_if_it_is_the_training_length_of_all_models(make, tmp_path, other):
    results = make(names=["first", "second"], tasks=["perplexity"], runs=1)
    results["models"][1]["context_length"] = other
    write_report(results, tmp_path)
    page = Page((tmp_path / "index.html").read_text())
    assert page.tables["Loss (nats per token), by length in tokens"][0][1:] == ["256", "512", "1,024", "2,048"]
    assert "training length)" not in page.text
    assert page.tables["Models"][2][3] == (str(other) if other else "–")


def test_page_shows_models_command_and_settings(results, page):
    text = " ".join(page.text.split())
    for model in results["models"]:
        assert model["fingerprint"] in text
        assert model["path"] in text
        assert model["positions"] in text
    assert results["command"] in text
    for name, version in results["versions"].items():
        assert [name, version] in page.tables["Settings, machine and versions"]
    assert ["lengths", "256, 512, 1024, 2048"] in page.tables["Settings, machine and versions"]
    assert page.tables["Models"][1][:7] == ["RoPE", "RoPE, base 10000", "5,310,720", "256", "2,048", "819,200", "2"]


def test_page_shows_plots_and_maps_with_alternative_texts(page):
    assert len(page.images) == len(PLOTS) + 1
    assert all(image["alt"] for image in page.images)
    assert any(image["alt"] == "Attention map RoPE-layer-0" for image in page.images)


def test_page_is_self_contained(page, folder):
    external = [reference for reference in page.references if not reference.startswith(("data:", "#"))]
    assert external == []
    assert "@import" not in (folder / "index.html").read_text()
    assert "url(" not in (folder / "index.html").read_text()


def test_names_are_escaped(make, tmp_path):
    """HTML, matplotlib math, a leading underscore, missing glyphs, two names with the same folder name, and a path."""
    names = ['<b>&"', "_under $a_b$", "模型", "x/y", "x y", "../plots"]
    results = make(names=names, tasks=["perplexity", "retrieval", "harness"], runs=1)
    results["models"][0] |= {"path": "<i>.ckpt", "positions": "<u>"}
    results |= {"command": "ropepp-lit evaluate '<s>'", "settings": {"<q>": "<em>"}}
    write_report(results, tmp_path)
    text = (tmp_path / "index.html").read_text()
    for tag in ("<b>", "<i>", "<u>", "<s>", "<q>", "<em>"):
        assert tag not in text
    page = Page(text)
    assert [line[0] for line in page.tables["Loss (nats per token), by length in tokens"][1:]] == names
    assert page.tables["Tasks of lm-eval"][0][1:] == names
    for name in PLOTS:
        if figure := PLOTS[name](results):
            for legend in figure.legends:
                assert [label.get_text().strip() for label in legend.get_texts()] == names
    runs = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert runs == sorted(["b", "_under_a_b".strip("_"), "模型", "x_y", "x_y_1", "plots_1", "plots"])


@pytest.mark.parametrize(
    ("task", "sections", "plots"),
    [
        ("perplexity", ["findings", "models", "perplexity"], {"loss-by-length", "loss-by-position"}),
        ("retrieval", ["findings", "models", "retrieval"],
         {"retrieval-by-length", "retrieval-families", "retrieval-by-depth"}),
        ("noise", ["models", "noise"], {"noise-perplexity", "noise-retrieval"}),
        ("attention", ["models", "attention"], {"distance-attention"}),
        ("harness", ["models", "harness"], set()),
    ],
)  # fmt: skip
def test_page_has_only_the_sections_of_its_tasks(make, tmp_path, task, sections, plots):
    for name in PLOTS:
        (tmp_path / f"{name}.png").write_bytes(b"of an earlier report")
    write_report(make(names=["RoPE", "RoPE++ EC"], tasks=[task], runs=1), tmp_path)
    page = Page((tmp_path / "index.html").read_text())
    assert page.headings == [*sections, "method", "repeat", "limits"]
    assert {path.stem for path in tmp_path.glob("*.png")} == plots
    assert len(page.images) == len(plots)


def test_a_single_model_has_no_comparison(make, tmp_path):
    write_report(make(names=["alone"], tasks=["perplexity"], runs=1), tmp_path)
    page = Page((tmp_path / "index.html").read_text())
    assert "difference to" not in page.text
    assert "excludes 0" not in page.text
    assert "Each model has one training run" in page.text


def test_non_finite_numbers_become_null(make, tmp_path):
    results = make(names=["a", "b"], tasks=["perplexity"], runs=1)
    broken = select(results["scores"], model="b", metric="perplexity", length=2048)[0]
    broken |= {"value": float("inf"), "high": float("inf"), "difference": float("nan")}
    original = copy.deepcopy(results)
    write_report(results, tmp_path)
    assert results["scores"][0] == original["scores"][0]  # the argument is not modified
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    row = next(row for row in written["scores"] if row["model"] == "b" and row["metric"] == "perplexity"
               and row["length"] == 2048)  # fmt: skip
    assert (row["value"], row["high"], row["difference"]) == (None, None, None)
    assert Page((tmp_path / "index.html").read_text()).tables["Perplexity, by length in tokens"][2][4] == "–"


def test_tables_are_printed_as_markdown(results, folder):
    tool = Path(__file__).parents[2] / "tools" / "print_tables.py"
    printed = subprocess.run(
        [sys.executable, tool, folder / "results.json"], check=True, capture_output=True, text=True
    )
    lines = printed.stdout.splitlines()
    start = lines.index("| loss | 256 | 512 | 1,024 | 2,048 |")
    assert [line.split(" | ")[0] for line in lines[start + 2 : start + 5]] == ["| RoPE", "| RoPE++ EH", "| RoPE++ EC"]
    (row,) = select(results["scores"], model="RoPE++ EH", metric="loss", length=2048, **CLEAN)
    star = r"\*" if row["difference_low"] > 0 or row["difference_high"] < 0 else ""
    cell = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]; {shown(row['difference'], 3)}{star} "
    assert cell in lines[start + 3]
    assert "| `single` | 256 | 512 | 1,024 | 2,048 |" in lines


def test_heat_maps_by_depth_show_each_family_and_model(results):
    """There is a map for each family and model, with the values of that family."""
    figure = PLOTS["retrieval-by-depth"](results)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    models = ("RoPE", "RoPE++ EH", "RoPE++ EC")
    assert list(panels) == [f"{family}: {model}" for family in ("single", "multikey") for model in models]
    shown = {name: axes.images[0].get_array() for name, axes in panels.items()}
    for name, values in shown.items():
        family, model = name.split(": ")
        rows = select(results["scores"], task="retrieval", part=family, model=model, noise_std=None)
        for row in rows:
            if row["depth"] is not None:
                place = int(4 * row["depth"]), LENGTHS.index(row["length"])
                assert values[place] == pytest.approx(row["value"])
    assert (shown["single: RoPE"] != shown["multikey: RoPE"]).any()


def test_tasks_of_lm_eval_have_a_line_for_each_filter_and_show_their_settings(page):
    lines = {line[0]: line[1:] for line in page.tables["Tasks of lm-eval"][1:]}
    facts = {line[0]: line[1:] for line in page.tables["How the tasks were run"]}
    names = ["gsm8k, exact_match, strict-match", "gsm8k, exact_match, flexible-extract", "piqa, acc", "speech, wer"]
    assert list(lines) == list(facts)[1:] == names
    assert facts["Task, metric"] == ["examples", "lm-eval", "filter", "shots", "task version", "of"]
    assert facts[names[0]] == ["80", "0.4.12", "strict-match", "5", "3", "1319"]
    assert lines[names[0]][0].startswith("0.0000 [0.0000, 0.0")
    assert not lines[names[0]][0].endswith("0.0000]")  # 0 successes in 80 examples do not prove a probability of 0


def test_better_and_worse_use_higher_is_better(make, tmp_path):
    results = make(names=["first", "second"], tasks=["harness"], runs=1)
    for row in results["scores"]:
        if row["model"] == "second":
            row |= {"difference": -1.0, "difference_low": -1.5, "difference_high": -0.5}
    write_report(results, tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert text.count('title="worse than first') == 3  # accuracies
    assert text.count('title="better than first') == 1  # the word error rate


def test_page_shows_notices_sets_and_shares_of_more_context(make, tmp_path):
    results = make(names=["first"], tasks=["perplexity"], runs=1)
    results["notices"] = ["first was trained on <builtin>."]
    (row,) = select(results["scores"], metric="loss", length=512, **CLEAN)
    results["scores"] += [{**row, "part": name, "value": value} for name, value in (("code", 1.5), ("prose", 3.25))]
    results["scores"].append({**row, "metric": "more_context", "value": 41.6})
    write_report(results, tmp_path)
    page = Page((tmp_path / "index.html").read_text())
    text = " ".join(page.text.split())
    assert "Notices first was trained on <builtin>." in text
    assert "only a part of them more context: 42% at 512 tokens, each compared with the previous length" in text
    table = page.tables["Loss (nats per token), each set of documents, by length in tokens"]
    assert [line[0] for line in table[1:]] == ["code (24 documents)", "first", "prose (24 documents)", "first"]
    assert [cell.split()[0] for line in table for cell in line[1:] if "[" in cell] == ["1.500", "3.250"]
