"""Averaging of the gradients of an optimizer step over its tokens, conversations or pairs, across ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ropepp_lit.data.batch import Batch
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.nn.precision import at_least_float32

LossAverage = Literal["all_tokens", "trained_tokens", "conversations"]
"""Averages that a recipe can choose."""

Average = LossAverage | Literal["pairs"]
"""All averages; data of pairs of answers imply `pairs`."""


def choose_average(option: LossAverage | None, data: Any) -> Average:
    """Return what the loss is averaged over: the option if it is set, else a default for the training data.

    Args:
        option: `loss_average` of :class:`~ropepp_lit.train.causal_lm.CausalLM`.
        data: The datamodule, set up. `conversations` makes its batches contain weights.

    Raises:
        UsageError: `conversations` is chosen and a training set is plain text, or the option is set and the data are
            pairs of answers.
    """
    if not isinstance(data, TokenData):
        return option or "all_tokens"
    if data.holds_pairs:
        if option is not None:
            raise UsageError(f"model.loss_average: {option}: the loss of pairs of answers is their mean; leave it out")
        return "pairs"
    if option == "conversations":
        data.train_samples.average_conversations()
    return option or ("trained_tokens" if data.marks_trained_tokens else "all_tokens")


def describe_average(average: Average) -> str:
    """Return the description of an average for the banner."""
    return {
        "all_tokens": "summed over the labels of a step, divided by all of its tokens (the same divisor in each step)",
        "trained_tokens": "mean over the trained tokens of a step, all micro-batches and devices together",
        "conversations": "mean over the conversations of a step of the means over their trained tokens",
        "pairs": "mean over the pairs of answers of a step, all micro-batches and devices together",
    }[average]


class StepAverage:
    """Rescaling of the gradients of an optimizer step to an average over the items of the step.

    The loss of a micro-batch is divided by its number of positions (tokens of this rank), which is the same for all
    micro-batches, and gradients are averaged over micro-batches and ranks. The number of items is known only after the
    last micro-batch, so gradients are multiplied by positions / items before they are clipped. Nothing synchronizes
    with the device.

    Args:
        over: Items to average over. With `all_tokens` nothing is counted and gradients are unchanged.
    """

    def __init__(self, over: Average) -> None:
        self.over = over
        self._count = 0
        self._since: Tensor | int = 0

    def add(self, batch: Batch) -> int:
        """Count the items of a micro-batch on this rank, and return their number: the divisor of its summed loss."""
        if batch.pairs is not None:
            count = batch.pairs.num_counted
        else:
            count = batch.num_documents if self.over == "conversations" else batch.num_labels
        self._count += count
        return count

    def restart(self) -> None:
        """Reset the count, which may include micro-batches of an unfinished step."""
        self._count, self._since = 0, 0

    def rescale(self, parameters: Iterable[nn.Parameter], trainer: pl.Trainer, *, num_positions: int) -> None:
        """Rescale the gradients at the end of a step, after they are unscaled and before they are clipped.

        Args:
            parameters: Parameters of the decoder. Of sharded gradients each rank rescales its shards.
            trainer: Trainer of the run.
            num_positions: Tokens of a micro-batch on this rank.
        """
        if self.over == "all_tokens":
            return
        total_positions = num_positions * trainer.accumulate_grad_batches * trainer.world_size
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        if trainer.world_size == 1:
            torch._foreach_mul_(local, total_positions / max(self._count, 1))
            self._since += self._count
        else:
            device = trainer.strategy.root_device
            # Lightning's reduce has a barrier that blocks the host, and torch.tensor copies: both are avoided.
            count = torch.full((), self._count, dtype=torch.float64, device=device)
            dist.all_reduce(count)
            if local:
                factor = total_positions / count.clamp(min=1)  # gradients are 0 if the count is
                torch._foreach_mul_(local, factor.to(at_least_float32(local[0].dtype)))
            self._since += count
        self._count = 0

    def read_count(self, device: torch.device) -> list[Tensor]:
        """Return the count of all ranks since the last call, one float64 on the device; empty with `all_tokens`."""
        if self.over == "all_tokens":
            return []
        since, self._since = self._since, 0
        return [since if isinstance(since, Tensor) else torch.full((), since, dtype=torch.float64, device=device)]
