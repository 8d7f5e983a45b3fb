"""The decoder as a language model of lm-eval: nothing is exported, and one model is in memory.

Requests are encoded, cut and scored as lm-eval's `hf` model does (lm_eval/models/huggingface.py), so both give the same
numbers for a checkpoint and its export.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import TOKENS_AT_ONCE, Model
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.generation import generate
from ropepp_lit.nn.loss import rows_per_chunk
from ropepp_lit.nn.sampling import Sampling
from ropepp_lit.terminal import progress_bar
from ropepp_lit.text.tokenizer_files import content_of

MAX_GEN_TOKS = 256
"""Tokens of an answer where a task gives no number (lm-eval's default)."""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_return_sequences": (1,), "repetition_penalty": (1.0,), "length_penalty": (1.0,),
    "top_k": (None, 0), "min_p": (None, 0.0), "typical_p": (None, 1.0), "use_cache": (True, False), "seed": (None,),
}  # fmt: skip
"""Arguments of generation that change nothing at these values; others are refused."""


class DecoderLM(TemplateLM):
    """A decoder that answers lm-eval's requests.

    Args:
        model: Decoder and tokenizer.
        max_length: Tokens that are read at most; longer requests lose their beginning, which is counted.
    """

    def __init__(self, model: Model, *, max_length: int) -> None:
        super().__init__()
        self.model = model
        self.max_length = max_length
        self.tokenizer = make_tokenizer(model)
        self.requests_cut = 0
        self.tokens_cut = 0
        """Requests that lost their beginning, and how many tokens all of them lost."""

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends documents."""
        return self.model.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """What stands before a text without context: BOS where the tokenizer names one, else EOS."""
        bos = self.model.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_gen_toks(self) -> int:
        """See MAX_GEN_TOKS."""
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's cache of requests."""
        return self.model.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, after what the tokenizer puts before every text; special tokens in it are tokens.

        Args:
            string: The text.
            add_special_tokens: Whether the opening is put before it; None means unless it is there already.
            kwargs: Not used.
        """
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        opening = list(self.model.opening)
        if add_special_tokens is None:
            add_special_tokens = not opening or ids[: len(opening)] != opening
        return [*opening, *ids] if add_special_tokens else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation by the tokenizer's chat template."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        assert isinstance(text, str)
        return text

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` tokens one after the other.

        Args:
            requests: lm-eval's instances with arguments (text,).
            disable_tqdm: No progress bar.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for pair in get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True
        ):
            totals[number] += value
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations, and whether each of their tokens is the most likely one."""
        rows: dict[tuple[int, ...], list[int]] = {}  # what is read: the requests that read it
        for number, (_, context, continuation) in enumerate(requests):
            if not context or not continuation:
                raise UsageError("tasks: lm-eval: an example has an empty context or continuation, which has no score")
            if len(continuation) > self.max_length:
                raise UsageError(
                    f"max_length: {self.max_length:,} tokens are read, and a continuation has {len(continuation):,}"
                )
            rows.setdefault(tuple(self._cut(context + continuation, self.max_length + 1)[:-1]), []).append(number)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(rows, key=len, reverse=True)
        with progress_bar("loglikelihood", unit="requests", total=len(requests), show=not disable_tqdm) as bar:
            for batch in _batches(order, extra_tokens=0):
                hidden = self._read(batch)
                for row, ids in enumerate(batch):
                    for number in rows[ids]:
                        continuation = requests[number][2]
                        found[number] = self._score(hidden[row, : len(ids)][-len(continuation) :], continuation)
                    bar.update(len(rows[ids]))
        return found

    def _read(self, batch: Sequence[Sequence[int]]) -> torch.Tensor:
        """[rows, tokens, hidden_size], padded on the right, which earlier tokens do not see."""
        input_ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
        for row, ids in enumerate(batch):
            input_ids[row, : len(ids)] = torch.tensor(ids)
        return self.model.decoder.hidden_states(input_ids.to(self.model.device))

    def _score(self, hidden: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
        """The sum of the log-likelihoods of tokens, and whether each is the most likely one."""
        output = self.model.decoder.lm_head
        labels = torch.tensor(continuation, device=hidden.device)
        size = rows_per_chunk(output.weight.shape[0], hidden.device.type)
        total, greedy = hidden.new_zeros((), dtype=torch.float64), labels.new_ones((), dtype=torch.bool)
        for part, wanted in zip(hidden.split(size), labels.split(size), strict=True):
            logits = output(part).float()
            total -= F.cross_entropy(logits, wanted, reduction="none").double().sum()
            greedy &= (logits.argmax(dim=-1) == wanted).all()
        return float(total), bool(greedy)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop sequence, the token that ends documents, or the number of tokens that a task allows.

        Args:
            requests: lm-eval's instances with arguments (context, arguments of generation).
            disable_tqdm: No progress bar.

        Raises:
            UsageError: a task samples in a way that is not supported, or writes more than the model reads.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers = [""] * len(requests)
        with progress_bar("generate_until", unit="requests", total=len(requests), show=not disable_tqdm) as bar:
            for numbers in groups.values():
                self._answer(requests, numbers, answers, bar)
        return answers

    def _answer(self, requests: list[Any], numbers: list[int], answers: list[str], bar: tqdm) -> None:
        """Answer the requests of these numbers, which have the same arguments of generation."""
        settings = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], MAX_GEN_TOKS))
        eos = None if self.eot_token_id is None else self._decode([self.eot_token_id], special=True)
        until = handle_stop_sequences(settings.pop("until"), eos=eos)
        max_new_tokens = settings.pop("max_gen_toks")
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UsageError(
                f"max_length: the task writes up to {max_new_tokens:,} tokens, and {self.max_length:,} are read and "
                "written together; give more"
            )
        sampling = _sampling(settings)
        prefix = [] if self.prefix_token_id is None else [self.prefix_token_id]
        prompts = {n: self._cut(self.tok_encode(requests[n].args[0]), room) or prefix for n in numbers}
        if not all(prompts.values()):
            raise UsageError("tasks: lm-eval: an example has an empty prompt, and the tokenizer names no BOS or EOS")
        by_length = sorted(numbers, key=lambda n: len(prompts[n]), reverse=True)
        for batch in _batches([prompts[n] for n in by_length], extra_tokens=max_new_tokens):
            done, by_length = by_length[: len(batch)], by_length[len(batch) :]
            for number, ids in zip(done, self._write(batch, until, max_new_tokens, sampling), strict=True):
                answers[number] = postprocess_generated_text(self._decode(ids), until, None)
            bar.update(len(done))

    def _write(
        self, prompts: Sequence[Sequence[int]], until: list[str], max_new_tokens: int, sampling: Sampling
    ) -> list[list[int]]:
        """What is written after each prompt, before a token that ends it and at least up to a stop sequence."""
        longest = max(map(len, prompts))
        input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, ids in enumerate(prompts):
            input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        documents = None
        if any(len(ids) < longest for ids in prompts):  # padding is a document of its own before the prompt
            padding = torch.tensor([longest - len(ids) for ids in prompts])
            is_prompt = torch.arange(longest) >= padding[:, None]
            documents = Documents.from_ids(is_prompt.int().to(self.model.device))
        # A stop sequence of n bytes is of n tokens at most; special tokens may stand among them.
        tail = max((len(stop.encode()) for stop in until), default=0) + 8
        ends = self.model.tokenizer.stop_token_ids
        written: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        for tokens in generate(
            self.model.decoder, input_ids.to(self.model.device), max_new_tokens=max_new_tokens, documents=documents,
            sampling=sampling,
        ):  # fmt: skip
            for row, token in enumerate(tokens.tolist()):
                if row not in open_rows:
                    continue
                if token in ends:
                    open_rows.remove(row)
                    continue
                written[row].append(token)
                text = self._decode(written[row][-tail:], special=True)
                if any(stop in text for stop in until if stop):
                    open_rows.remove(row)
            if not open_rows:
                break
        return written

    def _decode(self, ids: list[int], *, special: bool = False) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=not special)
        assert isinstance(text, str)
        return text

    def _cut(self, ids: list[int], most: int) -> list[int]:
        """The last `most` tokens; what is lost is counted."""
        if len(ids) > most:
            self.requests_cut += 1
            self.tokens_cut += len(ids) - most
        return ids[-most:]


