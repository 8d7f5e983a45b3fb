"""`ropepp-lit doctor`: what is installed, which devices there are, and what a run would use of them."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ropepp_lit.errors import EXIT_CODES, UsageError
from ropepp_lit.malicious import refuse_malicious
from ropepp_lit.sizes import in_bytes

# Other imports wait until it is known whether the packages can be imported.

_MODULES = {"backports-zstd": "backports.zstd", "lightning": "lightning.pytorch", "pyyaml": "yaml"}
"""Modules of the packages whose module has another name."""

_LITTLE_SHARED_MEMORY = 2**30
"""Bytes; Docker gives a container 64 MiB by default."""

_VARIABLES = (
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_NTASKS",
    "SLURM_NNODES", "SLURM_PROCID", "SLURM_LOCALID", "LSB_JOBID", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
"""Environment variables that decide how many processes a run has, and on which devices."""


class Line(NamedTuple):
    """One line of the report."""

    name: str
    """Name, printed in the left column; also the key in JSON."""
    text: str
    """Description for people."""
    value: Any
    """The same for programs, JSON's types."""
    problem: str | None = None
    """What is broken, and how to repair it; None means nothing."""


def check_packages(packages: tuple[str, ...] = ()) -> Iterator[Line]:
    """Check that the required packages have versions within the bounds of our metadata, and can be imported.

    Args:
        packages: Requirements as in pyproject.toml; empty means those of the installed ropepp-lit.
    """
    from packaging.requirements import Requirement

    is_safe = True
    try:
        refuse_malicious()
    except UsageError as error:
        is_safe = False
        yield Line("malicious", "found, so no package is imported", True, str(error))
    required = packages or _requirements()
    if not required:
        yield Line("ropepp-lit", "not installed", None, "ropepp-lit: no metadata; install it by pip install -e .")
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, version = requirement.name, _version(requirement.name)
        remedy = f"pip install '{requirement}'"
        if version is None:
            yield Line(name, "not installed", None, f"{name}: not installed; {remedy}")
        elif not requirement.specifier.contains(version, prereleases=True):
            problem = f"{name} {version}: outside {requirement.specifier}; {remedy}"
            yield Line(name, f"{version}, outside {requirement.specifier}", version, problem)
        elif is_safe and (failure := _import_failure(_MODULES.get(name, name.replace("-", "_")))):
            problem = f"{name} {version}: cannot be imported ({failure}); {remedy} --force-reinstall"
            yield Line(name, f"{version}, cannot be imported", version, problem)
        else:
            yield Line(name, version, version)


def _requirements() -> tuple[str, ...]:
    with suppress(metadata.PackageNotFoundError):
        return tuple(metadata.requires("ropepp-lit") or ())
    return ()


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _import_failure(module: str) -> str | None:
    """Import a module; returns why it failed. A broken package may raise anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def check_extras() -> Iterator[Line]:
    """Report the optional extras: what is installed, or the command that installs it."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, _requirements()):
        extra = str(requirement.marker).partition("extra == ")[2].strip('"')
        if not extra or extra == "dev":
            continue
        version = _version(requirement.name)
        isolated = " --no-build-isolation" if extra == "flash" else ""
        command = f"pip install 'ropepp-lit[{extra}]'{isolated}"
        text = f"{requirement.name} {version}"
        if version is None:
            text = f"not installed: {command}"
        elif not requirement.specifier.contains(version, prereleases=True):
            text += f", outside {requirement.specifier}: {command}"
        yield Line(extra, text, {"package": requirement.name, "version": version, "command": command})


def check_machine() -> Iterator[Line]:
    """Report Python, CPU cores and memory."""
    version = platform.python_version()
    yield Line("Python", f"{version}, {platform.system()} {platform.machine()}, {sys.executable}", version)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _memory_limit()
    text = f"{usable} cores, {in_bytes(memory)} of memory"
    if limit is not None and limit < memory:
        text += f", of which this container may use {in_bytes(limit)}"
        memory = limit
    yield Line("CPU", text, {"cores": usable, "memory_bytes": memory})


