"""Attention probes: noise on the scores of one group of heads (Figure 5 of the paper), and attention by distance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from ropepp_lit.eval.models import Model
from ropepp_lit.eval.results import Measurement, sample_of
from ropepp_lit.nn import Probe

CHUNK_TOKENS = 512
"""Maximum number of queries per forward pass, which bounds the memory of the scores."""

MAP_CELLS = 64
"""Rows and columns of an attention map."""


class Noise(Probe):
    """Gaussian noise on the attention scores of one group of heads; those of other heads are unchanged, bit for bit.

    Args:
        groups: Groups of heads of the model.
        heads: Group that gets the noise, such as real or imaginary.
        std: Standard deviation, in units of the score (qᵀk / √D).
        seed: Seed of the noise.
    """

    def __init__(self, *, groups: tuple[str, ...], heads: str, std: float, seed: int) -> None:
        self._first, self._step = groups.index(heads), len(groups)
        self._std, self._seed = std, seed
        self._generator: torch.Generator | None = None

    def scores(self, layer: int, scores: Tensor) -> Tensor:
        """Add noise to the scores, in place."""
        if self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self._seed)
        selected = scores[:, self._first :: self._step]
        noise = torch.empty_like(selected).normal_(std=1, generator=self._generator)
        scores[:, self._first :: self._step] = selected + self._std * noise
        return scores


class _WeightSums(Probe):
    """Sums of the attention weights by distance, and by cells of a map."""

    def __init__(self, *, num_layers: int, num_groups: int, length: int) -> None:
        self.num_groups, self.length = num_groups, length
        edges = [0, 1]
        while edges[-1] < length:
            edges.append(2 * edges[-1])
        self.edges = edges[:-1]
        """First distance of each range: 0, 1, 2, 4, 8, …"""
        self.by_distance = torch.zeros(num_groups, len(self.edges), dtype=torch.float64)
        self.on_first = torch.zeros(num_groups, dtype=torch.float64)
        self.num_rows = 0
        self.maps = torch.zeros(num_layers, num_groups, MAP_CELLS, MAP_CELLS, dtype=torch.float64)

    def weights(self, layer: int, weights: Tensor) -> None:
        """Add a layer's weights [B, H, T, S]; the queries are at the last T of S positions."""
        _, heads, num_queries, num_keys = weights.shape
        grouped = weights.unflatten(1, (heads // self.num_groups, self.num_groups)).mean(dim=(0, 1)).double().cpu()
        queries = torch.arange(num_keys - num_queries, num_keys)
        keys = torch.arange(num_keys)
        cells = (queries * MAP_CELLS // self.length)[:, None] * MAP_CELLS + (keys * MAP_CELLS // self.length)[None]
        for group, values in enumerate(grouped):
            self.maps[layer, group].view(-1).index_add_(0, cells.flatten(), values.flatten())
        late = queries >= self.length // 2  # those that have all near and many far keys
        if not late.any():
            return
        self.num_rows += int(late.sum())
        distances = queries[late][:, None] - keys[None]
        ranges = torch.bucketize(distances.clamp(min=0), torch.tensor(self.edges), right=True) - 1
        for group, values in enumerate(grouped[:, late]):
            self.by_distance[group].index_add_(0, ranges.flatten(), values.flatten())
            self.on_first[group] += values[:, 0].sum()


@torch.inference_mode()
def measure_attention(
    model: Model,
    texts: Sequence[Sequence[int]],
    *,
    length: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> tuple[list[Measurement], Tensor]:
    """Measure the attention weights of real and imaginary heads by distance, and as maps.

    Args:
        model: The model.
        texts: Token ids of texts with at least `length` tokens.
        length: Number of tokens that are read of each text.
        progress: Called with the number of tokens read.

    Returns:
        Shares of the weights by distance (mean over the queries of the second half, layers and heads; `position` is the
        first distance of a range) and on the first token (`part` is `first token`), with one entry per text; and maps
        [layers, groups, MAP_CELLS, MAP_CELLS]: the mean weight of a query of one cell on all keys of another.
    """
    groups = model.decoder.scheme.head_kinds
    probes = [_sum_weights(model, text[:length], len(groups), progress) for text in texts]
    measurements, sample = [], sample_of(list(text[:length]) for text in texts)
    for group, heads in enumerate(groups):
        share = partial(Measurement, task="attention", metric="attention", length=length, heads=heads, sample=sample)
        rows = [float(probe.num_rows) for probe in probes]
        first = [float(probe.on_first[group]) for probe in probes]
        measurements.append(share(part="first token", numerators=first, denominators=rows))
        for number, edge in enumerate(probes[0].edges):
            sums = [float(probe.by_distance[group, number]) for probe in probes]
            measurements.append(share(position=edge, numerators=sums, denominators=rows))
    per_cell = torch.bincount(torch.arange(length) * MAP_CELLS // length, minlength=MAP_CELLS)
    maps = torch.stack([probe.maps for probe in probes]).mean(dim=0)
    return measurements, maps / per_cell[:, None].clamp(min=1)


def _sum_weights(model: Model, ids: Sequence[int], num_groups: int, progress: Callable[[int], object]) -> _WeightSums:
    """Read one text and return the sums of its attention weights."""
    probe = _WeightSums(num_layers=model.decoder.config.num_hidden_layers, num_groups=num_groups, length=len(ids))
    cache = model.decoder.allocate_cache(batch_size=1, max_tokens=len(ids))
    with model.decoder.probed(probe):
        for part in torch.tensor([list(ids)], device=model.device).split(CHUNK_TOKENS, dim=1):
            model.decoder(part, cache=cache, logits_to_keep=1)
            progress(part.shape[1])
    return probe


def draw_maps(maps: Tensor, groups: Sequence[str], title: str) -> Figure:
    """Draw attention maps [layers, groups, cells, cells]: a row of panels for each group, a column for each layer."""
    num_layers, num_groups = maps.shape[:2]
    figure = Figure(figsize=(1 + 1.7 * num_layers, 0.9 + 1.7 * num_groups), layout="constrained")
    axes = figure.subplots(num_groups, num_layers, squeeze=False)
    for group, layer in itertools.product(range(num_groups), range(num_layers)):
        panel = axes[group][layer]
        image = panel.imshow(maps[layer, group].numpy(), norm=LogNorm(vmin=1e-4, vmax=1), cmap="magma", aspect="equal")
        panel.set_xticks([])
        panel.set_yticks([])
        if group == 0:
            panel.set_title(f"layer {layer}", fontsize=9)
        if layer == 0:
            panel.set_ylabel(f"{groups[group]} heads", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8, label="attention weight")
    figure.suptitle(f"{title}: queries from top to bottom, keys from left to right", fontsize=10)
    return figure
