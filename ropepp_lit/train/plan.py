"""Command `ropepp-lit plan`: prints what a recipe will do, its FLOPs, its memory and its duration."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ropepp_lit.arguments import OneLineErrors
from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder, PositionScheme, RoPE, RoPEPP, layout_of
from ropepp_lit.nn.context_parallel import MODES, Mode, choose_mode, elements_moved
from ropepp_lit.sizes import in_bytes, parse_bytes
from ropepp_lit.terminal import output
from ropepp_lit.train.checks import Checks, checkpoint_to_continue
from ropepp_lit.train.cli import RecipeCLI, quiet
from ropepp_lit.train.costs import cache_bytes_per_token, training_flops_per_token
from ropepp_lit.train.devices import DEVICES, find_device
from ropepp_lit.train.fsdp import FSDP2Strategy
from ropepp_lit.train.lora import trained_shapes
from ropepp_lit.train.loss_average import choose_average, describe_average
from ropepp_lit.train.memory import PARTS, Memory, StepMemory
from ropepp_lit.train.optimizer import Muon, split_parameters
from ropepp_lit.train.plan_result import Totals, plan_result
from ropepp_lit.train.step_setup import DTYPES, Setup
from ropepp_lit.train.trainer_options import check_options

if TYPE_CHECKING:
    from ropepp_lit.train.simulate import Simulation

GIB = 2**30


class PlanCLI(RecipeCLI):
    """Parses a recipe as `fit` does, and instantiates all classes except the trainer, whose devices may be missing."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Only check the trainer's options."""
        check_options(self.config_init["fit"].trainer)

    def _run_subcommand(self, subcommand: str) -> None:
        """Do not run anything."""


def plan(arguments: list[str]) -> None:
    """Print the plan of a recipe.

    Args:
        arguments: Options of `fit`, and those of :func:`_parser`.

    Raises:
        UsageError: the recipe is invalid, or cannot run on this number of devices.
    """
    options, rest = _parser().parse_known_args(arguments)
    device = find_device(options.device)
    if device is None:
        raise UsageError(f"device: {options.device!r} is not known; choose one of {', '.join(DEVICES)}")
    if not 0 < options.utilization <= 1:
        raise UsageError(f"utilization: {options.utilization} must be above 0 and at most 1")
    if options.simulate not in ("true", "false"):
        raise UsageError(f"simulate: {options.simulate!r} must be true or false")
    device_memory = device.memory * GIB
    if options.device_memory is not None:
        device_memory = parse_bytes("device_memory", options.device_memory)
    with output(as_json=options.json, quiet=False) as print_result:
        cli = PlanCLI(["fit", *rest])
        recipe = Recipe(cli, cli.config_init["fit"].trainer)
        notices = recipe.check(cli.config_init["fit"])
        print("".join(f"{line}\n" for line in notices), end="")
        totals = Totals.of(recipe, peak=1e12 * device.tflops, utilization=options.utilization)
        recipe.show(totals, device_memory, options.utilization, options.device)
        simulation = recipe.show_simulation() if options.simulate == "true" else None
        gpu = {"device": options.device, "device_memory": device_memory}
        print_result(plan_result(recipe, totals, **gpu, notices=notices, simulation=simulation))


