"""Runs tasks of lm-eval with lm-eval's own prompts, filters, few-shot examples and aggregation."""

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

JACKKNIFE_BLOCKS = 200
"""Number of blocks of the delete-d jackknife for metrics that are not means over examples."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of lm-eval."""

    num_fewshot: int | None = None
    """Number of few-shot examples; None means the task's default."""

    include_path: str | None = None
    """Folder with the user's own tasks (YAML)."""

    apply_chat_template: bool = False
    max_length: int | None = None
    """Maximum sequence length in tokens; None means the trained context length."""

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(f"num_fewshot: {self.num_fewshot} must be 0 or more")
        if self.max_length is not None and self.max_length < 1:
            raise UsageError(f"max_length: {self.max_length} must be 1 or more")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise UsageError(f"include_path: {self.include_path}: no such folder; name one with tasks (YAML)")

    def identity(self) -> dict[str, Any]:
        """Return what results depend on: options, lm-eval's version and the digest of the files in `include_path`."""
        digest = hashlib.sha256()
        for file in sorted(Path(self.include_path).rglob("*")) if self.include_path else ():
            if file.is_file() and file.suffix in (".yaml", ".py", ".json", ".jsonl", ".csv"):
                digest.update(str(file.relative_to(str(self.include_path))).encode() + b"\0" + file.read_bytes())
        return {**asdict(self), "files": digest.hexdigest(), "lm_eval": version("lm_eval")}


def check_harness() -> None:
    """Raise UsageError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("tasks: harness needs lm-eval: pip install 'ropepp-lit[eval]'")


def check_task(task: str, options: Options) -> None:
    """Raise UsageError if lm-eval has no such task."""
    _manager_of(task, options.include_path)


@functools.cache
def _manager(include_path: str | None, *, defaults: bool) -> tuple[Any, dict[str, Any]]:
    """Return lm-eval's task manager (indexing its tasks takes seconds) and the metadata that it passes to tasks."""
    from lm_eval.tasks import TaskManager

    metadata: dict[str, Any] = {"max_seq_lengths": []}
    return TaskManager(include_path=include_path, include_defaults=defaults, metadata=metadata), metadata


def _manager_of(task: str, include_path: str | None) -> tuple[Any, dict[str, Any]]:
    """Return the manager of the tasks in `include_path` if it includes the task, otherwise the one of all tasks."""
    if include_path is not None:
        manager, metadata = _manager(include_path, defaults=False)
        if task in manager.all_subtasks:
            return manager, metadata
    manager, metadata = _manager(include_path, defaults=True)
    if task not in manager.all_tasks:
        where = "" if include_path is None else f", and {include_path} has none"
        raise UsageError(f"tasks: lm-eval has no task {task!r}{where}; see: lm_eval ls tasks")
    return manager, metadata


def run_tasks(
    model: Model, task: str, *, lengths: Sequence[int], limit: int | None, options: Options
) -> list[Measurement]:
    """Run a task of lm-eval, or a group with all its tasks.

    Tasks that generate examples of a given length (RULER's) are run once for each length.

    Args:
        model: The model.
        task: Name of the task or group.
        lengths: Tokens of prompt and answer, for tasks that depend on a length.
        limit: Number of examples of each task and length, the first ones; None means all.
        options: Options of lm-eval.

    Returns:
        One measurement per task, metric, filter and length, with lm-eval's value. A filter other than `none` is part of
        the metric's name: `exact_match,strict-match`.

    Raises:
        UsageError: There is no such task, its data cannot be loaded, or the model does not support the task.
    """
    measurements: list[Measurement] = []
    names = [task]
    for length in lengths:
        at_length, names_with_lengths = run_at_length(model, names, length=length, limit=limit, options=options)
        measurements += at_length
        names = names_with_lengths  # the others do not depend on the length
        if not names:
            break
    if not measurements:
        raise UsageError(f"tasks: harness:{task} returns no numeric metric")
    return measurements


