"""The tasks of an evaluation, cut into units of work that are measured, kept and found again one by one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ropepp_lit.errors import UsageError
from ropepp_lit.eval import answers, harness, perplexity, probes, retrieval
from ropepp_lit.eval.models import Model
from ropepp_lit.eval.results import Measurement
from ropepp_lit.eval.retrieval_families import DEPTHS, FAMILIES

TASKS = ("perplexity", "retrieval", "noise", "attention", "answers:FILE", "harness:NAME")
ATTENTION_TEXTS = 4
EXAMPLES = 50
"""Documents, examples of each family, and prompts of each file, where no limit is given."""

WITHOUT_LENGTH = ("answers", "harness")
"""Tasks that are measured once and not at each length."""


class Unit(NamedTuple):
    """What is measured at once, of one model."""

    task: str
    """perplexity, retrieval, attention, answers or harness."""

    part: str
    """A family of retrieval, a file of prompts and answers, or a task of lm-eval."""

    length: int | None
    heads: str = ""
    noise_std: float | None = None

    def __str__(self) -> str:
        noise = f", noise {self.noise_std:g} on {self.heads} heads" if self.noise_std is not None else ""
        length = "" if self.length is None else f" at {self.length:,}"
        return f"{self.task}{':' if self.part else ''}{self.part}{length}{noise}"


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
    options: harness.Options = field(default_factory=harness.Options)
    """Of lm-eval."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UsageError(f"tasks: name at least one of {', '.join(TASKS)}")
        for name in self.tasks:
            _parse(name)
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit: {self.limit} must be 1 or more")
        if self.stride is not None and not 1 <= self.stride <= min(self.lengths):
            raise UsageError(f"stride: {self.stride} must be 1 or more, and no more than the shortest of lengths")
        if any(not std >= 0 for std in self.noise_std) or not self.noise_std:
            raise UsageError("noise_std: give standard deviations of 0 or more, such as 0,0.5,1")
        if "harness" in self.kinds:
            harness.check_harness()
        elif self.options != harness.Options():
            raise UsageError(
                "tasks: num_fewshot, include_path, apply_chat_template and max_length are for harness:NAME alone; "
                "name a task of lm-eval, or leave them out"
            )

    @property
    def examples(self) -> int:
        """Documents, examples of each family, or prompts of each file."""
        return EXAMPLES if self.limit is None else self.limit

    @property
    def kinds(self) -> set[str]:
        """The tasks without their parts; noise counts as what it disturbs."""
        return {kind for name in self.tasks for kind, _, _ in _parse(name)}

    @property
    def needs_text(self) -> bool:
        """Whether documents are read."""
        return bool(self.kinds & {"perplexity", "attention"})

    def units(self, model: Model) -> list[Unit]:
        """The work for one model, each piece once."""
        units: dict[Unit, None] = {}
        for name in self.tasks:
            for kind, part, is_noise in _parse(name):
                for length in (None,) if kind in WITHOUT_LENGTH else self.lengths:
                    disturbed = [
                        Unit(kind, part, length, heads, std)
                        for heads in probes.groups_of(model)
                        for std in self.noise_std
                    ]
                    units |= dict.fromkeys(disturbed if is_noise else [Unit(kind, part, length)])
        return list(units)


def _parse(name: str) -> list[tuple[str, str, bool]]:
    """Kinds and parts of a task's name, and whether with noise."""
    kind, _, part = name.partition(":")
    if kind == "noise":
        inner = part.split("+") if part else ["perplexity", "retrieval"]
        found = [(kind, part, True) for word in inner for kind, part, noisy in _parse(word) if not noisy]
        if any(kind not in ("perplexity", "retrieval") for kind, _, _ in found) or not found:
            raise UsageError(f"tasks: noise is for perplexity and retrieval, not {part}")
        return found
    if kind == "retrieval":
        families = part.split("+") if part else list(FAMILIES)
        for family in families:
            if family not in FAMILIES:
                raise UsageError(f"tasks: retrieval has no family {family!r}; choose of {', '.join(FAMILIES)}")
        return [("retrieval", family, False) for family in families]
    if kind in WITHOUT_LENGTH and part:
        return [(kind, part, False)]
    if kind in ("perplexity", "attention") and not part:
        return [(kind, "", False)]
    raise UsageError(f"tasks: no task {name!r}; choose of {', '.join(TASKS)}")


def work_of(unit: Unit, settings: Settings, num_tokens: Sequence[int]) -> int:
    """Tokens that a unit reads, for the progress bar; those of answers and lm-eval are not known and count 1.

    Args:
        unit: The unit.
        settings: Of the evaluation.
        num_tokens: Of each document.
    """
    if unit.task == "retrieval":
        return settings.examples * (unit.length or 0)
    if unit.task == "perplexity":
        assert unit.length is not None
        stride = settings.stride or unit.length
        return sum(w.end - w.start for w in perplexity.windows(list(num_tokens), length=unit.length, stride=stride))
    if unit.task == "attention":
        return min(ATTENTION_TEXTS, len(num_tokens)) * (unit.length or 0)
    return 1


