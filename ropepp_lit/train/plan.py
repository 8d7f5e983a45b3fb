"""`ropepp-lit plan`: what a recipe will do and cost, before anything is spent."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder, PositionScheme, RoPE, RoPEPP
from ropepp_lit.nn.context_parallel import MODES, Mode, choose_mode, elements_moved
from ropepp_lit.sizes import parse_bytes
from ropepp_lit.train.checks import Checks, check_checkpointing, checkpoint_to_continue
from ropepp_lit.train.cli import RecipeCLI, quiet
from ropepp_lit.train.costs import (
    PEAK_TFLOPS,
    Memory,
    cache_bytes_per_token,
    layout_of,
    memory_of_step,
    peak_flops,
    training_flops_per_token,
)
from ropepp_lit.train.fsdp import FSDP2Strategy
from ropepp_lit.train.optimizer import Muon, split_parameters

GIB = 2**30


class PlanCLI(RecipeCLI):
    """Parses a recipe as `fit` does, and makes everything but the trainer, so any device may be named."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None is needed, and this machine may have no such devices."""
        check_checkpointing(self.config_init["fit"].trainer)

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def plan(arguments: list[str]) -> None:
    """Print what a recipe will do.

    Args:
        arguments: Options of `fit`, and those of :func:`_parser`.

    Raises:
        UsageError: the recipe is wrong, or cannot run on so many devices.
    """
    options, rest = _parser().parse_known_args(arguments)
    peak = peak_flops(options.device)
    if peak is None:
        raise UsageError(f"device: {options.device!r} is not known; choose of {', '.join(PEAK_TFLOPS)}")
    if not 0 < options.utilization <= 1:
        raise UsageError(f"utilization: {options.utilization} must be above 0 and at most 1")
    device_memory = parse_bytes("device_memory", options.device_memory)
    cli = PlanCLI(["fit", *rest])
    recipe = Recipe(cli, cli.config_init["fit"].trainer)
    for line in recipe.check(cli.config_init["fit"]):
        print(line)
    recipe.show(device_memory, peak, options.utilization, options.device)


