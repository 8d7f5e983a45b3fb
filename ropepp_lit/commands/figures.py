"""`ropepp-lit figures`: the figures of the method that the README shows."""

from __future__ import annotations

from ropepp_lit.arguments import call


def figures(
    *, out: str | None = None, rope_theta: float = 10_000.0, head_dim: int = 128, context_length: int = 4096
) -> None:
    """Draw the figures of the method, computed by the rotation of this package.

    scores-by-distance.png shows the attention score of a real and an imaginary head over distance; positions-seen.png
    shows which cosines and sines of slow rotary pairs occur within the trained length, and which only beyond it.

    Args:
        out: Output folder, created if needed; existing files of these two names are replaced.
        rope_theta: Base of the rotary frequencies.
        head_dim: Head size, even.
        context_length: Trained length in tokens, for positions-seen.png.
    """
    import math
    from pathlib import Path

    from ropepp_lit.errors import UsageError

    if out is None:
        raise UsageError("out: name the folder of the figures by --out")
    if not 1 < rope_theta < math.inf:
        raise UsageError(f"rope_theta: {rope_theta} must be above 1 and finite")
    if head_dim < 2 or head_dim % 2:
        raise UsageError(f"head_dim: {head_dim} must be even, and 2 or more")
    if context_length < 2:
        raise UsageError(f"context_length: {context_length} must be 2 or more")

    from ropepp_lit.eval.figures import draw_positions, draw_scores, to_png
    from ropepp_lit.files import write_whole  # heavy imports follow the checks of the arguments

    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scores = draw_scores(head_dim=head_dim, rope_theta=rope_theta)
        write_whole(folder / "scores-by-distance.png", to_png(scores))
        positions = draw_positions(head_dim=head_dim, rope_theta=rope_theta, context_length=context_length)
        write_whole(folder / "positions-seen.png", to_png(positions))
    except OSError as error:
        raise UsageError(f"out: {folder}: {error.strerror}") from error
    print(f"{folder} has scores-by-distance.png and positions-seen.png.")


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    call(figures, arguments)
