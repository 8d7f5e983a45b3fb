"""Tasks of lm-eval, by its own rules: prompts, filters, aggregation and few-shot examples are its own."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.harness_loading import load_tasks
from ropepp_lit.eval.models import Model
from ropepp_lit.eval.results import Measurement

PARTS = 200
"""Parts of the examples that are left out in turn where a metric is not a mean over examples."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """lm-eval's own options."""

    num_fewshot: int | None = None
    """Examples in the prompt; None means the task's own number."""

    include_path: str | None = None
    """A folder with tasks (YAML) of one's own."""

    apply_chat_template: bool = False
    max_length: int | None = None
    """Tokens that are read at most; None means the trained context."""

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(f"num_fewshot: {self.num_fewshot} must be 0 or more")
        if self.max_length is not None and self.max_length < 1:
            raise UsageError(f"max_length: {self.max_length} must be 1 or more")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise UsageError(f"include_path: {self.include_path}: no such folder; name one with tasks (YAML)")

    def identity(self) -> dict[str, Any]:
        """What tells results apart: the options, lm-eval's version and the files of `include_path`."""
        digest = hashlib.sha256()
        for file in sorted(Path(self.include_path).rglob("*")) if self.include_path else ():
            if file.is_file() and file.suffix in (".yaml", ".py", ".json", ".jsonl", ".csv"):
                digest.update(str(file.relative_to(str(self.include_path))).encode() + b"\0" + file.read_bytes())
        return {**asdict(self), "files": digest.hexdigest(), "lm_eval": version("lm_eval")}


def check_harness() -> None:
    """Raise UsageError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("tasks: harness needs lm-eval: pip install 'ropepp-lit[eval]'")


def check_task(task: str, options: Options) -> None:
    """Raise UsageError where lm-eval knows no such task."""
    _manager_of(task, options.include_path)


@functools.cache
def _manager(include_path: str | None, *, defaults: bool) -> tuple[Any, dict[str, Any]]:
    """lm-eval's task manager (indexing its own tasks takes seconds), and what it passes to tasks as it loads them."""
    from lm_eval.tasks import TaskManager

    metadata: dict[str, Any] = {"max_seq_lengths": []}
    return TaskManager(include_path=include_path, include_defaults=defaults, metadata=metadata), metadata


def _manager_of(task: str, include_path: str | None) -> tuple[Any, dict[str, Any]]:
    """The manager of the tasks of `include_path` where the task is one of them, else of all."""
    if include_path is not None:
        manager, metadata = _manager(include_path, defaults=False)
        if task in manager.all_subtasks:
            return manager, metadata
    manager, metadata = _manager(include_path, defaults=True)
    if task not in manager.all_tasks:
        where = "" if include_path is None else f", and {include_path} has none"
        raise UsageError(f"tasks: lm-eval knows no task {task!r}{where}; see: lm_eval ls tasks")
    return manager, metadata


def measure(
    model: Model, task: str, *, lengths: Sequence[int], limit: int | None, options: Options
) -> list[Measurement]:
    """What lm-eval finds for a task, or for each task of a group and the group.

    Tasks that make examples of a given length (RULER's) are run once for each length.

    Args:
        model: What is measured.
        task: Its name.
        lengths: Tokens of prompt and answer, for tasks that have lengths.
        limit: Examples of each task and length, the first ones; None means all.
        options: Of lm-eval.

    Returns:
        One measurement per task, metric, filter and length, with lm-eval's value. A filter other than `none` is named
        in the metric: `exact_match,strict-match`.

    Raises:
        UsageError: no such task, its data cannot be had, or the model cannot be measured by it.
    """
    found: list[Measurement] = []
    names = [task]
    for length in lengths:
        run, has_lengths = run_task(model, names, length=length, limit=limit, options=options)
        found += run
        names = has_lengths  # the others do not depend on the length
        if not names:
            break
    if not found:
        raise UsageError(f"tasks: harness:{task} gives no number")
    return found


