"""The folder of a run is used by one run at a time."""

import pytest

from ropepp_lit.errors import UsageError
from ropepp_lit.files import held


@pytest.mark.end_to_end
def test_two_runs_in_a_folder(start_training, command_path, run, tiny, tmp_path):
    options = [*tiny, "--trainer.default_root_dir", "run", "--trainer.limit_val_batches", 0]
    options += ["--trainer.max_steps", 10**6, "--checkpoints.every_n_steps", 1]
    process = start_training(command_path, "fit", *options, cwd=tmp_path)
    recipe = (tmp_path / "run/recipe.yaml").read_text()
    refused = run("fit", *options, "--data.seed", 7, cwd=tmp_path, returncode=2)
    (line,) = [line for line in refused.stderr.splitlines() if "Seed set" not in line]
    assert line.startswith("ropepp-lit: error: run: another run is training in it; let it end, or choose another")
    assert process.poll() is None
    assert (tmp_path / "run/recipe.yaml").read_text() == recipe
    lock = tmp_path / "run/.lock"
    with pytest.raises(UsageError, match="busy"), held(lock, busy="busy"):
        raise AssertionError
    process.kill()
    process.wait(60)
    with held(lock, busy="busy") as has_locks:
        assert has_locks
