"""Conversion of errors of Lightning, strategies, cluster environments and the disk to one-line messages."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ropepp_lit.errors import DISK_ERRORS, LostProcessError, UsageError

_ENVIRONMENTS = "lightning.fabric.plugins.environments"
_SETTING_MODULES = (
    "lightning.fabric.accelerators",
    "lightning.fabric.connector",
    "lightning.fabric.plugins",
    "lightning.fabric.strategies",
    "lightning.fabric.utilities.device_parser",
    "lightning.fabric.loggers",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.pytorch.trainer.connectors",
    "lightning.pytorch.trainer.setup",
    "lightning.pytorch.trainer.trainer",
)
"""Modules of Lightning that raise errors about settings."""

_MAX_LENGTH = 400
"""Maximum number of characters of a message; of longer ones only the first line is used."""


@contextmanager
def in_one_line(key: str) -> Iterator[None]:
    """Convert errors about settings or the environment to UsageError; other exceptions are bugs and propagate.

    Args:
        key: Key of the recipe with which the message starts.
    """
    try:
        yield
    except UsageError:
        raise
    except MisconfigurationException as error:
        raise UsageError(f"{key}: {_message(error)}") from error
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UsageError(
            f"{error.filename or 'the files of the run'}: cannot be written: {error.strerror}; when that is fixed, "
            "continue by --ckpt_path auto"
        ) from error
    except Exception as error:
        root = _root(error)
        if _is_lost_process(root) and not _is_connecting(error):
            raise LostProcessError(
                f"another process of the run cannot be reached any more ({_first_sentence(root)}); its own last lines "
                "give the reason; continue by --ckpt_path auto"
            ) from error
        if _is_setting_error(root) and root is not error:  # wrapped by the parser, which instantiated a class
            raise UsageError(f"{key}: {_message(root)}") from error
        modules = _modules(error.__traceback__)
        if any(module.startswith(_ENVIRONMENTS) for module in modules):
            raise UsageError(f"the cluster's environment variables: {_describe(error)}") from error
        if _is_connecting(error):
            raise UsageError(f"the processes cannot connect: {_describe(error)}") from error
        if modules and modules[-1].startswith(_SETTING_MODULES):
            raise UsageError(f"{key}: {_describe(error)}") from error
        raise


def check_launcher(variables: Mapping[str, str]) -> None:
    """Check that processes restarted by torchrun would not wait for the previous ones.

    They would read the previous addresses from the store that they share with the launcher (pytorch issue 135712).

    Args:
        variables: Environment variables of the process.

    Raises:
        UsageError: torchrun can restart the processes and reuses their store.
    """
    restarts = variables.get("TORCHELASTIC_MAX_RESTARTS", "0")
    keeps_store = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts != "0" and keeps_store and variables.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            f"torchrun --max_restarts {restarts}: restarted processes would wait for the previous ones forever; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"
        )


def _root(error: BaseException) -> BaseException:
    """Return the first exception of a chain."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _is_lost_process(error: BaseException) -> bool:
    """Return whether a collective failed because another process has ended or timed out."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _is_connecting(error: BaseException) -> bool:
    """Return whether the error occurred while the processes connected."""
    return "_init_dist_connection" in _functions(error.__traceback__)


def _first_sentence(error: BaseException) -> str:
    """Return the first sentence of a collective's error, without the location in the library's source."""
    return re.sub(r"^\[[^]]*\] *", "", _message(error)).split(". ")[0]


def _is_setting_error(error: BaseException) -> bool:
    return isinstance(error, MisconfigurationException | ModuleNotFoundError)


def _modules(trace: TracebackType | None) -> list[str]:
    return [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(trace)]


def _functions(trace: TracebackType | None) -> list[str]:
    return [frame.f_code.co_name for frame, _ in traceback.walk_tb(trace)]


def _describe(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is not set" if error.args else "a name is missing"
    return _message(error)


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if len(text) > _MAX_LENGTH:
        text = next(line for line in str(error).splitlines() if line.strip()).strip()
    return text or type(error).__name__
