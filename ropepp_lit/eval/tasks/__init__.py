"""Registry of evaluation tasks: parses `--tasks` and splits an evaluation into units, which are measured separately."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ropepp_lit.checkpoint import import_class
from ropepp_lit.errors import UsageError, did_you_mean
from ropepp_lit.eval import probes
from ropepp_lit.eval.harness import Options, check_harness
from ropepp_lit.eval.models import Model, load_model
from ropepp_lit.eval.results import Measurement
from ropepp_lit.eval.tasks import graph_walks, mrcr, retrieval, ruler
from ropepp_lit.eval.tasks.answers import Answers
from ropepp_lit.eval.tasks.attention import Attention
from ropepp_lit.eval.tasks.base import Answer, Draft, Family, Request, Task
from ropepp_lit.eval.tasks.harness import Harness
from ropepp_lit.eval.tasks.long_perplexity import LongPerplexity
from ropepp_lit.eval.tasks.perplexity import Perplexity, more_context
from ropepp_lit.eval.tasks.reading import Induction, recalls
from ropepp_lit.eval.texts import Texts, by_set

__all__ = ["Answer", "Draft", "Family", "Model", "Request", "Task"]

TASKS = (
    "perplexity", "longppl", "retrieval", "ruler", "recall", "induction", "graphwalks", "mrcr", "noise", "attention",
    "answers:FILE", "harness:NAME",
)  # fmt: skip
"""Task names for messages; a name with a dot refers to a user's class."""

EXAMPLES = 50
"""Default number of documents, of examples of each family, and of prompts of each file."""

SUITES: dict[str, Mapping[str, Family]] = {
    "retrieval": retrieval.FAMILIES, "ruler": ruler.FAMILIES, "graphwalks": graph_walks.FAMILIES,
    "mrcr": mrcr.FAMILIES,
}  # fmt: skip
"""Tasks that consist of families, by part; the mean over multiple families is reported too."""

PLAIN: dict[str, Callable[[], Task]] = {
    "perplexity": Perplexity, "induction": Induction, "attention": Attention,
}  # fmt: skip
"""Task classes without parts."""