def make_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers' class: lm-eval's tasks know no other.

    It encodes as the checkpoint's; special tokens, chat template and decoding are those of its tokenizer_config.json.
    """
    ours = model.tokenizer
    settings = json.loads(model.entry.get("tokenizer_config") or "{}")
    names: dict[str, Any] = {}
    for key in _SPECIAL:
        names[key] = content_of(settings.get(key))
    for key, token_id in (("bos_token", ours.bos_token_id), ("eos_token", ours.eos_token_id)):
        names[key] = None if token_id is None else ours.tokenizer.id_to_token(token_id)
    return PreTrainedTokenizerFast(
        tokenizer_object=ours.tokenizer,  # copied
        chat_template=settings.get("chat_template"),
        clean_up_tokenization_spaces=bool(settings.get("clean_up_tokenization_spaces", False)),
        **{key: token for key, token in names.items() if token is not None},
    )


def _batches(rows: Sequence[Sequence[int]], *, extra_tokens: int) -> Iterator[list[Any]]:
    """Rows in their order, as many at once as have no more than TOKENS_AT_ONCE tokens, padded to the first one."""
    remaining = iter(rows)
    for first in remaining:
        size = max(1, TOKENS_AT_ONCE // (len(first) + extra_tokens))
        yield [first, *itertools.islice(remaining, size - 1)]


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Temperature and top_p of a task's arguments of generation."""
    sampled = settings.pop("do_sample", False)
    temperature = float(settings.pop("temperature", 0.0) or 0.0)
    top_p = float(settings.pop("top_p", 1.0) or 1.0)
    for key, value in settings.items():
        if value not in _NEUTRAL.get(key, ()):
            raise UsageError(f"tasks: lm-eval: the task generates with {key}={value!r}, which is not supported")
    return Sampling(temperature=temperature, top_p=top_p) if sampled else Sampling()
