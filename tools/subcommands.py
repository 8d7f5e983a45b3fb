"""Run subcommands of ropepp-lit in processes of their own; a finished training is not repeated."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ropepp_lit.checkpoint import read_checkpoint
from ropepp_lit.files import write_whole

RECIPES = Path(__file__).parent.parent / "recipes"


def fit(
    folder: Path, recipes: Sequence[Path | str], options: Sequence[str] = (), *, threads: int | None = None
) -> dict[str, Any]:
    """Train into a folder, or resume the run there; a finished run is not repeated.

    Exits if the training fails, or if the folder holds the run of another command.

    Args:
        folder: Folder of the run; its output goes to a file next to it that ends with .log.
        recipes: Recipes, later ones override earlier ones.
        options: Options of `fit`.
        threads: Number of PyTorch threads; None means the default of the environment.

    Returns:
        Contents of `finished.json` in the folder:

        | key        | value                                                            |
        |------------|------------------------------------------------------------------|
        | `command`  | arguments after `ropepp-lit`                                     |
        | `step`     | optimizer steps                                                  |
        | `seconds`  | duration of the command; None if the run was resumed             |
        | `peak_gib` | peak resident memory of its process; None if the run was resumed |
    """
    configs = itertools.chain.from_iterable(("--config", str(name)) for name in recipes)
    command = ["fit", *configs, *options, "--trainer.default_root_dir", str(folder), "--ckpt_path", "auto"]
    shown = [word.replace(str(RECIPES), RECIPES.name) for word in command]  # the same in another clone
    finished = folder / "finished.json"
    if finished.exists():
        found: dict[str, Any] = json.loads(finished.read_text())
        if found["command"] != shown:
            sys.exit(f"{folder}: holds the run of another command (see {finished}); name another --out")
        return found
    last = folder / "checkpoints" / "last.ckpt"
    is_new, started = not last.exists(), time.monotonic()
    peak = run(command, log=folder.parent / f"{folder.name}.log", threads=threads)
    found = {"command": shown, "step": read_checkpoint(last)["global_step"]}
    found |= (
        {"seconds": time.monotonic() - started, "peak_gib": peak} if is_new else {"seconds": None, "peak_gib": None}
    )
    write_whole(finished, json.dumps(found, indent=1))
    return found


def run(command: Sequence[str], *, log: Path | None = None, threads: int | None = None) -> float:
    """Run a subcommand; exits if it fails.

    Args:
        command: Arguments after `ropepp-lit`.
        log: File to append its output to; None means the terminal.
        threads: Number of PyTorch threads; None means the default of the environment.

    Returns:
        Peak resident memory of its process in GiB.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    words = [sys.executable, "-m", "ropepp_lit", *command]
    if log is None:
        code, peak = _wait(subprocess.Popen(words, env=environment))
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            code, peak = _wait(subprocess.Popen(words, env=environment, stdout=file, stderr=file))
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] if log else []
        sys.exit(f"`ropepp-lit {command[0]}` ended with {code}" + "".join(f"; see {log}: {line}" for line in last))
    return peak


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """Wait for a process; returns its exit code and peak memory in GiB."""
    with process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    return process.returncode, usage.ru_maxrss * unit / 2**30
