"""Optimizers by name in a recipe: AdamW, or Muon for the matrices with AdamW for the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ropepp_lit.errors import UsageError


class OptimizerConfig(ABC):
    """Settings from which an optimizer is built for a model."""

    @abstractmethod
    def build(self, decoder: nn.Module) -> torch.optim.Optimizer:
        """An optimizer over the decoder's parameters, in groups."""


class AdamW(OptimizerConfig):
    """AdamW (arXiv 1711.05101), fused.

    Args:
        lr: Peak learning rate.
        betas: Decay of the running means of gradient and squared gradient.
        eps: Added to the root of the mean squared gradient.
        weight_decay: Decoupled weight decay of the matrices.
        decay_all: Decay norms, biases and embeddings too, as the paper's runs do.
    """

    def __init__(
        self,
        *,
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay_all: bool = False,
    ) -> None:
        self.lr, self.betas, self.eps, self.weight_decay = _positive("lr", lr), betas, eps, weight_decay
        self.decay_all = decay_all

    def build(self, decoder: nn.Module) -> torch.optim.Optimizer:
        """Two groups: what decays and what doesn't."""
        matrices, rest = split_parameters(decoder, output_layer_is_matrix=True)
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": rest, "weight_decay": self.weight_decay if self.decay_all else 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


class Muon(OptimizerConfig):
    """Muon for the blocks' matrices (torch's own; arXiv 2502.16982), AdamW for all else.

    All else is embeddings, output layer, norms and biases.
    Muon's updates are scaled to AdamW's size, so that one learning rate means the same to both.

    Args:
        lr: Peak learning rate of the matrices.
        momentum: Decay of the running mean of the gradient.
        weight_decay: Decoupled weight decay of the matrices; the rest does not decay.
        adamw_lr: Peak learning rate of the rest; empty means `lr`.
        adamw_betas: AdamW's betas for the rest.
        adamw_eps: AdamW's eps for the rest.
    """

    def __init__(
        self,
        *,
        lr: float = 5e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        self.lr, self.momentum, self.weight_decay = _positive("lr", lr), momentum, weight_decay
        self.adamw_lr = lr if adamw_lr is None else _positive("adamw_lr", adamw_lr)
        self.adamw_betas, self.adamw_eps = adamw_betas, adamw_eps

    def build(self, decoder: nn.Module) -> torch.optim.Optimizer:
        """One optimizer that steps both."""
        matrices, rest = split_parameters(decoder, output_layer_is_matrix=False)
        is_sharded = any(isinstance(parameter, DTensor) for parameter in matrices)
        return _Together(
            (_GatheredMuon if is_sharded else torch.optim.Muon)(
                matrices,
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                rest, lr=self.adamw_lr, betas=self.adamw_betas, eps=self.adamw_eps, weight_decay=0.0, fused=True
            ),
        )


def split_parameters(
    decoder: nn.Module, *, output_layer_is_matrix: bool
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights of linear layers, and everything else: embeddings, norms, biases.

    Args:
        decoder: The model.
        output_layer_is_matrix: Whether an untied `lm_head` counts as a linear layer; tied, it is the embedding.
    """
    embeddings = {id(module.weight) for module in decoder.modules() if isinstance(module, nn.Embedding)}
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in decoder.named_parameters():
        is_matrix = parameter.ndim == 2 and id(parameter) not in embeddings
        is_matrix = is_matrix and (output_layer_is_matrix or name != "lm_head.weight")
        (matrices if is_matrix else rest).append(parameter)
    return matrices, rest


class _GatheredMuon(torch.optim.Muon):
    """Muon for matrices that are spread over devices: each is orthogonalized whole, by every device."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; a matrix of shards alone would be orthogonalized to something else."""
        assert closure is None, "only `_Together` steps this"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum_buffer"], group["momentum"]).full_tensor()
                # Muon itself, without momentum, on a matrix of zeros: it becomes what is to be added.
                change = torch.zeros_like(update).requires_grad_()
                change.grad = update
                settings = {key: group[key] for key in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
                torch.optim.Muon([change], weight_decay=0.0, momentum=0.0, nesterov=False, **settings).step()
                mesh, placements = parameter.device_mesh, parameter.placements
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(distribute_tensor(change.detach(), mesh, placements, src_data_rank=None))
        return None


class _Together(torch.optim.Optimizer):
    """Several optimizers as one: schedules, clipping and checkpoints see a single one, which shares its state."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts
        self._sizes = [len(part.param_groups) for part in parts]
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        first = 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            part.param_groups = self.param_groups[first : first + size]
            part.state = self.state
            first += size

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of each part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state and hand it to the parts."""
        super().load_state_dict(state_dict)
        self._share()


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise UsageError(f"model.optimizer.{name}: {value} must be above 0")
    return value
