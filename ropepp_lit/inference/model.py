"""Model and settings for text generation."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ropepp_lit.checkpoint import KEY, load_decoder
from ropepp_lit.errors import UsageError
from ropepp_lit.files import fingerprint
from ropepp_lit.hf.folder import describe_dtypes, locate, open_checkpoint
from ropepp_lit.nn import Decoder
from ropepp_lit.nn.sampling import Sampling
from ropepp_lit.text.formats import unescape
from ropepp_lit.text.stream import StoppingStream
from ropepp_lit.text.tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Settings of text generation."""

    max_new_tokens: int = 128
    """Maximum number of tokens to generate."""

    sampling: Sampling = field(default_factory=Sampling)

    seed: int = 0
    """Random seed; random numbers of a prompt also depend on its index among the prompts."""

    stop_texts: tuple[str, ...] = ()
    """Texts that end the generation; they are not part of the result."""

    def check(self) -> GenerationSettings:
        """Return the settings, or raise UsageError for an invalid one."""
        self.sampling.check()
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: {self.max_new_tokens} must be 1 or more")
        if not all(self.stop_texts):
            raise UsageError("stop: an empty stop text; give a text, or omit the option")
        return self


def parse_stop(value: str) -> tuple[str, ...]:
    r"""Parse the stop texts of a command line.

    Args:
        value: One text with escapes such as `\n`, or a JSON list of texts; empty for none.

    Raises:
        UsageError: The list has elements that are not strings.
    """
    if not value:
        return ()
    try:
        texts = json.loads(value) if value.startswith("[") else None
    except ValueError:
        texts = None
    if texts is None:
        return (unescape(value),)
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f'stop: {value}: a list must contain only strings, such as \'["###", "1"]\'')
    return tuple(texts)


@dataclass(kw_only=True)
class Model:
    """A decoder with its tokenizer and context length."""

    path: str
    decoder: Decoder
    tokenizer: TextTokenizer
    context_length: int | None
    """Maximum number of tokens of prompt and answer; None if unknown."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.decoder.model.embed_tokens.weight.device

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the checkpoint's files; computing it reads them."""
        return fingerprint(locate(self.path))

    def remaining_tokens(self, ids: Sequence[int]) -> int | None:
        """Return the number of tokens that the context has left after a prompt; None if it is unlimited."""
        return None if self.context_length is None else max(0, self.context_length - len(ids))

    def limit(self, ids: Sequence[int], max_new_tokens: int) -> int:
        """Return the maximum number of tokens that can be generated after a prompt."""
        remaining = self.remaining_tokens(ids)
        return max_new_tokens if remaining is None else min(remaining, max_new_tokens)

    def stream(
        self, ids: Sequence[int], generation: GenerationSettings, *, stop_token_ids: Sequence[int] = ()
    ) -> StoppingStream:
        """Create a stream that decodes generated tokens, up to a stop token or stop text.

        Args:
            ids: Token ids of the prompt.
            generation: Generation settings; a stop text that is a special token is used as a stop token.
            stop_token_ids: Stop tokens in addition to those of the tokenizer.
        """
        tokens = {*self.tokenizer.stop_token_ids, *stop_token_ids}
        added = self.tokenizer.tokenizer.get_added_tokens_decoder()
        special = {token.content: token_id for token_id, token in added.items() if token.special}
        tokens |= {special[text] for text in generation.stop_texts if text in special}
        return StoppingStream(self.tokenizer, ids, stop_token_ids=tokens, stop_texts=generation.stop_texts)


def load_model(path: str, *, trust: str | None = None, context_length: int | None = None) -> Model:
    """Load a model, on the GPU if there is one.

    Args:
        path: See :func:`~ropepp_lit.hf.folder.open_checkpoint`.
        trust: `module.Class` of a position scheme outside this package that may be imported.
        context_length: Maximum number of tokens of prompt and answer; None means the checkpoint's context length.

    Raises:
        UsageError: The checkpoint does not exist, is damaged, or has no tokenizer.
    """
    if context_length is not None and context_length < 2:
        raise UsageError(f"context_length: {context_length} must be 2 or more")
    contents = open_checkpoint(path, checksums=True)
    entry = contents[KEY]
    if entry["tokenizer"] is None:
        raise UsageError(f"{path}: the checkpoint stores no tokenizer, so it cannot generate text")
    if notice := describe_dtypes(contents):
        print(f"Notice: {notice}; the first is the compute dtype.", file=sys.stderr)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Model(
        path=path,
        decoder=load_decoder(contents, trust=trust).to(device),
        tokenizer=TextTokenizer.from_entry(entry),
        context_length=entry.get("context_length") if context_length is None else context_length,
    )
