"""Base classes of evaluation tasks: :class:`Task`, and :class:`Family` for prompts with generated, scored answers."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ropepp_lit.eval.models import MAX_BATCH_TOKENS, Model
from ropepp_lit.eval.results import Measurement, sample_of
from ropepp_lit.eval.tasks import examples
from ropepp_lit.text.tokenizer import TextTokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Depths of the answer, cycled over the examples of families whose answer has a single position."""

MAX_PROMPT_CHARACTERS, MAX_ANSWER_CHARACTERS = 400, 2000
"""Characters that are stored of the end of a prompt and of the start of an answer."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of a model to an example."""

    number: int
    """Index of the example; the same number is the same example for every model."""

    prompt: str
    """End of the prompt."""

    expected: str
    written: str
    """Generated text."""

    score: float
    """Score from 0 to 1."""

    depth: float | None = None

    @classmethod
    def truncated(cls, *, prompt: str, expected: str, written: str, **values: Any) -> Answer:
        """Create an answer with its texts truncated to the stored lengths."""
        expected, written = expected[:MAX_ANSWER_CHARACTERS], written[:MAX_ANSWER_CHARACTERS]
        return cls(prompt=prompt[-MAX_PROMPT_CHARACTERS:], expected=expected, written=written, **values)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Inputs and settings of one call of :meth:`Task.measure`, and lists for its answers and images."""

    length: int | None
    """Context length in tokens; None for tasks that do not depend on a length."""

    lengths: tuple[int, ...]
    """All lengths of the evaluation."""

    limit: int
    """Number of examples; `texts` and `documents` are limited already."""

    seed: int = 0
    """Seed of the examples."""

    texts: Sequence[str] = ()
    """Documents, for tasks with `needs_text`."""

    documents: Sequence[Sequence[int]] = ()
    """Token ids of `texts`, with BOS and EOS tokens."""

    stride: int | None = None
    """Tokens between the starts of consecutive windows; None for windows that do not overlap."""

    chunk_tokens: int | None = None
    """Maximum number of tokens of a row in one forward pass, set when attention scores get noise; None means all."""

    progress: Callable[[int], object] = lambda tokens: None
    """Progress callback, to be called with the number of tokens read since the last call."""

    answers: list[Answer] = field(default_factory=list)
    """List to which the task appends the model's answers, for answers.jsonl and the page."""

    images: list[bytes] = field(default_factory=list)
    """List to which `attention` appends its map, a PNG."""


class Task(ABC):
    """A task of an evaluation, which measures a model at each length or once.

    `--tasks module.Class` selects a subclass in a user's file. It is constructed without arguments. In the results its
    `task` is the name of the module and its `part` the name of the class.
    """

    task: str = ""
    part: str = ""
    needs_text: ClassVar[bool] = False
    """Whether the task reads documents."""

    has_length: ClassVar[bool] = True
    """Whether the task is measured at each length; otherwise once."""

    by_document: ClassVar[bool] = False
    """Whether measurements have one entry per document, so that results are also reported for each source of text."""

    takes_noise: ClassVar[bool] = False
    """Whether the task can run with noise; it must then read at most `request.chunk_tokens` per forward pass."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not cls.__module__.startswith("ropepp_lit."):
            cls.task, cls.part = cls.__module__, cls.__qualname__

    def __str__(self) -> str:
        """Return the name that `--tasks` accepts."""
        separator = "." if self.task == type(self).__module__ else ":"
        return f"{self.task}{separator if self.part else ''}{self.part}"

    @property
    def about(self) -> str:
        """Description for the page: the first line of the class's docstring."""
        return (type(self).__doc__ or "").strip().partition("\n")[0]

    @abstractmethod
    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """Measure the model; called in a no-grad context.

        Args:
            model: The model, with `decoder`, `tokenizer` and `device`.
            request: Length, number of examples, documents and other settings.

        Returns:
            Measurements, created by :meth:`measurement`.
        """

    def check(self, model: Model, request: Request) -> None:  # noqa: B027
        """Raise UsageError for errors that can be detected before the evaluation starts.

        Args:
            model: The model to measure; its weights may not be loaded yet.
            request: Request with the shortest length as its `length`; it may have no documents.
        """

    def num_tokens(self, request: Request) -> int:
        """Return the number of tokens that :meth:`measure` reads, for the progress bar; 1 if unknown."""
        return 1

    def identity(self, request: Request) -> dict[str, Any]:
        """Return what the result depends on besides model, length, limit, seed, stride and documents, as plain values.

        An example is the digest of a file that the task reads. Cached results are reused while this value and the files
        that define a user's class (:meth:`sources`) are unchanged.
        """
        return {}

    def sources(self) -> dict[str, str]:
        """Return the SHA-256 digests of the files that define the class, by module, without those of this package."""
        kinds = {kind.__module__: kind for kind in type(self).__mro__ if kind not in (object, ABC)}
        files = {
            name: inspect.getsourcefile(kind) for name, kind in kinds.items() if name.split(".")[0] != "ropepp_lit"
        }
        return {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items() if file}

    def measurement(self, request: Request, **fields: Any) -> Measurement:
        """Create a measurement of this task at the request's length.

        Args:
            request: The argument of :meth:`measure`.
            fields: Fields of :class:`~ropepp_lit.eval.results.Measurement`: `metric`, `numerators` and `denominators`
                (one each for every example; the value is the ratio of their sums), `sample` (see `sample_of`),
                `aggregation="score"` or `"percent"` for a share in percent, and others.
        """
        return Measurement(**{"task": self.task, "part": self.part, "length": request.length, **fields})


