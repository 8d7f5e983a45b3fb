"""Plot the training loss of runs over the number of tokens read.

    python tools/draw_loss_curves.py runs/laptop runs/laptop-ntk … --out curves.png

Runs that start from the weights of the first run are shifted to the right by `--after TOKENS`.
"""

from __future__ import annotations

from pathlib import Path

from benchmarking import argument_parser
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from ropepp_lit.eval.report.panels import COLOURS


def read_curve(folder: Path) -> tuple[list[float], list[float]]:
    """Return the tokens read and the loss at each logged step of a run."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tokens = {event.step: make_ndarray(event.tensor_proto).item() for event in events.Tensors("tokens_seen")}
    losses = [event for event in events.Scalars("train/loss") if event.step in tokens]
    return [tokens[event.step] for event in losses], [event.value for event in losses]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; the others start from the first")
    parser.add_argument("--after", type=float, default=0.0, help="tokens at which the other runs start")
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
