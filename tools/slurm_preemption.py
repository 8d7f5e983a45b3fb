"""Preempt a SLURM training job that resumes each time, and compare the result with a job that was not preempted.

    python tools/slurm_preemption.py --out runs/slurm

Starts a cluster of one node on this machine (munged, slurmctld and slurmd, on Debian by `apt-get install slurmd
slurmctld munge`; needs root), submits the job script of recipes/devices.md with two tasks, and preempts it: by SIGUSR1,
as `--signal` does before the time limit, after which the script requeues the job; and by `scontrol requeue`, as SLURM
does for a job of higher priority. Weights, optimizer state, position in the data and curves must be bit-identical to
those of the job that was not preempted.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jsonargparse
from chaos_jobs import SHARDS, make_inputs, result

COMMAND = str(Path(sys.executable).parent / "ropepp-lit")

CONFIGURATION = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
ReturnToService=2
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

JOB = """#!/bin/bash
#SBATCH --ntasks=2 --ntasks-per-node=2 --signal=SIGUSR1@30 --requeue --open-mode=append --output=output
export OMP_NUM_THREADS=1
srun --overlap {command} fit --config {inputs}/recipe.yaml {data} --trainer.max_steps {steps} \\
    --checkpoints.every_n_steps 4 --trainer.devices 2 --trainer.strategy fsdp2 --trainer.default_root_dir run \\
    --ckpt_path auto
code=$?
echo "exit code $code"
[ $code -eq 138 ] && scontrol requeue $SLURM_JOB_ID  # stopped by SIGUSR1, and saved
exit $code
"""


class Cluster:
    """Context manager of a cluster of one node on this machine.

    Args:
        folder: Folder of its state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._munged: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cluster:
        """Start the cluster."""
        missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]
        if missing or os.geteuid():
            sys.exit(f"needs root and {', '.join(missing) or 'nothing else'}: apt-get install slurmd slurmctld munge")
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        text = CONFIGURATION.format(folder=self.folder, host=socket.gethostname().split(".")[0], cpus=os.cpu_count())
        (self.folder / "slurm.conf").write_text(text)
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            self._munged = subprocess.Popen(["runuser", "-u", "munge", "--", "munged", "--foreground"])
            _wait_for(
                lambda: not subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode, "munged"
            )
        for name in ("slurmctld", "slurmd"):
            subprocess.run([name], check=True)
        _wait_for(lambda: "idle" in ask("sinfo", "-h", "-o", "%t"), "an idle node")
        return self

    def __exit__(self, *_: object) -> None:
        """End its processes."""
        subprocess.run(["scancel", "--user", "root", "--signal=KILL"], check=False)
        for name in ("slurmd", "slurmctld"):
            path = self.folder / f"{name}.pid"
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)
        if self._munged is not None:
            self._munged.terminate()


def ask(*command: str) -> str:
    """Return the output of a command."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _wait_for(is_true: object, what: str, limit_s: float = 300) -> None:
    deadline = time.monotonic() + limit_s
    while not is_true():  # type: ignore[operator]
        if time.monotonic() > deadline:
            sys.exit(f"waited {limit_s:.0f} s for {what}")
        time.sleep(0.2)


def _state(job: str) -> str:
    found = re.search(r"JobState=(\w+)", ask("scontrol", "show", "job", job))
    assert found is not None
    return found[1]


def submit(folder: Path, script: str, preemptions: int) -> None:
    """Run a job in a folder to its end, preempting it the given number of times."""
    folder.mkdir(parents=True)
    (folder / "job.sh").write_text(script)
    job = ask("sbatch", "--parsable", "--chdir", str(folder), str(folder / "job.sh")).strip()
    seen = 0

    def newest() -> int:
        return max((int(path.stem[5:]) for path in folder.glob("run/checkpoints/step=*.ckpt")), default=0)

    for number in range(preemptions):
        _wait_for(lambda before=seen: newest() > before, f"a checkpoint of {folder}")
        if number % 2 == 0:
            ask("scancel", "--signal=USR1", f"{job}.0")
            how = "SIGUSR1"
        else:
            ask("scontrol", "requeue", job)
            how = "requeued"
        _wait_for(lambda: _state(job) == "PENDING", "the job to be queued again")
        ask("scontrol", "update", f"JobId={job}", "StartTime=now")
        seen = newest()
        print(f"preempted at step {seen} ({how})", flush=True)
    _wait_for(lambda: _state(job) not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), "the end of the job")
    if _state(job) != "COMPLETED":
        sys.exit(f"the job is {_state(job)}; see {folder}/output")


def slurm_preemption(*, out: Path, preemptions: int = 5, steps: int = 48) -> None:
    """Compare a preempted job with an undisturbed one.

    Args:
        out: New output folder.
        preemptions: Number of preemptions.
        steps: Number of training steps.
    """
    out = out.resolve()
    inputs = out / "inputs"
    make_inputs(inputs, lambda words: subprocess.run([COMMAND, *words], cwd=inputs, check=True, capture_output=True))
    data = " ".join(word.replace("{inputs}", str(inputs)) for word in SHARDS)
    script = JOB.format(command=COMMAND, inputs=inputs, data=data, steps=steps)
    with Cluster(out / "slurm"):
        submit(out / "undisturbed", script, 0)
        submit(out / "preempted", script, preemptions)
    one, other = (result(out / name) for name in ("undisturbed", "preempted"))
    differing = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name) and name != "output"]
    if differing:
        sys.exit(f"the preempted job differs in {', '.join(sorted(differing))}")
    print(f"Preempted {preemptions} times, and every file is that of the undisturbed job: {', '.join(sorted(one))}")


if __name__ == "__main__":
    jsonargparse.auto_cli(slurm_preemption, as_positional=False)