class Recipe:
    """A recipe's model, data and devices, and what follows from them."""

    def __init__(self, cli: PlanCLI, trainer: Any) -> None:
        self.model, self.data, self.trainer = cli.model, cli.datamodule, trainer
        self.config, self.scheme = self.model.config, self.model.scheme
        with torch.device("meta"):
            decoder = Decoder(self.config, self.scheme, self.model.frequencies)
        self.layout, self.num_parameters = decoder.head_layout, decoder.num_parameters
        self.devices = _count(trainer.devices) * trainer.num_nodes
        strategy = trainer.strategy
        if strategy in ("fsdp2", "fsdp2strategy"):
            strategy = FSDP2Strategy()
        self.strategy = strategy if isinstance(strategy, FSDP2Strategy) else None
        self.context_parallel_size, self.shards, self.reduces_each_micro_batch = 1, 1, False
        self.context_parallel_mode: Mode | None = None
        at_once = self.layout.split(self.model.attention_head_groups)
        if isinstance(strategy, FSDP2Strategy):
            strategy.check(
                world_size=self.devices,
                layout=at_once,
                head_dim=self.config.head_dim,
                context_length=self.data.context_length,
            )
            self.context_parallel_size = strategy.context_parallel_size
            if self.context_parallel_size > 1:
                self.context_parallel_mode = choose_mode(
                    at_once, self.config.head_dim, self.context_parallel_size, strategy.context_parallel_mode
                )
            self.reduces_each_micro_batch = strategy.reduce_each_micro_batch
            self.shards = self.devices // strategy.replicate_size
        self.replicas = self.devices // self.context_parallel_size
        matrices, others = split_parameters(decoder, output_layer_is_matrix=False)
        sizes = [sum(parameter.numel() for parameter in part) for part in (matrices, others)]
        is_muon = isinstance(self.model.optimizer_config, Muon)
        self.optimizer_states = (sizes[0] + 2 * sizes[1]) / sum(sizes) if is_muon else 2.0

    def check(self, options: Any) -> list[str]:
        """Make the checks of `fit`; those of data and checkpoints where they are on this machine.

        Args:
            options: The recipe with its classes instantiated.

        Returns:
            Lines to print: what the run starts from.
        """
        checks = Checks(self.model, self.data, options, strategy=self.strategy, world_size=self.devices)
        checks.check_steps()
        checks.check_recipe(has_gpu=self.trainer.accelerator != "cpu")
        self.first_batch = self.data.first_batch()
        if self.first_batch is not None:
            checks.check_data()
        lines, init_from, ckpt_path = [], self.model.init_from, checkpoint_to_continue(options)
        if init_from is not None and not Path(init_from).exists():
            lines.append(f"Not checked: model.init_from {init_from} does not exist yet")
        elif (start := checks.check_init_from()) is not None:
            lines.append(start.message)
        if ckpt_path is not None and not Path(ckpt_path).exists():
            lines.append(f"Not checked: ckpt_path {ckpt_path} does not exist yet")
        elif ckpt_path is not None:
            lines += checks.check_resume(ckpt_path)
        return lines

    @property
    def tokens_per_step(self) -> int:
        """Over all devices."""
        accumulated = self.trainer.accumulate_grad_batches
        return self.data.tokens_per_step(accumulate_grad_batches=accumulated, num_replicas=self.replicas)

    def memory(self, **changes: Any) -> Memory:
        """Per device, with some settings other than the recipe's."""
        model = self.model
        keeps_attention = model.activation_checkpointing == "attention"
        settings: dict[str, Any] = {
            "num_parameters": self.num_parameters,
            "rows": self.data.batch_size,
            "context_length": self.data.context_length,
            "shards": self.shards,
            "context_parallel_size": self.context_parallel_size,
            "itemsize": 2 if str(self.trainer.precision or "32").startswith(("bf16", "16")) else 4,
            "optimizer_states": self.optimizer_states,
            "accumulates": self.trainer.accumulate_grad_batches > 1 and not self.reduces_each_micro_batch,
            "activation_checkpointing": 1 if keeps_attention else model.activation_checkpointing,
            "keeps_attention": keeps_attention,
            "mlp_chunk_tokens": model.mlp_chunk_tokens,
            "offload_activations": model.offload_activations,
        }
        return memory_of_step(self.config, self.layout, **{**settings, **changes})

    def show(self, device_memory: int, peak: float, utilization: float, device: str) -> None:
        """Print the plan."""
        context, steps = self.data.context_length, self.trainer.max_steps
        flops = training_flops_per_token(self.config, self.layout, context)
        tokens = self.tokens_per_step * steps
        days = flops * tokens / (self.devices * peak * utilization) / 86400
        frequencies = f", {self.model.frequencies}" if self.scheme.uses_frequencies else ""
        print(
            f"""parameters        {self.num_parameters:,}
context           {context:,} tokens{frequencies}
tokens per step   {self.tokens_per_step:,} ({self.data.batch_size} rows × {self.trainer.accumulate_grad_batches} \
accumulated × {self.replicas} replicas; {self.devices} devices)
tokens in all     {tokens:,} in {steps:,} steps
FLOPs per token   {flops:.3e} (forward and backward, no recomputation), {flops * tokens:.2e} in all
time              {days:.2f} days on {self.devices} × {device} at {utilization:.0%} of its dense bfloat16 peak
{self._sharing()}
| scheme      | query projections | attention heads | key/value heads | KV cache per token | FLOPs per token |
|-------------|-------------------|-----------------|-----------------|--------------------|-----------------|"""
        )
        schemes: dict[str, PositionScheme] = {
            str(scheme): scheme for scheme in (RoPE(), RoPEPP(variant="eh"), RoPEPP(variant="ec"))
        }
        if str(self.scheme) not in schemes:
            schemes[type(self.scheme).__name__] = self.scheme
        for name, scheme in schemes.items():
            try:
                layout = layout_of(self.config, scheme)
            except UsageError:
                print(f"| {name:<11} | cannot be built with {self.config.num_attention_heads} heads |")
                continue
            cost = training_flops_per_token(self.config, layout, context)
            cache = cache_bytes_per_token(self.config, layout)
            print(
                f"| {name:<11} | {layout.num_query_heads:>17} | {layout.num_attention_heads:>15} | "
                f"{layout.num_key_value_heads:>15} | {cache:>12,} bytes | {cost:>15.3e} |"
            )
        memory = self.memory()
        print("\nmemory per device, estimated:")
        for part, size in memory._asdict().items():
            print(f"  {part:<12} {size / GIB:8.2f} GiB")
        print(f"  {'in all':<12} {memory.total / GIB:8.2f} GiB of {device_memory / GIB:.0f} GiB")
        print(self._advice(device_memory))
        self._show_batch()

    def _sharing(self) -> str:
        """A line about context parallelism, where there is any: what each mode sends."""
        ranks, head_dim, groups = self.context_parallel_size, self.config.head_dim, self.model.attention_head_groups
        layout = self.layout.split(groups)
        if self.context_parallel_mode is None:
            return ""
        tokens = self.data.batch_size * self.data.context_length / ranks
        itemsize = 2 if str(self.trainer.precision or "32").startswith(("bf16", "16")) else 4
        sent = [
            f"{mode} {groups * elements_moved(layout, head_dim, ranks, mode) * tokens * itemsize / 2**20:,.1f} MiB"
            for mode in MODES
            if mode == "gather" or layout.num_query_heads % ranks == 0
        ]
        return (
            f"context parallel  {ranks} devices share a row; each sends per layer in the forward pass: "
            f"{', '.join(sent)}; mode: {self.context_parallel_mode}\n"
        )

    def _advice(self, device_memory: int) -> str:
        """What would have to change for the recipe to fit."""
        if self.memory().total <= device_memory:
            return "It fits."
        changes: dict[str, Any] = {}
        words: list[str] = []
        for key, value, option in (
            ("activation_checkpointing", 1, "--model.activation_checkpointing 1"),
            ("rows", 1, "--data.batch_size 1 with more --trainer.accumulate_grad_batches"),
            ("mlp_chunk_tokens", 2048, "--model.mlp_chunk_tokens 2048"),
            ("shards", 8, "--trainer.strategy fsdp2 on 8 devices"),
            ("shards", 64, "--trainer.strategy fsdp2 on 64 devices"),
            ("context_parallel_size", 8, "--trainer.strategy.context_parallel_size 8"),
        ):
            if key == "shards" and self.shards >= value:
                continue
            if key == "context_parallel_size" and self.data.context_length % (2 * value):
                continue
            changes[key] = value
            words = [word for word in words if key != "shards" or "fsdp2" not in word] + [option]
            total = self.memory(**changes).total
            if total <= device_memory:
                return f"It does not fit. This would, with {total / GIB:.2f} GiB: {'; '.join(words)}"
        return (
            "It does not fit, and would not with every lever on 64 devices: take a smaller model or a shorter context."
        )

    def _show_batch(self) -> None:
        """The first rows of the data, decoded, where they are prepared."""
        batch = self.first_batch
        if batch is None:
            print("\nThe data are not here, or not prepared yet.")
            return
        text = Tokenizer.from_str(self.data.tokenizer_json).decode(batch.input_ids[0, :64].tolist())
        documents = "plain rows" if batch.documents is None else f"{len(batch.documents.cu_seqlens) - 1} documents"
        print(f"\nfirst batch: {tuple(batch.input_ids.shape)}, {documents}; it begins: {text!r}")


def _count(devices: Any) -> int:
    """How many devices of a node a recipe asks for."""
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdigit() else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ropepp-lit plan",
        description="What a recipe will do and cost. Takes the options of fit (--config RECIPE …) and these:",
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="H100", help=f"what to reckon with, of {', '.join(PEAK_TFLOPS)}")
    parser.add_argument("--device_memory", default="80GiB", help="of each device")
    parser.add_argument("--utilization", type=float, default=0.4, help="share of the peak that training reaches")
    return parser


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    quiet()
    plan(arguments[1:])
