"""Other position schemes in the commands: train, continue, validate, generate; `export` refuses them."""

import pytest
import torch

from ropepp_lit.checkpoint import KEY, decoder_weights, read_checkpoint
from ropepp_lit.cli import main

pytestmark = pytest.mark.end_to_end

SCHEMES = {
    "ALiBi": ([], "positions  ALiBi\n"),
    "PartialRoPE": (["--model.positions.partial_rotary_factor", "0.5"], "PartialRoPE on 0.5 of each head, base 10000"),
    "FoPE": (["--model.positions.context_length", "64"], "FoPE for 64 tokens, base 10000"),
    "NoPE": ([], "positions  NoPE\n"),
    "PoPE": ([], "positions  PoPE, base 10000"),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_from_training_to_text(name, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options, banner = SCHEMES[name]
    options = [*tiny, "--model.positions", name, *options, "--trainer.precision", "bf16-mixed"]
    options += ["--model.schedule.total_steps", "4", "--trainer.default_root_dir"]
    main(["fit", *options, "run", "--trainer.max_steps", "2"])
    assert banner in capsys.readouterr().out
    checkpoint = read_checkpoint("run/checkpoints/last.ckpt")
    class_path = checkpoint[KEY]["architecture"]["positions"]["class_path"]
    assert class_path == f"ropepp_lit.nn.{'pope' if name == 'PoPE' else 'baselines'}.{name}"
    main(["fit", *options, "run", "--trainer.max_steps", "4", "--ckpt_path", "auto"])
    main(["fit", *options, "baseline", "--trainer.max_steps", "4"])
    halves, baseline = (decoder_weights(read_checkpoint(f"{run}/checkpoints/last.ckpt")) for run in ("run", "baseline"))
    before = decoder_weights(checkpoint)
    assert halves.keys() == baseline.keys() == before.keys()
    for key, value in baseline.items():
        assert torch.equal(halves[key], value), key
        assert torch.equal(before[key], value) == ("coef" in key or "exponents" in key), key
    capsys.readouterr()
    main(["validate", *options, "run", "--ckpt_path", "run/checkpoints/last.ckpt"])
    assert "bits per byte" in capsys.readouterr().out
    main(["generate", "run/checkpoints/last.ckpt", "--prompt", "Text", "--max_new_tokens", "80"])
    assert capsys.readouterr().out.startswith("Text")
    for command in (["export", "run/checkpoints/last.ckpt", "hf"],
                    ["upcycle", "run/checkpoints/last.ckpt", "ec.ckpt", "--variant", "ec"]):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            main(command)
        refused = capsys.readouterr().err
        assert refused.count("\n") == 1
        assert name in refused
    assert not (tmp_path / "hf").exists()


def test_fit_flushes_denormal_numbers(run, tiny, tmp_path):
    (tmp_path / "probe.py").write_text(
        "import torch\n"
        "from lightning.pytorch import Callback\n\n\n"
        "class Probe(Callback):\n"
        "    def on_train_batch_start(self, *_):\n"
        "        print('smallest sum', float(torch.full((1_000_000,), 1e-39).mul(0.5).sum()))\n"
    )
    options = ["--trainer.callbacks+", "probe.Probe", "--trainer.max_steps", 1]
    assert "smallest sum 0.0" in run("fit", *tiny, *options, cwd=tmp_path).stdout


def test_an_unknown_name_lists_the_known_ones(run, tiny, tmp_path):
    failed = run("fit", *tiny, "--model.positions", "Alibi", cwd=tmp_path, returncode=2).stderr
    for name in SCHEMES:
        assert name in failed
