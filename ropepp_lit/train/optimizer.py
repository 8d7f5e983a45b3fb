"""Optimizers that a recipe can choose: AdamW, or Muon for matrices combined with AdamW for all other parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz  # torch offers no public names of these

from ropepp_lit.errors import UsageError
from ropepp_lit.nn.attention import Attention


class OptimizerConfig(ABC):
    """Settings of an optimizer."""

    @abstractmethod
    def build(self, decoder: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of a decoder's parameters, with parameter groups."""


class AdamW(OptimizerConfig):
    """AdamW (arXiv 1711.05101), fused implementation.

    Args:
        lr: Peak learning rate.
        betas: Decay rates of the running averages of the gradient and its square.
        eps: Term added to the denominator for numerical stability.
        weight_decay: Decoupled weight decay of the matrices.
        decay_all: Apply weight decay to norms, biases and embeddings too, as in the paper's runs.
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
        self.lr, self.betas = _positive("lr", lr), _shares("betas", *betas)
        self.eps, self.weight_decay = _not_negative("eps", eps), _not_negative("weight_decay", weight_decay)
        self.decay_all = decay_all

    def build(self, decoder: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer with two groups: matrices, and all other parameters."""
        matrices, rest = split_parameters(decoder, output_layer_is_matrix=True)
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": rest, "weight_decay": self.weight_decay if self.decay_all else 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


class Muon(OptimizerConfig):
    """Muon (`torch.optim.Muon`; arXiv 2502.16982) for the matrices of the blocks, AdamW for all other parameters.

    The other parameters are embeddings, output layer, norms and biases.
    Muon's updates are scaled to match the RMS of AdamW's, so both can use the same learning rate.

    Args:
        lr: Peak learning rate of the matrices.
        momentum: Decay rate of the running average of the gradient.
        weight_decay: Decoupled weight decay of the matrices; other parameters have none.
        adamw_lr: Peak learning rate of the other parameters; empty means `lr`.
        adamw_betas: `betas` of AdamW.
        adamw_eps: `eps` of AdamW.
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
        self.lr, (self.momentum,) = _positive("lr", lr), _shares("momentum", momentum)
        self.weight_decay = _not_negative("weight_decay", weight_decay)
        self.adamw_lr = lr if adamw_lr is None else _positive("adamw_lr", adamw_lr)
        self.adamw_betas = _shares("adamw_betas", *adamw_betas)
        self.adamw_eps = _not_negative("adamw_eps", adamw_eps)

    def build(self, decoder: nn.Module) -> torch.optim.Optimizer:
        """Build one optimizer that steps Muon and AdamW."""
        matrices, rest = split_parameters(decoder, output_layer_is_matrix=False)
        is_sharded = any(isinstance(parameter, DTensor) for parameter in matrices)
        return _CombinedOptimizer(
            (_ShardedMuon if is_sharded else torch.optim.Muon)(
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
    """Split the trainable parameters into weights of linear layers and others.

    Others are embeddings, norms, biases and parameters of position schemes. Frozen parameters are in neither list.

    Args:
        decoder: The model.
        output_layer_is_matrix: Whether an untied `lm_head` counts as a linear layer; if tied, it is the embedding.
    """
    others = {id(module.weight) for module in decoder.modules() if isinstance(module, nn.Embedding)}
    for module in decoder.modules():
        if isinstance(module, Attention):
            others |= {id(parameter) for parameter in module.parameters(recurse=False)}
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in decoder.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim == 2 and id(parameter) not in others
        is_matrix = is_matrix and (output_layer_is_matrix or name != "lm_head.weight")
        (matrices if is_matrix else rest).append(parameter)
    return matrices, rest


class _ShardedMuon(torch.optim.Muon):
    """Muon for matrices that FSDP2 shards by rows: each rank orthogonalizes a subset of the matrices.

    Matrices are processed in rounds of one per rank. In a round every rank sends its rows of each matrix to the
    matrix's owner, and receives its rows of the result after the owner's Newton-Schulz iteration: two all-to-alls in
    bfloat16, the dtype in which torch's Muon iterates. With replicas (HSDP) the rounds are divided among replicas, and
    the results are broadcast. With the same gradients, the updates equal those of a single process bit for bit.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step. Every rank must call it."""
        assert closure is None, "only `_CombinedOptimizer` steps this"
        for group in self.param_groups:
            parameters: list[DTensor] = []
            gradients: list[DTensor] = []
            momenta: list[DTensor] = []
            self._init_group(group, parameters, gradients, momenta)  # type: ignore[arg-type]
            # Matrices of the same shape are adjacent, which balances the load of a round over the ranks.
            order = sorted(range(len(parameters)), key=lambda i: (-parameters[i].numel(), parameters[i].shape))
            matrices = [_Matrix(parameters[i], gradients[i], momenta[i], group) for i in order]
            for matrix in matrices:
                matrix.momentum.lerp_(matrix.gradient, 1 - group["momentum"])
            if matrices:
                _orthogonalize(matrices, parameters[0].device_mesh, parameters[0].placements)
        return None


class _Matrix:
    """Rows of one rank of a matrix sharded by rows, with their gradient and momentum."""

    def __init__(self, parameter: DTensor, gradient: DTensor, momentum: DTensor, settings: dict[str, Any]) -> None:
        self.shape = parameter.shape
        self.rows, self.gradient, self.momentum = parameter.to_local(), gradient.to_local(), momentum.to_local()
        self._settings = settings

    def sizes(self, num_ranks: int) -> list[int]:
        """Return the number of elements on each rank: chunks of equally many rows, the last ones smaller or empty."""
        chunk = -(-self.shape[0] // num_ranks)
        starts = (min(rank * chunk, self.shape[0]) for rank in range(num_ranks + 1))
        return [(end - start) * self.shape[1] for start, end in pairwise(starts)]

    def direction(self) -> Tensor:
        """Return this rank's rows of the update before orthogonalization, flattened, in bfloat16."""
        momentum = self._settings["momentum"]
        update = self.gradient.lerp(self.momentum, momentum) if self._settings["nesterov"] else self.momentum
        return update.bfloat16().flatten()

    def orthogonalize(self, direction: Tensor) -> Tensor:
        """Orthogonalize the full matrix of :meth:`direction`; input and output are flattened."""
        coefficients, steps, eps = (self._settings[key] for key in ("ns_coefficients", "ns_steps", "eps"))
        return _zeropower_via_newtonschulz(direction.view(self.shape), coefficients, steps, eps).reshape(-1)

    def update(self, orthogonalized: Tensor) -> None:
        """Apply weight decay and the flattened update to this rank's rows."""
        lr = self._settings["lr"]
        self.rows.mul_(1 - lr * self._settings["weight_decay"])
        adjusted = _adjust_lr(lr, self._settings["adjust_lr_fn"], self.shape)
        self.rows.add_(orthogonalized.view_as(self.rows), alpha=-adjusted)


