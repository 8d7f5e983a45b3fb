"""`ropepp-lit figures`: the figures of the method, as in the README."""

from __future__ import annotations

from ropepp_lit.arguments import call


def figures(
    *, out: str | None = None, rope_theta: float = 10_000.0, head_dim: int = 128, context_length: int = 4096
) -> None:
    """Draw the figures of the method with the toolkit's own rotation.

    scores-by-distance.png has the score of a real and an imaginary head against distance; positions-seen.png the
    cosines and sines that slow rotary pairs meet within the trained length, and those that are new beyond it.

    Args:
        out: Folder of the figures, made where there is none; files of these two names are replaced.
        rope_theta: The base of the rotary frequencies.
        head_dim: Dimensions of a head, even.
        context_length: Tokens of the trained length, in positions-seen.png.
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
    from ropepp_lit.files import write_whole  # heavy imports wait until the arguments are known to be right

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
