"""Output of the command: streams that survive any encoding and a closed pipe, progress bars, `--json` and `--quiet`."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from ropepp_lit.errors import DISK_ERRORS

if TYPE_CHECKING:
    from tqdm import tqdm

READER_GONE = 141
"""Exit code of a command that only prints, if its pipe is closed: that of a program ended by SIGPIPE."""

_PLAIN = str.maketrans("█–—−×→…·≥≤", "#---x>..><")
"""ASCII replacements, each as wide as the original."""


def prepare_streams(*, ends_with_reader: bool) -> None:
    r"""Configure stdout and stderr to print any text, and not to end the process if a pipe is closed.

    Characters that the encoding does not support are replaced by a similar ASCII character or `?`; bytes of a file name
    that is not UTF-8 are printed as `\xff`. Closed streams become the null device.

    Args:
        ends_with_reader: Exit with :data:`READER_GONE` if the pipe of stdout is closed. Otherwise the output is dropped
            and the command continues.
    """
    codecs.register_error("ropepp_lit.near", _near)
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _lasting(stream, ends=ends_with_reader and name == "stdout"))


def _lasting(stream: io.TextIOWrapper, *, ends: bool) -> io.TextIOWrapper:
    """Return a stream to the same file that handles encoding errors and closed pipes."""
    raw = getattr(stream.buffer, "raw", stream.buffer)  # with PYTHONUNBUFFERED there is no buffer
    if not isinstance(raw, io.FileIO):  # of a test or a notebook
        stream.reconfigure(errors="ropepp_lit.near")
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(raw.fileno(), ends=ends)),
        encoding=stream.encoding,
        errors="ropepp_lit.near",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


_is_quiet = False
"""Whether progress bars are off, by :func:`output`."""


@contextmanager
def output(*, as_json: bool, quiet: bool) -> Iterator[Callable[[Any], None]]:
    """Apply `--json` and `--quiet` to everything that is printed inside.

    Args:
        as_json: Print everything to stderr, so that stdout has nothing but the result.
        quiet: Print nothing to stdout but the result, and draw no progress bars. Errors and warnings, which go to
            stderr, are still printed.

    Yields:
        Function that prints the result to stdout as one line of JSON; it does nothing without `as_json`.
    """
    global _is_quiet
    stdout, before = sys.stdout, _is_quiet

    def print_result(result: Any) -> None:
        if as_json:
            print(json.dumps(result), file=stdout)

    with ExitStack() as stack:
        if quiet:
            _is_quiet = True
            for variable in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
                os.environ[variable] = "1"
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        elif as_json:
            stack.enter_context(redirect_stdout(sys.stderr))
        try:
            yield print_result
        finally:
            _is_quiet = before


def progress_bar(
    description: str, *, unit: str, total: float | None = None, initial: int = 0, scale: bool = False, show: bool = True
) -> tqdm:
    """Create a progress bar on stderr, which is drawn on a terminal only and removed when it is closed.

    Args:
        description: Text before the bar.
        unit: Name of what is counted, in the plural.
        total: Number of units; None means that it is not known.
        initial: Units that were done before.
        scale: Print numbers with k, M, G.
        show: Draw the bar.
    """
    from tqdm import tqdm

    return tqdm(
        desc=description,
        unit=f" {unit}",
        total=total,
        initial=initial,
        unit_scale=scale,
        file=sys.stderr,
        disable=None if show and not _is_quiet else True,  # None means: unless stderr is a terminal
        leave=False,
        dynamic_ncols=True,
    )


def quiet_full_disk_in_threads() -> None:
    """Suppress the traceback of a thread that cannot write, such as TensorBoard's: its next call raises the error."""
    previous = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        error = arguments.exc_value
        if not (isinstance(error, OSError) and error.errno in DISK_ERRORS):
            previous(arguments)

    threading.excepthook = hook


class _Descriptor(io.FileIO):
    """An open file, such as a pipe that may be closed by its reader."""

    def __init__(self, number: int, *, ends: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._ends = ends

    def write(self, data: Any) -> int:
        """Write, or drop the data if the pipe is closed."""
        try:
            return super().write(data)
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if self._ends:
                raise SystemExit(READER_GONE) from None
            return len(memoryview(data).cast("B"))


def _near(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that cannot be encoded (error handler of codecs)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(map(_near_character, text)), error.end


def _near_character(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that os.fsdecode could not decode
        return f"\\x{ord(character) - 0xDC00:02x}"
    plain = character.translate(_PLAIN)
    return plain if plain.isascii() else "?"
