"""Draw the training loss of runs against the tokens they have read.

    python tools/draw_loss_curves.py runs/laptop runs/laptop-ntk … --out curves.png

A run that began from another's weights is drawn behind it, where `--after TOKENS` says.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

COLOURS = ("#111827", "#2563eb", "#ea580c", "#16a34a", "#9333ea", "#9ca3af")


def read_curve(folder: Path) -> tuple[list[float], list[float]]:
    """Tokens read and loss at each time that a run logged them."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tokens = {event.step: make_ndarray(event.tensor_proto).item() for event in events.Tensors("tokens_seen")}
    losses = [event for event in events.Scalars("train/loss") if event.step in tokens]
    return [tokens[event.step] for event in losses], [event.value for event in losses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; the first is where others begin")
    parser.add_argument("--after", type=float, default=0.0, help="tokens that the runs behind the first begin at")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (folder, colour) in enumerate(zip(options.runs, COLOURS, strict=False)):
        tokens, losses = read_curve(folder)
        shift = options.after if number else 0.0
        axes.plot([(count + shift) / 1e6 for count in tokens], losses, color=colour, linewidth=1.6, label=folder.name)
    axes.set_xlabel("million tokens read")
    axes.set_ylabel("training loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(options.out, dpi=160)


if __name__ == "__main__":
    main()
