"""lm-eval's tasks with our decoder have the same results as with lm-eval's `hf` model of an export."""

import math

import pytest
import torch
from harness_tasks import write_tasks
from others import KINDS, LONG, make_folder

from ropepp_lit.errors import UsageError
from ropepp_lit.eval import harness
from ropepp_lit.eval.harness import Options
from ropepp_lit.eval.models import load_model
from ropepp_lit.eval.tasks.examples import write_answers
from ropepp_lit.eval.tasks.retrieval import FAMILIES
from ropepp_lit.hf.export import export
from ropepp_lit.hf.folder import open_checkpoint

lm_eval = pytest.importorskip("lm_eval")

PLAIN = (
    "local_choice", "local_rolling", "local_lambada", "local_no_context", "local_filters", "local_wer", "local_group",
)  # fmt: skip
MAX_LENGTH = 192


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return str(write_tasks(tmp_path_factory.mktemp("lm-eval") / "tasks"))


@pytest.fixture(scope="module")
def folders(small_checkpoints, tmp_path_factory):
    """Function that creates Hugging Face folders: models of other families, and exports of ours."""
    created = {}

    def make(kind):
        if kind not in created:
            folder = tmp_path_factory.mktemp("folders") / kind
            if kind in KINDS:
                created[kind] = make_folder(kind, folder)
            else:
                export(open_checkpoint(small_checkpoints[kind]), folder, dtype=None, max_shard_bytes=10**9, check=False)
                created[kind] = folder
        return created[kind]

    return make


def load(path):
    return load_model(str(path), dtype=torch.float32, device=torch.device("cpu"))


def hf_model(folder, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=3, max_length=MAX_LENGTH,
        trust_remote_code=True, **options,
    )  # fmt: skip


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arguments_of_one, number) for number, arguments_of_one in enumerate(arguments)]


@pytest.mark.parametrize("kind", [*KINDS, "eh", "ec"])
def test_requests_match_the_hf_model(folders, small_checkpoints, kind):
    from ropepp_lit.eval.language_model import DecoderLM

    hf = hf_model(folders(kind))
    ours = DecoderLM(load(small_checkpoints.get(kind, folders(kind))), max_length=MAX_LENGTH)
    first = hf.tokenizer.decode([hf.prefix_token_id])
    pairs = instances(
        "loglikelihood",
        ("The quick brown", " fox"), ("The quick brown ", "fox"), ("The quick brown", " cat sleeps."), ("", "A fox"),
        (f"{first}The fox", " reads"), ("Two\n\nlines:", "\n漢字 🙂"), (LONG, " It ends."), ("a", LONG[:60]),
    )  # fmt: skip
    measurements, reference = ours.loglikelihood(pairs), hf.loglikelihood(pairs)
    assert [value for value, _ in measurements] == pytest.approx([value for value, _ in reference], rel=1e-5, abs=1e-4)
    assert [greedy for _, greedy in measurements] == [greedy for _, greedy in reference]
    assert ours.num_truncated == 1
    assert ours.num_truncated_tokens == sum(map(len, hf._encode_pair(LONG, " It ends."))) - MAX_LENGTH - 1

    texts = instances("loglikelihood_rolling", (LONG,), ("A fox.",), (LONG[:700],))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(hf.loglikelihood_rolling(texts), rel=1e-5)
    assert ours.num_truncated == 1

    stops = {"until": ["e", "\n\n"], "max_gen_toks": 24, "do_sample": False}
    free = {"until": [], "max_gen_toks": 40, "temperature": 0.0}
    prompts = [("The quick", stops), ("def add(", free), ("The fox reads 漢字", free), (LONG, free), ("Naïve", stops)]
    prompts = instances("generate_until", *prompts)
    assert ours.generate_until(prompts) == hf.generate_until(prompts)
    assert ours.num_truncated == 2


@pytest.mark.parametrize("kind", ["llama2", "ec"])
def test_tasks_match_the_hf_model(folders, small_checkpoints, tasks, kind):
    from lm_eval.tasks import TaskManager

    measurements, has_lengths = harness.run_at_length(
        load(small_checkpoints.get(kind, folders(kind))), PLAIN[:-1], length=64, limit=None,
        options=Options(include_path=tasks, max_length=MAX_LENGTH),
    )  # fmt: skip
    reference = lm_eval.simple_evaluate(
        model=hf_model(folders(kind)), tasks=list(PLAIN[:-1]), bootstrap_iters=0,
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
    )["results"]  # fmt: skip
    assert has_lengths == []
    assert len(measurements) == 14
    for item in measurements:
        metric, _, filter_key = item.metric.partition(",")
        value = reference[item.part][f"{metric},{filter_key or 'none'}"]
        if item.aggregation == "perplexity":
            assert math.log(item.value) == pytest.approx(math.log(value), rel=1e-5, abs=1e-4)
        else:
            assert item.value == pytest.approx(value, rel=1e-4, abs=1e-6)
        assert len(item.numerators) == 8


