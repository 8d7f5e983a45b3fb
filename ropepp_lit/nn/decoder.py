"""The decoder: a Llama-like language model whose attention heads are those of a position scheme.

Choices: pre-norm RMSNorm, SwiGLU, grouped-query attention, no dropout, no biases unless asked for. Parameters bear the
names of Hugging Face's Llama, so that conversion is configuration and not renaming.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ropepp_lit.errors import UsageError
from ropepp_lit.nn.attention import FIRST_SCORE_SCALE
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
"""What becomes of the losses of tokens, see :meth:`Decoder.loss`."""


class OutputLayer(nn.Linear):
    """The output layer: logits, or the loss without ever holding all logits."""

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        *,
        reduction: Reduction,
        places: Tensor | None,
        weights: Tensor | None,
    ) -> Tensor:
        """Cross-entropy of the next tokens; arguments and result are those of :meth:`Decoder.loss`.

        Args:
            hidden: [B, T, hidden_size], after the last norm.
            labels: [B, T].
            reduction: See there.
            places: See there.
            weights: See there.
        """
        flat = hidden.flatten(0, 1), self.weight, labels.flatten()
        if callable(reduction):
            return function_of_cross_entropy(*flat, reduction, places=places)
        if reduction == "none":
            return token_cross_entropy(*flat).view_as(labels)
        loss = linear_cross_entropy(*flat, places=places, label_weights=None if weights is None else weights.flatten())
        return loss / (labels != IGNORE_INDEX).sum() if reduction == "mean" else loss


class Trunk(nn.Module):
    """Embedding, blocks and the last norm: `model.` in Hugging Face's names."""

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
        self.layout_at_once = self.head_layout
        """Heads that an attention layer computes at once; see :meth:`save_memory`."""
        self.context_group: ContextGroup | None = None
        """Ranks that share the tokens of each row; see :meth:`set_context_group`."""
        self.model = Trunk(config, scheme)
        self.lm_head = OutputLayer(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order."""
        return cast(list[Block], list(self.model.layers))

    @property
    def positions_in_words(self) -> str:
        """Scheme, and base and scaling where they have an effect, such as `RoPE++ EC, base 10000`."""
        return f"{self.scheme}, {self.frequencies}" if self.scheme.uses_frequencies else str(self.scheme)

    def set_context_group(self, group: ContextGroup | None) -> None:
        """Share the tokens of each row among ranks: each computes its own, attention is over the whole row.

        `input_ids` and `labels` are then this rank's tokens [B, T / ranks], as :meth:`ContextShard.take` returns them;
        `positions`, `documents` and caches stay those of whole rows (`documents` may also be what
        :meth:`ContextShard.take_documents` returned), and a loss is that of this rank's tokens. With a cache, every
        rank computes whole rows.

        Args:
            group: The ranks; None undoes it.

        Raises:
            UsageError: the query heads cannot be shared equally, in the mode `heads`.
        """
        if group is not None:
            choose_mode(self.layout_at_once, self.config.head_dim, group.size(), group.mode)
        self.context_group = group
        for block in self.blocks:
            block.self_attn.context_group = group

    @property
    def attention_implementation(self) -> str | None:
        """What :meth:`set_attention` was given."""
        return self.blocks[0].self_attn.implementation

    def set_attention(self, implementation: str | None) -> None:
        """Let all layers compute attention by what :func:`ropepp_lit.nn.kernels.select_implementation` returned."""
        for block in self.blocks:
            block.self_attn.implementation = implementation

    @contextmanager
    def whole_rows(self) -> Iterator[None]:
        """Compute whole rows on every rank, as if :meth:`set_context_group` had not been called."""
        group = self.context_group
        self.set_context_group(None)
        try:
            yield
        finally:
            self.set_context_group(group)

    @contextmanager
    def probed(self, probe: Probe) -> Iterator[None]:
        """Let a probe see, and change, the scores of every layer; attention then holds all of them.

        Raises:
            ValueError: ranks share the tokens of each row, so that none has all scores.
        """
        if self.context_group is not None:
            raise ValueError("a probe needs whole rows; call set_context_group(None) first")
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
        """Normal weights of standard deviation `initializer_range`, zero biases, norms of one (the paper's setting).

        The position scheme's tensors and gates of attention are drawn last, so that one seed gives all schemes the
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
                block.self_attn.score_scale.fill_(FIRST_SCORE_SCALE)
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
        """Trade time for memory in training; results stay the same.

        Args:
            checkpoint_every: Every so many blocks one keeps its input alone and is computed again in the backward pass;
                1 means all blocks, 0 none.
            keep_attention: These blocks keep the results of attention too, which costs most to compute again.
            offload: Inputs that are kept go to the CPU's memory (for a GPU).
            mlp_chunk_tokens: Tokens of a row that the SwiGLU layers compute at once, and again in the backward pass.
            attention_head_groups: Groups of heads that attention layers compute one after the other, and again in the
                backward pass; 1 computes all heads at once.

        Raises:
            UsageError: the key/value heads cannot be split into these groups, or a group not among the context group.
        """
        self.layout_at_once = self.head_layout.split(attention_head_groups)
        for number, block in enumerate(self.blocks, start=1):
            block.is_checkpointed = checkpoint_every > 0 and number % checkpoint_every == 0
            block.keeps_attention, block.is_offloaded = keep_attention, offload
            block.mlp.chunk_tokens, block.self_attn.head_groups = mlp_chunk_tokens, attention_head_groups
        self.set_context_group(self.context_group)

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones counted once."""
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
        """Logits of the next tokens.

        Args:
            input_ids: [B, T] integers below `vocab_size`.
            positions: [B, T] integers; None means those of `documents`, else 0, 1, … after what the cache holds.
            documents: Bounds of packed documents that must not see each other; None means one document per row.
            cache: Keys and values so far; gets the new ones.
            logits_to_keep: Compute logits of the last so many tokens only; 0 means all.

        Returns:
            [B, T or logits_to_keep, vocab_size] of the weights' dtype, or of autocast's.

        Raises:
            UsageError: a token id outside the vocabulary (checked on CPU; on a GPU the kernel asserts).
            ValueError: the cache is full.
        """
        return self.lm_head(self.hidden_states(input_ids, positions, documents, cache)[:, -logits_to_keep:])

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        reduction: Reduction = "mean",
        places: Tensor | None = None,
        weights: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Documents | ShardedDocuments | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Cross-entropy of the next tokens; logits are never held all at once.

        Args:
            input_ids: See :meth:`forward`.
            labels: [B, T] int64: the token that should come *next* at each place (already shifted); -100 is ignored.
            reduction: Over the labels that are not ignored; `none` gives the loss of each token, without gradients. Or
                a function to be descended instead: it gets the loss of each token, [M] with places, else [B * T], and
                returns a scalar (without gradients anything).
            places: [M] int64: indices of the labels that are not ignored, in the flattened batch; the other tokens are
                then dropped before the output layer. None computes all of them.
            weights: [B, T] floating: what the loss of each label is multiplied by, before it is reduced by `sum` (or
                divided by the number of labels, for `mean`; not with a function). None means 1.
            positions: See :meth:`forward`.
            documents: See :meth:`forward`.
            cache: See :meth:`forward`.

        Returns:
            Scalar, or [B, T] for `none`: nats, float32 (float64 in a float64 model).

        Raises:
            UsageError: see :meth:`forward`.
            ValueError: see :meth:`forward`.
        """
        hidden = self.hidden_states(input_ids, positions, documents, cache)
        return self.lm_head.loss(hidden, labels, reduction=reduction, places=places, weights=weights)

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        documents: Documents | ShardedDocuments | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """[B, T, hidden_size] after the last norm, what `lm_head` reads; arguments are those of :meth:`forward`."""
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
        hidden = self.model.embed_tokens(input_ids)
        tables_dtype = at_least_float32(hidden.dtype)
        tables = self.scheme.tables(positions, self.frequencies, head_dim=self.config.head_dim, dtype=tables_dtype)
        if self.config.score_scaling is not None:
            tables = (*tables, positions.add(1).to(tables_dtype).log()[..., None, None])
        for block in self.model.layers:
            hidden = block(hidden, tables, documents=documents, cache=cache, mask=mask)
        return self.model.norm(hidden)

    def allocate_cache(self, *, batch_size: int, max_tokens: int) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_tokens` tokens, prompt and answer together."""
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