def run_at_length(
    model: Model, names: Sequence[str], *, length: int, limit: int | None, options: Options
) -> tuple[list[Measurement], list[str]]:
    """Run tasks of lm-eval at one length.

    Args:
        model: The model.
        names: Names of the tasks and groups.
        length: Tokens of prompt and answer, for tasks that depend on a length.
        limit: See :func:`run_tasks`.
        options: Options of lm-eval.

    Returns:
        Measurements, and the names of the tasks that depend on the length.
    """
    from lm_eval import evaluator

    from ropepp_lit.eval.language_model import DecoderLM

    with _loaded(model, names, length, options) as (loaded, manager):
        tasks = loaded["tasks"]
        has_lengths = [name for name, task in tasks.items() if _has_lengths(task)]
        max_length = options.max_length or model.entry.get("context_length") or length
        language_model = DecoderLM(model, max_length=max(max_length, length) if has_lengths else max_length)
        if options.apply_chat_template and language_model.tokenizer.chat_template is None:
            raise UsageError(f"apply_chat_template: {model.path} stores no chat template; leave the option out")
        inside = {task.task_name for group in loaded.get("groups", {}).values() for task in group.get_all_tasks()}
        groups = loaded.get("groups", {})
        nested = {inner.name for group in groups.values() for inner in group.get_all_groups()}
        try:
            # lm-eval queries the git commit of the current folder, which prints an error outside of a repository.
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
    if language_model.num_truncated:
        print(
            f"harness:{'+'.join(names)}: {language_model.num_truncated:,} prompts or texts were longer than the "
            f"maximum length of {language_model.max_length:,} tokens of {model.name} and were truncated at the start "
            f"({language_model.num_truncated_tokens:,} tokens in total); increase it with --max_length",
            file=sys.stderr,
        )
    details = {
        "lm-eval": version("lm_eval"),
        "max_length": language_model.max_length,
        "prompts_cut": language_model.num_truncated,
        "tokens_cut": language_model.num_truncated_tokens,
        "limit": limit,
        "chat_template": options.apply_chat_template,
    }
    return list(_measurements(results, tasks, groups, has_lengths, length, details)), has_lengths


@contextlib.contextmanager
def _loaded(model: Model, names: Sequence[str], length: int, options: Options) -> Iterator[tuple[Any, Any]]:
    """Yield the tasks and groups with their data, and lm-eval's task manager."""
    from ropepp_lit.eval.language_model import make_tokenizer

    managers = [_manager_of(name, options.include_path) for name in names]
    manager, metadata = max(managers, key=lambda pair: len(pair[0].all_tasks))
    with tempfile.TemporaryDirectory() as folder:  # tasks that generate their data load the tokenizer by name
        tokenizer = make_tokenizer(model)
        tokenizer.save_pretrained(folder)
        metadata.update(max_seq_lengths=[length], tokenizer=folder, pretrained=folder)
        loaded = load_tasks(manager, names, tokenizer, model.opening, length)
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UsageError(f"tasks: harness:{name} executes code generated by the model, which is not supported")
            if getattr(task, "MULTIMODAL", False):
                raise UsageError(f"tasks: harness:{name} is multimodal, and the model supports only text")
        yield loaded, manager


def _has_lengths(task: Any) -> bool:
    """Return whether the names of the task's metrics are lengths, as for RULER."""
    return bool(task.aggregation()) and all(metric.isdigit() for metric in task.aggregation())


def _measurements(
    results: dict[str, Any],
    tasks: dict[str, Any],
    groups: dict[str, Any],
    has_lengths: Sequence[str],
    length: int,
    details: dict[str, Any],
) -> Iterator[Measurement]:
    """Yield a measurement for each metric of lm-eval's results, with the values of the samples."""
    measurements: dict[tuple[str, str], Measurement] = {}
    for name, key, metric, filter_key, value in _values_of(results, length):
        higher = results["higher_is_better"].get(name, {}).get(metric, True)
        task_details = {
            **details,
            "filter": filter_key,
            "shots": results["n-shot"].get(name),
            "task_version": results["versions"].get(name),
        }
        is_length = metric.isdigit()
        fields = {
            "task": "harness",
            "part": name,
            "metric": ("score" if is_length else metric) + ("" if filter_key == "none" else f",{filter_key}"),
            "length": length if is_length else None,
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
            task_details |= {"examples": len(items), "of": results["n-samples"][name]["original"]}
        else:
            leaves = [
                measurements[task.task_name, key]
                for task in groups[name].get_all_tasks()
                if (task.task_name, key) in measurements
            ]
            numerators, denominators, aggregation = _of_group(leaves, value)
            names = [leaf.sample for leaf in leaves]
            task_details |= {"examples": len(numerators), "tasks": len(leaves)}
        measurements[name, key] = Measurement(
            **fields,
            numerators=numerators,
            denominators=denominators,
            sample=hashlib.sha256("\0".join(names).encode()).hexdigest()[:16],
            aggregation=aggregation,
            details=task_details,
        )
        yield measurements[name, key]


def _values_of(results: dict[str, Any], length: int) -> Iterator[tuple[str, str, str, str, float]]:
    """Yield name, `metric,filter`, metric, filter and value of all numeric results; tasks before groups."""
    for name in sorted(results["results"], key=lambda name: name not in results["samples"]):
        for key, value in results["results"][name].items():
            metric, comma, filter_key = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, bool | str):
                continue
            if metric.isdigit() and int(metric) != length:
                continue  # RULER's tasks report -1 for lengths that were not run
            if isinstance(value, int | float | np.number):
                yield name, key, metric, filter_key, float(value)


