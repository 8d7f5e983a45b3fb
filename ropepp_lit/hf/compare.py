"""How far two checkpoints are apart: logits on random tokens, loss on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ropepp_lit.checkpoint import KEY, load_decoder
from ropepp_lit.errors import UsageError

PROBE_TOKENS = 256


@torch.inference_mode()
def compare(before: dict[str, Any], after: dict[str, Any], text: Path | None) -> str:
    """A line about the logits and, where a text is given, one about the loss.

    Args:
        before: Checkpoint.
        after: Checkpoint with the same vocabulary.
        text: UTF-8 file.

    Raises:
        UsageError: the text cannot be read, or there is no tokenizer for it.
    """
    ids = None if text is None else _tokenize(before, text)
    old, new = (load_decoder(checkpoint).float() for checkpoint in (before, after))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(old.config.vocab_size, (1, PROBE_TOKENS), generator=generator)
    expected = old(probe)
    share = float((new(probe) - expected).abs().max() / expected.abs().max())
    lines = [f"Logits of {PROBE_TOKENS} random tokens differ by {share:.1e} of the largest."]
    if ids is not None:
        losses = []
        for decoder in (old, new):
            total = sum(float(decoder(row[:, :-1], labels=row[:, 1:], reduction="sum")) for row in ids)
            losses.append(total / sum(row.shape[1] - 1 for row in ids))
        tokens = sum(row.shape[1] - 1 for row in ids)
        lines.append(
            f"Loss on {text}, {tokens:,} tokens: {losses[0]:.4f} before, {losses[1]:.4f} after, in nats per token."
        )
    return "\n".join(lines)


def _tokenize(checkpoint: dict[str, Any], text: Path) -> list[torch.Tensor]:
    """Rows of up to the context length of the model, at most 16 of them."""
    ours = checkpoint[KEY]
    if ours["tokenizer"] is None:
        raise UsageError("text: the checkpoint holds no tokenizer to read a text with")
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"text: {text}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    ids = Tokenizer.from_str(ours["tokenizer"]).encode(content, add_special_tokens=False).ids
    if ours["bos_token_id"] is not None:
        ids = [ours["bos_token_id"], *ids]
    if len(ids) < 2:
        raise UsageError(f"text: {text}: too short to predict anything")
    size = min(ours["context_length"] or 2048, 2048)
    return [row for row in torch.tensor([ids]).split(size, dim=1)[:16] if row.shape[1] > 1]
