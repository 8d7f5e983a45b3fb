"""Loads exported folders in a separate process that cannot import ropepp_lit, and runs them in transformers.

    python in_transformers.py JOBS.json

A job is a folder of an export and the safetensors file that gets the answers; `io` names a file of golden values.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ropepp_lit":
            raise ImportError("exports must not need ropepp_lit")


sys.meta_path.insert(0, Hidden())

from transformers import AutoModel, AutoModelForCausalLM, StaticCache  # noqa: E402


def answer(folder, io):
    # As in the documentation: only the folder's path and trust_remote_code.
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    input_ids, prompt = io["input_ids"], io["gen_prompt"]
    new = io["gen_sequences"].shape[1] - prompt.shape[1]
    greedy = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ones = torch.ones_like(prompt)
    results = {"logits": model(input_ids).logits}
    model.set_attn_implementation("eager")
    results["eager"] = model(input_ids).logits
    model.set_attn_implementation("sdpa")
    for name, options in (
        ("dynamic", {}),
        ("static", {"cache_implementation": "static"}),
        ("none", {"use_cache": False}),
    ):
        results[f"generated_{name}"] = model.generate(prompt, attention_mask=ones, **options, **greedy)
    pads = torch.zeros_like(prompt[:, :5])
    padded, mask = torch.cat([pads, prompt], dim=1), torch.cat([pads, ones], dim=1)
    results["generated_padded"] = model.generate(padded, attention_mask=mask, **greedy)[:, 5:]
    results["shifted"] = model(input_ids, position_ids=torch.arange(input_ids.shape[1])[None] + 5000).logits
    static = StaticCache(config=model.config, max_cache_len=64)
    halves = []
    for part in input_ids.split(input_ids.shape[1] // 2, dim=1):
        start = sum(half.shape[1] for half in halves)
        places = torch.arange(start, start + part.shape[1])
        halves.append(model(part, past_key_values=static, position_ids=places[None], cache_position=places).logits)
    results["static_halves"] = torch.cat(halves, dim=1)
    cached = model(input_ids, use_cache=True).past_key_values
    layers = [(layer.keys, layer.values) for layer in cached.layers]
    results["cache_bytes"] = torch.tensor(sum(x.nbytes for pair in layers for x in pair))
    base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    results["base"] = model.lm_head(base(input_ids).last_hidden_state)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results["compiled"] = compiled(input_ids, use_cache=False).logits
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True, dtype=torch.float32).eval()
    results["saved_again"] = again(input_ids).logits
    model.train()
    model.gradient_checkpointing_enable()
    loss = model(input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()
    results["gradient"] = model.model.layers[0].self_attn.q_proj.weight.grad
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    results["plain_gradient"] = model.model.layers[0].self_attn.q_proj.weight.grad
    return results


for job in json.loads(Path(sys.argv[1]).read_text()):
    answers = answer(job["folder"], load_file(job["io"]))
    save_file({name: value.detach().contiguous() for name, value in answers.items()}, job["answer"])
