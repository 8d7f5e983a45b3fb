import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ropepp_lit.checkpoint import write_checkpoint
from ropepp_lit.hf.export import export
from ropepp_lit.hf.folder import read_folder

GOLDENS = Path(__file__).parent.parent / "goldens"
CASES = ["rope_theta1e4", "eh_theta1e4", "ec_theta1e4", "ec_theta5e5", "ec_yarn32", "eh_pi8"]


def write_official(case, folder):
    """Write a golden case in the format of the public training script."""
    settings = json.loads((GOLDENS / case / "case.json").read_text())
    config = {
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_scaling": None,
        "use_cache": False,
        **settings["config"],
    }
    config |= {"ignore_index": 2, "attention_bias": False, "tie_word_embeddings": False}
    if settings["rope_config"]:
        config["rope_config"] = settings["rope_config"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(GOLDENS / case / settings["weights"]), folder / "model.safetensors")
    return folder


@pytest.fixture
def official_folder():
    """Function that writes a golden case in the format of the public training script."""
    return write_official


@pytest.fixture(scope="session")
def exports(tmp_path_factory, run_file):
    """Golden cases after import and export, and the results of transformers in a separate process."""
    root = tmp_path_factory.mktemp("exports")
    jobs = []
    for case in CASES:
        checkpoint = read_folder(write_official(case, root / "official" / case))
        write_checkpoint(root / f"{case}.ckpt", checkpoint)
        folder = root / "hf" / case
        export(checkpoint, folder, dtype=torch.float32, max_shard_bytes=10**9, check=False)
        io = GOLDENS / case / "io.safetensors"
        jobs.append({"folder": str(folder), "io": str(io), "answer": str(root / f"{case}.answer")})
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("in_transformers.py")
    run_file(script, root / "jobs.json", cwd=root)
    return root


@pytest.fixture(params=CASES)
def answers(request, exports):
    """Name of a case, golden values, and results of transformers."""
    return (
        request.param,
        load_file(GOLDENS / request.param / "io.safetensors"),
        load_file(exports / f"{request.param}.answer"),
    )


@pytest.fixture
def forked_check(run_file, tmp_path_factory, monkeypatch):
    """Run the check of `export` with `run_file`, which is faster than starting Python; the script is the same."""
    script = tmp_path_factory.mktemp("check") / "check.py"

    def run(command, *, cwd, **_):
        script.write_text(command[2])
        return run_file(script, *command[3:], cwd=cwd)

    monkeypatch.setattr("ropepp_lit.hf.export.subprocess", SimpleNamespace(run=run))
