"""How far two checkpoints are apart: logits on random tokens, loss on a text; in float32, a block at a time."""

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
    """A line about the logits and, where a text is given, one about the loss.

    Args:
        before: Checkpoint.
        after: Checkpoint with the same vocabulary.
        text: UTF-8 file.

    Raises:
        UsageError: the text cannot be read, or there is no tokenizer for it.
    """
    rows = [] if text is None else _tokenize(before, text)
    tokens = sum(row.shape[1] - 1 for row in rows)
    logits, losses = [], []
    for checkpoint in (before, after):  # one after the other: a single copy of the weights is in memory
        decoder = load_in_float32(checkpoint)
        probe = torch.randint(decoder.config.vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
        logits.append(decoder(probe))
        losses.append(sum(float(decoder.loss(row[:, :-1], row[:, 1:], reduction="sum")) for row in rows))
        del decoder
    share = float((logits[1] - logits[0]).abs().max() / logits[0].abs().max())
    lines = [f"Logits of {PROBE_TOKENS} random tokens differ by {share:.1e} of the largest."]
    if tokens:
        old, new = (loss / tokens for loss in losses)
        lines.append(f"Loss on {text}, {tokens:,} tokens: {old:.4f} before, {new:.4f} after, in nats per token.")
    return "\n".join(lines)


def load_in_float32(checkpoint: dict[str, Any], *, dtype: torch.dtype | None = None) -> Decoder:
    """A checkpoint's decoder that computes in float32; blocks keep their stored weights and are converted as they run.

    Args:
        checkpoint: Of :func:`~ropepp_lit.checkpoint.read_checkpoint`.
        dtype: What the weights are rounded to; None leaves them.
    """
    decoder = load_decoder(checkpoint, dtype=dtype, keep_dtypes=dtype is None)
    for module in (decoder.model.embed_tokens, decoder.model.norm, decoder.lm_head):
        module.float()
    stored: dict[torch.nn.Module, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}

    def widen(block: torch.nn.Module, _: Any) -> None:
        stored[block] = [(parameter, parameter.data) for parameter in block.parameters()]
        block.float()

    def restore(block: torch.nn.Module, *_: Any) -> None:
        for parameter, value in stored.pop(block):
            parameter.data = value

    for block in decoder.model.layers:
        block.register_forward_pre_hook(widen)
        block.register_forward_hook(restore)
    return decoder


def _tokenize(checkpoint: dict[str, Any], text: Path) -> list[torch.Tensor]:
    """Rows of up to the context length of the model, at most 16 of them."""
    ours = checkpoint[KEY]
    if ours["tokenizer"] is None:
        raise UsageError("text: the checkpoint holds no tokenizer to read a text with")
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"text: {text}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    ids = TextTokenizer.from_entry(ours).encode_whole(content)
    if len(ids) < 2:
        raise UsageError(f"text: {text}: too short to predict anything")
    size = min(ours["context_length"] or 2048, 2048)
    return [row for row in torch.tensor([ids]).split(size, dim=1)[:16] if row.shape[1] > 1]
