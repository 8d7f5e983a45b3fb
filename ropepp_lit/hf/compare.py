"""Compares two checkpoints by their logits on random tokens and their loss on a text, in float32, block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ropepp_lit.checkpoint import KEY, load_decoder
from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder
from ropepp_lit.text.tokenizer import TextTokenizer

PROBE_TOKENS = 256


@torch.inference_mode()
def compare(before: dict[str, Any], after: dict[str, Any], text: Path | None) -> str:
    """Return a line with the difference of the logits and, if there is a text, a line with the losses.

    Args:
        before: First checkpoint.
        after: Second checkpoint, with the same vocabulary.
        text: UTF-8 file; None compares only the logits.

    Raises:
        UsageError: The text cannot be read, or the checkpoint has no tokenizer.
    """
    rows = [] if text is None else _tokenize(before, text)
    tokens = sum(row.shape[1] - 1 for row in rows)
    logits, losses = [], []
    for checkpoint in (before, after):  # sequentially, so that only one model is in memory
        decoder = load_in_float32(checkpoint)
        probe = torch.randint(decoder.config.vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
        logits.append(decoder(probe))
        losses.append(sum(float(decoder.loss(row[:, :-1], row[:, 1:], reduction="sum")) for row in rows))
        del decoder
    difference = float((logits[1] - logits[0]).abs().max() / logits[0].abs().max())
    lines = [f"Logits of {PROBE_TOKENS} random tokens differ by {difference:.1e} of the largest."]
    if tokens:
        old, new = (loss / tokens for loss in losses)
        lines.append(f"Loss on {text}, {tokens:,} tokens: {old:.4f} before, {new:.4f} after, in nats per token.")
    return "\n".join(lines)


def load_in_float32(checkpoint: dict[str, Any], *, dtype: torch.dtype | None = None) -> Decoder:
    """Load a decoder that computes in float32; each block is converted only while it runs, to save memory.

    Args:
        checkpoint: Checkpoint from :func:`~ropepp_lit.checkpoint.read_checkpoint`.
        dtype: Dtype to which the weights are rounded; None keeps the stored dtypes.
    """
    decoder = load_decoder(checkpoint, dtype=dtype, keep_dtypes=dtype is None)
    for module in (decoder.model.embed_tokens, decoder.model.norm, decoder.lm_head):
        module.float()
    stored: dict[torch.nn.Module, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}

    def to_float32(block: torch.nn.Module, _: Any) -> None:
        stored[block] = [(parameter, parameter.data) for parameter in block.parameters()]
        block.float()

    def restore(block: torch.nn.Module, *_: Any) -> None:
        for parameter, value in stored.pop(block):
            parameter.data = value

    for block in decoder.model.layers:
        block.register_forward_pre_hook(to_float32)
        block.register_forward_hook(restore)
    return decoder


def _tokenize(checkpoint: dict[str, Any], text: Path) -> list[torch.Tensor]:
    """Tokenize a text into up to 16 rows of up to the model's context length."""
    entry = checkpoint[KEY]
    if entry["tokenizer"] is None:
        raise UsageError("text: the checkpoint stores no tokenizer, so no loss on a text can be computed")
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"text: {text}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    ids = TextTokenizer.from_entry(entry).encode_whole(content)
    if len(ids) < 2:
        raise UsageError(f"text: {text}: too short to predict anything")
    size = min(entry["context_length"] or 2048, 2048)
    return [row for row in torch.tensor([ids]).split(size, dim=1)[:16] if row.shape[1] > 1]