def _memory_limit(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the control group of a container may use; None where there is no limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            return int((folder / name).read_text())
    return None


def check_devices() -> Iterator[Line]:
    """Report the GPUs, whether torch can use them, attention and bfloat16; importing torch must have succeeded."""
    import torch

    build = torch.version.cuda or torch.version.hip
    driver = _cuda_of_driver() if torch.version.cuda else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        gpus = [torch.cuda.get_device_properties(number) for number in range(count)]
    notes = [" ".join(str(warning.message).split()) for warning in caught]
    text = f"torch is built for {build}" if build else "torch is built for CPUs alone"
    if torch.version.cuda:
        text += f"; the driver supports {driver}" if driver else "; there is no NVIDIA driver"
    problem = None
    if notes:
        problem = f"torch {torch.__version__}: {notes[0]}"
    elif driver and not gpus and "CUDA_VISIBLE_DEVICES" not in os.environ:
        problem = (
            f"torch {torch.__version__}: built for CUDA {build} and finds no GPU, though there is a driver for CUDA "
            f"{driver}; update the driver, or install the build of torch for CUDA {driver}"
        )
    value = {"build": build, "driver": driver}
    yield Line("ROCm" if torch.version.hip else "CUDA", text, value, problem)
    for number, gpu in enumerate(gpus):
        capability = f"{gpu.major}.{gpu.minor}"
        values = {"name": gpu.name, "memory_bytes": gpu.total_memory, "compute_capability": capability}
        text = f"{gpu.name}, {in_bytes(gpu.total_memory)}, compute capability {capability}"
        yield Line(f"GPU {number}", text, values)
    device = torch.device("cuda" if gpus else "cpu")
    yield _attention(device)
    yield _bfloat16(device)


def _cuda_of_driver() -> str | None:
    """The newest CUDA version that the NVIDIA driver supports; None where there is no driver."""
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed or not version.value else f"{version.value // 1000}.{version.value % 1000 // 10}"


def _attention(device: Any) -> Line:
    """The implementation that `model.attention` chooses by default, and why the others are not it."""
    import torch

    from ropepp_lit.nn.kernels import IMPLEMENTATIONS, describe, select_implementation

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    refused = []
    for name in IMPLEMENTATIONS:
        try:
            select_implementation(name, device)
        except UsageError as error:
            refused.append(str(error).removeprefix("model.attention: "))
    chosen = select_implementation(None, device)
    text = describe(chosen, device, dtype)
    reasons = ["there is no CUDA device"] if device.type == "cpu" else refused
    text += f"; {'; '.join(reasons)}" if reasons else ""
    return Line("attention", text, {"implementation": chosen, "reasons": reasons})


def _bfloat16(device: Any) -> Line:
    import torch

    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        is_native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    where = "GPU" if device.type == "cuda" else "CPU"
    text = f"the {where} has instructions for it" if is_native else f"the {where} emulates it, which is slow"
    return Line("bfloat16", text, is_native)


def check_storage() -> Iterator[Line]:
    """Report free space: shared memory, the current folder, our cache folder and that of the Hugging Face Hub."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from ropepp_lit.data.remote import default_cache_dir
    from ropepp_lit.train.disk_space import free_bytes

    shared = Path("/dev/shm")  # noqa: S108
    if shared.is_dir():
        total = shutil.disk_usage(shared).total
        text = f"{in_bytes(total)}"
        if total < _LITTLE_SHARED_MEMORY:
            text += "; little for several GPUs: start the container with --shm-size 8g or --ipc host"
        yield Line(str(shared), text, {"bytes": total})
    for name, folder in (
        ("current folder", Path.cwd()),
        ("cache", default_cache_dir()),
        ("Hub's cache", Path(HF_HUB_CACHE)),
    ):
        free = free_bytes(folder)
        text = f"{folder}: {'unknown' if free is None else in_bytes(free)} free"
        yield Line(name, text, {"path": str(folder), "free_bytes": free})


def check_launcher() -> Iterator[Line]:
    """Report the environment variables of launchers and schedulers, and what Lightning makes of them."""
    from lightning.fabric.plugins import environments

    from ropepp_lit.train.lightning_errors import check_launcher as check_restarts

    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    # In the order of Lightning's trainer.
    launchers: dict[str, type[environments.ClusterEnvironment]] = {
        "torchrun": environments.TorchElasticEnvironment,
        "SLURM": environments.SLURMEnvironment,
        "LSF": environments.LSFEnvironment,
        "MPI": environments.MPIEnvironment,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        launcher = next((name for name, kind in launchers.items() if kind.detect()), None)
    names = [name for name in variables if name not in ("CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT")]
    text = launcher or "none: ropepp-lit starts the processes of a run itself"
    if launcher is None and names:
        text += f"; {', '.join(names)} set without one: unset what is left over of another program"
    problem = None
    try:
        check_restarts(os.environ)
    except UsageError as error:
        problem = str(error)
    yield Line("launcher", text, launcher, problem)
    for name, value in variables.items():
        yield Line(name, value, value)


SECTIONS: dict[str, Callable[[], Iterator[Line]]] = {
    "machine": check_machine,
    "packages": check_packages,
    "extras": check_extras,
    "devices": check_devices,
    "storage": check_storage,
    "launcher": check_launcher,
}
"""The parts of the report, by key in JSON; packages come before what needs them."""


def doctor(*, as_json: bool) -> int:
    """Print the report.

    Args:
        as_json: Print one JSON object: `version`, `problems` (a list of texts), and an object for each of
            :data:`SECTIONS` with a value for each line.

    Returns:
        Exit code: 1 where something is broken, else 0.
    """
    version = _version("ropepp-lit")
    report: dict[str, list[Line]] = {}
    problems: list[str] = []
    for section, check in SECTIONS.items():
        report[section] = []
        try:
            for line in check():
                report[section].append(line)
                problems += [line.problem] if line.problem else []
        except Exception as error:  # of a broken package, such as torch
            problems.append(f"{section}: not checked: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    if as_json:
        sections = {name: {line.name: line.value for line in lines} for name, lines in report.items()}
        print(json.dumps({"version": version, "problems": problems, **sections}, indent=2))
        return int(bool(problems))
    print(f"{'ropepp-lit':<20} {version}")
    for lines in report.values():
        print("".join(f"\n{line.name:<20} {line.text}" for line in lines))
    print("".join(f"\nBroken: {problem}" for problem in problems) or "\nNothing is broken.")
    return int(bool(problems))


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    parser = argparse.ArgumentParser(
        prog="ropepp-lit doctor",
        description="Report what is installed, which devices there are and what a run would use of them; exits with 1 "
        "where something is broken.",
        epilog=EXIT_CODES,  # this parser does not depend on jsonargparse, which may be what is broken
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    sys.exit(doctor(as_json=parser.parse_args(arguments[1:]).json))