def check(model: Model, units: Sequence[Unit], settings: Settings, num_tokens: Sequence[int] = ()) -> None:
    """Raise what can be known to be wrong before the work begins.

    Args:
        model: What will be measured.
        units: What of it.
        settings: Of the evaluation.
        num_tokens: Of each document, where perplexity or attention are measured.

    Raises:
        UsageError: a length is too short for a family, longer than any document, or too long for the memory, no
            document has a token to predict, or lm-eval knows no such task.
    """
    for length in settings.lengths:
        check_memory(model, length)
    for unit in units:
        if unit.task == "harness":
            harness.check_task(unit.part, settings.options)
        elif unit.task == "answers":
            answers.read_pairs(model, unit.part, limit=settings.examples)
    shortest = min(settings.lengths)  # longer ones hold what it holds
    for family in dict.fromkeys(unit.part for unit in units if unit.task == "retrieval"):
        # In short contexts words a few tokens longer may be too long, so all are tried.
        numbers = range(settings.examples if shortest <= 4096 else len(DEPTHS))
        retrieval.make_examples(family, model.tokenizer, length=shortest, numbers=numbers, seed=settings.seed)
    if num_tokens and any(unit.task == "perplexity" for unit in units) and max(num_tokens) < 2:
        raise UsageError(f"text: no document has two tokens, so {model.name} has nothing to predict; name other text")
    for unit in units:
        if unit.task == "attention" and unit.length is not None and max(num_tokens) < unit.length:
            raise UsageError(
                f"text: attention at {unit.length:,} tokens needs a document as long, and the longest has "
                f"{max(num_tokens):,}"
            )


def measure(
    model: Model,
    unit: Unit,
    settings: Settings,
    texts: Sequence[str],
    *,
    progress: Callable[[int], object] = lambda tokens: None,
) -> tuple[list[Measurement], torch.Tensor | None]:
    """Measure a unit.

    Args:
        model: What is measured.
        unit: What of it.
        settings: Of the evaluation.
        texts: Documents, for perplexity and attention.
        progress: Called with the number of tokens read.

    Returns:
        Measurements; and attention maps, where the unit is of attention.

    Raises:
        UsageError: the length is too short for the unit.
    """
    if unit.task == "harness":
        found = harness.measure(
            model, unit.part, lengths=settings.lengths, limit=settings.limit, options=settings.options
        )
        progress(1)
        return found, None
    if unit.task == "answers":
        found = answers.measure(model, unit.part, limit=settings.examples)
        progress(1)
        return found, None
    assert unit.length is not None
    if unit.task == "attention":
        ids = [model.tokenizer.encode_whole(text) for text in texts]
        long_enough = [text for text in ids if len(text) >= unit.length][:ATTENTION_TEXTS]
        return probes.measure_attention(model, long_enough, length=unit.length, progress=progress)
    if unit.noise_std is None:
        return _measure(model, unit, settings, texts, None, progress), None
    groups = probes.groups_of(model)
    with model.decoder.probed(probes.Noise(groups=groups, heads=unit.heads, std=unit.noise_std, seed=settings.seed)):
        found = _measure(model, unit, settings, texts, probes.CHUNK_TOKENS, progress)
    whole = [item for item in found if item.position is None and item.depth is None]
    return [dataclasses.replace(item, heads=unit.heads, noise_std=unit.noise_std) for item in whole], None


def _measure(
    model: Model,
    unit: Unit,
    settings: Settings,
    texts: Sequence[str],
    chunk_tokens: int | None,
    progress: Callable[[int], object],
) -> list[Measurement]:
    assert unit.length is not None
    if unit.task == "perplexity":
        return perplexity.measure(
            model, texts, length=unit.length, stride=settings.stride, chunk_tokens=chunk_tokens, progress=progress
        )
    return retrieval.measure(
        model, unit.part, length=unit.length, limit=settings.examples, seed=settings.seed, chunk_tokens=chunk_tokens,
        progress=progress,
    )  # fmt: skip


def averages(found: Sequence[Measurement]) -> Iterator[Measurement]:
    """The mean over the families of retrieval, for each length and noise, where there is more than one."""
    groups: dict[tuple, list[Measurement]] = {}
    for item in found:
        if item.task == "retrieval" and item.depth is None:
            groups.setdefault((item.length, item.heads, item.noise_std), []).append(item)
    for group in groups.values():
        if len(group) > 1:
            yield retrieval.average(group)


def check_memory(model: Model, length: int) -> None:
    """Raise UsageError where a row of so many tokens cannot fit into memory.

    An estimate from below: weights, the row's keys and values, and what one layer computes at once.
    """
    config, layout = model.decoder.config, model.decoder.head_layout
    weight = model.decoder.model.embed_tokens.weight
    widths = 4 * config.hidden_size + 3 * config.intermediate_size + 3 * layout.num_attention_heads * config.head_dim
    cache = model.decoder.allocate_cache(batch_size=1, max_tokens=1).nbytes
    needed = length * (cache + widths * weight.itemsize) + model.decoder.num_parameters * weight.itemsize
    if weight.is_cuda:
        available = torch.cuda.get_device_properties(weight.device).total_memory
    elif not hasattr(os, "sysconf"):  # Windows
        return
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise UsageError(
            f"lengths: {length:,} tokens need about {needed / 2**30:.1f} GiB with {model.name}, and this machine has "
            f"{available / 2**30:.1f}; leave that length out"
        )
