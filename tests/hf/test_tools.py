"""Exports in other tools: LoRA of peft, and lm-eval."""

import json
import subprocess
import sys

import pytest
import torch

from ropepp_lit.checkpoint import describe_architecture, make_checkpoint
from ropepp_lit.hf.export import export
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPEPP
from ropepp_lit.text.tokenizer import byte_tokenizer

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export of a small RoPE++ model with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    geometry = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config, scheme, frequencies = DecoderConfig(vocab_size=258, **geometry), RoPEPP(variant="ec"), Frequencies()
    torch.manual_seed(0)
    checkpoint = make_checkpoint(
        Decoder(config, scheme, frequencies).state_dict(),
        architecture=describe_architecture(config, scheme, frequencies),
        context_length=8192,
        tokenizer=byte_tokenizer().tokenizer.to_str(),
        bos_token_id=0,
        eos_token_id=1,
    )
    export(checkpoint, folder, dtype=None, max_shard_bytes=10**9, check=False)
    return folder


def test_lora_training_saving_loading_and_merging(exported, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    def load():
        return AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, dtype=torch.float32)

    input_ids = torch.randint(258, (4, 32), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = peft.get_peft_model(load(), peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    assert any("o_proj.lora_A" in name for name, _ in model.named_parameters())
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        losses.append(model(input_ids, labels=input_ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids).logits
        loaded = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(input_ids).logits, expected, atol=1e-6, rtol=0)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids).logits, expected, atol=1e-4, rtol=0)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True, dtype=torch.float32)
        torch.testing.assert_close(again.eval()(input_ids).logits, merged(input_ids).logits, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_lm_eval_on_a_custom_task_and_needles(exported, tmp_path):
    pytest.importorskip("lm_eval")
    pytest.importorskip("wonderwords")
    lines = [{"question": f"{n} + 1 =", "choices": [str(n + 1), str(n + 7)], "answer": 0} for n in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "sums.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
    (tmp_path / "sums.yaml").write_text(task)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args"]
    command += [f"pretrained={exported},trust_remote_code=True,dtype=float32", "--include_path", str(tmp_path)]
    command += ["--tasks", "sums,niah_single_1", "--limit", "2", "--metadata", '{"max_seq_lengths":[4096]}']
    command += ["--output_path", str(tmp_path / "results"), "--device", "cpu", "--batch_size", "1"]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=1200)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (actual,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(actual.read_text())["results"]
    assert 0 <= results["sums"]["acc,none"] <= 1
    assert 0 <= results["niah_single_1"]["4096,none"] <= 1
