"""Run state of checkpoints that are damaged or written by another tool."""

import copy

import pytest
import torch

from ropepp_lit.cli import main
from ropepp_lit.errors import UsageError
from ropepp_lit.train.optimizer import AdamW, Muon
from ropepp_lit.train.optimizer_state import check_optimizer_state
from ropepp_lit.train.run_state import read_run


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """Checkpoint of a run after two steps."""
    folder = tmp_path_factory.mktemp("saved")
    options = [
        "--trainer.max_steps",
        "2",
        "--trainer.default_root_dir",
        str(folder),
        "--trainer.limit_val_batches",
        "0",
    ]
    main(["fit", *tiny, *options])
    return torch.load(folder / "checkpoints/step=2.ckpt", weights_only=True)


LOOP = ("loops", "fit_loop")
PROGRESS = (*LOOP, "epoch_loop.batch_progress")
STEPS = (*LOOP, "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total")
OPTIMIZER = ("optimizer_states", 0)
POSITION = (*LOOP, "state_dict", "combined_loader", 0)
GONE = object()
WRONG = {
    # Where in the checkpoint, the value there, and what the error names.
    "the step of other weights": (("global_step",), 3, "its global_step is 3, and the steps counted are 2"),
    "no step": (("global_step",), GONE, "its global_step is 'None'"),
    "a step below 0": (("global_step",), -1, "its global_step is '-1'"),
    "counts that are a list": ((*PROGRESS, "current"), [1, 2], r"batch_progress.current is '\[1, 2\]'"),
    "no counts": ((*PROGRESS, "total"), GONE, "it has no 'total'"),
    "a count that is a text": ((*STEPS, "ready"), "nan", "step.total.ready is 'nan'"),
    "a count below 0": ((*PROGRESS, "total", "started"), -1, "batch_progress.total.started is -1"),
    "another count": (
        (*LOOP, "epoch_loop.state_dict", "_batches_that_stepped"), None, "_batches_that_stepped is 'None'"
    ),
    "no progress": ((*LOOP, "epoch_progress"), GONE, "it has no 'epoch_progress'"),
    "no loops": (("loops",), GONE, "it has no 'loops'"),
    "an epoch": (("epoch",), None, "its epoch is 'None'"),
    "a schedule elsewhere": (("lr_schedulers", 0, "last_epoch"), 7, "its schedule is at step 7, and global_step is 2"),
    "learning rates": (("lr_schedulers", 0, "base_lrs"), "x", "its base_lrs of the schedule is 'x'"),
    "no schedule": (("lr_schedulers",), [], "not enough values to unpack"),
    "callbacks": (("callbacks",), 7, "its state of callbacks is 7"),
    "a place in the data": ((*POSITION, "samples"), -4, "its position in the data is"),
    "another identity of the data": ((*POSITION, "identity"), {}, "its position in the data is"),
    "contents of the data": ((*POSITION, "identity", "contents"), [["a"]], "its position in the data is"),
    "a position that is none": (POSITION, "", "its position in the data is"),
    "no optimizer": (OPTIMIZER, [], "its optimizer state is not a dictionary"),
    "no groups": ((*OPTIMIZER, "param_groups"), GONE, "it has no 'param_groups'"),
    "a parameter in two groups": ((*OPTIMIZER, "param_groups", 0, "params", 1), 0, "belongs to parameters"),
    "a parameter of no group": ((*OPTIMIZER, "param_groups", 0, "params", 1), 99, "belongs to parameters"),
    "a tensor without content": (
        (*OPTIMIZER, "state", 0, "exp_avg"), torch.zeros(1).expand(10**12), "is larger than what is stored of it"
    ),
}  # fmt: skip


def changed(checkpoint, keys, value):
    """Return a copy of a checkpoint with another value at a path."""
    *path, last = keys
    checkpoint = copy.deepcopy(checkpoint)
    inner = checkpoint
    for key in path:
        inner = inner[key]
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    return checkpoint


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values(saved, tmp_path, case):
    keys, value, problem = WRONG[case]
    path = tmp_path / "step=2.ckpt"
    torch.save(changed(saved, keys, value), path)
    with pytest.raises(UsageError, match=f"{path}: damaged: .*{problem}"):
        read_run(path)


def test_a_run_continues_from_the_newest_checkpoint_that_is_right(saved, tiny, tmp_path, capsys):
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    torch.save(saved, folder / "step=2.ckpt")
    torch.save(changed({**saved, "global_step": 4}, ("loops",), GONE), folder / "step=4.ckpt")
    options = ["--trainer.max_steps", "3", "--trainer.default_root_dir", str(tmp_path / "run")]
    main(["fit", *tiny, *options, "--trainer.limit_val_batches", "0", "--ckpt_path", "auto"])
    output = capsys.readouterr().out
    assert f"step=4.ckpt is damaged: continuing from {folder}/step=2.ckpt" in output
    assert "(damaged: it has no 'loops')" in output


STATES = {
    "AdamW": (AdamW(), 0, {"exp_avg": GONE}, "it has no exp_avg|has no exp_avg of parameter 0"),
    "AdamW's mean": (AdamW(), 0, {"exp_avg": torch.tensor(2.0)}, r"exp_avg of parameter 0 is not a tensor of shape"),
    "AdamW's step": (AdamW(), 1, {"step": "x"}, r"step of parameter 1 is not a tensor of shape \(\)"),
    "Muon": (Muon(), 0, {"momentum_buffer": torch.zeros(3, 3)}, r"momentum_buffer of parameter 0"),
    "integers": (AdamW(), 0, {"exp_avg_sq": torch.zeros(4, 3, dtype=torch.int64)}, r"exp_avg_sq of parameter 0"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_does_not_fit(case):
    config, key, values, problem = STATES[case]
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = config.build(model)
    model(torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    check_optimizer_state(optimizer, state, "a.ckpt")
    for name, value in values.items():
        if value is GONE:
            del state["state"][key][name]
        else:
            state["state"][key][name] = value
    with pytest.raises(UsageError, match=f"a.ckpt: damaged: .*({problem})"):
        check_optimizer_state(optimizer, state, "a.ckpt")
    del state["param_groups"][0]["params"][-1]
    with pytest.raises(UsageError, match=r"a.ckpt: damaged: .*(no group|instead of)"):
        check_optimizer_state(optimizer, state, "a.ckpt")


def test_a_state_of_a_users_own_optimizer():
    class Own(torch.optim.SGD):
        pass

    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = Own([parameter], lr=0.1)
    state = optimizer.state_dict()
    state["state"][0] = {"row": torch.zeros(3), "column": torch.zeros(4)}
    check_optimizer_state(optimizer, state, "a.ckpt")