def run_task(
    model: Model, names: Sequence[str], *, length: int, limit: int | None, options: Options
) -> tuple[list[Measurement], list[str]]:
    """Run tasks of lm-eval, those that have lengths at one.

    Args:
        model: What is measured.
        names: Of the tasks.
        length: Tokens of prompt and answer.
        limit: See :func:`measure`.
        options: Of lm-eval.

    Returns:
        Measurements; and the names of the tasks that have lengths.
    """
    from lm_eval import evaluator

    from ropepp_lit.eval.language_model import DecoderLM

    with _loaded(model, names, length, options) as (loaded, manager):
        tasks = loaded["tasks"]
        has_lengths = [name for name, task in tasks.items() if _has_lengths(task)]
        reads = options.max_length or model.entry.get("context_length") or length
        language_model = DecoderLM(model, max_length=max(reads, length) if has_lengths else reads)
        if options.apply_chat_template and language_model.tokenizer.chat_template is None:
            raise UsageError(f"apply_chat_template: {model.path} stores no chat template; leave the option out")
        inside = {task.task_name for group in loaded.get("groups", {}).values() for task in group.get_all_tasks()}
        groups = loaded.get("groups", {})
        nested = {inner.name for group in groups.values() for inner in group.get_all_groups()}
        try:
            # It would ask git for the commit of the current folder, which prints an error where that is none of git's.
            evaluator.get_git_commit_hash = lambda: None
            results = evaluator.simple_evaluate(
                model=language_model,
                tasks=[group for name, group in groups.items() if name not in nested]
                + [task for name, task in tasks.items() if name not in inside],
                num_fewshot=options.num_fewshot,
                limit=limit,
                task_manager=manager,
                apply_chat_template=options.apply_chat_template,
                bootstrap_iters=0,
                log_samples=True,
            )
        except ImportError as error:
            raise UsageError(f"tasks: {', '.join(names)}: {error}; pip install 'ropepp-lit[eval]'") from error
    if language_model.requests_cut:
        print(
            f"harness:{'+'.join(names)}: {language_model.requests_cut:,} prompts or texts were longer than the "
            f"{language_model.max_length:,} tokens that {model.name} reads and lost their beginning "
            f"({language_model.tokens_cut:,} tokens in all); --max_length gives more",
            file=sys.stderr,
        )
    details = {
        "lm-eval": version("lm_eval"),
        "max_length": language_model.max_length,
        "prompts_cut": language_model.requests_cut,
        "tokens_cut": language_model.tokens_cut,
        "limit": limit,
        "chat_template": options.apply_chat_template,
    }
    return list(_measurements(results, tasks, groups, has_lengths, length, details)), has_lengths


@contextlib.contextmanager
def _loaded(model: Model, names: Sequence[str], length: int, options: Options) -> Iterator[tuple[Any, Any]]:
    """Tasks and groups with their data, and lm-eval's task manager."""
    from ropepp_lit.eval.language_model import make_tokenizer

    managers = [_manager_of(name, options.include_path) for name in names]
    manager, metadata = max(managers, key=lambda pair: len(pair[0].all_tasks))
    with tempfile.TemporaryDirectory() as folder:  # tasks that make their own data load the tokenizer by its name
        tokenizer = make_tokenizer(model)
        tokenizer.save_pretrained(folder)
        metadata.update(max_seq_lengths=[length], tokenizer=folder, pretrained=folder)
        loaded = load_tasks(manager, names, tokenizer, model.opening, length)
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UsageError(f"tasks: harness:{name} runs code that the model writes; it is not run here")
            if getattr(task, "MULTIMODAL", False):
                raise UsageError(f"tasks: harness:{name} shows more than text, and the model reads text alone")
        yield loaded, manager


def _has_lengths(task: Any) -> bool:
    """Whether the task names its metrics by lengths, as RULER's do."""
    return bool(task.aggregation()) and all(metric.isdigit() for metric in task.aggregation())


def _measurements(
    results: dict[str, Any],
    tasks: dict[str, Any],
    groups: dict[str, Any],
    has_lengths: Sequence[str],
    length: int,
    details: dict[str, Any],
) -> Iterator[Measurement]:
    """What lm-eval found, metric by metric, each with its values for single examples."""
    found: dict[tuple[str, str], Measurement] = {}
    for name, key, metric, filter_key, value in _values_of(results, length):
        higher = results["higher_is_better"].get(name, {}).get(metric, True)
        said = {
            **details,
            "filter": filter_key,
            "shots": results["n-shot"].get(name),
            "task_version": results["versions"].get(name),
        }
        sized = metric.isdigit()
        fields = {
            "task": "harness",
            "part": name,
            "metric": ("score" if sized else metric) + ("" if filter_key == "none" else f",{filter_key}"),
            "length": length if sized else None,
            "higher_is_better": higher,
        }
        if name in tasks:
            samples = [
                sample
                for sample in results["samples"][name]
                if sample["filter"] == filter_key and metric in sample["metrics"]
            ]
            items, names = [sample[metric] for sample in samples], [sample["doc_hash"] for sample in samples]
            aggregate = tasks[name].aggregation().get(metric) or _mean
            numerators, denominators, aggregation = spread(items, aggregate, value)
            said |= {"examples": len(items), "of": results["n-samples"][name]["original"]}
        else:
            leaves = [
                found[task.task_name, key] for task in groups[name].get_all_tasks() if (task.task_name, key) in found
            ]
            numerators, denominators, aggregation = _of_group(leaves, value)
            names = [leaf.sample for leaf in leaves]
            said |= {"examples": len(numerators), "tasks": len(leaves)}
        found[name, key] = Measurement(
            **fields,
            numerators=numerators,
            denominators=denominators,
            sample=hashlib.sha256("\0".join(names).encode()).hexdigest()[:16],
            aggregation=aggregation,
            details=said,
        )
        yield found[name, key]


