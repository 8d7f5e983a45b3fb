"""Run the installed command in forks of a process that has already imported the libraries.

A run of a tiny model takes a second, importing PyTorch, Lightning and transformers four. A fork is a separate process,
with its own exit code, signals and memory; nothing of `ropepp_lit` is imported before the fork, which executes the file
of the installed command. Reads jobs from stdin, one line of JSON each, and prints the process id and the exit code of
the fork. A `detached` job runs concurrently with the next ones; its exit code is printed for `{"wait": ID}`.
"""

import gc
import importlib
import json
import os
import runpy
import sys

LIBRARIES = [
    "datasets", "lightning.pytorch.cli", "litdata", "matplotlib.figure", "pyarrow.parquet", "safetensors.torch",
    "tokenizers", "torch.utils.tensorboard", "transformers.models.llama.modeling_llama",
]  # fmt: skip


def become(job):
    """Turn this process into the process of a job."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, job["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        file = os.open(path, flags)
        os.dup2(file, number)
        os.close(file)
    sys.argv = job["command"]
    sys.path[0] = os.path.dirname(job["command"][0])


def serve():
    """Fork for each job; returns the job in the fork, and None in this process after the last job."""
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            become(job)
            return job
        print(pid, flush=True)
        if not job.get("detached"):
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


for library in LIBRARIES:
    importlib.import_module(library)
gc.collect()
gc.freeze()
if job := serve():
    runpy.run_path(job["command"][0], run_name="__main__")
