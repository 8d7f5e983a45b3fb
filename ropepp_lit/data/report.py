"""What a preparation kept and left out, for people."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np

from ropepp_lit.data.shards import Manifest
from ropepp_lit.data.trained_tokens import is_trained, split_pair, token_ids
from ropepp_lit.text.tokenizer import TextTokenizer

SHOWN_TOKENS = 500
"""Of the conversation that is shown, at most."""


def left_out_lines(manifest: Manifest) -> list[str]:
    """What was left out: how many by reason, and the first of them."""
    lines = [f"left out: {count:,} ({reason})" for reason, count in manifest.skipped.items()]
    return lines + [f"  {example}" for example in manifest.examples[:5]]


def conversation_lines(manifest: Manifest, folder: Path) -> list[str]:
    """What a set of conversations or completions has: documents, tokens, how many are trained, what ends a turn.

    Args:
        manifest: Of the set.
        folder: With its tokenizer.
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
    lines += left_out_lines(manifest)
    lines += [f"Notice: {reason}: in {count:,} documents" for reason, count in manifest.notices.items()]
    if manifest.end_of_turn:
        names = " or ".join(str(tokenizer.token(token)) for token in manifest.end_of_turn)
        lines.append(f"A turn ends with {names}.")
    elif manifest.chat_template is not None:
        eos = tokenizer.token(tokenizer.eos_token_id)
        lines.append(
            "Notice: the chat template ends turns with no token of its own, so a model would not stop at their end; "
            f"let it write eos_token ({eos}) behind answers"
        )
    return lines


def shown(stored: np.ndarray, tokenizer: TextTokenizer) -> str:
    """The text of a document, decoded, with what is trained in colour, or in brackets where there is none.

    Args:
        stored: [tokens], see :mod:`.trained_tokens`.
        tokenizer: Of the tokens.
    """
    return "\n--- rejected ---\n".join(_shown(part, tokenizer) for part in split_pair(stored))


def _shown(stored: np.ndarray, tokenizer: TextTokenizer) -> str:
    has_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before, behind = ("\x1b[32m", "\x1b[0m") if has_colour else ("[[", "]]")
    first = max(0, int(is_trained(stored).argmax()) - SHOWN_TOKENS // 2)
    part = stored[first : first + SHOWN_TOKENS]
    pieces = []
    for run in np.split(part, np.flatnonzero(np.diff(is_trained(part).astype(np.int8))) + 1):
        text = tokenizer.tokenizer.decode(token_ids(run).tolist(), skip_special_tokens=False)
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], text)
        pieces.append(f"{before}{text}{behind}" if run[0] >= 0 else text)
    left = len(stored) - first - len(part)
    return f"{'… ' if first else ''}{''.join(pieces)}{f' … ({left:,} more tokens)' if left else ''}"
