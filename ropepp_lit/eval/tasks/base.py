"""What a task of an evaluation is. Subclass :class:`Family` for prompts whose answers get a score, or :class:`Task`."""

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

from ropepp_lit.eval.models import TOKENS_AT_ONCE, Model
from ropepp_lit.eval.results import Measurement, sample_of
from ropepp_lit.eval.tasks import examples
from ropepp_lit.text.tokenizer import TextTokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the answer lies in examples that have one place for it, in turn."""

PROMPT_CHARACTERS, WRITTEN_CHARACTERS = 400, 2000
"""Of the end of a prompt, and of the beginning of an answer, that are kept."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote for an example."""

    number: int
    """Of the example: the same number is the same example for every model."""

    prompt: str
    """Its end."""

    expected: str
    written: str
    score: float
    """From 0 to 1."""

    depth: float | None = None

    @classmethod
    def cut(cls, *, prompt: str, expected: str, written: str, **values: Any) -> Answer:
        """An answer whose texts are cut to the lengths that are kept."""
        expected, written = expected[:WRITTEN_CHARACTERS], written[:WRITTEN_CHARACTERS]
        return cls(prompt=prompt[-PROMPT_CHARACTERS:], expected=expected, written=written, **values)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be measured of a model at once."""

    length: int | None
    """Tokens of the context; None for tasks that are measured once."""

    lengths: tuple[int, ...]
    """All lengths of the evaluation."""

    limit: int
    """Examples; the documents are limited already."""

    seed: int = 0
    """Of the examples."""

    texts: Sequence[str] = ()
    """Documents, for tasks that need text."""

    documents: Sequence[Sequence[int]] = ()
    """Token ids of the texts, with what opens and closes documents."""

    stride: int | None = None
    """Tokens from one window to the next; None means that windows do not overlap."""

    chunk_tokens: int | None = None
    """Tokens of a row in one forward pass at most, where scores are disturbed and held in memory; None means all."""

    progress: Callable[[int], object] = lambda tokens: None
    """Call it with the number of tokens that were read."""

    answers: list[Answer] = field(default_factory=list)
    """To which the task appends what the model wrote; it is kept, and the page shows some."""

    images: list[bytes] = field(default_factory=list)
    """To which `attention` appends its map, a PNG."""


class Task(ABC):
    """Something that is measured of a model: at each length, or once.

    A subclass in a file of the user's own is named by `--tasks module.Class`. It is made without arguments. Its `task`
    in the results is the module's name, its `part` the class's.
    """

    task: str = ""
    part: str = ""
    needs_text: ClassVar[bool] = False
    """Whether it reads documents."""

    has_length: ClassVar[bool] = True
    """Whether it is measured at each length, or once."""

    by_document: ClassVar[bool] = False
    """Whether its measurements have one entry for each document, so that each source of text can be given by itself."""

    takes_noise: ClassVar[bool] = False
    """Whether noise may disturb it: it then reads at most `chunk_tokens` of the request at once."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not cls.__module__.startswith("ropepp_lit."):
            cls.task, cls.part = cls.__module__, cls.__qualname__

    def __str__(self) -> str:
        """As `--tasks` names it."""
        mark = "." if self.task == type(self).__module__ else ":"
        return f"{self.task}{mark if self.part else ''}{self.part}"

    @property
    def about(self) -> str:
        """What it asks, for the page: the first line of the class's docstring."""
        return (type(self).__doc__ or "").strip().partition("\n")[0]

    @abstractmethod
    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """Measure it, without gradients.

        Args:
            model: Of which: `decoder`, `tokenizer`, `device`.
            request: Length, number of examples, documents and so on.

        Returns:
            Measurements, see :meth:`measured`.
        """

    def check(self, model: Model, request: Request) -> None:  # noqa: B027
        """Raise UsageError for what can be known to be wrong before anything is measured.

        Args:
            model: What will be measured; its weights may not be there yet.
            request: For all lengths, with the least one as its `length`. It may be without documents.
        """

    def num_tokens(self, request: Request) -> int:
        """Tokens that :meth:`measure` reads, for the progress bar; what is not known counts 1."""
        return 1

    def identity(self, request: Request) -> dict[str, Any]:
        """What decides the result beside the model, the length, limit, seed, stride and documents; plain values.

        Such as a digest of a file that it reads. Results are kept and used again as long as it stays the same, and the
        files that define a user's class (:meth:`sources`) too.
        """
        return {}

    def sources(self) -> dict[str, str]:
        """Digests of the files that define its class, by module, as far as they are not part of this package."""
        kinds = {kind.__module__: kind for kind in type(self).__mro__ if kind not in (object, ABC)}
        files = {
            name: inspect.getsourcefile(kind) for name, kind in kinds.items() if name.split(".")[0] != "ropepp_lit"
        }
        return {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items() if file}

    def measured(self, request: Request, **fields: Any) -> Measurement:
        """A measurement of this task at the request's length.

        Args:
            request: Of :meth:`measure`.
            fields: Of :class:`~ropepp_lit.eval.results.Measurement`: `metric`, `numerators` and `denominators` (one
                each for every example: the value is the ratio of their sums), `sample` (see `sample_of`),
                `aggregation="score"` or `"percent"` for a share in percent, and others.
        """
        return Measurement(**{"task": self.task, "part": self.part, "length": request.length, **fields})