@dataclass(frozen=True)
class Draft:
    """An example before its context is filled to a length."""

    fillers: Iterable[str]
    """Filler texts, from the end of the context to its start; as many are used as fit the length."""

    needles: list[tuple[float, str]]
    """Texts inserted between the fillers, each with its depth: 0 is the start, 1 the end."""

    question: str
    """End of the prompt."""

    answers: list[str]
    """Strings that the generated text must contain."""

    depth: float | None = None
    """Depth of the answer, one of DEPTHS, if it has a single position."""

    ideal: str = ""
    """Continuation of a perfect model; empty means the answers, separated by commas, and a full stop."""

    head: str = ""
    """Start of the prompt, before the context; it is never truncated."""

    separator: str = " "
    """Separator between fillers, needles and the question."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fillers", iter(self.fillers))
        if not self.ideal:
            object.__setattr__(self, "ideal", f" {', '.join(self.answers)}.")

    def take(self, count: int) -> list[str]:
        """Return the next `count` fillers."""
        return list(itertools.islice(self.fillers, count))

    def units(self, fillers: list[str]) -> list[str]:
        """Return fillers and needles in the order of the text; `fillers` are in reverse. The first unit is a filler."""
        units: list[list[str]] = [[filler] for filler in reversed(fillers)]
        for depth, needle in sorted(self.needles, key=lambda pair: pair[0]):
            units[needle_index(depth, len(units))].append(needle)
        return list(itertools.chain.from_iterable(units))

    def text(self, fillers: list[str]) -> str:
        """Return the example with these fillers, without its head."""
        return self.separator.join([*self.units(fillers), self.question])


def needle_index(depth: float, units: int) -> int:
    """Return the index of the unit after which a needle of this depth (0 to 1) is inserted."""
    return round(depth * (units - 1))


class Family(Task):
    """Prompts of an exact number of tokens, answered by greedy decoding. Measures the mean score, also by depth."""

    takes_noise = True

    @abstractmethod
    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """Create an example without its length.

        Args:
            rng: Source of all randomness of the example.
            depth: Suggested depth of the answer, one of DEPTHS.
            units: Approximate number of fillers, for families that scale other contents with the length.
        """

    def score(self, answers: list[str], written: str) -> float:
        """Return the share of the answers that occur in `written`, ignoring case (RULER's string match)."""
        return sum(answer.lower() in written.lower() for answer in answers) / len(answers)

    def numbered_draft(self, *, units: int, seed: str, number: int = 0) -> Draft:
        """Create the example with a number, which also selects the depth.

        Args:
            units: See :meth:`draft`.
            seed: Seed; the random generator is seeded with seed, part and number.
            number: Index of the example.
        """
        rng = random.Random(f"{seed}/{self.part}/{number}")  # noqa: S311
        return self.draft(rng, depth=DEPTHS[number % len(DEPTHS)], units=units)

    def max_new_tokens(self, tokenizer: TextTokenizer, *, seed: int) -> int:
        """Return the maximum length of an answer: twice the tokens of a perfect answer, plus eight."""
        return 2 * len(tokenizer.encode_text(self.numbered_draft(units=100, seed=str(seed)).ideal)) + 8

    def check(self, model: Model, request: Request) -> None:
        """Raise UsageError if the examples do not fit into the shortest length; they then fit into longer ones too."""
        shortest = min(request.lengths)
        # In short contexts a few more tokens may not fit, so all examples are tried.
        numbers = range(request.limit if shortest <= 4096 else len(DEPTHS))
        examples.make_examples(self, model.tokenizer, length=shortest, numbers=numbers, seed=request.seed)

    def num_tokens(self, request: Request) -> int:
        """Return the tokens of all prompts, including the space reserved for the answers."""
        return request.limit * (request.length or 0)

    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """Measure the score over all examples, and by the depth of the answer."""
        assert request.length is not None
        length, max_new_tokens = request.length, self.max_new_tokens(model.tokenizer, seed=request.seed)
        answers: list[Answer] = []
        samples: list[str] = []
        for numbers in batches(request.limit, length):  # one batch at a time: memory does not grow with the limit
            batch = examples.make_examples(self, model.tokenizer, length=length, numbers=numbers, seed=request.seed)
            prompts = [example.input_ids for example in batch]
            samples.append(sample_of(prompts))
            written = examples.write_answers(
                model, prompts, max_new_tokens=max_new_tokens, chunk_tokens=request.chunk_tokens
            )
            for number, example, text in zip(numbers, batch, written, strict=True):
                end = model.tokenizer.decode(example.input_ids[-MAX_PROMPT_CHARACTERS:])
                answers.append(
                    Answer.truncated(
                        number=number, prompt=end, expected=example.ideal.strip(), written=text,
                        score=self.score(example.answers, text), depth=example.depth,
                    )
                )  # fmt: skip
            request.progress(len(batch) * length)
        request.answers.extend(answers)
        score = partial(self.measurement, request, metric="score", sample=sample_of(samples))
        scores = [answer.score for answer in answers]
        measurements = [score(numerators=scores, denominators=[1.0] * len(scores))]
        for depth in DEPTHS:
            counts = [float(answer.depth == depth) for answer in answers]
            if any(counts):
                numerators = [value * count for value, count in zip(scores, counts, strict=True)]
                measurements.append(score(depth=depth, numerators=numerators, denominators=counts))
        return measurements


def batches(limit: int, length: int) -> Iterator[range]:
    """Yield the numbers of the examples of each batch, with up to MAX_BATCH_TOKENS tokens."""
    size = max(1, MAX_BATCH_TOKENS // length)
    return (range(start, min(start + size, limit)) for start in range(0, limit, size))
