"""Training throughput: tokens per second, and model FLOPs utilization."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ropepp_lit.nn import DecoderConfig, HeadLayout
from ropepp_lit.nn.lora import LoRA
from ropepp_lit.train.costs import training_flops
from ropepp_lit.train.devices import device_name, peak_flops


class Throughput:
    """Clock of training time, which excludes validation, samples and evaluation.

    Args:
        config: Geometry of the decoder.
        layout: Head counts.
        num_devices: Number of devices of the run.
        lora: LoRA settings; None means that all weights train.
    """

    def __init__(self, config: DecoderConfig, layout: HeadLayout, num_devices: int, lora: LoRA | None = None) -> None:
        self._config, self._layout, self._lora = config, layout, lora
        peak = peak_flops(device_name() or "")
        self._peak = None if peak is None else peak * num_devices
        self._restart()

    def add(self, tokens: int, pairs: int) -> None:
        """Count a micro-batch.

        Args:
            tokens: Number of tokens on all devices.
            pairs: Number of pairs of a query and a key visible to it, on all devices.
        """
        self._tokens += tokens
        self._flops += training_flops(self._config, self._layout, tokens=tokens, pairs=pairs, lora=self._lora)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock while the context is active; also restarts it after an exception."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - started

    def read(self, counted: Mapping[str, float] | None = None) -> dict[str, float]:
        """Return the throughput since the last call, and restart.

        Args:
            counted: Other counts since then, by name.

        Returns:
            `tokens_per_second`; `NAME_per_second` of each other count; `model_flops_utilization` (arXiv 2204.02311) if
            the peak of the GPU is known.
        """
        seconds = max(time.perf_counter() - self._since, 1e-9)
        others = {f"{name}_per_second": number / seconds for name, number in (counted or {}).items()}
        figures = {"tokens_per_second": self._tokens / seconds, **others}
        if self._peak is not None:
            figures["model_flops_utilization"] = self._flops / seconds / self._peak
        self._restart()
        return figures

    def _restart(self) -> None:
        self._since, self._tokens, self._flops = time.perf_counter(), 0, 0.0
