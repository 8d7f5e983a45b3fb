"""Totals of a planned run, and the result that `ropepp-lit plan --json` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ropepp_lit.train.costs import cache_bytes_per_token, training_flops_per_token

if TYPE_CHECKING:
    from ropepp_lit.train.plan import Recipe
    from ropepp_lit.train.simulate import Simulation


class Totals(NamedTuple):
    """Tokens, FLOPs and duration of a run."""

    tokens: int
    flops_per_token: float
    """Forward and backward, without recomputation; packed documents take fewer."""
    flops: float
    days: float

    @classmethod
    def of(cls, recipe: Recipe, *, peak: float, utilization: float) -> Totals:
        """Estimate the totals of a recipe.

        Args:
            recipe: Recipe to run to its last step.
            peak: Operations per second of a device.
            utilization: Share of the peak that training reaches.
        """
        per_token = training_flops_per_token(
            recipe.config, recipe.layout, recipe.data.context_length, lora=recipe.model.lora
        )
        tokens = recipe.tokens_per_step * recipe.trainer.max_steps
        flops = per_token * tokens
        return cls(tokens, per_token, flops, flops / (recipe.devices * peak * utilization) / 86400)


def plan_result(
    recipe: Recipe,
    totals: Totals,
    *,
    device: str,
    device_memory: int,
    notices: list[str],
    simulation: Simulation | None,
) -> dict[str, Any]:
    """Collect the result that `plan --json` prints.

    Args:
        recipe: Recipe that was checked.
        totals: Totals of the run.
        device: Name of the GPU that the plan is for.
        device_memory: Its memory in bytes.
        notices: Lines of the checks.
        simulation: Simulated step; None if it was not run.

    Returns:
        An object with `parameters`, `context_length`, `devices`, `device`, `tokens_per_step`, `steps`, `tokens`,
        `flops_per_token`, `flops`, `days`, `kv_cache_bytes_per_token`, `memory_bytes` (per device: by part, and
        `total`), `device_memory_bytes`, `fits`, `checkpoint_bytes`, `notices` (a list of texts), and `simulation`
        (null, or `memory_bytes` by part and `total`, and `flops_per_step` of a device).
    """
    memory = recipe.memory()
    simulated = None
    if simulation is not None:
        parts = {name: int(size) for name, size in simulation.memory.items()}
        simulated = {
            "memory_bytes": {**parts, "total": sum(parts.values())}, "flops_per_step": int(simulation.counts.flops)
        }  # fmt: skip
    return {
        "parameters": recipe.num_parameters,
        "context_length": recipe.data.context_length,
        "devices": recipe.devices,
        "device": device,
        "tokens_per_step": recipe.tokens_per_step,
        "steps": recipe.trainer.max_steps,
        "tokens": totals.tokens,
        "flops_per_token": totals.flops_per_token,
        "flops": totals.flops,
        "days": totals.days,
        "kv_cache_bytes_per_token": cache_bytes_per_token(recipe.config, recipe.layout),
        "memory_bytes": {**{name: int(size) for name, size in memory.parts.items()}, "total": int(memory.total)},
        "device_memory_bytes": device_memory,
        "fits": bool(memory.total <= device_memory),
        "checkpoint_bytes": int(recipe.checkpoint_bytes),
        "notices": notices,
        "simulation": simulated,
    }
