"""Metrics of attention during training, separately for real and imaginary heads: scores, weights, output projection."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from torch import Tensor

from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.adapters import merge_layer
from ropepp_lit.nn import Decoder, Documents, Probe
from ropepp_lit.nn.lora import LoRA, clean_name
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.evaluation import EveryNSteps, evaluating
from ropepp_lit.train.fsdp import full_tensor
from ropepp_lit.train.metric_logging import log_metrics

LARGEST = "largest_score"
"""Metric that is aggregated over layers by its maximum; norms by the root of the sum of squares, others by the mean."""


class Diagnostics(EveryNSteps):
    """Logs metrics of attention as `attention/…`, aggregated over layers and for each layer.

    | metric                   | for each kind of heads (real, imaginary)                                           |
    |--------------------------|------------------------------------------------------------------------------------|
    | `largest_score`          | largest qᵀk · scale of a query and a key visible to it                             |
    | `entropy`                | mean entropy of a query's attention weights in nats                                |
    | `share_beyond_N`         | mean percentage of a query's weight on keys more than N tokens before it           |
    | `output_norm`            | Frobenius norm of their columns of o_proj (with adapters, of the merged weights)   |
    | `output_gradient_norm`   | norm of the gradient of those columns, after clipping; not with adapters on o_proj |

    Scores and weights are computed on the first tokens of the first training row, the same text each time.

    Args:
        every_n_steps: Optimizer steps between logs; also logged at the last step. 0 disables them.
        far: N of `share_beyond_N`: keys more than N tokens before the query count.
        max_tokens: Maximum number of tokens of the row to use; memory is quadratic in it.
    """

    def __init__(self, *, every_n_steps: int = 0, far: int = 64, max_tokens: int = 1024) -> None:
        super().__init__("diagnostics", every_n_steps)
        if far < 1:
            raise UsageError(f"diagnostics.far: {far} must be 1 or more")
        if max_tokens < 2:
            raise UsageError(f"diagnostics.max_tokens: {max_tokens} must be 2 or more")
        self.far, self.max_tokens = far, max_tokens
        self._row: tuple[Tensor, Documents | None] | None = None

    def check(self, decoder: Decoder, data: TokenData) -> None:
        """Raise UsageError if no key of the row is further away than `far`; the decoder may be on the meta device."""
        length = min(self.max_tokens, data.context_length)
        if self.every_n_steps and self.far >= length:
            raise UsageError(f"diagnostics.far: {self.far} must be less than the {length} tokens that are read")

    def run(self, trainer: pl.Trainer, module: CausalLM) -> None:
        """Compute and log the metrics."""
        decoder = module.decoder
        kinds = decoder.scheme.head_kinds
        if self._row is None:
            self._row = self._first_row(trainer.datamodule, module.device)  # type: ignore[attr-defined]
        ids, documents = self._row
        probe = _AttentionProbe(num_kinds=len(kinds), far=self.far)
        # Gradients are still those of the step: Lightning sets them to None before the next one.
        with torch.no_grad():
            norms = list(_norms(decoder, module.lora, len(kinds)))
            with evaluating(trainer, decoder), decoder.probed(probe):
                decoder(ids, documents=documents, logits_to_keep=1)
            metrics = {LARGEST: probe.largest, "entropy": probe.entropy, f"share_beyond_{self.far}": probe.beyond}
            for name in ("output_norm", "output_gradient_norm"):
                if norms and all(name in layer_norms for layer_norms in norms):
                    metrics[name] = [layer_norms[name] for layer_norms in norms]
            layers = torch.stack([torch.stack(values).double() for values in metrics.values()])
            overall = torch.stack([_aggregate(name, values) for name, values in zip(metrics, layers, strict=True)])
            numbers = torch.cat((overall[:, None], layers), dim=1).tolist()  # the host waits for the device once
        values: dict[str, float] = {}
        for name, rows in zip(metrics, numbers, strict=True):
            for layer, row in enumerate(rows):
                prefix = "attention" if layer == 0 else f"attention/layer_{layer - 1}"
                values |= {f"{prefix}/{kind}/{name}": value for kind, value in zip(kinds, row, strict=True)}
        log_metrics(trainer, values, trainer.global_step)

    def _first_row(self, data: TokenData, device: torch.device) -> tuple[Tensor, Documents | None]:
        """Return the first tokens of the first row, [1, T], and its documents."""
        samples = data.train_samples
        batch = samples.collate(samples.__getitems__([0]))
        documents = batch.documents
        if isinstance(documents, Documents):
            documents = Documents.from_ids(documents.ids[:, : self.max_tokens].to(device))
        assert documents is None or isinstance(documents, Documents)
        return batch.input_ids[:, : self.max_tokens].to(device), documents


def _aggregate(name: str, layers: Tensor) -> Tensor:
    """Aggregate a metric over layers: [layers, kinds] → [kinds]."""
    if name == LARGEST:
        return layers.amax(dim=0)
    return layers.square().sum(dim=0).sqrt() if name.endswith("norm") else layers.mean(dim=0)


class _AttentionProbe(Probe):
    """Metrics of each layer, by kind of heads: lists of tensors [kinds]."""

    def __init__(self, *, num_kinds: int, far: int) -> None:
        self.num_kinds, self.far = num_kinds, far
        self.largest: list[Tensor] = []
        self.entropy: list[Tensor] = []
        self.beyond: list[Tensor] = []
        self._scores: Tensor | None = None

    def scores(self, layer: int, scores: Tensor) -> Tensor:
        """Store the scores until :meth:`weights` determines the visible keys."""
        self._scores = scores
        return scores

    def weights(self, layer: int, weights: Tensor) -> None:
        """Compute the metrics of a layer from its weights, [1, H, T, T]."""
        assert self._scores is not None
        num_tokens = weights.shape[-1]
        kinds = weights.float().unflatten(1, (-1, self.num_kinds))
        logs = kinds.log().nan_to_num(neginf=0.0)
        self.entropy.append(-(kinds * logs).sum(dim=-1).mean(dim=(0, 1, 3)))
        beyond = kinds.tril(-self.far - 1).sum(dim=-1)
        self.beyond.append(100 * beyond.mean(dim=(0, 1, 3)))
        positions = torch.arange(num_tokens, device=weights.device)
        visible = (positions[:, None] >= positions) & (weights > 0)  # the largest weight cannot underflow to 0
        scores = self._scores.masked_fill(~visible, -torch.inf).unflatten(1, (-1, self.num_kinds))
        self.largest.append(scores.amax(dim=(0, 1, 3, 4)).float())
        self._scores = None


def _norms(decoder: Decoder, lora: LoRA | None, num_kinds: int) -> Iterator[dict[str, Tensor]]:
    """Yield `output_norm`, and `output_gradient_norm` if the columns train, of each layer, each [kinds]."""
    for block in decoder.blocks:
        head_dim = block.self_attn.head_dim
        own = {clean_name(name): value for name, value in block.self_attn.o_proj.named_parameters()}
        parts = {name: full_tensor(value.detach()) for name, value in own.items() if name != "bias"}
        weight = parts.pop("weight")
        if parts:
            assert lora is not None
            weight = merge_layer(lora, weight, parts, head_dim=head_dim)
        norms = {"output_norm": _norm_by_kind(weight, head_dim, num_kinds)}
        if own["weight"].grad is not None:
            norms["output_gradient_norm"] = _norm_by_kind(full_tensor(own["weight"].grad), head_dim, num_kinds)
        elif "imaginary" in own and own["imaginary"].grad is not None:
            norm = torch.linalg.matrix_norm(full_tensor(own["imaginary"].grad).float())
            norms["output_gradient_norm"] = torch.stack((torch.zeros_like(norm), norm))
        yield norms


def _norm_by_kind(matrix: Tensor, head_dim: int, num_kinds: int) -> Tensor:
    """Return the Frobenius norms, [kinds], of the columns of [hidden_size, H · D] that read heads of each kind."""
    columns = matrix.float().unflatten(1, (-1, num_kinds, head_dim))
    return columns.square().sum(dim=(0, 1, 3)).sqrt()
