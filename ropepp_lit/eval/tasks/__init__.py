"""The tasks of an evaluation: what `--tasks` names, cut into units that are measured and kept one by one."""

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
"""What messages name; a name with a dot is a class of the user."""

EXAMPLES = 50
"""Documents, examples of each family, and prompts of each file, where no limit is given."""

SUITES: dict[str, Mapping[str, Family]] = {
    "retrieval": retrieval.FAMILIES, "ruler": ruler.FAMILIES, "graphwalks": graph_walks.FAMILIES,
    "mrcr": mrcr.FAMILIES,
}  # fmt: skip
"""Tasks that consist of families, by their parts; the mean over several is given too."""

PLAIN: dict[str, Callable[[], Task]] = {
    "perplexity": Perplexity, "induction": Induction, "attention": Attention,
}  # fmt: skip
"""Tasks without parts."""


class Unit(NamedTuple):
    """What is measured at once, of one model."""

    task: Task
    length: int | None
    heads: str = ""
    noise_std: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it apart, in plain values."""
        return self.task.task, self.task.part, self.length, self.heads, self.noise_std

    def __str__(self) -> str:
        noise = f", noise {self.noise_std:g} on {self.heads} heads" if self.noise_std is not None else ""
        length = "" if self.length is None else f" at {self.length:,}"
        return f"{self.task}{length}{noise}"


class Found(NamedTuple):
    """What a unit has given."""

    measurements: list[Measurement]
    answers: list[Answer]
    images: list[bytes]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all units share."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    limit: int | None = None
    """Documents, examples of each family, prompts of each file, examples of each task of lm-eval; None means EXAMPLES,
    and the whole task."""

    stride: int | None = None
    noise_std: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    seed: int = 0
    options: Options = field(default_factory=Options)
    """Of lm-eval."""

    has_essays: bool = True
    """Whether the user names text, in which needles of ruler may lie."""

    checkpoint: str = ""
    """The first checkpoint, which finds the key tokens of longppl."""

    load: Callable[..., Model] = load_model
    """Loads a checkpoint with the command's dtype and device."""

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
                "tasks: num_fewshot, include_path, apply_chat_template and max_length are for harness:NAME alone; "
                "name a task of lm-eval, or leave them out"
            )

    @functools.cached_property
    def parsed(self) -> list[tuple[Task, bool]]:
        """The tasks, and whether with noise."""
        return [pair for name in self.tasks for pair in self._parse(name)]

    @property
    def examples(self) -> int:
        """Documents, examples of each family, or prompts of each file."""
        return EXAMPLES if self.limit is None else self.limit

    @property
    def notices(self) -> list[str]:
        """Lines that say which tasks are left out."""
        if "ruler" not in self.tasks or not self._without_essays:
            return []
        return [f"ruler: {', '.join(self._without_essays)} need essays and are left out; name files of them by --text."]

    @property
    def _without_essays(self) -> list[str]:
        """Tasks of ruler for which there is no text."""
        return [] if self.has_essays else [part for part, task in ruler.FAMILIES.items() if task.needs_text]

    @property
    def kinds(self) -> set[str]:
        """The tasks without their parts; noise counts as what it disturbs."""
        return {task.task for task, _ in self.parsed}

    @property
    def needs_text(self) -> bool:
        """Whether documents are read."""
        return any(task.needs_text for task, _ in self.parsed)

    def units(self, model: Model) -> list[Unit]:
        """The work for one model, each piece once."""
        units: dict[tuple[Any, ...], Unit] = {}
        for task, is_noise in self.parsed:
            for length in self.lengths if task.has_length else (None,):
                disturbed = [
                    Unit(task, length, heads, std)
                    for heads in model.decoder.scheme.head_kinds
                    for std in self.noise_std
                ]
                units |= {unit.key: unit for unit in (disturbed if is_noise else [Unit(task, length)])}
        return list(units.values())

    def request(
        self,
        length: int | None,
        *,
        texts: Sequence[str] = (),
        documents: Sequence[Sequence[int]] = (),
        **fields: Any,
    ) -> Request:
        """What a task is asked for at a length; `fields` are others of :class:`Request`."""
        return Request(
            length=length, lengths=self.lengths, limit=self.examples, seed=self.seed, texts=texts, documents=documents,
            stride=self.stride, **fields,
        )  # fmt: skip

    def _parse(self, name: str) -> list[tuple[Task, bool]]:
        """Tasks of a name, and whether with noise."""
        kind, colon, part = name.partition(":")
        if kind and colon and not part:
            raise UsageError(f"tasks: {name}: nothing follows the colon; leave it out, or name a part")
        if kind == "noise":
            inner = part.split("+") if part else ["perplexity", "retrieval"]
            found = [(task, True) for word in inner for task, is_noise in self._parse(word) if not is_noise]
            if any(not task.takes_noise for task, _ in found) or not found:
                own = "; a task of your own takes it where it says takes_noise = True" if "." in part else ""
                raise UsageError(f"tasks: noise is for perplexity and prompts, not {part}{own}")
            return found
        if kind in SUITES:
            suite = SUITES[kind]
            families = part.split("+") if part else list(suite)
            for family in families:
                if family not in suite:
                    near = did_you_mean(family, suite)
                    raise UsageError(f"tasks: {kind} has no family {family!r}; choose of {', '.join(suite)}{near}")
                if part and kind == "ruler" and family in self._without_essays:
                    raise UsageError(f"tasks: ruler:{family} hides its needles in essays; name files of them by text")
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
            f"tasks: no task {name!r}; choose of {', '.join(TASKS)}, or name a class of yours, module.Class"
            f"{did_you_mean(name, TASKS)}"
        )