def _mean(items: Sequence[float]) -> float:
    """Compute the mean, lm-eval's default aggregation."""
    return sum(items) / len(items)


def spread(
    items: Sequence[Any], aggregate: Callable[[Sequence[Any]], float], value: float
) -> tuple[list[float], list[float], str]:
    """Return values of single samples whose aggregation is the value that lm-eval computes.

    Means and perplexities use the values of the samples. For other metrics (F1, BLEU, word error rate) the samples get
    influence values (jackknife pseudo-values, shifted to have the metric's value as their mean), whose variance is that
    of the metric to first order. If the aggregation fails on fewer samples, only the value is returned.

    Args:
        items: Values of the samples, of the type that the aggregation takes.
        aggregate: Aggregation function of lm-eval.
        value: Aggregation of all items.

    Returns:
        Numerators, denominators, and the aggregation of :class:`~ropepp_lit.eval.results.Measurement`.
    """
    from lm_eval.api import metrics

    ones = [1.0] * len(items)
    if aggregate is metrics.perplexity:
        return [-float(item) for item in items], ones, "perplexity"
    if aggregate in (metrics.weighted_perplexity, metrics.bits_per_byte):
        aggregation = "perplexity" if aggregate is metrics.weighted_perplexity else "bits_per_byte"
        return [-float(item[0]) for item in items], [float(item[1]) for item in items], aggregation
    with contextlib.suppress(Exception):  # not every aggregation accepts a single item
        with warnings.catch_warnings(action="ignore"):
            singles = [float(aggregate([item])) for item in items]
        half = max(1, len(items) // 2)
        comparisons = ((singles, value), (singles[:half], aggregate(items[:half])))
        if all(math.isclose(_mean(some), result, rel_tol=1e-9, abs_tol=1e-12) for some, result in comparisons):
            return singles, ones, "mean"
    influence = np.zeros(len(items))
    for block in np.array_split(np.arange(len(items)), min(JACKKNIFE_BLOCKS, len(items))):
        deleted = set(block.tolist())
        try:
            rest = aggregate([item for number, item in enumerate(items) if number not in deleted])
        except Exception:  # an aggregation may need more samples, such as some of each class
            return [value], [1.0], "mean"
        influence[block] = (value - rest) * (len(items) - len(block)) / len(block)
    return (value + influence - influence.mean()).tolist(), ones, "mean"


def _of_group(leaves: Sequence[Measurement], value: float) -> tuple[list[float], list[float], str]:
    """Return a group's mean over its tasks, weighted by size or unweighted, whichever equals lm-eval's value."""
    if all(leaf.aggregation == "mean" for leaf in leaves):
        total = sum(len(leaf.numerators) for leaf in leaves)
        for weights in ([1.0] * len(leaves), [total / len(leaves) / len(leaf.numerators) for leaf in leaves]):
            numerators = [x * w for leaf, w in zip(leaves, weights, strict=True) for x in leaf.numerators]
            denominators = [w for leaf, w in zip(leaves, weights, strict=True) for _ in leaf.numerators]
            if math.isclose(sum(numerators) / sum(denominators), value, rel_tol=1e-9, abs_tol=1e-12):
                return numerators, denominators, "mean"
    return [value], [1.0], "mean"
