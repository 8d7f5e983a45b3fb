"""Property tests of sizes: formatted sizes are parsed exactly, and errors have one line."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropepp_lit.errors import UsageError
from ropepp_lit.eval.report.panels import short_length
from ropepp_lit.sizes import parse_bytes, parse_tokens

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SPACE = st.sampled_from(["", " ", "  ", "\t"])


@given(
    whole=st.integers(0, 10**12), decimals=st.one_of(st.just(""), st.integers(0, 10**9).map(str)),
    unit=st.sampled_from(sorted(UNITS)), change=st.sampled_from([str, str.lower, str.upper]), space=SPACE,
)  # fmt: skip
def test_bytes_are_exact(whole, decimals, unit, change, space):
    number = f"{whole}.{decimals}" if decimals else str(whole)
    expected = int(Fraction(number) * UNITS[unit])
    text = f"{space}{number}{space}{change(unit)}{space}"
    if expected:
        assert parse_bytes("key", text) == expected
    else:
        with pytest.raises(UsageError, match=r"^key: .* is not a size such as"):
            parse_bytes("key", text)


@given(lengths=st.lists(st.integers(1, 2**40), min_size=1, max_size=6), space=SPACE)
def test_printed_lengths_are_parsed_exactly(lengths, space):
    lengths = [length if length < 2**20 else length // 1024 * 1024 for length in lengths]
    assert [int(short_length(length).replace(",", "").replace("k", "")) for length in lengths] == [
        length // 1024 if length % 1024 == 0 else length for length in lengths
    ]
    printed = f"{space},{space}".join(short_length(length).replace(",", "") for length in lengths)
    assert parse_tokens("key", printed) == sorted(set(lengths))
    assert parse_tokens("key", ",".join(map(str, lengths))) == sorted(set(lengths))


ANYTHING = st.one_of(
    st.text(max_size=12),
    st.text("0123456789.,kKmMgGiIbBtT-+e_ ", max_size=12),
    st.integers(15, 6000).map(lambda digits: "9" * digits + "B"),
    st.integers(15, 6000).map(lambda digits: "9" * digits),
)


def attempt(parse, text):
    """Return the parsed value, and the error message if there is none."""
    try:
        return parse("key", text), None
    except UsageError as error:
        return None, str(error)


@given(text=ANYTHING)
def test_errors_have_one_line(text):
    for parse in (parse_bytes, parse_tokens):
        found, message = attempt(parse, text)
        if message is None:
            assert min(found if isinstance(found, list) else [found]) >= 1
            assert set(text.lower()) <= set("0123456789.,kmgtib \t\n\r\v\f")
        else:
            assert message.startswith("key: ")
            assert len(message.splitlines()) == 1
