"""`ropepp-lit doctor`: what it reports of this machine, and of machines with fake devices, packages and variables."""

import json
import os
import warnings
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

import ropepp_lit.commands.doctor as module
from ropepp_lit.nn import kernels
from ropepp_lit.sizes import in_bytes

H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=85_000_000_000, major=9, minor=0)


def lines(check, *arguments):
    return {line.name: line for line in check(*arguments)}


@pytest.mark.end_to_end
def test_report_of_this_machine(run, tmp_path):
    report = json.loads(run("doctor", "--json", cwd=tmp_path).stdout)
    assert report["problems"] == []
    assert report["version"] == metadata.version("ropepp-lit")
    assert {name: report["packages"][name] for name in ("torch", "lightning", "pyyaml")} == {
        name: metadata.version(name) for name in ("torch", "lightning", "pyyaml")
    }
    assert "dev" not in report["extras"]
    assert report["extras"]["eval"]["package"] == "lm-eval"
    assert report["machine"]["CPU"]["memory_bytes"] > 2**28
    assert report["storage"]["current folder"]["path"] == str(tmp_path)
    assert report["storage"]["current folder"]["free_bytes"] > 0
    assert report["devices"]["attention"]["implementation"] in kernels.IMPLEMENTATIONS

    printed = run("doctor", cwd=tmp_path).stdout.splitlines()
    assert printed[-1] == "Nothing is broken."
    assert f"{'torch':<20} {metadata.version('torch')}" in printed
    assert all(len(line) < 21 or line[20] == " " for line in printed[:-1])


@pytest.mark.parametrize(
    ("requirement", "text", "problem"),
    [
        ("numpy>=1", metadata.version("numpy"), None),
        ("numpy>=99", f"{metadata.version('numpy')}, outside >=99", "outside >=99; pip install 'numpy>=99'"),
        ("no-such-package<2", "not installed", "not installed; pip install 'no-such-package<2'"),
        # It is installed, and no module has its name.
        ("pytest-xdist", f"{metadata.version('pytest-xdist')}, cannot be imported", "(ModuleNotFoundError: No module"),
    ],
)
def test_required_packages(requirement, text, problem):
    (line,) = module.check_packages((requirement, "never-asked>=1; extra == 'dev'"))
    assert line.text == text
    assert (problem in line.problem) if problem else line.problem is None


def test_malicious_release_is_a_problem_and_is_not_imported(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "2.6.2")
    monkeypatch.setattr(module.importlib, "import_module", lambda name: pytest.fail(f"imports {name}"))
    found = lines(module.check_packages, ("lightning>=2.6,<3",))
    assert "GHSA-w37p-236h-pfx3" in found["malicious"].problem
    assert found["lightning"].problem is None


def fake_gpus(monkeypatch, gpus, *, driver="13.0", warning=None):
    def is_available():
        if warning:
            warnings.warn(warning, stacklevel=1)
        return bool(gpus)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpus[number])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: gpus[0].name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (gpus[0].major, gpus[0].minor))
    monkeypatch.setattr(module, "_cuda_of_driver", lambda: driver)


def test_gpus(monkeypatch):
    fake_gpus(monkeypatch, [H100, H100])
    found = lines(module.check_devices)
    assert found["CUDA"] == ("CUDA", "torch is built for 13.0; the driver supports 13.0", found["CUDA"].value, None)
    assert found["GPU 1"].text == f"NVIDIA H100 80GB HBM3, {in_bytes(85_000_000_000)}, compute capability 9.0"
    assert found["attention"].text.startswith("varlen (torch.nn.attention.varlen) in bfloat16; ")
    assert "fa3 needs the module flash_attn_interface; it is not installed" in found["attention"].text
    assert found["bfloat16"].value is True


def test_gpu_without_bfloat16(monkeypatch):
    fake_gpus(monkeypatch, [SimpleNamespace(name="Tesla T4", total_memory=2**34, major=7, minor=5)])
    assert lines(module.check_devices)["bfloat16"].text == "the GPU emulates it, which is slow"


@pytest.mark.parametrize(
    ("driver", "warning", "problem"),
    [
        (None, None, None),
        ("12.2", None, "built for CUDA 13.0 and finds no GPU, though there is a driver for CUDA 12.2; update the"),
        ("12.2", "The NVIDIA driver on your system\nis too old", ": The NVIDIA driver on your system is too old"),
    ],
)
def test_driver_and_build_that_do_not_match(monkeypatch, driver, warning, problem):
    fake_gpus(monkeypatch, [], driver=driver, warning=warning)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = lines(module.check_devices)
    assert (problem in found["CUDA"].problem) if problem else found["CUDA"].problem is None
    assert found["attention"].text.endswith("there is no CUDA device")


TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("variables", "text", "problem"),
    [
        ({}, "none: ropepp-lit starts the processes of a run itself", None),
        ({"WORLD_SIZE": "8"}, "; WORLD_SIZE set without one: unset what is left over of another program", None),
        (TORCHRUN, "torchrun", None),
        (
            {**TORCHRUN, "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            "torchrun",
            "torchrun --max_restarts 3: restarted processes would wait",
        ),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"}, "SLURM", None),
    ],
)
def test_launchers(monkeypatch, variables, text, problem):
    for name in os.environ:
        if name.startswith("SLURM_") or name in module._VARIABLES:
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = lines(module.check_launcher)
    assert found["launcher"].text.endswith(text)
    assert (problem in found["launcher"].problem) if problem else found["launcher"].problem is None
    assert {name: found[name].value for name in variables if name in found} == {
        name: value for name, value in variables.items() if name in module._VARIABLES
    }


def test_little_shared_memory_and_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(total=2**26, free=2**26))
    found = lines(module.check_storage)
    assert (
        found["/dev/shm"].text
        == "64.0 MiB; little for several GPUs: start the container with --shm-size 8g or --ipc host"
    )
    assert found["cache"].value["free_bytes"] == 2**26
    (tmp_path / "memory.max").write_text("max\n")
    assert module._memory_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1048576\n")
    assert module._memory_limit(tmp_path) == 2**20
    monkeypatch.setattr(module, "_memory_limit", lambda: 2**20)
    assert "of which this container may use 1.0 MiB" in lines(module.check_machine)["CPU"].text


@pytest.mark.parametrize("as_json", [False, True])
def test_a_problem_and_a_check_that_fails(monkeypatch, capsys, as_json):
    def broken():
        yield module.Line("torch", "1.0", "1.0", "torch 1.0: too old")
        raise OSError("libtorch.so: undefined\nsymbol")

    monkeypatch.setattr(module, "SECTIONS", {"packages": broken})
    problems = ["torch 1.0: too old", "packages: not checked: OSError: libtorch.so: undefined symbol"]
    with pytest.raises(SystemExit) as stop:
        module.main(["doctor", *["--json"] * as_json])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    if as_json:
        assert json.loads(printed) == {
            "version": metadata.version("ropepp-lit"), "problems": problems, "packages": {"torch": "1.0"}
        }  # fmt: skip
    else:
        assert printed.endswith("\nBroken: " + "\nBroken: ".join(problems) + "\n")