def _values_of(results: dict[str, Any], length: int) -> Iterator[tuple[str, str, str, str, float]]:
    """Name, `metric,filter`, metric, filter and value of whatever lm-eval gives as a number; tasks before groups."""
    for name in sorted(results["results"], key=lambda name: name not in results["samples"]):
        for key, value in results["results"][name].items():
            metric, comma, filter_key = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, bool | str):
                continue
            if metric.isdigit() and int(metric) != length:
                continue  # RULER's tasks give -1 for lengths that were not run
            if isinstance(value, int | float | np.number):
                yield name, key, metric, filter_key, float(value)


def _mean(items: Sequence[float]) -> float:
    """lm-eval's aggregation of metrics that name none."""
    return sum(items) / len(items)


def spread(
    items: Sequence[Any], aggregate: Callable[[Sequence[Any]], float], value: float
) -> tuple[list[float], list[float], str]:
    """Numbers for single examples, of which a metric's value is made as lm-eval makes it.

    Means and perplexities are made of the examples' own numbers. Others (F1, BLEU, word error rate) are not: there the
    examples get influence values (the jackknife's pseudo-values, moved so that their mean is the value), whose spread
    is that of the metric to first order. An aggregation that refuses fewer examples gives the value alone.

    Args:
        items: The examples' values, of whatever type the aggregation takes.
        aggregate: lm-eval's aggregation.
        value: What it makes of all items.

    Returns:
        Numerators, denominators, and the aggregation of :class:`~ropepp_lit.eval.results.Measurement`.
    """
    from lm_eval.api import metrics

    ones = [1.0] * len(items)
    if aggregate is metrics.perplexity:
        return [-float(item) for item in items], ones, "perplexity"
    if aggregate in (metrics.weighted_perplexity, metrics.bits_per_byte):
        finish = "perplexity" if aggregate is metrics.weighted_perplexity else "bits_per_byte"
        return [-float(item[0]) for item in items], [float(item[1]) for item in items], finish
    with contextlib.suppress(Exception):  # not every aggregation takes a single item
        with warnings.catch_warnings(action="ignore"):
            singles = [float(aggregate([item])) for item in items]
        half = max(1, len(items) // 2)
        parts_and_values = ((singles, value), (singles[:half], aggregate(items[:half])))
        if all(math.isclose(_mean(part), whole, rel_tol=1e-9, abs_tol=1e-12) for part, whole in parts_and_values):
            return singles, ones, "mean"
    parts = np.array_split(np.arange(len(items)), min(PARTS, len(items)))
    influence = np.zeros(len(items))
    for part in parts:
        left_out = set(part.tolist())
        try:
            rest = aggregate([item for number, item in enumerate(items) if number not in left_out])
        except Exception:  # an aggregation may need more, such as examples of both classes
            return [value], [1.0], "mean"
        influence[part] = (value - rest) * (len(items) - len(part)) / len(part)
    return (value + influence - influence.mean()).tolist(), ones, "mean"


def _of_group(leaves: Sequence[Measurement], value: float) -> tuple[list[float], list[float], str]:
    """A group's mean over its tasks, weighted by their examples or not: whichever gives lm-eval's value."""
    if all(leaf.aggregation == "mean" for leaf in leaves):
        total = sum(len(leaf.numerators) for leaf in leaves)
        for weights in ([1.0] * len(leaves), [total / len(leaves) / len(leaf.numerators) for leaf in leaves]):
            numerators = [x * w for leaf, w in zip(leaves, weights, strict=True) for x in leaf.numerators]
            denominators = [w for leaf, w in zip(leaves, weights, strict=True) for _ in leaf.numerators]
            if math.isclose(sum(numerators) / sum(denominators), value, rel_tol=1e-9, abs_tol=1e-12):
                return numerators, denominators, "mean"
    return [value], [1.0], "mean"