def by_metric(measurements):
    return {(item.part, item.metric): item for item in measurements}


@pytest.fixture(scope="module")
def measurements(small_checkpoints, tasks):
    """Measurements of all local tasks, by task and metric."""
    options = Options(include_path=tasks, max_length=MAX_LENGTH)
    run, _ = harness.run_at_length(load(small_checkpoints["ec"]), PLAIN[:-1], length=64, limit=None, options=options)
    return by_metric(run)


def test_perplexity_matches_the_task(measurements):
    lambada = measurements["local_lambada", "perplexity"]
    assert lambada.value == pytest.approx(math.exp(sum(lambada.numerators) / 8))
    assert lambada.value > 100  # not its inverse
    words = [float(len(text.split())) for text in _texts()]
    assert measurements["local_rolling", "word_perplexity"].denominators == words


def _texts():
    from harness_tasks import DOCUMENTS

    return [document["text"] for document in DOCUMENTS[:8]]


def test_each_filter_has_its_own_row(measurements):
    strict = measurements["local_filters", "exact_match,strict-match"]
    flexible = measurements["local_filters", "exact_match,flexible-extract"]
    assert (strict.value, strict.numerators) == (1, [1.0] * 8)
    assert (flexible.value, flexible.numerators) == (0, [0.0] * 8)
    assert (strict.details["filter"], strict.details["examples"], strict.details["of"]) == ("strict-match", 8, 8)


def test_higher_is_better_is_that_of_the_task(measurements):
    directions = {metric: item.higher_is_better for (_, metric), item in measurements.items()}
    assert {metric for metric, higher in directions.items() if not higher} == {
        "brier_score", "word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity", "wer",
    }  # fmt: skip


def test_details_contain_the_settings(measurements):
    details = measurements["local_choice", "acc"].details
    assert (details["shots"], details["task_version"], details["lm-eval"]) == (2, 3, lm_eval.__version__)
    assert (details["max_length"], details["prompts_cut"], details["limit"]) == (MAX_LENGTH, 0, None)


def test_options_are_passed_to_lm_eval(small_checkpoints, tasks):
    options = Options(include_path=tasks, max_length=MAX_LENGTH, num_fewshot=1)
    few = harness.run_tasks(load(small_checkpoints["ec"]), "local_choice", lengths=[64], limit=3, options=options)
    for item in few:
        assert (item.details["shots"], item.details["examples"], item.details["of"]) == (1, 3, 8)


def test_tasks_run_at_every_length(small_checkpoints, tasks):
    model = load(small_checkpoints["ec"])
    options = Options(include_path=tasks)
    measurements = harness.run_tasks(model, "local_needles", lengths=[4096, 512, 9000], limit=2, options=options)
    assert [(item.length, item.metric, item.numerators) for item in measurements] == [
        (length, "score", [float(length % 7)] * 2) for length in (4096, 512, 9000)
    ]
    assert [item.details["max_length"] for item in measurements] == [4096, 512, 9000]
    unlimited = harness.run_tasks(model, "local_needles", lengths=[512], limit=None, options=options)
    assert len(unlimited[0].numerators) == 6
    plain = harness.run_tasks(model, "local_rolling", lengths=[512, 1024], limit=1, options=options)
    assert [item.length for item in plain] == [None] * 3


def test_truncation_is_reported(small_checkpoints, tasks, capfd, monkeypatch):
    monkeypatch.setenv("GIT_DIR", "nowhere")  # a call of git by lm-eval would print an error
    options = Options(include_path=tasks, max_length=40)
    (item, *_) = harness.run_tasks(
        load(small_checkpoints["ec"]), "local_lambada", lengths=[64], limit=None, options=options
    )
    assert item.details["prompts_cut"] > 0
    line = f"{item.details['prompts_cut']} prompts or texts were longer than the maximum length of 40 tokens of ec"
    errors = capfd.readouterr().err
    assert line in errors
    assert "fatal" not in errors


