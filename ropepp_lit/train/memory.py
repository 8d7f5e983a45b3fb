"""Estimate of the peak memory of one device during an optimizer step, tensor by tensor.

Tests compare it with :mod:`ropepp_lit.train.simulate`, which runs the step on fake tensors. Neither includes memory
that kernels allocate internally, NCCL buffers, the CUDA context, or fragmentation of the allocator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ropepp_lit.nn import DecoderConfig, HeadLayout
from ropepp_lit.nn.loss import rows_per_chunk
from ropepp_lit.train.costs import adapter_layers, adapter_parameters
from ropepp_lit.train.step_setup import Setup

PARTS = ("parameters", "gradients", "optimizer", "activations", "other")
"""Parts of a device's memory. Activations include temporary tensors of the loss and of the backward pass."""


class Line(NamedTuple):
    """Tensors of one kind."""

    part: str
    """One of :data:`PARTS`."""
    name: str
    elements: float
    """Number of elements of all of them."""
    dtype: torch.dtype

    @property
    def bytes(self) -> float:
        """Size in bytes."""
        return self.elements * self.dtype.itemsize


class Memory(NamedTuple):
    """Memory at a moment of a step."""

    moment: str
    lines: list[Line]

    @property
    def total(self) -> float:
        """Total in bytes."""
        return sum(line.bytes for line in self.lines)

    @property
    def parts(self) -> dict[str, float]:
        """Bytes of each part."""
        return {part: sum(line.bytes for line in self.lines if line.part == part) for part in PARTS}