class Recipe:
    """Model, data and devices of a recipe, and the quantities derived from them."""

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
        sharding: dict[str, Any] = {}
        self.context_parallel_mode: Mode | None = None
        at_once = self.layout.split(self.model.attention_head_groups)
        if isinstance(strategy, FSDP2Strategy):
            heads = {"layout": at_once, "head_dim": self.config.head_dim}
            strategy.check(world_size=self.devices, context_length=self.data.context_length, **heads)
            names = ("context_parallel_size", "replicate_size", "reduce_each_micro_batch", "reshard_after_forward")
            sharding = {"strategy": "fsdp2", **{name: getattr(strategy, name) for name in names}}
            if strategy.context_parallel_size > 1:
                self.context_parallel_mode = choose_mode(
                    at_once, self.config.head_dim, strategy.context_parallel_size, strategy.context_parallel_mode
                )
                sharding["context_parallel_mode"] = self.context_parallel_mode
        elif self.devices > 1:
            name = strategy if isinstance(strategy, str) else type(strategy).__name__
            if name != "auto" and not name.lower().startswith("ddp"):
                raise UsageError(f"trainer.strategy: the memory of {name} is not known; choose ddp or fsdp2")
            sharding = {"strategy": "ddp"}
        model = self.model
        self.setup = Setup(
            rows=self.data.batch_size,
            context_length=self.data.context_length,
            devices=self.devices,
            precision=_precision(trainer.precision),
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            gradient_clip_val=trainer.gradient_clip_val,
            activation_checkpointing=model.activation_checkpointing,
            offload_activations=model.offload_activations,
            mlp_chunk_tokens=model.mlp_chunk_tokens,
            attention_head_groups=model.attention_head_groups,
            lora=model.lora,
            **sharding,
        )
        self.context_parallel_size = self.setup.context_parallel_size
        self.replicas = self.devices // self.context_parallel_size
        matrices, others = split_parameters(decoder, output_layer_is_matrix=False)
        sizes = [sum(parameter.numel() for parameter in part) for part in (matrices, others)]
        is_muon = isinstance(self.model.optimizer_config, Muon)
        self.optimizer_states = (sizes[0] + 2 * sizes[1]) / sum(sizes) if is_muon else 2.0

    def check(self, options: Any) -> list[str]:
        """Run the checks of `fit`; those of data and checkpoints only if they are on this machine.

        Args:
            options: The recipe with its classes instantiated.

        Returns:
            Lines to print.
        """
        checks = Checks(self.model, self.data, options, strategy=self.strategy, world_size=self.devices)
        checks.check_steps()
        self.checkpoint_bytes, self.keep = checks.checkpoint_bytes, options.checkpoints.keep
        lines, ckpt_path = [], checkpoint_to_continue(options)
        key, path = ("model.init_from", self.model.init_from) if ckpt_path is None else ("ckpt_path", ckpt_path)
        if path is not None and not Path(path).exists():
            lines.append(f"Not checked: {key} {path} does not exist yet")
        else:
            checks.open_checkpoint(ckpt_path)
        lines += checks.check_recipe(has_gpu=self.trainer.accelerator != "cpu")
        self.first_batch = self.data.first_batch()
        if self.first_batch is not None:
            lines += checks.check_data()
        else:
            lines += self.data.notices
        return [*lines, *checks.compare()]

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step on all devices."""
        accumulated = self.trainer.accumulate_grad_batches
        return self.data.tokens_per_step(accumulate_grad_batches=accumulated, num_replicas=self.replicas)

    def memory(self, **changes: Any) -> Memory:
        """Return the peak memory per device, with `changes` to the recipe's settings of the step."""
        setup = dataclasses.replace(self.setup, **changes)
        step = StepMemory(
            self.config,
            self.layout,
            setup,
            num_parameters=self.num_parameters,
            optimizer_states=self.optimizer_states,
        )
        return step.peak()

    def show(self, totals: Totals, device_memory: int, utilization: float, device: str) -> None:
        """Print the plan."""
        context, steps = self.data.context_length, self.trainer.max_steps
        frequencies = f", {self.model.frequencies}" if self.scheme.uses_frequencies else ""
        print(
            f"""parameters        {self.num_parameters:,}{self._trained()}
context           {context:,} tokens{frequencies}
tokens per step   {self.tokens_per_step:,} ({self.data.batch_size} rows × {self.trainer.accumulate_grad_batches} \
accumulated × {self.replicas} replicas; {self.devices} devices)
tokens in all     {totals.tokens:,} in {steps:,} steps
FLOPs per token   {totals.flops_per_token:.3e} (forward and backward, no recomputation), {totals.flops:.2e} in all; \
packed documents take less
time              {totals.days:.2f} days on {self.devices} × {device} at {utilization:.0%} of its dense bfloat16 peak
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
            cost = training_flops_per_token(self.config, layout, context, lora=self.model.lora)
            cache = cache_bytes_per_token(self.config, layout)
            print(
                f"| {name:<11} | {layout.num_query_heads:>17} | {layout.num_attention_heads:>15} | "
                f"{layout.num_key_value_heads:>15} | {cache:>12,} bytes | {cost:>15.3e} |"
            )
        memory = self.memory()
        print(f"\nmemory per device at the peak of a step, estimated ({memory.moment}):")
        for part, size in memory.parts.items():
            print(f"  {part:<12} {size / GIB:8.2f} GiB")
        print(f"  {'total':<12} {memory.total / GIB:8.2f} GiB of {device_memory / GIB:.0f} GiB")
        print(self._advice(device_memory))
        kept = f"{self.keep} are kept, and one more while it is written" if self.keep else "all are kept"
        print(f"checkpoint: {in_bytes(self.checkpoint_bytes)} of weights and optimizer state; {kept}")
        self._show_batch()

    def _trained(self) -> str:
        """Return a line with the trained parameters, if they are not all."""
        lora = self.model.lora
        if lora is None:
            return ""
        with torch.device("meta"):
            decoder = Decoder(self.config, self.scheme, self.model.frequencies)
        trained = sum(shape.numel() for shape in trained_shapes(decoder, lora).values())
        base = str(self.setup.base_dtype).removeprefix("torch.")
        return (
            f"\ntrained           {trained:,} ({trained / self.num_parameters:.2%}) by LoRA beside the others in {base}"
        )

    def _sharing(self) -> str:
        """Return a line with the bytes that each mode of context parallelism sends, if it is used."""
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
        """Return the changes with which the recipe would fit."""
        if self.memory().total <= device_memory:
            return "It fits."
        sharded = {"strategy": "fsdp2", "replicate_size": 1}
        steps: list[tuple[str, dict[str, Any]]] = [
            ("--model.activation_checkpointing 1", {"activation_checkpointing": 1}),
            ("--data.batch_size 1 with more --trainer.accumulate_grad_batches", {"rows": 1}),
            ("--model.mlp_chunk_tokens 2048", {"mlp_chunk_tokens": 2048}),
            *(
                (f"--trainer.strategy fsdp2 on {devices} devices", {**sharded, "devices": devices})
                for devices in (8, 64)
                if self.setup.shards < devices
            ),
        ]
        if self.data.context_length % 16 == 0:
            mode = choose_mode(self.layout, self.config.head_dim, 8)
            change = {**sharded, "context_parallel_size": 8, "context_parallel_mode": mode}
            steps.append(("--trainer.strategy.context_parallel_size 8", change))
        changes: dict[str, Any] = {}
        options: list[str] = []
        for option, change in steps:
            changes |= change
            options = [earlier for earlier in options if "devices" not in change or "fsdp2" not in earlier] + [option]
            total = self.memory(**changes).total
            if total <= device_memory:
                return f"It does not fit. This would, with {total / GIB:.2f} GiB: {'; '.join(options)}"
        return (
            "It does not fit, and would not with all memory options on 64 devices: choose a smaller model or a shorter "
            "context."
        )

    def show_simulation(self) -> Simulation:
        """Run a step on fake tensors, and print its memory, FLOPs and collectives next to the estimates."""
        from ropepp_lit.train.simulate import simulate  # imports torch's testing package

        started = time.monotonic()
        simulation = simulate(
            self.setup,
            config=self.config,
            scheme=self.scheme,
            frequencies=self.model.frequencies,
            optimizer=self.model.optimizer_config,
        )
        estimate, total = self.memory(), sum(simulation.memory.values())
        print(
            f"""
simulation of a step of one of {self.devices:,} devices ({simulation.micro_batches} of \
{self.setup.accumulate_grad_batches} micro-batches run, the others extrapolated; plain rows, which take the
memory of packed documents; without torch.compile), {time.monotonic() - started:.0f} s:

| memory at the peak | simulated     | estimated     |
|--------------------|---------------|---------------|"""
        )
        for part in PARTS:
            print(
                f"| {part:<18} | {simulation.memory[part] / GIB:>9.2f} GiB | {estimate.parts[part] / GIB:>9.2f} GiB |"
            )
        print(f"| {'total':<18} | {total / GIB:>9.2f} GiB | {estimate.total / GIB:>9.2f} GiB |")
        counts, loss, accumulated = simulation.counts, simulation.loss, self.setup.accumulate_grad_batches
        context = self.data.context_length
        per_token = training_flops_per_token(self.config, self.layout, context, lora=self.model.lora)
        formula = per_token * self.setup.tokens * accumulated
        print(
            f"""
FLOPs of a step per device      {counts.flops:.3e} with recomputation; {formula:.3e} by the formula, without
  output layer and loss         {loss.flops * accumulated:.3e}
loss per micro-batch            {loss.memory / GIB:.2f} GiB at its peak, {loss.bytes / GIB:.2f} GiB read and written
"""
        )
        if not counts.calls:
            print("collectives: none")
            return simulation
        print("| collectives of a step   | ranks | calls  | sent per device |")
        print("|-------------------------|-------|--------|-----------------|")
        for collective, calls in sorted(counts.calls.items()):
            sent = counts.sent[collective] / GIB
            print(f"| {collective.kind:<23} | {collective.ranks:>5,} | {calls:>6,} | {sent:>11,.3f} GiB |")
        return simulation

    def _show_batch(self) -> None:
        """Print the first rows of the data, decoded, if they are prepared."""
        batch = self.first_batch
        if batch is None:
            print("\nThe data are not on this machine, or not prepared yet.")
            return
        text = self.data.text_tokenizer.decode(batch.input_ids[0, :64].tolist())
        documents = "plain rows" if batch.documents is None else f"{len(batch.documents.cu_seqlens) - 1} documents"
        print(f"\nfirst batch: {tuple(batch.input_ids.shape)}, {documents}; it begins: {text!r}")
        print(f"loss: {describe_average(choose_average(self.model.loss_average, self.data))}")
        if self.model.pairs.preference is not None:
            print(f"preference: {self.model.pairs.preference}")
        for line in self.data.packing_lines(self.tokens_per_step // self.data.context_length):
            print(f"packing: {line}")


def _count(devices: Any) -> int:
    """Return the number of devices per node in a recipe."""
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    if count < 1:
        raise UsageError(f"trainer.devices: {devices} must name one or more")
    return count


def _precision(precision: Any) -> str:
    """Return the long name of a Lightning precision."""
    name = str(precision or "32-true")
    name = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}.get(name, name)
    dtype, _, kind = name.partition("-")
    if dtype not in DTYPES or kind not in ("true", "mixed"):
        raise UsageError(
            f"trainer.precision: the memory of {name} is not known; choose bf16-mixed, bf16-true or 32-true"
        )
    return name


class _Parser(OneLineErrors, argparse.ArgumentParser):
    pass


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ropepp-lit plan",
        description="Print FLOPs, memory and duration of a recipe. Takes the options of fit (--config RECIPE …), and:",
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="H100 SXM", help=f"GPU to plan for: {', '.join(DEVICES)}")
    parser.add_argument("--device_memory", help="memory of each GPU, such as 80GiB; default: that of --device")
    parser.add_argument("--utilization", type=float, default=0.4, help="fraction of the peak that training reaches")
    parser.add_argument(
        "--simulate",
        default="false",
        help="true: simulate an optimizer step of one device of the cluster on fake tensors, and print its memory, "
        "FLOPs and collectives; requires no GPU and no data",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as one line of JSON, the rest to stderr")
    return parser


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    quiet()
    plan(arguments[1:])
