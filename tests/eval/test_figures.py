"""Figures of the method, compared with formulas and closed forms, and the command `figures`."""

import io

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from ropepp_lit.cli import main
from ropepp_lit.eval.figures import (
    IMAGINARY,
    LIGHT,
    REAL,
    draw_positions,
    factor_ranges,
    limit_scores,
    scores,
    to_png,
    trigonometric_integrals,
)


def angles(num_distances, *, head_dim, rope_theta):
    """Return the angles θ_n Δ, [num_distances, head_dim / 2]."""
    pairs = np.arange(head_dim // 2)
    return np.arange(num_distances)[:, None] * rope_theta ** (-2 * pairs / head_dim)


def colours(png):
    """Return the colours of a figure, and its width and height."""
    pixels = imread(io.BytesIO(png))[..., :3]
    return {tuple(colour) for colour in np.unique((pixels * 255).round().reshape(-1, 3), axis=0)}, pixels.shape[1::-1]


def rgb(colour):
    return tuple(np.round(np.array(to_rgb(colour)) * 255))


@pytest.mark.parametrize(
    ("x", "cosine", "sine"),
    [
        (0.001, -6.3305398640805938, 0.00099999994444444611),
        (1.0, 0.33740392290096813, 0.94608307036718301),
        (4.0, -0.14098169788693041, 1.7582031389490531),  # the largest argument of the power series
        (4.01, -0.14260429630144631, 1.7563053683733345),  # continued fraction
        (10.0, -0.045456433004455373, 1.658347594218874),
        (100.0, -0.0051488251426104921, 1.5622254668890563),
        (1e5, 3.5758791572935136e-7, 1.5708063203993941),
    ],
)
def test_trigonometric_integrals(x, cosine, sine):
    actual = trigonometric_integrals(np.array([x]))[0]
    assert abs(actual.real - cosine) < 2e-15
    assert abs(actual.imag - sine) < 2e-15


@pytest.mark.parametrize(("head_dim", "rope_theta"), [(128, 10_000.0), (64, 500_000.0), (2, 7.5)])
def test_scores_are_means_of_cosines_and_sines(head_dim, rope_theta):
    phi = angles(20_000, head_dim=head_dim, rope_theta=rope_theta)  # more than one chunk
    real, imaginary = scores(20_000, head_dim=head_dim, rope_theta=rope_theta).numpy()
    np.testing.assert_allclose(real, np.cos(phi).mean(axis=1), atol=1e-9)
    np.testing.assert_allclose(imaginary, np.sin(phi).mean(axis=1), atol=1e-9)


@pytest.mark.parametrize("rope_theta", [10_000.0, 500_000.0])
def test_scores_of_many_pairs_approach_the_closed_form(rope_theta):
    distances = np.arange(300.0)
    limit = limit_scores(distances, rope_theta=rope_theta)
    assert limit[0] == 1
    head_dim = 4096
    real, imaginary = scores(300, head_dim=head_dim, rope_theta=rope_theta).numpy()
    # The mean includes the pair of frequency 1 and excludes that of 1 / base. With half of each it is a trapezoid
    # sum of step 2/d, whose error is nearly step²/12 times the difference of the slopes at its ends, Δ ln(base).
    ends = np.exp(1j * distances) - np.exp(1j * distances / rope_theta)
    error = np.abs(real + 1j * imaginary - ends / head_dim - limit)
    assert (error <= 1.1 * (2 / head_dim) ** 2 / 12 * distances * np.log(rope_theta) + 1e-12).all()
    assert error.max() < 1e-4


def test_factor_ranges_match_the_formula():
    cos, sin = (f(angles(10_000, head_dim=128, rope_theta=10_000.0)) for f in (np.cos, np.sin))
    expected = np.array([[[cos, sin], [sin, -cos]], [[-sin, cos], [cos, sin]]])  # query's dimension, head, key's
    actual = factor_ranges(10_000, head_dim=128, rope_theta=10_000.0).numpy()
    np.testing.assert_allclose(actual[0], expected.min(axis=-2), atol=1e-9)
    np.testing.assert_allclose(actual[1], expected.max(axis=-2), atol=1e-9)


def test_imaginary_heads_extend_the_factors_of_slow_pairs():
    least, greatest = factor_ranges(4096, head_dim=128, rope_theta=10_000.0)
    slow = angles(4096, head_dim=128, rope_theta=10_000.0)[-1] < np.pi / 2
    assert slow.nonzero()[0].tolist() == list(range(55, 64))  # as stated in the README
    # Dimension n of the query, [real or imaginary, pair], over both dimensions of the key.
    lowest, highest = least[0].amin(dim=1), greatest[0].amax(dim=1)
    assert bool((lowest[0, slow] >= 0).all())
    assert bool((lowest[1, slow] == -1).all())
    # With both groups of heads, pairs cover -1 to 1 after a quarter turn; with only real heads after half a turn.
    assert bool((lowest[0, 51:] > -0.9).all())
    assert torch.allclose(lowest[1, :55], torch.tensor(-1.0, dtype=torch.float64))
    assert torch.allclose(highest.amax(dim=0), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize(("head_dim", "context_length"), [(2, 2), (64, 200)])
def test_positions_are_plotted_for_any_geometry(head_dim, context_length):
    png = to_png(draw_positions(head_dim=head_dim, rope_theta=10_000.0, context_length=context_length))
    actual, size = colours(png)
    assert {rgb(REAL), rgb(IMAGINARY), rgb(LIGHT)} <= actual
    assert size == (1120, 560)


def test_pairs_with_full_rotations_have_no_new_factors():
    figure = draw_positions(head_dim=8, rope_theta=2.0, context_length=4096)
    blue = [bar.get_height() for bar in figure.axes[0].patches if bar.get_facecolor()[:3] == to_rgb(REAL)]
    assert len(blue) == 8  # four pairs, cos and sin
    assert min(blue) > 1.999


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "out: name the folder of the figures by --out"),
        (["--out", "new", "--head_dim", "7"], "head_dim: 7 must be even, and 2 or more"),
        (["--out", "new", "--head_dim", "0"], "head_dim: 0 must be even, and 2 or more"),
        (["--out", "new", "--rope_theta", "1"], "rope_theta: 1.0 must be above 1 and finite"),
        (["--out", "new", "--rope_theta", ".inf"], "rope_theta: inf must be above 1 and finite"),
        (["--out", "new", "--rope_theta", "many"], "rope_theta"),
        (["--out", "new", "--context_length", "1"], "context_length: 1 must be 2 or more"),
        (["--out", "new", "--colour", "red"], "colour"),
        (["--out", "file"], "out: file: File exists"),
        (["--out", "file/new"], "out: file/new: Not a directory"),
    ],
)
def test_invalid_options(options, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["figures", *options])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ropepp-lit: error: ")
    assert expected in line
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


@pytest.mark.end_to_end
def test_the_command_writes_both_figures(run, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "positions-seen.png").write_text("an older one")
    options = ["--head_dim", "64", "--context_length", "1024", "--rope_theta", "20000"]
    printed = run("figures", "--out", "pictures", *options, cwd=tmp_path).stdout
    assert "scores-by-distance.png" in printed
    actual = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert sorted(actual) == ["positions-seen.png", "scores-by-distance.png"]
    for name, height in (("scores-by-distance.png", 504), ("positions-seen.png", 560)):
        painted, size = colours(actual[name])
        assert size == (1120, height)
        assert {rgb(REAL), rgb(IMAGINARY)} <= painted
        assert len(actual[name]) < 120_000  # included in the README