@dataclass(frozen=True)
class Draft:
    """An example whose length is still open."""

    fillers: Iterable[str]
    """What lengthens it, from the end of the context to its start; as many are used as the length takes."""

    needles: list[tuple[float, str]]
    """What is put among the fillers, and how deep: 0 is the start, 1 the end."""

    question: str
    """What the prompt ends with."""

    answers: list[str]
    """What must be written."""

    depth: float | None = None
    """Of the answer, one of DEPTHS, where it lies in one place."""

    ideal: str = ""
    """What a perfect model writes behind the question; empty means the answers with commas and a full stop."""

    head: str = ""
    """What the prompt begins with, before the context that is cut to the length."""

    separator: str = " "
    """Between fillers, needles and the question."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fillers", iter(self.fillers))
        if not self.ideal:
            object.__setattr__(self, "ideal", f" {', '.join(self.answers)}.")

    def take(self, count: int) -> list[str]:
        """The next fillers."""
        return list(itertools.islice(self.fillers, count))

    def units(self, fillers: list[str]) -> list[str]:
        """The context with these fillers, first the last of it; its first unit is a filler."""
        units: list[list[str]] = [[filler] for filler in reversed(fillers)]
        for depth, needle in sorted(self.needles, key=lambda pair: pair[0]):
            units[place(depth, len(units))].append(needle)
        return list(itertools.chain.from_iterable(units))

    def text(self, fillers: list[str]) -> str:
        """The example behind its head, with these fillers."""
        return self.separator.join([*self.units(fillers), self.question])


def place(depth: float, units: int) -> int:
    """Index of the unit behind which a needle of this depth (0 to 1) stands."""
    return round(depth * (units - 1))


class Family(Task):
    """Prompts of an exact length for any tokenizer, answered greedily. The mean score is measured, also by depth."""

    takes_noise = True

    @abstractmethod
    def draft(self, rng: random.Random, *, depth: float, units: int) -> Draft:
        """An example without its length.

        Args:
            rng: Decides the example.
            depth: Where the answer may be put, of DEPTHS.
            units: About how many fillers the context will have, for what is repeated more often in longer ones.
        """

    def score(self, answers: list[str], written: str) -> float:
        """How right an answer is, from 0 to 1: the share of the answers in it, whatever their case (RULER's match)."""
        return sum(answer.lower() in written.lower() for answer in answers) / len(answers)

    def draw(self, *, units: int, seed: str, number: int = 0) -> Draft:
        """An example by its number, which also sets the depth, in turn.

        Args:
            units: See :meth:`draft`.
            seed: With number and part it decides the example.
            number: Of the example.
        """
        rng = random.Random(f"{seed}/{self.part}/{number}")  # noqa: S311
        return self.draft(rng, depth=DEPTHS[number % len(DEPTHS)], units=units)

    def max_new_tokens(self, tokenizer: TextTokenizer, *, seed: int) -> int:
        """Tokens that a model may write: twice those of a perfect answer, and eight."""
        return 2 * len(tokenizer.encode_text(self.draw(units=100, seed=str(seed)).ideal)) + 8

    def check(self, model: Model, request: Request) -> None:
        """Raise UsageError where the examples do not fit into the least length: longer ones hold what it holds."""
        shortest = min(request.lengths)
        # In short contexts words a few tokens longer may be too long, so all are tried.
        numbers = range(request.limit if shortest <= 4096 else len(DEPTHS))
        examples.make_examples(self, model.tokenizer, length=shortest, numbers=numbers, seed=request.seed)

    def num_tokens(self, request: Request) -> int:
        """Of all prompts with room for the answers."""
        return request.limit * (request.length or 0)

    def measure(self, model: Model, request: Request) -> list[Measurement]:
        """The score over all examples, and by the depth of the answer."""
        assert request.length is not None
        length, max_new_tokens = request.length, self.max_new_tokens(model.tokenizer, seed=request.seed)
        answers: list[Answer] = []
        samples: list[str] = []
        for numbers in batches(request.limit, length):  # made batch by batch: memory does not grow with the limit
            batch = examples.make_examples(self, model.tokenizer, length=length, numbers=numbers, seed=request.seed)
            prompts = [example.input_ids for example in batch]
            samples.append(sample_of(prompts))
            written = examples.write_answers(
                model, prompts, max_new_tokens=max_new_tokens, chunk_tokens=request.chunk_tokens
            )
            for number, example, text in zip(numbers, batch, written, strict=True):
                end = model.tokenizer.decode(example.input_ids[-PROMPT_CHARACTERS:])
                answers.append(
                    Answer.cut(
                        number=number, prompt=end, expected=example.ideal.strip(), written=text,
                        score=self.score(example.answers, text), depth=example.depth,
                    )
                )  # fmt: skip
            request.progress(len(batch) * length)
        request.answers.extend(answers)
        measured = partial(self.measured, request, metric="score", sample=sample_of(samples))
        scores = [answer.score for answer in answers]
        found = [measured(numerators=scores, denominators=[1.0] * len(scores))]
        for depth in DEPTHS:
            here = [float(answer.depth == depth) for answer in answers]
            if any(here):
                numerators = [score * inside for score, inside in zip(scores, here, strict=True)]
                found.append(measured(depth=depth, numerators=numerators, denominators=here))
        return found


def batches(limit: int, length: int) -> Iterator[range]:
    """Numbers of the examples of a length that are read at once."""
    size = max(1, TOKENS_AT_ONCE // length)
    return (range(start, min(start + size, limit)) for start in range(0, limit, size))
