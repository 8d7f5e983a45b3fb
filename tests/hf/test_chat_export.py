"""A fine-tuned chat model in transformers: chat template and end of the answers."""

import json
import re

import others
import pytest
from small_checkpoints import BYTES, make
from transformers import AutoTokenizer

from ropepp_lit.checkpoint import KEY, read_checkpoint
from ropepp_lit.cli import main
from ropepp_lit.data.conversations import merge_settings
from ropepp_lit.hf.export import export
from ropepp_lit.hf.folder import open_checkpoint
from ropepp_lit.inference.prompts import encode_messages
from ropepp_lit.text.chat import ChatTemplate
from ropepp_lit.text.tokenizer import TextTokenizer

TURNS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\r\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\r\n{% endif %}"
)
TEMPLATES = {
    "plain": "{{ messages }}",
    "CRLF": "{% for m in messages %}\r\n{{ m.content }}\r\n{% endfor %}\r\n",
    "CR alone, tabs and spaces at the ends": " \t{{ messages }}\r \t",
    "several line ends behind it": "{{ messages }}\n\n\r\n\n",
    "not ASCII": "{# 漢字, naïve 🙂, U+2028 \u2028, U+0085 \x85, BOM \ufeff #}{{ messages }}",
    "a BOM": "\ufeff{{ messages }}",
    "by name": [
        {"name": "default", "template": "{{ messages }}\r\n"},
        {"name": "tool_use", "template": "{{ tools }} "},
    ],
    "a name that is no file's": [{"name": "default", "template": "a\r\n"}, {"name": "../b", "template": "b"}],
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_are_exported_byte_for_byte(kind, tmp_path):
    """From a base model and a chat dataset to the exported folder, as read by transformers and by us."""
    template = TEMPLATES[kind]
    stored = {"tokenizer_config": json.dumps({"chat_template": template})}
    base = {"tokenizer_config": json.dumps({"chat_template": "of the base", "pad_token": "<|end_of_text|>"})}
    entry = merge_settings(base, stored)
    export(make(entry=entry), tmp_path / "hf", dtype=None, max_shard_bytes=10**9, check=False)
    named = {"default": template} if isinstance(template, str) else {one["name"]: one["template"] for one in template}
    files = {path.relative_to(tmp_path / "hf").as_posix(): path for path in (tmp_path / "hf").rglob("*.jinja")}
    actual = {name: path.read_bytes().decode() for name, path in files.items()}
    if kind == "a name that is no file's":
        assert actual == {}
    else:
        expected = {f"additional_chat_templates/{name}.jinja": text for name, text in named.items()}
        expected["chat_template.jinja"] = expected.pop("additional_chat_templates/default.jinja")
        assert actual == expected
        assert "chat_template" not in json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    again = json.loads(open_checkpoint(tmp_path / "hf")[KEY]["tokenizer_config"])
    assert again["pad_token"] == "<|end_of_text|>"
    assert again["chat_template"] == template
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template
    if kind != "a name that is no file's":  # of files transformers makes every line end \n, as Jinja does
        named = {name: re.sub("\r\n?", "\n", text) for name, text in named.items()}
    assert theirs == (named if len(named) > 1 else named["default"])
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_template_that_is_not_utf8(tmp_path, mistake):
    export(make(tokenizer=BYTES), tmp_path / "hf", dtype=None, max_shard_bytes=10**9, check=False)
    (tmp_path / "hf" / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    line = mistake("hf", "out.ckpt", subcommand="import", base=[])
    assert line.endswith("hf/chat_template.jinja: not UTF-8 (invalid start byte at byte 3)")


GENERATE = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ropepp_lit":
            raise ImportError("the export must not need ropepp_lit")

sys.meta_path.insert(0, Hidden())
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, conversations = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
answers = []
for messages in conversations:
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=40)[0].tolist()
    answers.append({"prompt": inputs["input_ids"][0].tolist(), "written": ids[inputs["input_ids"].shape[1] :]})
print(json.dumps(answers))
"""
ANSWER = "It sleeps."


@pytest.fixture(scope="module")
def tuned(run, tmp_path_factory):
    """A RoPE++ model with a tokenizer like Llama 3's, fine-tuned to answer in one sentence, and exported."""
    folder = tmp_path_factory.mktemp("tuned")
    others.make_folder("llama3", folder / "base", initializer_range=0.05)
    (folder / "own.jinja").write_bytes(TURNS.encode())
    questions = (f"{text}{'!' * number}" for number in range(1, 5) for text in ("The fox?", "And the dog?", "It?"))
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": ANSWER}]} for q in questions]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = ["--format", "chat", "--chat_template", "own.jinja", "--tokenizer", "base"]
    run("upcycle", "base", "ec.ckpt", "--variant", "ec", cwd=folder)
    run("prepare", "rows.jsonl", "--out", "shards", *chat, "--validation_fraction", 0.2, cwd=folder)
    options = {
        "model.optimizer.init_args.lr": 0.01, "model.schedule.init_args.warmup_steps": 2, "data.source": "shards",
        "data.context_length": 128, "data.batch_size": 2, "trainer.max_steps": 40, "trainer.accelerator": "cpu",
        "trainer.default_root_dir": "run", "trainer.limit_val_batches": 1, "sample.max_new_tokens": 1,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    run("fit", "--config", "ec.yaml", *words, cwd=folder)
    run("export", "run/checkpoints/last.ckpt", "hf", "--check", "false", cwd=folder)
    return folder


@pytest.mark.end_to_end
def test_generation_in_transformers_stops_at_the_same_token(tuned, run_file, monkeypatch, capsys):
    """The template includes BOS, which the tokenizer also adds; there are two stop tokens."""
    monkeypatch.chdir(tuned)
    first = [{"role": "user", "content": "The fox?"}]
    more = [*first, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "And the dog?"}]
    (tuned / "in.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in (first, more)))
    (tuned / "check.py").write_text(GENERATE)
    theirs = json.loads(run_file("check.py", "hf", json.dumps([first, more]), cwd=tuned).stdout.splitlines()[-1])
    actual = {}
    for model in ("run/checkpoints/last.ckpt", "hf"):
        tokenizer = TextTokenizer.from_entry(open_checkpoint(model)[KEY])
        options = ["--temperature", "0", "--max_new_tokens", "40"]
        out = f"{len(actual)}.jsonl"
        main(["generate", model, "--prompts", "in.jsonl", "--out", out, "--chat", "true", *options])
        rows = [json.loads(line) for line in (tuned / out).read_text().splitlines()]
        actual[model] = [(row["text"], row["finish_reason"], row["tokens"]) for row in rows]
    capsys.readouterr()
    bos, end = (tokenizer.tokenizer.token_to_id(token) for token in ("<|begin_of_text|>", "<|eot_id|>"))
    ours = ChatTemplate.from_tokenizer(tokenizer)
    for turns, answer in zip((first, more), theirs, strict=True):
        assert answer["prompt"] == encode_messages(ours, {"messages": turns})
        assert [place for place, token in enumerate(answer["prompt"]) if token == bos] == [0]
        assert answer["written"].count(end) == 1
        assert answer["written"][-1] == end
    expected = [(tokenizer.decode(answer["written"]), "stop", len(answer["written"])) for answer in theirs]
    assert actual["run/checkpoints/last.ckpt"] == actual["hf"] == expected
    assert expected[0][0] == ANSWER
    assert (tuned / "hf" / "chat_template.jinja").read_bytes() == TURNS.encode()
    stored = read_checkpoint(tuned / "run/checkpoints/last.ckpt")[KEY]["tokenizer_config"]
    assert json.loads(stored)["chat_template"] == TURNS
    again = open_checkpoint("hf")[KEY]
    assert json.loads(again["tokenizer_config"])["chat_template"] == TURNS
