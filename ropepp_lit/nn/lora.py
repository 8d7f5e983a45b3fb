"""LoRA (arXiv 2106.09685) for a decoder, by peft, and the names of its parameters.

peft wraps linear layers of the blocks in layers with the frozen weight W and two small matrices A and B:
y = W x + alpha / rank · B A x. :attr:`LoRA.train_fully` lists what else is trained.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ropepp_lit.errors import UsageError
from ropepp_lit.nn.decoder import Decoder
from ropepp_lit.nn.positions import PairedHeads, PositionScheme

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a block."""

FULLY = ("imaginary", "embed_tokens", "lm_head", "norms")
"""Weights that can be trained in full."""

_WRAPPERS = {"base_layer", "default", "wrapped"}
"""Parts of parameter names that the wrapping layers add."""


@dataclass(kw_only=True, frozen=True)
class LoRA:
    """LoRA configuration. Trained weights and their optimizer state are in float32."""

    rank: int = 256
    """Rows of A and columns of B. 256 on all linear layers follows TRL's guide LoRA Without Regret for supervised
    fine-tuning; a lower rank saves memory and is enough for small datasets."""

    alpha: float = 16
    """The product B A is multiplied by alpha / rank. A learning rate of about 10 × that of full fine-tuning is
    suitable."""

    targets: list[str] | None = None
    """Linear layers with adapters, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj; empty means all
    of them, and `[]` none (with train_fully)."""

    dropout: float = 0.0
    """Dropout probability of the adapters' inputs."""

    rslora: bool = False
    """Multiply by alpha / √rank instead (arXiv 2312.03732)."""

    dora: bool = False
    """Train the norm of each output's weights too (DoRA, arXiv 2402.09353); slower, since each forward pass computes
    the norms."""

    train_fully: list[str] = field(default_factory=list)
    """Weights that are trained in full: `imaginary`, the columns of o_proj that read imaginary heads (RoPE++ only),
    added to the base's; `embed_tokens`, `lm_head` (the same with tied embeddings) and `norms`, replacing the base's."""

    base_dtype: str | None = None
    """Dtype of the frozen weights, and of activations outside autocast: float32 or bfloat16; empty means that of the
    trainer's precision. bfloat16 halves their memory, and rounds weights that are stored in a wider dtype."""

    @property
    def layers(self) -> list[str]:
        """Names of the linear layers with adapters."""
        return list(LINEAR) if self.targets is None else list(self.targets)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values `values` such that `LoRA(**values)` is equal."""
        return dataclasses.asdict(self)

    def check(self, scheme: PositionScheme) -> None:
        """Check the values. Not done in the constructor, where the argument parser would wrap the error message.

        Args:
            scheme: Position scheme of the decoder.

        Raises:
            UsageError: a value out of range, a target that no block has, or nothing to train.
        """
        if self.rank < 1:
            raise UsageError(f"model.lora.rank: {self.rank} must be 1 or more")
        if not 0 < self.alpha < math.inf:
            raise UsageError(f"model.lora.alpha: {self.alpha} must be above 0")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"model.lora.dropout: {self.dropout} must be 0 or more and below 1")
        for key, names, known in (("targets", self.layers, LINEAR), ("train_fully", self.train_fully, FULLY)):
            for name in names:
                if name not in known:
                    raise UsageError(f"model.lora.{key}: the decoder has no {name!r}; choose from {', '.join(known)}")
        if self.base_dtype not in (None, "float32", "bfloat16"):
            raise UsageError(f"model.lora.base_dtype: {self.base_dtype!r} must be float32 or bfloat16")
        if not self.layers and not self.train_fully:
            raise UsageError("model.lora.targets: targets and train_fully are empty; there is nothing to train")
        if "imaginary" in self.train_fully and not isinstance(scheme, PairedHeads):
            raise UsageError(
                f"model.lora.train_fully: {scheme} has no imaginary heads; remove imaginary, or train a RoPE++ "
                "model (ropepp-lit upcycle converts a RoPE model)"
            )

    def peft_config(self) -> Any:
        """Return the adapters' `LoraConfig`.

        Raises:
            UsageError: peft is not installed.
        """
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise UsageError("model.lora: LoRA needs peft; run: pip install 'ropepp-lit[peft]'") from error
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # declared int, and only divided
            target_modules=self.layers,
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=self.dora,
        )


class ImaginaryColumns(nn.Module):
    """An output projection with a trained term for the columns that read imaginary heads.

    Args:
        layer: [2 · heads · head_dim] → [hidden_size]; real and imaginary heads alternate.
        head_dim: Size of a head.
        dtype: Dtype of the trained term.
    """

    def __init__(self, layer: nn.Linear, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.wrapped, self.head_dim = layer, head_dim
        shape = layer.out_features, layer.in_features // 2
        self.imaginary = nn.Parameter(torch.zeros(shape, dtype=dtype))

    def forward(self, heads: Tensor) -> Tensor:
        """Map […, in_features] to […, out_features], in the dtype of the wrapped layer's output."""
        output: Tensor = self.wrapped(heads)
        added = F.linear(imaginary_of(heads, self.head_dim).to(self.imaginary.dtype), self.imaginary)
        return output + added.to(output.dtype)


