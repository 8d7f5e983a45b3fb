"""The decoder: a Llama-like language model whose attention heads are defined by a position scheme.

Pre-norm RMSNorm, SwiGLU, grouped-query attention, no dropout, and no biases by default. Parameters have the names of
Hugging Face's Llama, so that conversion needs no renaming. :meth:`Decoder.hidden_states` is the forward pass: it
computes the scheme's tables once and runs the blocks. :meth:`Decoder.forward` returns logits; :meth:`Decoder.loss`
returns the loss without storing all logits. Read :mod:`ropepp_lit.nn.loss` next.

Shapes: B batch, T tokens, M labels that are not ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ropepp_lit.errors import UsageError
from ropepp_lit.nn.attention import INITIAL_SCORE_SCALE
from ropepp_lit.nn.block import Block
from ropepp_lit.nn.cache import KVCache
from ropepp_lit.nn.config import DecoderConfig
from ropepp_lit.nn.context_parallel import ContextGroup, ShardedDocuments, choose_mode
from ropepp_lit.nn.documents import Documents
from ropepp_lit.nn.frequencies import Frequencies
from ropepp_lit.nn.loss import IGNORE_INDEX, function_of_cross_entropy, linear_cross_entropy, token_cross_entropy
from ropepp_lit.nn.positions import PositionScheme, layout_of
from ropepp_lit.nn.precision import at_least_float32
from ropepp_lit.nn.probe import Probe

Reduction = Literal["mean", "sum", "none"] | Callable[[Tensor], Tensor]
"""Reduction of the losses of tokens, see :meth:`Decoder.loss`."""


class OutputLayer(nn.Linear):
    """The output layer, which computes logits, or the loss without storing all logits."""

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        reduction: Reduction,
        label_indices: Tensor | None,
        weights: Tensor | None,
    ) -> Tensor:
        """Return the cross-entropy of the next tokens; see :meth:`Decoder.loss` for arguments and result.

        Args:
            hidden: [B, T, hidden_size], after the last norm.
            labels: [B, T].
            reduction: See :meth:`Decoder.loss`.
            label_indices: See :meth:`Decoder.loss`.
            weights: See :meth:`Decoder.loss`.
        """
        flat = hidden.flatten(0, 1), self.weight, labels.flatten()  # [B · T, hidden_size], weight, [B · T]
        if callable(reduction):
            return function_of_cross_entropy(*flat, reduction, label_indices=label_indices)
        if reduction == "none":
            return token_cross_entropy(*flat).view_as(labels)
        label_weights = None if weights is None else weights.flatten()
        loss = linear_cross_entropy(*flat, label_indices=label_indices, label_weights=label_weights)
        return loss / (labels != IGNORE_INDEX).sum() if reduction == "mean" else loss


class Trunk(nn.Module):
    """Embedding, blocks and the final norm: `model.` in Hugging Face's parameter names."""

    def __init__(self, config: DecoderConfig, scheme: PositionScheme) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, scheme, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model with a position scheme.

    Example:
        >>> config = DecoderConfig(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
        ...                        num_attention_heads=4, num_key_value_heads=2)
        >>> decoder = Decoder(config, RoPEPP(variant="ec"), Frequencies(rope_theta=10_000))
        >>> logits = decoder(torch.zeros(1, 8, dtype=torch.int64))

    Args:
        config: Geometry.
        scheme: Head layout and rotation.
        frequencies: Base and scaling of the rotary frequencies.

    Raises:
        UsageError: the scheme cannot be built with this geometry.
    """

    def __init__(self, config: DecoderConfig, scheme: PositionScheme, frequencies: Frequencies) -> None:
        super().__init__()
        self.config, self.scheme, self.frequencies = config, scheme, frequencies
        self.head_layout = layout_of(config, scheme)
        self.group_layout = self.head_layout
        """Head counts that an attention layer computes at once; see :meth:`save_memory`."""
        self.context_group: ContextGroup | None = None
        """Ranks that shard the tokens of each row; see :meth:`set_context_group`."""
        self.model = Trunk(config, scheme)
        self.lm_head = OutputLayer(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    @property
    def blocks(self) -> list[Block]:
        """Blocks in order."""
        return cast(list[Block], list(self.model.layers))

    @property
    def positions_description(self) -> str:
        """Scheme, and base and scaling where they have an effect, such as `RoPE++ EC, base 10000`."""
        return f"{self.scheme}, {self.frequencies}" if self.scheme.uses_frequencies else str(self.scheme)

    def set_context_group(self, group: ContextGroup | None) -> None:
        """Shard the tokens of each row among ranks (context parallelism); attention is still over full rows.

        `input_ids` and `labels` are then this rank's tokens [B, T / ranks], as :meth:`ContextShard.take` returns them;
        `positions`, `documents` and caches are still those of full rows (`documents` may also be the result of
        :meth:`ContextShard.take_documents`), and the loss is over this rank's tokens. With a cache, every rank computes
        full rows.

        Args:
            group: The ranks; None disables context parallelism.

        Raises:
            UsageError: the query heads cannot be sharded equally, in the mode `heads`.
        """
        if group is not None:
            choose_mode(self.group_layout, self.config.head_dim, group.size(), group.mode)
        self.context_group = group
        for block in self.blocks:
            block.self_attn.context_group = group

    @property
    def attention_implementation(self) -> str | None:
        """Implementation set by :meth:`set_attention`."""
        return self.blocks[0].self_attn.implementation

    def set_attention(self, implementation: str | None) -> None:
        """Set the implementation of attention, a result of :func:`ropepp_lit.nn.kernels.select_implementation`."""
        for block in self.blocks:
            block.self_attn.implementation = implementation

    @contextmanager
    def full_rows(self) -> Iterator[None]:
        """Compute full rows on every rank inside the context, as if :meth:`set_context_group` had not been called."""
        group = self.context_group
        self.set_context_group(None)
        try:
            yield
        finally:
            self.set_context_group(group)

    @contextmanager
    def probed(self, probe: Probe) -> Iterator[None]:
        """Call a probe with the scores of every layer inside the context; attention then stores all scores.

        Raises:
            ValueError: ranks shard the tokens of each row, so that none has all scores.
        """
        if self.context_group is not None:
            raise ValueError("a probe needs full rows; call set_context_group(None) first")
        layers = [block.self_attn for block in self.blocks]
        for attention in layers:
            attention.probe = probe
        try:
            yield
        finally:
            for attention in layers:
                attention.probe = None

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize weights: normal with standard deviation `initializer_range`, biases 0, norms 1, as in the paper.

        Attention gates and the position scheme's tensors are initialized last, so that one seed gives all schemes the
        same weights.
        """
        gates = [block.self_attn.output_gate for block in self.blocks]
        modules = [module for module in self.modules() if module not in gates]
        for module in [*modules, *filter(None, gates)]:
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=self.config.initializer_range)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)
        for block in self.blocks:
            if block.self_attn.score_scale is not None:
                block.self_attn.score_scale.fill_(INITIAL_SCORE_SCALE)
            block.self_attn.set_scheme_tensors(self.scheme, self.frequencies)

    def save_memory(
        self,
        *,
        checkpoint_every: int = 0,
        keep_attention: bool = False,
        offload: bool = False,
        mlp_chunk_tokens: int | None = None,
        attention_head_groups: int = 1,
    ) -> None:
        """Set the memory options of training, which trade compute for memory and do not change results.

        Args:
            checkpoint_every: One of every so many blocks saves only its input and is recomputed in the backward pass; 1
                means all blocks, 0 none.
            keep_attention: Checkpointed blocks save the outputs of attention too, the most expensive to recompute.
            offload: Saved inputs are moved to CPU memory (for GPUs).
            mlp_chunk_tokens: Tokens of a row per chunk of the SwiGLU layers; chunks are recomputed in the backward
                pass.
            attention_head_groups: Groups of heads that attention layers compute sequentially and recompute in the
                backward pass; 1 computes all heads at once.

        Raises:
            UsageError: the key/value heads cannot be split into these groups, or a group not among the context group.
        """
        self.group_layout = self.head_layout.split(attention_head_groups)
        for number, block in enumerate(self.blocks, start=1):
            block.is_checkpointed = checkpoint_every > 0 and number % checkpoint_every == 0
            block.keeps_attention, block.is_offloaded = keep_attention, offload
            block.mlp.chunk_tokens, block.self_attn.head_groups = mlp_chunk_tokens, attention_head_groups
        self.set_context_group(self.context_group)

    @property
    def num_parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Documents | ShardedDocuments | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Return the logits of the next tokens.

        Args:
            input_ids: [B, T] integers below `vocab_size`.
            positions: [B, T] integers; None means those of `documents`, else 0, 1, … counted on from the cached tokens.
            documents: Bounds of packed documents, between which there is no attention; None means one document per row.
            cache: Keys and values so far; the new ones are appended.
            logits_to_keep: Compute only the logits of this many last tokens; 0 means all.

        Returns:
            [B, T or logits_to_keep, vocab_size] of the weights' dtype, or of autocast's.

        Raises:
            UsageError: a token id outside the vocabulary (checked on CPU; on a GPU the kernel asserts).
            ValueError: the cache is full.
        """
        hidden = self.hidden_states(input_ids, positions, documents, cache)
        logits: Tensor = self.lm_head(hidden[:, -logits_to_keep:])
        return logits

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        reduction: Reduction = "mean",
        label_indices: Tensor | None = None,
        weights: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Documents | ShardedDocuments | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the cross-entropy of the next tokens without storing all logits.

        Args:
            input_ids: See :meth:`forward`.
            labels: [B, T] int64: the *next* token at each position (already shifted); -100 is ignored.
            reduction: `mean` or `sum` over the labels that are not ignored; `none` returns the loss of each token,
                without gradients. A function is a custom loss: it receives the loss of each token, [M] with
                `label_indices`, else [B * T], and returns a scalar (anything if gradients are disabled).
            label_indices: [M] int64: indices of the labels that are not ignored, in the flattened batch; the other
                tokens are dropped before the output layer. None computes all tokens.
            weights: [B, T] floating: factors of the losses, applied before `sum` (or before the division by the number
                of labels, for `mean`; not with a function). None means 1.
            positions: See :meth:`forward`.
            documents: See :meth:`forward`.
            cache: See :meth:`forward`.

        Returns:
            Scalar, or [B, T] for `none`, in nats; float32 (float64 in a float64 model).

        Raises:
            UsageError: see :meth:`forward`.
            ValueError: see :meth:`forward`.
        """
        hidden = self.hidden_states(input_ids, positions, documents, cache)
        return self.lm_head.loss(hidden, labels, reduction=reduction, label_indices=label_indices, weights=weights)

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        documents: Documents | ShardedDocuments | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the input of `lm_head`, [B, T, hidden_size] after the final norm; see :meth:`forward`."""
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_ids(input_ids)
        group = self.context_group if cache is None else None
        start = cache.num_tokens if cache is not None else 0
        rows, num_tokens = input_ids.shape[0], input_ids.shape[1] * (group.size() if group is not None else 1)
        if group is not None:
            documents = group.shard.take_documents(documents, rows, num_tokens, input_ids.device)
        mask = None
        if cache is not None:
            assert not isinstance(documents, ShardedDocuments)
            mask = cache.extend(num_tokens, documents.ids if documents is not None else None)
        if positions is None and documents is not None:
            positions = documents.positions
        elif positions is None:
            positions = torch.arange(start, start + num_tokens, device=input_ids.device).expand(rows, -1)
        elif isinstance(documents, ShardedDocuments) and group is not None:
            positions = group.shard.take(positions)
        hidden: Tensor = self.model.embed_tokens(input_ids)  # [B, T, hidden_size]
        tables_dtype = at_least_float32(hidden.dtype)
        tables = self.scheme.tables(positions, self.frequencies, head_dim=self.config.head_dim, dtype=tables_dtype)
        if self.config.score_scaling is not None:
            tables = (*tables, positions.add(1).to(tables_dtype).log()[..., None, None])
        for block in self.model.layers:
            hidden = block(hidden, tables, documents=documents, cache=cache, mask=mask)
        normalized: Tensor = self.model.norm(hidden)
        return normalized

    def allocate_cache(self, *, batch_size: int, max_tokens: int) -> KVCache:
        """Return an empty cache for `batch_size` rows of up to `max_tokens` tokens, prompt and completion together."""
        weight = self.model.embed_tokens.weight
        return KVCache(
            num_layers=self.config.num_hidden_layers,
            batch_size=batch_size,
            num_key_value_heads=self.head_layout.num_key_value_heads,
            max_tokens=max_tokens,
            head_dim=self.config.head_dim + self.head_layout.extra_dims,
            dtype=weight.dtype,
            device=weight.device,
        )

    def _check_ids(self, input_ids: Tensor) -> None:
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise UsageError(
                f"input_ids: token id {wrong} is outside the vocabulary of {self.config.vocab_size}; "
                "the text was tokenized for another model, or model.decoder.vocab_size is too small"
            )