class Unit(NamedTuple):
    """A task at one length and noise level: the smallest part of an evaluation that is measured and cached."""

    task: Task
    length: int | None
    heads: str = ""
    noise_std: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Plain values that identify the unit."""
        return self.task.task, self.task.part, self.length, self.heads, self.noise_std

    def __str__(self) -> str:
        noise = f", noise {self.noise_std:g} on {self.heads} heads" if self.noise_std is not None else ""
        length = "" if self.length is None else f" at {self.length:,}"
        return f"{self.task}{length}{noise}"


class UnitResult(NamedTuple):
    """Result of a unit."""

    measurements: list[Measurement]
    answers: list[Answer]
    images: list[bytes]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """EvaluationSettings of an evaluation."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    limit: int | None = None
    """Maximum number of documents, examples of each family, prompts of each file and examples of each lm-eval task;
    None means EXAMPLES, and all examples of lm-eval tasks."""

    stride: int | None = None
    noise_std: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    seed: int = 0
    options: Options = field(default_factory=Options)
    """Options of lm-eval."""

    has_essays: bool = True
    """Whether the user passes text, which `ruler` uses as essays."""

    checkpoint: str = ""
    """First checkpoint, the default model that identifies the key tokens of longppl."""

    load: Callable[..., Model] = load_model
    """Function that loads a checkpoint with the command's dtype and device."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UsageError(f"tasks: name at least one of {', '.join(TASKS)}")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit: {self.limit} must be 1 or more")
        if self.stride is not None and not 1 <= self.stride <= min(self.lengths):
            raise UsageError(f"stride: {self.stride} must be 1 or more, and no more than the shortest of lengths")
        if any(not std >= 0 for std in self.noise_std) or not self.noise_std:
            raise UsageError("noise_std: give standard deviations of 0 or more, such as 0,0.5,1")
        if "harness" in self.kinds:
            check_harness()
        elif self.options != Options():
            raise UsageError(
                "tasks: num_fewshot, include_path, apply_chat_template and max_length apply only to harness:NAME; "
                "name a task of lm-eval, or leave them out"
            )

    @functools.cached_property
    def parsed(self) -> list[tuple[Task, bool]]:
        """Tasks, and whether each is run with noise."""
        return [pair for name in self.tasks for pair in self._parse(name)]

    @property
    def examples(self) -> int:
        """Maximum number of documents, examples of each family, and prompts of each file."""
        return EXAMPLES if self.limit is None else self.limit

    @property
    def notices(self) -> list[str]:
        """Notices about skipped tasks."""
        if "ruler" not in self.tasks or not self._without_essays:
            return []
        return [f"ruler: {', '.join(self._without_essays)} need essays and are skipped; pass files of them by --text."]

    @property
    def _without_essays(self) -> list[str]:
        """Tasks of ruler that need essays, if there are none."""
        return [] if self.has_essays else [part for part, task in ruler.FAMILIES.items() if task.needs_text]

    @property
    def kinds(self) -> set[str]:
        """Task names without their parts; for noise, those of the tasks with noise."""
        return {task.task for task, _ in self.parsed}

    @property
    def needs_text(self) -> bool:
        """Whether any task reads documents."""
        return any(task.needs_text for task, _ in self.parsed)

    def units(self, model: Model) -> list[Unit]:
        """Return the unique units for a model."""
        units: dict[tuple[Any, ...], Unit] = {}
        for task, is_noise in self.parsed:
            for length in self.lengths if task.has_length else (None,):
                with_noise = [
                    Unit(task, length, heads, std)
                    for heads in model.decoder.scheme.head_kinds
                    for std in self.noise_std
                ]
                units |= {unit.key: unit for unit in (with_noise if is_noise else [Unit(task, length)])}
        return list(units.values())

    def request(
        self,
        length: int | None,
        *,
        texts: Sequence[str] = (),
        documents: Sequence[Sequence[int]] = (),
        **fields: Any,
    ) -> Request:
        """Create the request for a length; `fields` are further fields of :class:`Request`."""
        return Request(
            length=length, lengths=self.lengths, limit=self.examples, seed=self.seed, texts=texts, documents=documents,
            stride=self.stride, **fields,
        )  # fmt: skip

    def _parse(self, name: str) -> list[tuple[Task, bool]]:
        """Return the tasks of a name, and whether each is run with noise."""
        kind, colon, part = name.partition(":")
        if kind and colon and not part:
            raise UsageError(f"tasks: {name}: no part after the colon; remove the colon, or add a part")
        if kind == "noise":
            inner = part.split("+") if part else ["perplexity", "retrieval"]
            tasks = [(task, True) for word in inner for task, is_noise in self._parse(word) if not is_noise]
            if any(not task.takes_noise for task, _ in tasks) or not tasks:
                own = "; set takes_noise = True in a task of your own that supports it" if "." in part else ""
                raise UsageError(f"tasks: noise is for perplexity and prompts, not {part}{own}")
            return tasks
        if kind in SUITES:
            suite = SUITES[kind]
            families = part.split("+") if part else list(suite)
            for family in families:
                if family not in suite:
                    near = did_you_mean(family, suite)
                    raise UsageError(f"tasks: {kind} has no family {family!r}; choose from {', '.join(suite)}{near}")
                if part and kind == "ruler" and family in self._without_essays:
                    raise UsageError(f"tasks: ruler:{family} needs essays; pass files of them by --text")
            return [(suite[family], False) for family in families if family not in self._without_essays]
        if kind == "recall":
            return [(task, False) for task in recalls(part)]
        if kind == "longppl":
            return [(LongPerplexity(part or self.checkpoint, part, load=self.load), False)]
        if kind == "answers" and part:
            return [(Answers(part), False)]
        if kind == "harness" and part:
            return [(Harness(part, options=self.options, limit=self.limit), False)]
        if kind in PLAIN and not part:
            return [(PLAIN[kind](), False)]
        if "." in kind and not part:
            return [(_own_task(kind), False)]
        raise UsageError(
            f"tasks: no task {name!r}; choose from {', '.join(TASKS)}, or name your own class as module.Class"
            f"{did_you_mean(name, TASKS)}"
        )


def _own_task(class_path: str) -> Task:
    """Create the task of a user's class."""
    module = class_path.rpartition(".")[0]
    if module in SUITES or module in PLAIN or f"{module}:" in " ".join(TASKS):
        raise UsageError(f"tasks: {class_path}: {module} is a task of ropepp-lit; rename your module")
    step = "imported"
    try:
        cls = import_class(class_path, Task)
        step = "constructed"
        return cls()
    except UsageError as error:
        raise UsageError(f"tasks: {error}") from error
    except Exception as error:  # whatever the user's code raises
        raise UsageError(f"tasks: {class_path}: cannot be {step}: {type(error).__name__}: {error}") from error


def check_units(model: Model, units: Sequence[Unit], request: Request, *, device: torch.device | None = None) -> None:
    """Check that units can be measured, before the evaluation starts.

    Args:
        model: The model; its weights may be on the meta device.
        units: Units to check.
        request: Request for the shortest length, with the documents if they are available.
        device: Device of the evaluation; None means that of the model.

    Raises:
        UsageError: A length is too short for a family, longer than every document, or too long for the memory; no
            document has a token to predict; or lm-eval has no such task.
    """
    for length in request.lengths:
        check_memory(model, length, device or model.device)
    for task in {unit.key[:2]: unit.task for unit in units}.values():
        task.check(model, request)


