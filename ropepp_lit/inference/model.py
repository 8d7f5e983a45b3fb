"""A model that writes text, and what a user sets about it."""

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
class Writing:
    """What is asked of a model for each prompt."""

    max_new_tokens: int = 128
    """Tokens to write at most."""

    sampling: Sampling = field(default_factory=Sampling)

    seed: int = 0
    """Of the random numbers; each prompt has its own by its place among the prompts."""

    stop_texts: tuple[str, ...] = ()
    """Texts that end what is written; they are not part of it."""

    def check(self) -> Writing:
        """Return the settings, or raise a UsageError that names the key."""
        self.sampling.check()
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens: {self.max_new_tokens} must be 1 or more")
        if not all(self.stop_texts):
            raise UsageError("stop: an empty text ends everything; name a text, or leave it out")
        return self


def parse_stop(value: str) -> tuple[str, ...]:
    r"""Texts that end what is written, as a command line names them.

    Args:
        value: One text with escapes such as `\n`, or a JSON list of texts; empty means none.

    Raises:
        UsageError: the list holds something else.
    """
    if not value:
        return ()
    try:
        found = json.loads(value) if value.startswith("[") else None
    except ValueError:
        found = None
    if found is None:
        return (unescape(value),)
    if not all(isinstance(text, str) for text in found):
        raise UsageError(f'stop: {value}: a list must hold texts alone, such as \'["###", "1"]\'')
    return tuple(found)


@dataclass(kw_only=True)
class Model:
    """A decoder that continues text."""

    path: str
    decoder: Decoder
    tokenizer: TextTokenizer
    context_length: int | None
    """Tokens of prompt and answer together; None where nothing says it."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.decoder.model.embed_tokens.weight.device

    @property
    def fingerprint(self) -> str:
        """Hash of the checkpoint's files, which are read for it."""
        return fingerprint(locate(self.path))

    def room_behind(self, ids: Sequence[int]) -> int | None:
        """Tokens that the context has left behind a prompt; None where it has no end."""
        return None if self.context_length is None else max(0, self.context_length - len(ids))

    def limit(self, ids: Sequence[int], max_new_tokens: int) -> int:
        """Tokens that can be written behind a prompt."""
        room = self.room_behind(ids)
        return max_new_tokens if room is None else min(room, max_new_tokens)

    def stream(self, ids: Sequence[int], writing: Writing, *, stop_token_ids: Sequence[int] = ()) -> StoppingStream:
        """What turns the tokens behind a prompt into text, up to what ends it.

        Args:
            ids: The prompt.
            writing: Settings; a stop text that is a special token ends the text as a token.
            stop_token_ids: Tokens that end the text beside those of the tokenizer.
        """
        tokens = {*self.tokenizer.stop_token_ids, *stop_token_ids}
        added = self.tokenizer.tokenizer.get_added_tokens_decoder()
        special = {token.content: token_id for token_id, token in added.items() if token.special}
        tokens |= {special[text] for text in writing.stop_texts if text in special}
        return StoppingStream(self.tokenizer, ids, stop_token_ids=tokens, stop_texts=writing.stop_texts)


def load_model(path: str, *, trust: str | None = None, context_length: int | None = None) -> Model:
    """A checkpoint, Hugging Face folder or name on the Hugging Face Hub as a model, on the GPU where there is one.

    Args:
        path: See :func:`~ropepp_lit.hf.folder.open_checkpoint`.
        trust: `module.Class` of a position scheme that is not ours and may be imported.
        context_length: Tokens of prompt and answer together instead of those of the checkpoint.

    Raises:
        UsageError: no such checkpoint, a damaged one, or one without a tokenizer.
    """
    if context_length is not None and context_length < 2:
        raise UsageError(f"context_length: {context_length} must be 2 or more")
    contents = open_checkpoint(path, checksums=True)
    ours = contents[KEY]
    if ours["tokenizer"] is None:
        raise UsageError(f"{path}: the checkpoint stores no tokenizer, so it cannot read a prompt or write text")
    if notice := describe_dtypes(contents):
        print(f"Notice: {notice}; computed in the first.", file=sys.stderr)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Model(
        path=path,
        decoder=load_decoder(contents, trust=trust).to(device),
        tokenizer=TextTokenizer.from_entry(ours),
        context_length=ours.get("context_length") if context_length is None else context_length,
    )