def _own_task(class_path: str) -> Task:
    """The task that a class of the user's is of."""
    module = class_path.rpartition(".")[0]
    if module in SUITES or module in PLAIN or f"{module}:" in " ".join(TASKS):
        raise UsageError(f"tasks: {class_path}: {module} is a task of ropepp-lit; give your module another name")
    step = "imported"
    try:
        found = import_class(class_path, Task)
        step = "made"
        return found()
    except UsageError as error:
        raise UsageError(f"tasks: {error}") from error
    except Exception as error:  # whatever the user's code raises
        raise UsageError(f"tasks: {class_path}: cannot be {step}: {type(error).__name__}: {error}") from error


def check(model: Model, units: Sequence[Unit], request: Request, *, device: torch.device | None = None) -> None:
    """Raise what can be known to be wrong before the work begins.

    Args:
        model: What will be measured; its weights may be without content.
        units: What of it.
        request: Of the least length, with the documents if they are known.
        device: On which it will be measured; None means where it is.

    Raises:
        UsageError: a length is too short for a family, longer than any document, or too long for the memory, no
            document has a token to predict, or lm-eval knows no such task.
    """
    for length in request.lengths:
        check_memory(model, length, device or model.device)
    for task in {unit.key[:2]: unit.task for unit in units}.values():
        task.check(model, request)


def measure(
    model: Model,
    unit: Unit,
    settings: Settings,
    *,
    texts: Sequence[str] = (),
    documents: Sequence[Sequence[int]] = (),
    progress: Callable[[int], object] = lambda tokens: None,
) -> Found:
    """Measure a unit.

    Args:
        model: What is measured.
        unit: What of it.
        settings: Of the evaluation.
        texts: Documents, for tasks that need text.
        documents: Their token ids, see :class:`Request`.
        progress: Called with the number of tokens read.

    Raises:
        UsageError: the length is too short for the unit.
    """
    is_noise = unit.noise_std is not None
    chunk_tokens = probes.CHUNK_TOKENS if is_noise else None
    request = settings.request(
        unit.length, texts=texts, documents=documents, progress=progress, chunk_tokens=chunk_tokens
    )
    with torch.no_grad():
        if not is_noise:
            found = unit.task.measure(model, request)
        else:
            groups, std = model.decoder.scheme.head_kinds, unit.noise_std or 0.0
            noise = probes.Noise(groups=groups, heads=unit.heads, std=std, seed=settings.seed)
            with model.decoder.probed(noise):
                found = unit.task.measure(model, request)
            found = [
                dataclasses.replace(item, heads=unit.heads, noise_std=unit.noise_std)
                for item in found
                if item.position is None and item.depth is None
            ]
    if not (isinstance(found, list) and found and all(isinstance(item, Measurement) for item in found)):
        raise TypeError(f"{unit.task}: measure must return a list of Measurement, not {found!r}")
    return Found(found, request.answers, request.images)


def averages(found: Sequence[Measurement]) -> Iterator[Measurement]:
    """The mean over the families of a suite, for each length and noise, where there is more than one.

    Each example of all of them counts as much as any.
    """
    groups: dict[tuple[Any, ...], list[Measurement]] = {}
    for item in found:
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
    found: Sequence[Measurement], settings: Settings, sets: Texts, documents: Sequence[Sequence[int]]
) -> Iterator[Measurement]:
    """What follows from a model's measurements.

    Means over families, values of each set of documents, and the share of the tokens that have more to read at a length
    than at the one before.

    Args:
        found: Of all units.
        settings: Of the evaluation.
        sets: Documents by set.
        documents: Token ids of all.
    """
    yield from averages(found)
    by_document = {task.task for task, _ in settings.parsed if task.by_document}
    whole = [item for item in found if item.task in by_document and item.position is None and not item.part]
    if "perplexity" in settings.kinds:
        sizes = [len(ids) for ids in documents]
        shares = [
            more_context(sizes, length=length, before=before, stride=settings.stride)
            for before, length in itertools.pairwise(sorted(set(settings.lengths)))
        ]
        yield from shares
        whole += shares
    if len(sets) > 1:
        for item in whole:
            for name, place in by_set({name: len(texts) for name, texts in sets.items()}):
                numerators, denominators = item.numerators[place], item.denominators[place]
                sample = f"{item.sample} {name}"
                yield dataclasses.replace(
                    item, part=name, numerators=numerators, denominators=denominators, sample=sample
                )


def check_memory(model: Model, length: int, device: torch.device) -> None:
    """Raise UsageError where a row of so many tokens cannot fit into memory.

    An estimate from below: weights, the row's keys and values, and what one layer computes at once.
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