class StepMemory:
    """Lists of the tensors on a device at the moments of a step that can be its peak.

    Args:
        config: Geometry.
        layout: Head counts of the position scheme.
        setup: Batch, devices, precision and memory options.
        num_parameters: Number of parameters of the model, without adapters.
        optimizer_states: Optimizer states per parameter.
        device_type: `cpu` has other kernels than `cuda`: RMSNorm saves more, and the loss has smaller chunks.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layout: HeadLayout,
        setup: Setup,
        *,
        num_parameters: int,
        optimizer_states: float = 2.0,
        device_type: str = "cuda",
    ) -> None:
        self.config, self.layout, self.setup = config, layout, setup
        self.num_parameters, self.optimizer_states = num_parameters, optimizer_states
        self.device_type = device_type
        self.embedding = config.vocab_size * config.hidden_size
        """Number of parameters of the embedding, and of the output layer."""
        self.root = self.embedding * (1 if config.tie_word_embeddings else 2)
        self.layer = (num_parameters - self.root) / config.num_hidden_layers
        self.compute, self.weight = setup.compute_dtype, setup.weight_dtype
        self.residual = setup.base_dtype if setup.uses_autocast else self.compute
        """Dtype of hidden states: autocast does not cast the embedding."""
        self.base = setup.base_dtype
        self.is_cast = setup.uses_autocast and self.base != self.compute
        """Whether autocast caches copies of the weights."""
        self.gathered = self.compute if setup.is_mixed else self.base
        """Dtype of gathered frozen parameters, or of all if none is frozen."""
        lora = setup.lora
        self.added = 0.0 if lora is None else adapter_parameters(config, layout, lora)
        """Number of parameters that LoRA adds to a block."""
        fully = () if lora is None else lora.train_fully
        self.trains_output = (
            lora is None or "lm_head" in fully or (config.tie_word_embeddings and "embed_tokens" in fully)
        )
        trains_input = lora is None or "embed_tokens" in fully or (config.tie_word_embeddings and "lm_head" in fully)
        self.trained_layer = self.layer if lora is None else self.added
        self.trained_root = self.embedding * (self.trains_output + (trains_input and not config.tie_word_embeddings))
        self.trained = config.num_hidden_layers * self.trained_layer + self.trained_root
        self.frozen = num_parameters + config.num_hidden_layers * self.added - self.trained
        self.trained_input = self.embedding if trains_input else 0
        self.precise = torch.float64 if self.compute == torch.float64 else torch.float32
        self.reduced = self.precise if setup.precision.endswith("mixed") else self.weight
        """Dtype in which gradients are reduced."""

    def peak(self) -> Memory:
        """Return the memory at the moment with the largest total."""
        layers = self.config.num_hidden_layers
        moments = [
            Memory("in the loss", [*self._forward(), *self._loss()]),
            Memory("at the end of the loss", [*self._forward(), *self._loss(is_end=True)]),
            Memory("when the last gradients are reduced", list(self._end())),
        ]
        if self.setup.strategy == "fsdp2":
            moments.append(Memory("when the embedding is gathered", list(self._begin())))
            moments.append(Memory("when the output layer's gradient is reduced", list(self._output_layer_backward())))
        for done, name in ((0, "last"), (layers - 1, "first")):
            for gradients, part in ((self._mlp_backward(), "MLP"), (self._attention_backward(), "attention")):
                lines = [*self._backward(done), *gradients]
                moments.append(Memory(f"in the backward pass of the {name} block's {part}", lines))
        return max(moments, key=lambda memory: memory.total)

    def _always(self) -> Iterator[Line]:
        """Yield the tensors that exist during the complete step."""
        setup, shards = self.setup, self.setup.shards
        yield Line("parameters", "parameters", self.trained / shards, self.weight)
        yield Line("parameters", "frozen parameters", self.frozen / shards, self.base)
        yield Line("optimizer", "optimizer states", self.optimizer_states * self.trained / shards, self.weight)
        if setup.strategy == "ddp":
            yield Line("gradients", "buckets of DDP", self.trained, self.weight)
        if setup.keeps_full_gradients:
            yield Line("gradients", "gradients of earlier micro-batches", self.trained, self.reduced)
        elif setup.accumulate_grad_batches > 1:
            yield Line("gradients", "gradients of earlier micro-batches", self.trained / shards, self.weight)

    def _gathered(self, *, blocks: float, output_layer: bool = False) -> Iterator[Line]:
        """Yield the parameters that FSDP2 has gathered: of `blocks` blocks, and of the output layer."""
        if self.setup.strategy != "fsdp2":
            return
        yield from self._gathered_blocks(blocks)
        if self.config.tie_word_embeddings:  # gathered with the last norm for the complete step
            yield Line("parameters", "gathered embedding", self.embedding, self.gathered)
        elif not self.setup.reshard_after_forward:
            yield Line("parameters", "gathered embedding and output layer", self.root, self.gathered)
        elif output_layer:
            yield Line("parameters", "gathered output layer", self.embedding, self.gathered)

    def _gathered_blocks(self, blocks: float) -> Iterator[Line]:
        yield Line("parameters", "gathered blocks", blocks * self.layer, self.gathered)
        dtype = self.compute if self.setup.is_mixed else self.weight
        yield Line("parameters", "gathered adapters", blocks * self.added, dtype)

    def _block(self) -> list[Line]:
        """Return the tensors that a block saves for its backward pass, without its input."""
        setup, config = self.setup, self.config
        size = setup.tokens * config.hidden_size
        lines = [
            Line("activations", "input of the second norm", size, self.residual),
            Line("activations", "normalized hidden states", 2 * size, self.compute),
            *self._adapters(),
        ]
        if self.device_type == "cpu":
            lines.append(Line("activations", "hidden states before the norm's scale", 2 * size, self.precise))
        if setup.attention_head_groups == 1:  # otherwise each group is recomputed
            lines += self._attention()
        if not self._is_chunked:
            inner = 4 * setup.tokens * config.intermediate_size
            lines.append(Line("activations", "gate, its activation, up and product", inner, self.compute))
        return lines

    def _adapters(self) -> list[Line]:
        """Return the tensors that LoRA saves in a block; adapters of another dtype save copies of their inputs."""
        setup, lora = self.setup, self.setup.lora
        if lora is None:
            return []
        tokens, copied = setup.tokens, self.compute if setup.is_mixed else self.weight
        is_copied = setup.uses_autocast or (self.weight != self.compute and not setup.is_mixed)
        lines = [Line("activations", "products of A", tokens * len(lora.layers) * lora.rank, copied)]
        if lora.dora:  # the outputs of the base, and of B A
            width = 2 * sum(outputs for _, outputs in adapter_layers(self.config, self.layout, lora))
            lines.append(Line("activations", "outputs that are scaled by norms", tokens * width, copied))
        if is_copied:
            width = sum(inputs for inputs, _ in adapter_layers(self.config, self.layout, lora))
            lines.append(Line("activations", "inputs of adapters", tokens * width, copied))
            # Frozen layers do not save their inputs, because their weights have no gradients.
            lines.append(
                Line("activations", "inputs of frozen layers", -2 * tokens * self.config.hidden_size, self.compute)
            )
        return lines

    def _attention(self) -> list[Line]:
        """Return the tensors that attention saves for one group of heads, without its input."""
        setup, config, layout = self.setup, self.config, self.layout
        tokens = setup.tokens / setup.attention_head_groups
        head, grown = config.head_dim, config.head_dim + layout.extra_dims
        queries, heads, caches = layout.num_query_heads, layout.num_attention_heads, layout.num_key_value_heads
        part, attended = "activations", tokens * grown * (heads + 2 * self._attended_caches)
        lines = [
            Line(part, "queries, keys and values in attention", attended, self.compute),
            Line(part, "output of attention", tokens * grown * heads, self.compute),
            Line(part, "sums of exponentials", tokens * heads, torch.float32),
            Line(part, "input of the output projection", tokens * self._projected, self.compute),
            Line(part, "saved by the position scheme", tokens * layout.saved_elements, self.compute),
        ]
        if config.attention_gate is not None:
            size = head if config.attention_gate == "element" else 1
            lines.append(Line(part, "gates of attention", tokens * size * heads, self.compute))
        if config.score_scaling is not None:
            lines.append(Line(part, "queries before their scores are scaled", tokens * grown * heads, self.compute))
        if config.qk_norm:
            normalized = tokens * head * (queries + caches)
            lines.append(Line(part, "queries and keys before their norms", normalized, self.residual))
        return lines

    @property
    def _projected(self) -> int:
        """Inputs of the output projection per token; 0 if they are the same tensor as the output of attention."""
        exchanges = self.setup.context_parallel_size > 1 and self.setup.context_parallel_mode == "heads"
        is_other = exchanges or self.layout.extra_dims or self.config.attention_gate is not None
        return self.config.head_dim * self.layout.num_attention_heads if is_other else 0

    @property
    def _attended_caches(self) -> int:
        """Key/value heads in attention per token of this device."""
        caches, ranks = self.layout.num_key_value_heads, self.setup.context_parallel_size
        if self.setup.context_parallel_mode == "gather":  # the tokens of all ranks
            return caches * ranks
        return math.lcm(caches, ranks)  # repeated if not divisible by the number of ranks

    @property
    def _is_chunked(self) -> bool:
        chunk = self.setup.mlp_chunk_tokens
        return chunk is not None and chunk < self.setup.tokens_per_row

    def _saved(self, full: float, checkpointed: int, recomputed: int = 0) -> Iterator[Line]:
        """Yield activations: all of `full` blocks, inputs of `checkpointed` ones, `recomputed` of which are in both."""
        for line in self._block():
            yield line._replace(elements=full * line.elements)
        if self.setup.keeps_attention:
            head, heads = self.config.head_dim + self.layout.extra_dims, self.layout.num_attention_heads
            saved = (checkpointed - recomputed) * self.setup.tokens * heads
            yield Line("activations", "saved outputs of attention", saved * head, self.compute)
            yield Line("activations", "saved sums of exponentials", saved, torch.float32)
        inputs = full + (0 if self.setup.offload_activations else checkpointed)
        yield Line(
            "activations", "inputs of blocks", inputs * self.setup.tokens * self.config.hidden_size, self.residual
        )
        rotary = self.setup.rows * self.setup.context_length * self.config.head_dim
        yield Line("activations", "cosines and sines", rotary, self.compute)

    def _casts(self, blocks: float) -> Iterator[Line]:
        if self.is_cast:
            yield Line("activations", "cast parameters", blocks * self.layer, self.compute)

    def _checkpointed(self, blocks: int) -> int:
        """Return how many of the first `blocks` blocks are checkpointed."""
        every = self.setup.checkpoint_every
        return blocks // every if every else 0

    def _forward(self) -> Iterator[Line]:
        """Yield the tensors at the end of the forward pass."""
        layers = self.config.num_hidden_layers
        checkpointed = self._checkpointed(layers)
        yield from self._always()
        reshards, is_tied = self.setup.reshard_after_forward, self.config.tie_word_embeddings
        yield from self._gathered(blocks=is_tied if reshards else layers + is_tied, output_layer=True)
        yield from self._saved(layers - checkpointed, checkpointed)
        yield from self._casts(layers)
        yield Line("activations", "last hidden states", 2 * self.setup.tokens * self.config.hidden_size, self.residual)

    def _loss(self, *, is_end: bool = False) -> Iterator[Line]:
        """Yield the tensors of the loss: while it computes a chunk of tokens, or when it returns."""
        part, hidden = "activations", self.setup.tokens * self.config.hidden_size
        rows = rows_per_chunk(self.config.vocab_size, self.device_type)
        logits = min(rows, self.setup.tokens) * self.config.vocab_size
        if not is_end:
            yield Line(part, "logits and their softmax", 2 * logits, self.precise)
        yield Line(part, "gradient of the hidden states", hidden, self.compute)
        if self.trains_output:
            yield Line(part, "gradient of the output layer", self.embedding, self.precise)
        if is_end and self.trains_output:  # without a cast, the last product that is added to it
            yield Line(part, "gradient of the output layer, cast", self.embedding, self.compute)
        if self.setup.strategy == "fsdp2" and not self.config.tie_word_embeddings:  # otherwise that of a block
            yield Line("parameters", "buffer of the last all-gather", self.embedding, self.compute)
        if self.is_cast:
            yield Line(part, "cast output layer", self.embedding, self.compute)
            yield Line(part, "cast hidden states", hidden, self.compute)

    def _backward(self, done: int) -> Iterator[Line]:
        """Yield the tensors in the backward pass of a block, when that of `done` later ones is complete."""
        every, left = self.setup.checkpoint_every, self.config.num_hidden_layers - done
        checkpointed = self._checkpointed(left)
        full = left - checkpointed
        if checkpointed:  # one of them is recomputed
            full = max(full, full - left % every + 1)
        yield from self._always()
        yield from self._gathered(blocks=2 if self.setup.reshard_after_forward else left)
        yield from self._saved(full, checkpointed, recomputed=min(1, checkpointed))
        yield from self._casts(full)
        yield Line(
            "activations", "gradient of the hidden states", self.setup.tokens * self.config.hidden_size, self.residual
        )
        if self.setup.strategy == "fsdp2":
            if self.config.tie_word_embeddings:
                yield Line("gradients", "gradient of the embedding", self.trained_input, self.compute)
            done_parameters = done * self.trained_layer
            if not self.config.tie_word_embeddings:
                done_parameters += self.embedding * self.trains_output
            yield Line(
                "gradients", "reduced gradients", self._reduces * done_parameters / self.setup.shards, self.weight
            )
            yield Line("gradients", "gradients of a block", self.trained_layer, self.compute)
            yield Line(
                "gradients",
                "gradients of a block, to be reduced",
                self._reduces * bool(done) * self.trained_layer,
                self.reduced,
            )
        elif self.setup.strategy == "one" and self.setup.accumulate_grad_batches == 1:
            first = self.embedding * self.trains_output
            yield Line("gradients", "gradients", first + done * self.trained_layer, self.weight)

    @property
    def _reduces(self) -> bool:
        """Whether gradients are reduced layer by layer in the micro-batch of the peak."""
        return not self.setup.keeps_full_gradients

    def _begin(self) -> Iterator[Line]:
        """Yield the tensors when FSDP2 has gathered the first parameters: the collective's buffer, and a copy."""
        yield from self._always()
        yield Line("parameters", "gathered embedding", 2 * self.embedding, self.gathered)
        yield from self._gathered_blocks(1)

    def _output_layer_backward(self) -> Iterator[Line]:
        """Yield the tensors when FSDP2 reduces the output layer's gradient, before the blocks' backward passes."""
        yield from self._forward()
        yield Line(
            "activations", "gradient of the hidden states", self.setup.tokens * self.config.hidden_size, self.compute
        )
        if self.trains_output and not self.config.tie_word_embeddings:
            yield Line("gradients", "gradient of the output layer", self.embedding, self.compute)
            if not self._reduces:
                yield Line(
                    "gradients", "gradient of the output layer, before it is scaled", self.embedding, self.compute
                )
            yield Line(
                "gradients", "gradient of the output layer, to be reduced", self._reduces * self.embedding, self.reduced
            )

    def _mlp_backward(self) -> Iterator[Line]:
        """Yield the gradients of the SwiGLU layer, and with chunks the recomputed activations too."""
        setup = self.setup
        if not self._is_chunked:
            yield Line(
                "activations", "gradients in the MLP", 2 * setup.tokens * self.config.intermediate_size, self.compute
            )
            return
        chunk = setup.rows * (setup.mlp_chunk_tokens or 0)
        yield Line(
            "activations", "a chunk of the MLP with gradients", 6 * chunk * self.config.intermediate_size, self.compute
        )
        yield Line("activations", "gradient of the MLP's input", setup.tokens * self.config.hidden_size, self.compute)

    def _attention_backward(self) -> Iterator[Line]:
        """Yield the gradients of attention, and negative sizes for tensors that the MLP has freed."""
        setup, layout = self.setup, self.layout
        grown = self.config.head_dim + layout.extra_dims
        heads = 2 * layout.num_attention_heads + 2 * self._attended_caches
        groups = setup.attention_head_groups
        yield Line("activations", "gradients in attention", setup.tokens / groups * grown * heads, self.compute)
        freed = setup.tokens / groups * self._projected
        yield Line("activations", "freed by the output projection", -freed, self.compute)
        if groups > 1:
            yield from self._attention()
            yield Line(
                "activations", "gradient of the attention's input", setup.tokens * self.config.hidden_size, self.compute
            )
        if not self._is_chunked:
            freed = 4 * setup.tokens * self.config.intermediate_size
            yield Line("activations", "freed by the MLP", -freed, self.compute)
        yield Line("activations", "freed by the MLP", -setup.tokens * self.config.hidden_size, self.compute)

    def _end(self) -> Iterator[Line]:
        """Yield the tensors when the last gradients are reduced, or the optimizer steps."""
        yield from self._always()
        if self.setup.strategy == "fsdp2":
            yield Line("gradients", "reduced gradients", self.trained / self.setup.shards, self.weight)
            yield from self._gathered(blocks=0 if self.setup.reshard_after_forward else 1)
            if self._reduces:
                yield Line("gradients", "gradient of the embedding", self.trained_input, self.compute)
                yield Line("gradients", "gradients of a block, to be reduced", self.trained_layer, self.reduced)
            yield Line("gradients", "gradient of the embedding, to be reduced", self.trained_input, self.reduced)
        elif self.setup.strategy == "one" and self.setup.accumulate_grad_batches == 1:
            yield Line("gradients", "gradients", self.trained, self.weight)
