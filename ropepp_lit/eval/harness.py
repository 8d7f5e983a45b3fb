"""Tasks of lm-eval, on an export of the model in a temporary folder."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.models import TOKENS_AT_ONCE, Model
from ropepp_lit.eval.results import Measurement
from ropepp_lit.hf.export import export
from ropepp_lit.hf.folder import open_checkpoint


def check_harness() -> None:
    """Raise UsageError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("tasks: harness needs lm-eval: pip install 'ropepp-lit[eval]'")


def run(model: Model, task: str, *, lengths: Sequence[int], limit: int, seed: int) -> dict[str, Any]:
    """Run a task of lm-eval; its own results, with samples.

    Args:
        model: What is exported and measured.
        task: Its name.
        lengths: Tokens of the context, for tasks that have lengths (RULER's); others may read as much as the longest.
        limit: Examples (for each length).
        seed: Of the order and choice of examples.

    Raises:
        UsageError: no such task, a library that it needs is missing, or the model cannot be exported.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "model"
        export(open_checkpoint(model.path), exported, dtype=None, max_shard_bytes=10**10, check=False)
        metadata = {"max_seq_lengths": list(lengths), "tokenizer": str(exported), "pretrained": str(exported)}
        manager = TaskManager(metadata=metadata)
        if task not in manager.all_tasks:
            raise UsageError(f"tasks: lm-eval knows no task {task!r}; see: lm_eval ls tasks")
        dtype = str(model.decoder.model.embed_tokens.weight.dtype).removeprefix("torch.")
        try:
            return simple_evaluate(
                model="hf",
                model_args={
                    "pretrained": str(exported),
                    "trust_remote_code": True,
                    "dtype": dtype,
                    # Else lm-eval cuts prompts to the trained context, from their start, without a word.
                    "max_length": max(*lengths, model.entry.get("context_length") or 0),
                },
                tasks=[task],
                limit=limit,
                batch_size=max(1, TOKENS_AT_ONCE // max(lengths)),
                device=str(model.device),
                task_manager=manager,
                metadata=metadata,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                bootstrap_iters=0,
                log_samples=True,
            )
        except ImportError as error:
            raise UsageError(f"tasks: {task}: {error}; pip install 'ropepp-lit[eval]'") from error


def measure(model: Model, task: str, *, lengths: Sequence[int], limit: int, seed: int) -> list[Measurement]:
    """What lm-eval finds for a task; see :func:`run`.

    Returns:
        One measurement per metric that has a value for each example, examples in lm-eval's order.
    """
    found = run(model, task, lengths=lengths, limit=limit, seed=seed)
    measurements = []
    for name, samples in found["samples"].items():
        for metric in dict.fromkeys(metric for sample in samples for metric in sample["metrics"]):
            # RULER's tasks name the length by the metric, and give -1 to examples of other lengths.
            pairs = [sample[metric] for sample in samples if isinstance(sample.get(metric), int | float)]
            values = [float(value) for value in pairs if not metric.isdigit() or value >= 0]
            if values:
                length = int(metric) if metric.isdigit() else None
                measurements.append(
                    Measurement(
                        task="harness",
                        part=name,
                        metric="score" if length else metric,
                        length=length,
                        numerators=values,
                        denominators=[1.0] * len(values),
                    )
                )
    if not measurements:
        raise UsageError(f"tasks: harness:{task} gives no value for single examples, which intervals are made of")
    return measurements