def _orthogonalize(matrices: list[_Matrix], mesh: DeviceMesh, placements: Sequence[Placement]) -> None:
    """Update all matrices; each is orthogonalized on one rank of the mesh."""
    (dimension,) = (i for i, placement in enumerate(placements) if placement.is_shard())
    shards = mesh.get_group(dimension)
    replicas = mesh.get_group(1 - dimension) if mesh.ndim == 2 else None
    num_replicas, replica = (replicas.size(), replicas.rank()) if replicas is not None else (1, 0)
    rounds = [matrices[start : start + shards.size()] for start in range(0, len(matrices), shards.size())]
    for first in range(0, len(rounds), num_replicas):
        results = []
        for number, matrices_of_round in enumerate(rounds[first : first + num_replicas]):
            size = sum(matrix.rows.numel() for matrix in matrices_of_round)
            results.append(matrices[0].rows.new_empty(size, dtype=torch.bfloat16))
            if number == replica:
                _orthogonalize_round(matrices_of_round, results[-1], shards)
        for number, (matrices_of_round, result) in enumerate(zip(rounds[first:], results, strict=False)):
            if replicas is not None:
                dist.broadcast(result, group=replicas, group_src=number)
            parts = result.split([matrix.rows.numel() for matrix in matrices_of_round])
            for matrix, part in zip(matrices_of_round, parts, strict=True):
                matrix.update(part)


def _orthogonalize_round(matrices: list[_Matrix], result: Tensor, shards: dist.ProcessGroup) -> None:
    """Orthogonalize matrix i on rank i of the group; write this rank's rows of all matrices, flattened, to `result`."""
    num_ranks, rank = shards.size(), shards.rank()
    rows = [matrix.rows.numel() for matrix in matrices] + [0] * (num_ranks - len(matrices))
    own = matrices[rank] if rank < len(matrices) else None
    sizes = own.sizes(num_ranks) if own is not None else [0] * num_ranks
    direction = result.new_empty(sum(sizes))
    dist.all_to_all_single(direction, torch.cat([matrix.direction() for matrix in matrices]), sizes, rows, shards)
    full = own.orthogonalize(direction) if own is not None else direction
    dist.all_to_all_single(result, full, rows, sizes, shards)


class _CombinedOptimizer(torch.optim.Optimizer):
    """Multiple optimizers behind the interface of one, which schedules, clipping and checkpoints use."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self._sizes = [len(part.param_groups) for part in parts]
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        first = 0
        for part, size in zip(self.parts, self._sizes, strict=True):
            part.param_groups = self.param_groups[first : first + size]
            part.state = self.state
            first += size

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step each optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, and share it with the optimizers."""
        super().load_state_dict(state_dict)
        self._share()


def parts_of(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers that an optimizer consists of, or itself."""
    return optimizer.parts if isinstance(optimizer, _CombinedOptimizer) else (optimizer,)


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise UsageError(f"model.optimizer.{name}: {value} must be above 0")
    return value


def _not_negative(name: str, value: float) -> float:
    if not value >= 0:
        raise UsageError(f"model.optimizer.{name}: {value} must be 0 or more")
    return value


def _shares(name: str, *values: float) -> Any:
    for value in values:
        if not 0 <= value < 1:
            raise UsageError(f"model.optimizer.{name}: {value} must be 0 or more and below 1")
    return values
