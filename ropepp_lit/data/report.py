"""Format reports about prepared shards: totals, skipped documents, notices and an example."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np

from ropepp_lit.data.manifest import Manifest
from ropepp_lit.data.trained_tokens import is_trained, split_pair, token_ids
from ropepp_lit.text.tokenizer import TextTokenizer

SHOWN_TOKENS = 500
"""Maximum number of tokens of the example conversation."""


def skipped_lines(manifest: Manifest) -> list[str]:
    """Return lines with the number of skipped documents by reason, and the first of them."""
    lines = [f"left out: {count:,} ({reason})" for reason, count in manifest.skipped.items()]
    return lines + [f"  {example}" for example in manifest.examples[:5]]


def conversation_lines(manifest: Manifest, folder: Path) -> list[str]:
    """Return lines about a set of conversations or completions: documents, tokens, trained tokens, end of a turn.

    Args:
        manifest: Manifest of the set.
        folder: Folder with its tokenizer.
    """
    tokenizer = TextTokenizer.from_entry({**vars(manifest), "tokenizer": manifest.read_tokenizer(folder)})
    lines = [f"{'split':<12}{'documents':>14}{'tokens':>18}{'trained':>18}{'share':>8}{'longest':>12}"]
    for name, split in manifest.splits.items():
        if split.documents:
            share = split.trained_tokens / split.tokens
            lines.append(
                f"{name:<12}{split.documents:>14,}{split.tokens:>18,}{split.trained_tokens:>18,}{share:>8.1%}"
                f"{split.longest:>12,}"
            )
    lines += skipped_lines(manifest)
    lines += [f"Notice: {reason}: in {count:,} documents" for reason, count in manifest.notices.items()]
    if manifest.end_of_turn:
        names = " or ".join(str(tokenizer.token(token)) for token in manifest.end_of_turn)
        lines.append(f"A turn ends with {names}.")
    elif manifest.chat_template is not None:
        eos = tokenizer.token(tokenizer.eos_token_id)
        lines.append(
            "Notice: the chat template does not end turns with a dedicated token, so a model would not stop there; "
            f"change it to write eos_token ({eos}) after answers"
        )
    return lines


def highlight_trained(stored: np.ndarray, tokenizer: TextTokenizer) -> str:
    """Decode a document with its trained tokens in colour, or in brackets if the output is not a terminal.

    Args:
        stored: [tokens], see :mod:`.trained_tokens`.
        tokenizer: Tokenizer of the document.
    """
    return "\n--- rejected ---\n".join(_highlight(part, tokenizer) for part in split_pair(stored))


def _highlight(stored: np.ndarray, tokenizer: TextTokenizer) -> str:
    has_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    start, end = ("\x1b[32m", "\x1b[0m") if has_colour else ("[[", "]]")
    first = max(0, int(is_trained(stored).argmax()) - SHOWN_TOKENS // 2)
    part = stored[first : first + SHOWN_TOKENS]
    pieces = []
    for run in np.split(part, np.flatnonzero(np.diff(is_trained(part).astype(np.int8))) + 1):
        text = tokenizer.tokenizer.decode(token_ids(run).tolist(), skip_special_tokens=False)
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], text)
        pieces.append(f"{start}{text}{end}" if run[0] >= 0 else text)
    remaining = len(stored) - first - len(part)
    return f"{'… ' if first else ''}{''.join(pieces)}{f' … ({remaining:,} more tokens)' if remaining else ''}"
