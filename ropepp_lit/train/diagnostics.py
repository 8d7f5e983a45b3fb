"""What attention does while a model trains, for real and imaginary heads apart: scores, weights, output projection."""

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
from ropepp_lit.train.curves import log_figures
from ropepp_lit.train.evaluation import BySteps, evaluating
from ropepp_lit.train.fsdp import whole

LARGEST = "largest_score"
"""Of several layers the largest counts; of other figures their mean, and of norms the root of the sum of squares."""


class Diagnostics(BySteps):
    """Logs figures of attention as `attention/…`, of all layers together and of each.

    | figure                   | of the heads of one kind                                                           |
    |--------------------------|------------------------------------------------------------------------------------|
    | `largest_score`          | largest qᵀk · scale of a query and a key that it sees                              |
    | `entropy`                | entropy of a query's weights in nats, mean                                         |
    | `share_beyond_N`         | percent of a query's weight on keys more than N tokens before it, mean             |
    | `output_norm`            | Frobenius norm of the columns of o_proj that read them (with adapters, of the sum) |
    | `output_gradient_norm`   | norm of the gradient of those columns, after clipping; without adapters on them    |

    Scores and weights are those of the beginning of the first row of training, the same text each time.

    Args:
        every_n_steps: Optimizer steps between figures, also logged at the last step; 0 switches them off.
        far: N, in tokens.
        max_tokens: Tokens of the row that are read; memory is quadratic in them.
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
        """Raise UsageError where no key of a row is as far away as `far`; the decoder may be on the meta device."""
        length = min(self.max_tokens, data.context_length)
        if self.every_n_steps and self.far >= length:
            raise UsageError(f"diagnostics.far: {self.far} must be less than the {length} tokens that are read")

    def act(self, trainer: pl.Trainer, module: CausalLM) -> None:
        """Compute and log."""
        decoder = module.decoder
        kinds = decoder.scheme.head_kinds
        if self._row is None:
            self._row = self._first_row(trainer.datamodule, module.device)  # type: ignore[attr-defined]
        ids, documents = self._row
        watch = _Watch(num_kinds=len(kinds), far=self.far)
        # Gradients are still those of the step: they are set to None before the next one.
        with torch.no_grad():
            norms = list(_norms(decoder, module.lora, len(kinds)))
            with evaluating(trainer, decoder), decoder.probed(watch):
                decoder(ids, documents=documents, logits_to_keep=1)
            found = {LARGEST: watch.largest, "entropy": watch.entropy, f"share_beyond_{self.far}": watch.beyond}
            for name in ("output_norm", "output_gradient_norm"):
                if norms and all(name in of_layer for of_layer in norms):
                    found[name] = [of_layer[name] for of_layer in norms]
            layers = torch.stack([torch.stack(values).double() for values in found.values()])
            together = torch.stack([_join(name, values) for name, values in zip(found, layers, strict=True)])
            numbers = torch.cat((together[:, None], layers), dim=1).tolist()  # the host waits for the device once
        values: dict[str, float] = {}
        for name, rows in zip(found, numbers, strict=True):
            for layer, row in enumerate(rows):
                place = "attention" if layer == 0 else f"attention/layer_{layer - 1}"
                values |= {f"{place}/{kind}/{name}": value for kind, value in zip(kinds, row, strict=True)}
        log_figures(trainer, values, trainer.global_step)

    def _first_row(self, data: TokenData, device: torch.device) -> tuple[Tensor, Documents | None]:
        """Tokens [1, T] of the beginning of the first row, and its documents."""
        samples = data.train_samples
        batch = samples.collate(samples.__getitems__([0]))
        documents = batch.documents
        if isinstance(documents, Documents):
            documents = Documents.from_ids(documents.ids[:, : self.max_tokens].to(device))
        assert documents is None or isinstance(documents, Documents)
        return batch.input_ids[:, : self.max_tokens].to(device), documents


def _join(name: str, layers: Tensor) -> Tensor:
    """A figure of all layers together, of [layers, kinds]."""
    if name == LARGEST:
        return layers.amax(dim=0)
    return layers.square().sum(dim=0).sqrt() if name.endswith("norm") else layers.mean(dim=0)


class _Watch(Probe):
    """Figures of each layer, by kind of heads: lists of tensors [kinds]."""

    def __init__(self, *, num_kinds: int, far: int) -> None:
        self.num_kinds, self.far = num_kinds, far
        self.largest: list[Tensor] = []
        self.entropy: list[Tensor] = []
        self.beyond: list[Tensor] = []
        self._scores: Tensor | None = None

    def scores(self, layer: int, scores: Tensor) -> Tensor:
        """Keep them until it is known which keys a query sees."""
        self._scores = scores
        return scores

    def weights(self, layer: int, weights: Tensor) -> None:
        """Add a layer's weights [1, H, T, T]."""
        assert self._scores is not None
        num_tokens = weights.shape[-1]
        kinds = weights.float().unflatten(1, (-1, self.num_kinds))
        logs = kinds.log().nan_to_num(neginf=0.0)
        self.entropy.append(-(kinds * logs).sum(dim=-1).mean(dim=(0, 1, 3)))
        beyond = kinds.tril(-self.far - 1).sum(dim=-1)
        self.beyond.append(100 * beyond.mean(dim=(0, 1, 3)))
        places = torch.arange(num_tokens, device=weights.device)
        seen = (places[:, None] >= places) & (weights > 0)  # a weight may underflow, but never the largest
        scores = self._scores.masked_fill(~seen, -torch.inf).unflatten(1, (-1, self.num_kinds))
        self.largest.append(scores.amax(dim=(0, 1, 3, 4)).float())
        self._scores = None


def _norms(decoder: Decoder, lora: LoRA | None, num_kinds: int) -> Iterator[dict[str, Tensor]]:
    """`output_norm`, and `output_gradient_norm` where columns train, of each layer, each [kinds]."""
    for block in decoder.blocks:
        head_dim = block.self_attn.head_dim
        own = {clean_name(name): value for name, value in block.self_attn.o_proj.named_parameters()}
        parts = {name: whole(value.detach()) for name, value in own.items() if name != "bias"}
        weight = parts.pop("weight")
        if parts:
            assert lora is not None
            weight = merge_layer(lora, weight, parts, head_dim=head_dim)
        found = {"output_norm": _by_kind(weight, head_dim, num_kinds)}
        if own["weight"].grad is not None:
            found["output_gradient_norm"] = _by_kind(whole(own["weight"].grad), head_dim, num_kinds)
        elif "imaginary" in own and own["imaginary"].grad is not None:
            norm = torch.linalg.matrix_norm(whole(own["imaginary"].grad).float())
            found["output_gradient_norm"] = torch.stack((torch.zeros_like(norm), norm))
        yield found


def _by_kind(matrix: Tensor, head_dim: int, num_kinds: int) -> Tensor:
    """[kinds]: Frobenius norms of the columns of a matrix [hidden_size, H · D] that read heads of each kind."""
    columns = matrix.float().unflatten(1, (-1, num_kinds, head_dim))
    return columns.square().sum(dim=(0, 1, 3)).sqrt()
