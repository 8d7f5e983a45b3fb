"""Helpers of the benchmarks: the machine that they ran on, and measurements in processes of their own."""

from __future__ import annotations

import argparse
import multiprocessing
import platform
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Create a parser whose help is the script's docstring."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def machine() -> str:
    """Describe CPU, threads and versions in one line."""
    return (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def run_in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function that runs in a new process, so that its memory use starts from a clean state.

    Args:
        function: Function of a module, which the new process imports.
        arguments: Picklable arguments.

    Raises:
        EOFError: The function failed; the process has printed its traceback.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def _send_result(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))
