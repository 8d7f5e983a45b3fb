"""lm-eval model for our decoders, without an export.

Requests are tokenized, truncated and scored as in lm-eval's `hf` model (lm_eval/models/huggingface.py), so a checkpoint
and its export get the same results.
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
from ropepp_lit.eval.models import MAX_BATCH_TOKENS, Model
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.generation import generate
from ropepp_lit.nn.loss import rows_per_chunk
from ropepp_lit.nn.sampling import Sampling
from ropepp_lit.terminal import progress_bar
from ropepp_lit.text.tokenizer_files import content_of

MAX_GEN_TOKS = 256
"""Default maximum number of generated tokens (lm-eval's default)."""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_return_sequences": (1,), "repetition_penalty": (1.0,), "length_penalty": (1.0,),
    "top_k": (None, 0), "min_p": (None, 0.0), "typical_p": (None, 1.0), "use_cache": (True, False), "seed": (None,),
}  # fmt: skip
"""Generation arguments that have no effect at these values; other values are rejected."""


class DecoderLM(TemplateLM):
    """An lm-eval model.

    Args:
        model: Decoder and tokenizer.
        max_length: Maximum sequence length in tokens; longer requests are truncated at the start and counted.
    """

    def __init__(self, model: Model, *, max_length: int) -> None:
        super().__init__()
        self.model = model
        self.max_length = max_length
        self.tokenizer = make_tokenizer(model)
        self.num_truncated = 0
        """Number of truncated requests."""
        self.num_truncated_tokens = 0
        """Number of tokens that truncation removed."""

    @property
    def eot_token_id(self) -> int | None:
        """Id of the EOS token."""
        return self.model.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """Token id that replaces an empty context: BOS if the tokenizer has one, otherwise EOS."""
        bos = self.model.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_gen_toks(self) -> int:
        """Default maximum number of generated tokens."""
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in lm-eval's request cache."""
        return self.model.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize a text; special tokens in the text are parsed.

        Args:
            string: The text.
            add_special_tokens: Whether to prepend BOS; None prepends it unless the text starts with it.
            kwargs: Ignored.
        """
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        opening = list(self.model.opening)
        if add_special_tokens is None:
            add_special_tokens = not opening or ids[: len(opening)] != opening
        return [*opening, *ids] if add_special_tokens else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation with the tokenizer's chat template."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        assert isinstance(text, str)
        return text

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of full texts, computed in disjoint windows of `max_length` tokens.

        Args:
            requests: Instances of lm-eval with arguments (text,).
            disable_tqdm: Whether to hide the progress bar.
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
        """Return the log-likelihood of each continuation, and whether all its tokens are top-1 predictions."""
        rows: dict[tuple[int, ...], list[int]] = {}  # from inputs to the requests with these inputs
        for number, (_, context, continuation) in enumerate(requests):
            if not context or not continuation:
                raise UsageError("tasks: lm-eval: an example has an empty context or continuation, which has no score")
            if len(continuation) > self.max_length:
                raise UsageError(
                    f"max_length: a continuation has {len(continuation):,} tokens, more than the maximum length of "
                    f"{self.max_length:,}; give more"
                )
            rows.setdefault(tuple(self._truncate(context + continuation, self.max_length + 1)[:-1]), []).append(number)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(rows, key=len, reverse=True)
        with progress_bar("loglikelihood", unit="requests", total=len(requests), show=not disable_tqdm) as bar:
            for batch in _batches(order, extra_tokens=0):
                hidden = self._hidden_states(batch)
                for row, ids in enumerate(batch):
                    for number in rows[ids]:
                        continuation = requests[number][2]
                        results[number] = self._score(hidden[row, : len(ids)][-len(continuation) :], continuation)
                    bar.update(len(rows[ids]))
        return results

    def _hidden_states(self, batch: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return hidden states [rows, tokens, hidden_size]; padding is on the right, so it affects no other token."""
        input_ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
        for row, ids in enumerate(batch):
            input_ids[row, : len(ids)] = torch.tensor(ids)
        return self.model.decoder.hidden_states(input_ids.to(self.model.device))

    def _score(self, hidden: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of a continuation, and whether all its tokens are top-1 predictions."""
        lm_head = self.model.decoder.lm_head
        labels = torch.tensor(continuation, device=hidden.device)
        size = rows_per_chunk(lm_head.weight.shape[0], hidden.device.type)
        total, is_greedy = hidden.new_zeros((), dtype=torch.float64), labels.new_ones((), dtype=torch.bool)
        for chunk, targets in zip(hidden.split(size), labels.split(size), strict=True):
            logits = lm_head(chunk).float()
            total -= F.cross_entropy(logits, targets, reduction="none").double().sum()
            is_greedy &= (logits.argmax(dim=-1) == targets).all()
        return float(total), bool(is_greedy)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate answers up to a stop sequence, a stop token or the task's maximum number of tokens.

        Args:
            requests: Instances of lm-eval with arguments (context, generation arguments).
            disable_tqdm: Whether to hide the progress bar.

        Raises:
            UsageError: A task uses unsupported generation arguments, or generates more tokens than `max_length`.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        answers = [""] * len(requests)
        with progress_bar("generate_until", unit="requests", total=len(requests), show=not disable_tqdm) as bar:
            for numbers in groups.values():
                self._generate_group(requests, numbers, answers, bar)
        return answers

    def _generate_group(self, requests: list[Any], numbers: list[int], answers: list[str], bar: tqdm) -> None:
        """Generate the answers to the requests of these numbers, which have the same generation arguments."""
        settings = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], MAX_GEN_TOKS))
        eos = None if self.eot_token_id is None else self._decode([self.eot_token_id], special=True)
        until = handle_stop_sequences(settings.pop("until"), eos=eos)
        max_new_tokens = settings.pop("max_gen_toks")
        max_prompt_tokens = self.max_length - max_new_tokens
        if max_prompt_tokens < 1:
            raise UsageError(
                f"max_length: the task generates up to {max_new_tokens:,} tokens, which leaves no space for a prompt "
                f"within {self.max_length:,}; give more"
            )
        sampling = _sampling(settings)
        prefix = [] if self.prefix_token_id is None else [self.prefix_token_id]
        prompts = {
            n: self._truncate(self.tok_encode(requests[n].args[0]), max_prompt_tokens) or prefix for n in numbers
        }
        if not all(prompts.values()):
            raise UsageError(
                "tasks: lm-eval: an example has an empty prompt, and the tokenizer has no BOS or EOS token"
            )
        by_length = sorted(numbers, key=lambda n: len(prompts[n]), reverse=True)
        for batch in _batches([prompts[n] for n in by_length], extra_tokens=max_new_tokens):
            done, by_length = by_length[: len(batch)], by_length[len(batch) :]
            for number, ids in zip(done, self._generate_batch(batch, until, max_new_tokens, sampling), strict=True):
                answers[number] = postprocess_generated_text(self._decode(ids), until, None)
            bar.update(len(done))

    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], until: list[str], max_new_tokens: int, sampling: Sampling
    ) -> list[list[int]]:
        """Return the generated ids of each prompt, up to a stop token (excluded) or at least up to a stop sequence."""
        longest = max(map(len, prompts))
        input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, ids in enumerate(prompts):
            input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        documents = None
        if any(len(ids) < longest for ids in prompts):  # padding is a separate document before the prompt
            padding = torch.tensor([longest - len(ids) for ids in prompts])
            is_prompt = torch.arange(longest) >= padding[:, None]
            documents = Documents.from_ids(is_prompt.int().to(self.model.device))
        # A stop sequence of n bytes has up to n tokens; special tokens may occur between them.
        tail = max((len(stop.encode()) for stop in until), default=0) + 8
        ends = self.model.tokenizer.stop_token_ids
        written: list[list[int]] = [[] for _ in prompts]
        unfinished = set(range(len(prompts)))
        for tokens in generate(
            self.model.decoder, input_ids.to(self.model.device), max_new_tokens=max_new_tokens, documents=documents,
            sampling=sampling,
        ):  # fmt: skip
            for row, token in enumerate(tokens.tolist()):
                if row not in unfinished:
                    continue
                if token in ends:
                    unfinished.remove(row)
                    continue
                written[row].append(token)
                text = self._decode(written[row][-tail:], special=True)
                if any(stop in text for stop in until if stop):
                    unfinished.remove(row)
            if not unfinished:
                break
        return written

    def _decode(self, ids: list[int], *, special: bool = False) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=not special)
        assert isinstance(text, str)
        return text

    def _truncate(self, ids: list[int], max_tokens: int) -> list[int]:
        """Return the last `max_tokens` tokens, and count the removed ones."""
        if len(ids) > max_tokens:
            self.num_truncated += 1
            self.num_truncated_tokens += len(ids) - max_tokens
        return ids[-max_tokens:]


def make_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """Convert a model's tokenizer to the class of transformers, which lm-eval's tasks require.

    Special tokens, chat template and decoding are those of the checkpoint's tokenizer_config.json.
    """
    text_tokenizer = model.tokenizer
    settings = json.loads(model.entry.get("tokenizer_config") or "{}")
    names: dict[str, Any] = {}
    for key in _SPECIAL:
        names[key] = content_of(settings.get(key))
    for key, token_id in (("bos_token", text_tokenizer.bos_token_id), ("eos_token", text_tokenizer.eos_token_id)):
        names[key] = None if token_id is None else text_tokenizer.tokenizer.id_to_token(token_id)
    return PreTrainedTokenizerFast(
        tokenizer_object=text_tokenizer.tokenizer,  # copied
        chat_template=settings.get("chat_template"),
        clean_up_tokenization_spaces=bool(settings.get("clean_up_tokenization_spaces", False)),
        **{key: token for key, token in names.items() if token is not None},
    )


def _batches(rows: Sequence[Sequence[int]], *, extra_tokens: int) -> Iterator[list[Any]]:
    """Yield batches of consecutive rows with up to MAX_BATCH_TOKENS tokens, including padding to the first row."""
    remaining = iter(rows)
    for first in remaining:
        size = max(1, MAX_BATCH_TOKENS // (len(first) + extra_tokens))
        yield [first, *itertools.islice(remaining, size - 1)]


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Convert a task's generation arguments."""
    sampled = settings.pop("do_sample", False)
    temperature = float(settings.pop("temperature", 0.0) or 0.0)
    top_p = float(settings.pop("top_p", 1.0) or 1.0)
    for key, value in settings.items():
        if value not in _NEUTRAL.get(key, ()):
            raise UsageError(f"tasks: lm-eval: the task generates with {key}={value!r}, which is not supported")
    return Sampling(temperature=temperature, top_p=top_p) if sampled else Sampling()
