"""What the gradients of an optimizer step are averaged over: all micro-batches and ranks together."""

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
"""What a recipe can ask for."""

Average = LossAverage | Literal["pairs"]
"""What there is: of pairs of answers the mean is taken."""


def choose_average(asked: LossAverage | None, data: Any) -> Average:
    """What the loss is averaged over, where that is asked for, and else by the training data.

    Args:
        asked: See :class:`~ropepp_lit.train.causal_lm.CausalLM`.
        data: The datamodule, set up. For `conversations` its batches get weights.

    Raises:
        UsageError: conversations are to be averaged, and a training set is text; something else than pairs of answers
            is to be averaged where the data hold these.
    """
    if not isinstance(data, TokenData):
        return asked or "all_tokens"
    if data.holds_pairs:
        if asked is not None:
            raise UsageError(f"model.loss_average: {asked}: the loss of pairs of answers is their mean; leave it out")
        return "pairs"
    if asked == "conversations":
        data.train_samples.average_conversations()
    return asked or ("trained_tokens" if data.marks_trained_tokens else "all_tokens")


def describe_average(average: Average) -> str:
    """In words, for the banner."""
    return {
        "all_tokens": "summed over the labels of a step, divided by all of its tokens (the same divisor in each step)",
        "trained_tokens": "mean over the trained tokens of a step, all micro-batches and devices together",
        "conversations": "mean over the conversations of a step of the means over their trained tokens",
        "pairs": "mean over the pairs of answers of a step, all micro-batches and devices together",
    }[average]


class StepAverage:
    """Turns the gradients of an optimizer step into those of an average over what was counted.

    The loss of a micro-batch is divided by its places (tokens of this rank), which are the same for all. Gradients are
    then averaged over micro-batches and ranks. What there is to count is known when the last micro-batch has been read;
    so gradients are multiplied by places / count before they are clipped. The device is not waited for.

    Args:
        over: What is counted. For `all_tokens` nothing is, and gradients stay as they are.
    """

    def __init__(self, over: Average) -> None:
        self.over = over
        self._count = 0
        self._since: Tensor | int = 0

    def add(self, batch: Batch) -> int:
        """Count a micro-batch; returns what it has on this rank, which its summed loss is to be divided by."""
        if batch.pairs is not None:
            count = batch.pairs.num_counted
        else:
            count = batch.num_documents if self.over == "conversations" else batch.num_labels
        self._count += count
        return count

    def restart(self) -> None:
        """Forget micro-batches of a step that was not finished."""
        self._count, self._since = 0, 0

    def rescale(self, parameters: Iterable[nn.Parameter], trainer: pl.Trainer, *, places: int) -> None:
        """At the end of a step, before gradients are clipped and after they are unscaled.

        Args:
            parameters: Of the decoder. Gradients in shards are changed on each rank.
            trainer: Of the run.
            places: Tokens of a micro-batch on this rank.
        """
        if self.over == "all_tokens":
            return
        all_places = places * trainer.accumulate_grad_batches * trainer.world_size
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        if trainer.world_size == 1:
            torch._foreach_mul_(local, all_places / max(self._count, 1))
            self._since += self._count
        else:
            device = trainer.strategy.root_device
            # Not Lightning's reduce: it has a barrier, for which the host waits; nor torch.tensor, which copies.
            count = torch.full((), self._count, dtype=torch.float64, device=device)
            dist.all_reduce(count)
            if local:
                factor = all_places / count.clamp(min=1)  # without anything to count, gradients are 0
                torch._foreach_mul_(local, factor.to(at_least_float32(local[0].dtype)))
            self._since += count
        self._count = 0

    def since_read(self, device: torch.device) -> list[Tensor]:
        """What all ranks have counted since the last call, one float64 on the device; none where nothing is counted."""
        if self.over == "all_tokens":
            return []
        since, self._since = self._since, 0
        return [since if isinstance(since, Tensor) else torch.full((), since, dtype=torch.float64, device=device)]