def imaginary_of(heads: Tensor, head_dim: int) -> Tensor:
    """Select the imaginary heads in the last dimension, […, 2 · heads · head_dim] → […, heads · head_dim]."""
    pairs: Tensor = heads.unflatten(-1, (-1, 2, head_dim))
    return pairs[..., 1, :].flatten(-2)


def inject(decoder: Decoder, lora: LoRA) -> None:
    """Freeze a decoder and add adapters on its device; their values are not initialized.

    Args:
        decoder: Decoder, modified in place; its parameters are cast to the base's dtype.
        lora: LoRA configuration.

    Raises:
        UsageError: the decoder does not have the weights to train, or peft is not installed.
    """
    lora.check(decoder.scheme)
    base = decoder.model.embed_tokens.weight.dtype if lora.base_dtype is None else getattr(torch, lora.base_dtype)
    trained = torch.promote_types(base, torch.float32)
    for parameter in decoder.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(base)
    if lora.layers:
        config = lora.peft_config()
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, decoder)
        for parameter in decoder.parameters():
            if parameter.requires_grad:  # peft creates them in the base's dtype
                parameter.data = parameter.data.to(trained)
    for block in decoder.blocks if "imaginary" in lora.train_fully else ():
        attention: Any = block.self_attn
        columns = ImaginaryColumns(attention.o_proj, attention.head_dim, trained)
        attention.o_proj = columns.to(decoder.lm_head.weight.device)
    for block in decoder.blocks:
        block.has_dropout = lora.dropout > 0
    for name, module in decoder.named_modules():
        is_norm = isinstance(module, nn.RMSNorm) and "norms" in lora.train_fully
        if not is_norm and name.rpartition(".")[2] not in set(lora.train_fully) - {"imaginary", "norms"}:
            continue
        weight = module.weight
        weight.data = weight.data.to(trained)
        weight.requires_grad_(True)
        if trained != base:
            _cast_around(decoder, module, base)


def _cast_around(decoder: Decoder, module: nn.Module, base: torch.dtype) -> None:
    """Cast inputs and outputs of a module with float32 weights, so that it fits between modules in the base's dtype."""
    if not isinstance(module, nn.Embedding):
        module.register_forward_pre_hook(lambda module, inputs: inputs[0].to(module.weight.dtype))
    elif decoder.config.tie_word_embeddings:
        _cast_around(decoder, decoder.lm_head, base)
    if module is not decoder.lm_head:
        module.register_forward_hook(lambda _, __, output: output.to(base))


def clean_name(name: str) -> str:
    """Return a parameter's name without the parts of wrapping layers, as in a plain decoder or `….lora_A.weight`."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def trained_names(decoder: nn.Module) -> dict[str, str]:
    """Return a dict from clean names to names of the trained parameters; a tied output layer is the embedding."""
    return {clean_name(name): name for name, value in decoder.named_parameters() if value.requires_grad}


def base_names(decoder: nn.Module) -> dict[str, str]:
    """Return a dict from a plain decoder's names to names of tensors: without adapters, with fully trained weights."""
    adapters = (".lora_", ".imaginary")
    return {clean_name(name): name for name in decoder.state_dict() if not any(part in name for part in adapters)}
