"""Events in `run.jsonl`, and the file after kills and on a full disk."""

import json
import resource
import signal
from pathlib import Path

import pytest
from runs import At, KillError, kill, terminate

from ropepp_lit.cli import main
from ropepp_lit.train.run_log import RunLog, read_run_log

pytestmark = pytest.mark.end_to_end


def test_events_of_a_run(fit, capsys):
    """A run is stopped by a signal, killed, resumed with a damaged newest checkpoint, and finished."""
    with pytest.raises(SystemExit):
        fit("run", callbacks=[At("on_train_batch_end", terminate, batch=13)])
    with pytest.raises(KillError):
        fit("run", "--ckpt_path", "auto", callbacks=[At("on_save_checkpoint", kill, step=8)])
    newest = Path("run/checkpoints/step=6.ckpt")
    newest.write_bytes(newest.read_bytes()[:1000])
    fit("run", "--ckpt_path", "auto", "--sample.prompt", "a b")
    assert "run.jsonl" in capsys.readouterr().out
    events = [json.loads(line) for line in Path("run/run.jsonl").read_text().splitlines()]
    assert events == list(read_run_log(Path("run")))
    assert [(event["event"], event["step"]) for event in events] == [
        *(("start", 0), ("save", 2), ("validation", 2), ("save", 4), ("validation", 4), ("signal", 4), ("end", 4)),
        *(("start", 4), ("resume", 4), ("validation", 4), ("save", 6), ("validation", 6), ("end", 8)),
        *(("start", 4), ("resume", 4), ("validation", 4), ("save", 6), ("validation", 6)),
        *(("save", 8), ("validation", 8), ("end", 8)),
    ]
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    start, resume, save, end = events[0], events[14], events[3], events[-1]
    assert start["versions"].keys() == {"ropepp_lit", "torch", "lightning", "litdata", "python", "cuda"}
    assert (start["world_size"], start["precision"], start["device"]) == (1, "32-true", "cpu")
    assert events[13]["command"].startswith("ropepp-lit fit --config ")
    assert events[13]["command"].endswith(" --ckpt_path auto --sample.prompt 'a b'")
    assert (resume["checkpoint"], resume["damaged"]) == ("run/checkpoints/step=4.ckpt", [str(newest)])
    assert save["path"] == "run/checkpoints/step=4.ckpt"
    assert save["bytes"] == Path(save["path"]).stat().st_size
    validation = events[-2]
    assert validation["loss"] == next(iter(validation["sets"].values()))["loss"] > 0
    assert events[5]["signal"] == signal.SIGTERM.name
    assert [event["reason"] for event in events if event["event"] == "end"] == ["signal", "error", "finished"]
    assert end["tokens"] == 8 * 3 * 2 * 64


def test_an_incomplete_line_and_a_full_disk(tmp_path, capsys):
    log, path = RunLog(), tmp_path / "run.jsonl"
    log.write("start", step=0)  # not open: nothing
    path.write_bytes(b'{"event": "start"}\n{"event": "sa')
    log.open(tmp_path)
    log.write("resume", step=1, loss=float("nan"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        for step in (2, 3):
            log.write("save", step=step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.write("end", step=4)
    log.close()
    assert [(event["event"], event.get("step")) for event in read_run_log(tmp_path)] == [
        ("start", None), ("resume", 1), ("end", 4)
    ]  # fmt: skip
    assert next(event for event in read_run_log(tmp_path) if event["event"] == "resume")["loss"] is None
    assert capsys.readouterr().err.count("run.jsonl: File too large; the run continues, and events may be missing") == 1


def test_a_log_that_cannot_be_opened(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run/run.jsonl").mkdir(parents=True)
    main(["fit", *tiny, "--trainer.max_steps", "1", "--trainer.default_root_dir", "run"])
    assert capsys.readouterr().err.count("Notice: run/run.jsonl: Is a directory; the run continues") == 1