def measure_unit(
    model: Model,
    unit: Unit,
    settings: EvaluationSettings,
    *,
    texts: Sequence[str] = (),
    documents: Sequence[Sequence[int]] = (),
    progress: Callable[[int], object] = lambda tokens: None,
) -> UnitResult:
    """Measure a unit of a model.

    Args:
        model: The model.
        unit: The unit.
        settings: EvaluationSettings of the evaluation.
        texts: Documents, for tasks that need text.
        documents: Token ids of the documents, see :class:`Request`.
        progress: Called with the number of tokens read.

    Raises:
        UsageError: The length is too short for the unit.
    """
    is_noise = unit.noise_std is not None
    chunk_tokens = probes.CHUNK_TOKENS if is_noise else None
    request = settings.request(
        unit.length, texts=texts, documents=documents, progress=progress, chunk_tokens=chunk_tokens
    )
    with torch.no_grad():
        if not is_noise:
            measurements = unit.task.measure(model, request)
        else:
            groups, std = model.decoder.scheme.head_kinds, unit.noise_std or 0.0
            noise = probes.Noise(groups=groups, heads=unit.heads, std=std, seed=settings.seed)
            with model.decoder.probed(noise):
                measurements = unit.task.measure(model, request)
            measurements = [
                dataclasses.replace(item, heads=unit.heads, noise_std=unit.noise_std)
                for item in measurements
                if item.position is None and item.depth is None
            ]
    if not (
        isinstance(measurements, list) and measurements and all(isinstance(item, Measurement) for item in measurements)
    ):
        raise TypeError(f"{unit.task}: measure must return a list of Measurement, not {measurements!r}")
    return UnitResult(measurements, request.answers, request.images)


def averages(measurements: Sequence[Measurement]) -> Iterator[Measurement]:
    """Yield the mean over the families of a suite, for each length and noise level with more than one family.

    All examples have the same weight.
    """
    groups: dict[tuple[Any, ...], list[Measurement]] = {}
    for item in measurements:
        if item.task in SUITES and item.depth is None:
            groups.setdefault((item.task, item.length, item.heads, item.noise_std), []).append(item)
    for group in groups.values():
        if len(group) > 1:
            yield dataclasses.replace(
                group[0],
                part="all",
                numerators=[value for item in group for value in item.numerators],
                denominators=[value for item in group for value in item.denominators],
            )


def derived(
    measurements: Sequence[Measurement], settings: EvaluationSettings, sets: Texts, documents: Sequence[Sequence[int]]
) -> Iterator[Measurement]:
    """Yield the measurements that are computed from those of a model's units.

    These are means over families, values of each set of documents, and the share of the tokens that have more context
    at a length than at the previous one.

    Args:
        measurements: Measurements of all units.
        settings: EvaluationSettings of the evaluation.
        sets: Documents by set.
        documents: Token ids of all documents.
    """
    yield from averages(measurements)
    by_document = {task.task for task, _ in settings.parsed if task.by_document}
    splittable = [item for item in measurements if item.task in by_document and item.position is None and not item.part]
    if "perplexity" in settings.kinds:
        sizes = [len(ids) for ids in documents]
        shares = [
            more_context(sizes, length=length, before=before, stride=settings.stride)
            for before, length in itertools.pairwise(sorted(set(settings.lengths)))
        ]
        yield from shares
        splittable += shares
    if len(sets) > 1:
        for item in splittable:
            for name, rows in by_set({name: len(texts) for name, texts in sets.items()}):
                numerators, denominators = item.numerators[rows], item.denominators[rows]
                sample = f"{item.sample} {name}"
                yield dataclasses.replace(
                    item, part=name, numerators=numerators, denominators=denominators, sample=sample
                )


def check_memory(model: Model, length: int, device: torch.device) -> None:
    """Raise UsageError if a row of `length` tokens cannot fit into memory.

    The estimate is a lower bound: weights, the row's KV cache, and the activations of one layer.
    """
    config, layout = model.decoder.config, model.decoder.head_layout
    weight = model.decoder.model.embed_tokens.weight
    widths = 4 * config.hidden_size + 3 * config.intermediate_size + 3 * layout.num_attention_heads * config.head_dim
    cache = model.decoder.allocate_cache(batch_size=1, max_tokens=1).nbytes
    needed = length * (cache + widths * weight.itemsize) + model.decoder.num_parameters * weight.itemsize
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    elif not hasattr(os, "sysconf"):  # Windows
        return
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise UsageError(
            f"lengths: {length:,} tokens need about {needed / 2**30:.1f} GiB with {model.name}, and this machine has "
            f"{available / 2**30:.1f}; leave that length out"
        )
