"""Figures of the method (arXiv 2512.07525, Figures 1 and 3), computed with this package's rotation in float64.

Shapes: T distances, D head size. For a query at distance Δ from its key, the query is at position Δ and the key at
position 0, where the rotation is the identity. The entries of the rotated query are therefore the factors of the
entries of the key.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from torch import Tensor

from ropepp_lit.nn import Frequencies, RoPEPP

REAL, IMAGINARY = "#2563eb", "#ea580c"
DARK, GREY, LIGHT = "#111827", "#9ca3af", "#e5e7eb"
DASHES = (0, (3, 3))
EXTRAPOLATION = 8
"""Longest context of `draw_positions`, in multiples of the training context length."""


def rotate(query: Tensor, distances: Tensor, *, rope_theta: float) -> Tensor:
    """Rotate a query to each distance from a key at position 0, for its real and its imaginary head.

    Args:
        query: [D], float64.
        distances: [T], int64.
        rope_theta: Base of the rotary frequencies.

    Returns:
        Rotated queries [T, 2, D], float64, in the order real, imaginary.
    """
    scheme, head_dim = RoPEPP(), len(query)
    tables = scheme.tables(distances[None], Frequencies(rope_theta=rope_theta), head_dim=head_dim, dtype=query.dtype)
    queries = query.expand(1, len(distances), 1, head_dim)
    return scheme.rotate(queries, queries, tables)[0][0]


def scores(num_distances: int, *, head_dim: int, rope_theta: float) -> Tensor:
    """Return the real and imaginary score of a query and a key that are equal in every rotary pair, by distance.

    Each pair contributes q_n · conj(k_n) = 1, so the scores are the means over n of cos(θ_n Δ) and sin(θ_n Δ). Up to a
    factor, these are also the expected scores of random queries and keys with positively correlated pairs.

    Args:
        num_distances: Number of distances, starting at 0.
        head_dim: Head size D.
        rope_theta: Base of the rotary frequencies.

    Returns:
        Scores [2, num_distances], float64, in the order real, imaginary, relative to the real score at distance 0.
    """
    ones = torch.zeros(head_dim, dtype=torch.float64)
    ones[: head_dim // 2] = 1  # each pair is the complex number 1
    parts = _parts(num_distances, head_dim)
    return torch.cat([rotate(ones, part, rope_theta=rope_theta) @ ones for part in parts]).T / (head_dim // 2)


def limit_scores(distances: np.ndarray, *, rope_theta: float) -> np.ndarray:
    """Return the limit of :func:`scores` for many pairs, in closed form.

    With θ = base^(-x) and x even on [0, 1), the mean of exp(iθΔ) is the integral of exp(iu) / (u ln(base)) over u from
    Δ / base to Δ. Hence real (Ci(Δ) - Ci(Δ / base)) / ln(base), imaginary (Si(Δ) - Si(Δ / base)) / ln(base).

    Args:
        distances: [T], non-negative, not necessarily integers.
        rope_theta: Base of the rotary frequencies.

    Returns:
        Real and imaginary scores as complex numbers, [T], complex128.
    """
    values = np.ones(len(distances), dtype=np.complex128)  # the limit at distance 0
    far = distances > 0
    upper, lower = trigonometric_integrals(distances[far]), trigonometric_integrals(distances[far] / rope_theta)
    values[far] = (upper - lower) / math.log(rope_theta)
    return values


def trigonometric_integrals(x: np.ndarray) -> np.ndarray:
    """Return Ci(x) + i·Si(x), the cosine and sine integrals, with an error of about 1e-14.

    For x ≤ 4 by the power series γ + ln x + Σ (ix)^k / (k·k!), whose terms are small there; otherwise by the continued
    fraction of the exponential integral, using Ci(x) + i·Si(x) = iπ/2 - E1(-ix) (DLMF 6.5, 6.6 and 6.9).

    Args:
        x: [T], positive, float64.

    Returns:
        [T], complex128.
    """
    z = 1j * np.minimum(x, 4.0)
    series, term = np.euler_gamma + np.log(x) + 0j, np.ones_like(z)
    for k in range(1, 40):
        term = term * z / k
        series += term / k
    z = -1j * np.maximum(x, 4.0)
    fraction = np.zeros_like(z)
    for k in range(200, 0, -1):
        fraction = k * k / (z + 2 * k + 1 - fraction)
    return np.where(x <= 4.0, series, 0.5j * math.pi - np.exp(-z) / (z + 1 - fraction))


def factor_ranges(context_length: int, *, head_dim: int, rope_theta: float) -> Tensor:
    """Return the minimum and maximum factor of each dimension of a query within a context, for each key dimension.

    With φ = θ_n Δ, dimension n of a query contributes to the real score with the factors cos φ and sin φ, and to the
    imaginary score with sin φ and -cos φ; dimension n + D/2 with -sin φ and cos φ, and with cos φ and sin φ. For keys,
    the two dimensions are exchanged.

    Args:
        context_length: Context length in tokens; distances are smaller than it.
        head_dim: Head size D.
        rope_theta: Base of the rotary frequencies.

    Returns:
        [2, 2, 2, 2, D/2], float64: minimum and maximum; dimension n and n + D/2 of the query; real and imaginary;
        dimension n and n + D/2 of the key; pair n.
    """
    halves = []
    for half in range(2):
        query = torch.zeros(2, head_dim // 2, dtype=torch.float64)
        query[half] = 1
        parts = [
            torch.stack(rotate(query.flatten(), part, rope_theta=rope_theta).aminmax(dim=0))
            for part in _parts(context_length, head_dim)
        ]
        least, greatest = torch.stack(parts).unbind(dim=1)
        halves.append(torch.stack((least.amin(dim=0), greatest.amax(dim=0))).unflatten(-1, (2, -1)))
    return torch.stack(halves, dim=1)


def _parts(num_distances: int, head_dim: int) -> Iterator[Tensor]:
    """Split the distances 0, 1, 2, … into chunks whose rotated queries take a few megabytes."""
    step = max(1, 2**19 // head_dim)
    for start in range(0, num_distances, step):
        yield torch.arange(start, min(start + step, num_distances))


@matplotlib.rc_context({"font.size": 11})
def draw_scores(*, head_dim: int, rope_theta: float) -> Figure:
    """Plot scores by distance: single distances (dots), means within 15% (thick lines), closed forms (dashed lines)."""
    end = 100_000
    values = scores(end + 1, head_dim=head_dim, rope_theta=rope_theta).numpy()
    some = np.unique(np.geomspace(1, end, 1000).astype(int))
    centres = np.concatenate((np.arange(4), np.unique(np.geomspace(4, 0.85 * end, 300).astype(int))))
    smooth = np.concatenate((np.linspace(0, 1, 50), np.geomspace(1, end, 1000)))
    limits = limit_scores(smooth, rope_theta=rope_theta)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for score, limit, colour, label in (
        (values[0], limits.real, REAL, "real head: mean of cosines (RoPE)"),
        (values[1], limits.imag, IMAGINARY, "imaginary head: mean of sines (RoPE++ adds it)"),
    ):
        means = [score[int(c / 1.15 + 0.5) : int(c * 1.15 + 0.5) + 1].mean() for c in centres]
        axes.plot(some, score[some], ".", color=colour, markersize=2.4, markeredgewidth=0, alpha=0.4)
        axes.plot(centres, means, color=colour, linewidth=3, label=label)
        axes.plot(smooth, limit, color=DARK, linewidth=1, linestyle=DASHES)
    name = f"closed forms for many pairs, base b = {rope_theta:,g}"
    axes.plot([], [], color=DARK, linewidth=1, linestyle=DASHES, label=name)
    axes.text(300, limits.real[smooth >= 300][0] + 0.11, "(Ci(Δ) − Ci(Δ/b)) / ln b", fontsize=10, color=DARK)
    axes.text(1.5, -0.09, "(Si(Δ) − Si(Δ/b)) / ln b", fontsize=10, color=DARK)
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(0, end)
    axes.set_xticks([0, 1, 10, 100, 1_000, 10_000, 100_000], ["0", "1", "10", "100", "1k", "10k", "100k"])
    axes.set_xlabel("distance Δ between query and key (tokens)")
    axes.set_ylabel("score (relative to distance 0)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


@matplotlib.rc_context({"font.size": 11})
def draw_positions(*, head_dim: int, rope_theta: float, context_length: int) -> Figure:
    """Plot the ranges of the factors of query dimensions within the training context, and the extension beyond it."""
    longer = EXTRAPOLATION * context_length
    trained, beyond = (
        factor_ranges(tokens, head_dim=head_dim, rope_theta=rope_theta).numpy() for tokens in (context_length, longer)
    )
    frequencies = Frequencies(rope_theta=rope_theta).inverse_frequencies(head_dim, dtype=torch.float64)
    turns = frequencies.numpy() * (context_length - 1)
    num_pairs = head_dim // 2
    num_full = int((turns >= 2 * math.pi).sum())
    pairs = np.arange(max(0, min(num_full - 4, num_pairs - 16)), num_pairs)  # faster pairs cover the full range too
    ticks = pairs[pairs % max(1, round(len(pairs) / 5)) == 0].tolist()
    layers = (
        (beyond, [0, 1], LIGHT, f"new from {context_length:,} to {longer:,} tokens"),
        (trained, [1], IMAGINARY, "imaginary heads add (RoPE++)"),
        (trained, [0], REAL, "covered by real heads (RoPE)"),
    )
    figure = Figure(figsize=(8, 4), layout=ConstrainedLayoutEngine(wspace=0.05))
    for half, (axes, name, real, imaginary) in enumerate(
        zip(
            figure.subplots(1, 2, sharey=True),
            ("dimension n of a query", f"dimension n + {num_pairs} of a query"),
            ("real: cos φ, sin φ", "real: −sin φ, cos φ"),
            ("imaginary: sin φ, −cos φ", "imaginary: cos φ, sin φ"),
            strict=True,
        )
    ):
        for values, kinds, colour, _ in layers:
            for least, greatest in values[:, half, kinds].reshape(2, -1, num_pairs)[..., pairs].swapaxes(0, 1):
                axes.bar(pairs, greatest - least, bottom=least, width=0.8, color=colour)
        axes.set_title(name, fontsize=11, pad=22)
        axes.text(0, 1.03, real, fontsize=10, color=REAL, transform=axes.transAxes)
        axes.text(1, 1.03, imaginary, fontsize=10, color=IMAGINARY, transform=axes.transAxes, ha="right")
        axes.set_xticks(ticks, [f"{n}\n{math.degrees(turns[n]):,.0f}°" for n in ticks])
        axes.set_yticks([-1, 0, 1], ["−1", "0", "1"])
        axes.set_xlim(pairs[0] - 1, pairs[-1] + 1)
        axes.set_ylim(-1.02, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("factor (cosine or sine)", fontsize=11)
    figure.supxlabel(f"rotary pair n, and the largest angle φ = θₙΔ within {context_length:,} tokens", fontsize=11)
    figure.legend(
        handles=[Patch(color=colour, label=label) for _, _, colour, label in reversed(layers)],
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=10,
        handlelength=1.2,
        columnspacing=1.4,
    )
    return figure


def to_png(figure: Figure) -> bytes:
    """Render a figure as a PNG with 140 dpi."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=140, pil_kwargs={"optimize": True})
    return file.getvalue()
