"""Draw the README's figure with the toolkit's own rotation.

    python tools/draw_figures.py

Writes .github/scores-by-distance.png: the score of a query and a key that agree in every rotary pair, against their
distance, for a real and an imaginary head (Figure 1 of arXiv 2512.07525).
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from ropepp_lit.nn import Frequencies, RoPEPP

FIGURE = Path(__file__).parent.parent / ".github" / "scores-by-distance.png"
HEAD_DIM = 128


def scores(distances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and imaginary score of a key at position 0 and a query at each distance, as shares of the score at 0."""
    scheme = RoPEPP()
    ones = torch.zeros(1, len(distances), 1, HEAD_DIM, dtype=torch.float64)
    ones[..., : HEAD_DIM // 2] = 1  # each pair is the complex number 1
    tables = scheme.tables(distances[None], Frequencies(), head_dim=HEAD_DIM, dtype=torch.float64)
    queries, _ = scheme.rotate(ones, ones, tables)
    values = queries[0] @ ones[0, 0, 0] / (HEAD_DIM // 2)
    return values[:, 0], values[:, 1]


def main() -> None:
    distances = torch.arange(100_001)
    plt.rcParams.update({"font.size": 11, "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    # Thick: the mean over distances within 30%; thin: some of the distances themselves.
    centres = torch.cat((torch.arange(4), torch.logspace(0.6, math.log10(85_000), 300).long().unique()))
    some = torch.logspace(0, 5, 1500).long().unique()
    for values, colour, label in zip(
        scores(distances),
        ("#2563eb", "#ea580c"),
        ("real head: sum of cosines (RoPE)", "imaginary head: sum of sines (RoPE++ adds it)"),
        strict=True,
    ):
        means = [values[int(c / 1.15 + 0.5) : int(c * 1.15 + 0.5) + 1].mean() for c in centres]
        axes.plot(some, values[some], color=colour, linewidth=0.5, alpha=0.3)
        axes.plot(centres, means, color=colour, linewidth=2.2, label=label)
    axes.axhline(0, color="#9ca3af", linewidth=0.8, zorder=0)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(0, 100_000)
    axes.set_xticks([0, 1, 10, 100, 1_000, 10_000, 100_000], ["0", "1", "10", "100", "1k", "10k", "100k"])
    axes.set_xlabel("distance between query and key (tokens)")
    axes.set_ylabel("score (share of that at 0)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(FIGURE, dpi=160)


if __name__ == "__main__":
    main()