def test_chat_template(folders, tasks):
    options = Options(include_path=tasks, max_length=400, apply_chat_template=True)
    chat = load(folders("chat"))
    plain = harness.run_tasks(chat, "local_lambada", lengths=[64], limit=2, options=Options(include_path=tasks))
    measurements = harness.run_tasks(chat, "local_lambada", lengths=[64], limit=2, options=options)
    reference = lm_eval.simple_evaluate(
        model=hf_model(folders("chat")), tasks=["local_lambada"], limit=2, bootstrap_iters=0, apply_chat_template=True,
        task_manager=lm_eval.tasks.TaskManager(include_path=tasks, include_defaults=False),
    )  # fmt: skip
    (value, *_) = [item.value for item in measurements]
    assert math.log(value) == pytest.approx(
        math.log(reference["results"]["local_lambada"]["perplexity,none"]), abs=1e-4
    )
    assert value != plain[0].value
    with pytest.raises(UsageError, match=r"apply_chat_template: .* stores no chat template"):
        harness.run_tasks(load(folders("qwen")), "local_lambada", lengths=[64], limit=2, options=options)


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("local_sampled", "", "tasks: lm-eval: the task generates with num_beams=4, which is not supported"),
        (
            "local_wer",
            "max_length: 8",
            "max_length: the task generates up to 8 tokens, which leaves no space for a prompt within 8",
        ),
        ("unsafe", "task: unsafe\nunsafe_code: true", "harness:unsafe executes code generated by the model"),
        ("gone", "task: gone\ndataset_path: json\ndataset_kwargs: {data_files: gone.json}", "cannot load the task or"),
        ("online", "task: online\ndataset_path: nobody/nothing", "cannot load the task or its data"),
    ],
)
def test_errors_are_one_line(small_checkpoints, tasks, tmp_path, monkeypatch, task, settings, message):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reads = int(settings.split()[-1]) if settings.startswith("max_length") else MAX_LENGTH
    if settings.startswith("task"):
        tasks = str(tmp_path)
        rest = "test_split: test\ndoc_to_text: text\ndoc_to_target: text\noutput_type: generate_until\n"
        if task == "unsafe":
            data = tmp_path / "data.jsonl"
            data.write_text('{"text": "x"}\n')
            rest += f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path}/c}}\n"
        (tmp_path / "task.yaml").write_text(f"{settings}\n{rest}")
    with pytest.raises(UsageError, match=message) as caught:
        harness.run_tasks(
            load(small_checkpoints["ec"]), task, lengths=[64], limit=1,
            options=Options(include_path=tasks, max_length=reads),
        )  # fmt: skip
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mean", "matthews", "words"])
def test_influence_values_have_the_variance_of_the_metric(name):
    import numpy as np
    from lm_eval.api import metrics

    draw = np.random.default_rng(0)
    if name == "words":
        items = [(int(draw.integers(0, size)), int(size)) for size in draw.integers(1, 30, 150)]

        def aggregate(items):
            return sum(wrong for wrong, _ in items) / sum(words for _, words in items)

    elif name == "matthews":
        gold = draw.integers(0, 2, 150)
        items = list(zip(gold.tolist(), np.where(draw.uniform(size=150) < 0.3, 1 - gold, gold).tolist(), strict=True))
        aggregate = metrics.matthews_corrcoef
    else:
        items, aggregate = draw.normal(size=150).tolist(), metrics.mean
    value = aggregate(items)
    numerators, denominators, aggregation = harness.spread(items, aggregate, value)
    assert aggregation == "mean"
    assert np.sum(numerators) / np.sum(denominators) == pytest.approx(value)
    resampled = [aggregate([items[k] for k in draw.integers(0, 150, 150)]) for _ in range(300)]
    assert np.std(numerators) / 150**0.5 == pytest.approx(np.std(resampled), rel=0.2)


def test_an_aggregation_that_fails_on_fewer_samples_returns_only_the_value():
    """For example the area under a curve, which requires samples of both classes."""

    def aggregate(items):
        if len(set(items)) < 2:
            raise ValueError("one class")
        return 0.75

    assert harness.spread([0, 1], aggregate, 0.75) == ([0.75], [1.0], "mean")


# With a byte tokenizer a list of common words needs more tokens.
TASKS = [("niah_single_1", 4096), ("niah_multikey_2", 4096), ("ruler_fwe", 4096), ("ruler_cwe", 16384)]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "length"), TASKS)
def test_retrieval_scores_match_ruler(small_checkpoints, task, length):
    pytest.importorskip("wonderwords", reason="RULER's examples need the extra eval")
    from lm_eval.tasks.ruler.common_utils import process_results

    model = load(small_checkpoints["ec"])
    with harness._loaded(model, [task], length, Options()) as (loaded, _):
        documents = [loaded["tasks"][task].dataset["test"][number] for number in range(2)]
    scores = []
    for document in documents:
        prompt = f"{document['input']} {document['gen_prefix']}"
        (written,) = write_answers(model, [[*model.opening, *model.encode(prompt)]], max_new_tokens=128)
        answers = [str(answer) for answer in document["outputs"]]
        scores.append(FAMILIES["single"].score(answers, written))
        for text in (written, "", answers[0], f"They are {', '.join(answers)}.", answers[-1].upper()):
            assert FAMILIES["single"].score(answers, text) == process_results(document, [text])[str(length)]
    (measured,) = harness.run_tasks(model, task, lengths=[length], limit=2, options=Options())
    assert (measured.part, measured.metric, measured.length) == (task, "score", length)
    assert measured.numerators == scores


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ruler_vt", "ruler_cwe", "ruler_fwe", "niah_single_1"])
def test_example_generation_of_ruler_terminates(small_checkpoints, task):
    pytest.importorskip("wonderwords", reason="RULER's examples need the extra eval")
    with pytest.raises(UsageError, match=r"cannot generate examples of|cannot load") as caught:
        harness.run_tasks(load(small_checkpoints["ec"]), task, lengths=[128], limit=2, options=Options())
    assert "\n" not in str(caught.value)
