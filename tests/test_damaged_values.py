"""Files with values of wrong types or ranges: one line that names the file."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest
import torch
from folders import make_folder
from small_checkpoints import make

from ropepp_lit import checkpoint
from ropepp_lit.commands.evaluate import _replaced
from ropepp_lit.errors import UsageError
from ropepp_lit.eval.pieces import CachedResult, Piece, Work
from ropepp_lit.eval.results import Measurement
from ropepp_lit.eval.tasks.base import Answer
from ropepp_lit.hf.folder import open_checkpoint
from ropepp_lit.inference.prompts import _resume
from ropepp_lit.json_files import json_line, sealed
from ropepp_lit.text.sources import Reader, find_files
from ropepp_lit.text.tokenizer import TextTokenizer, byte_tokenizer
from ropepp_lit.train.classes import check_classes

NESTED = '{"a":' * 50_000 + "1" + "}" * 50_000


def entry(**changes):
    return lambda whole: whole[checkpoint.KEY].update(changes)


def decoder(**changes):
    return lambda whole: whole[checkpoint.KEY]["architecture"]["decoder"].update(changes)


def weight(change):
    def changed(whole):
        name = next(iter(whole["state_dict"]))
        whole["state_dict"][name] = change(whole["state_dict"][name])

    return changed


ENTRIES = {
    "no tokenizer": (lambda whole: whole[checkpoint.KEY].pop("tokenizer"), "it has no tokenizer"),
    "a number for a tokenizer": (entry(tokenizer=5), "its tokenizer is 5"),
    "a negative token": (entry(bos_token_id=-1), "its bos_token_id is -1"),
    "a token beyond all": (entry(eos_token_id=2**40), "its eos_token_id is 1,099,511,627,776"),
    "true for a token": (entry(eos_token_id=True), "its eos_token_id is 'True'"),
    "a text among tokens": (entry(opening=["a"]), "its opening is"),
    "a negative token among others": (entry(opening=[0, -1]), "its opening is -1"),
    "settings that are no JSON": (entry(tokenizer_config="{"), "Expecting property name"),
    "settings that are no object": (entry(generation_config="[]"), "its generation_config is not a JSON object"),
    "nested settings": (entry(tokenizer_config=NESTED), "nested too deeply"),
    "no context": (entry(context_length=0), "its context_length is 0"),
    "no tokens": (entry(tokens_seen=None), "its tokens_seen is 'None'"),
    "no step": (entry(validation={"a": {"loss": 1.0}}), "its validation of 'a' has no step"),
    "no figures": (entry(validation={"a": "b"}), "its validation is"),
    "a recipe without data": (entry(recipe={"model": {}}), "its recipe has no data"),
    "a recipe with a tensor": (entry(recipe={"data": {"a": torch.ones(1)}}), "its recipe is not of plain values"),
    "half a head": (decoder(num_attention_heads=0.5), "its num_attention_heads is '0.5'"),
    "a list of heads": (decoder(num_attention_heads=["a"]), "its num_attention_heads is"),
    "a number for a switch": (decoder(qk_norm=1), "its qk_norm is 1"),
    "too many heads": (decoder(num_attention_heads=2**60), "num_attention_heads: 1152921504606846976 must be above 0"),
    "no weights": (lambda whole: whole["state_dict"].clear(), "there is no weight of layer 0"),
    "a weight without content": (weight(lambda value: value.to("meta")), "is no weight"),
    "whole numbers": (weight(lambda value: value.long()), "is no weight"),
    "complex numbers": (weight(lambda value: value.to(torch.complex64)), "is no weight"),
    "a sparse weight": (weight(lambda value: value.to_sparse()), "is no weight"),
    "a nested weight": (weight(lambda value: {"a": value}), "is no weight"),
    "a terabyte": (weight(lambda value: value.flatten()[:1].expand(10**12)), "is larger than what is stored of it"),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_entries_of_a_checkpoint(tmp_path, kind):
    change, message = ENTRIES[kind]
    whole = make()
    change(whole)
    torch.save(whole, tmp_path / "model.ckpt")
    with pytest.raises(UsageError, match=message) as error:
        checkpoint.load_decoder(checkpoint.read_checkpoint(tmp_path / "model.ckpt"))
    assert "\n" not in str(error.value)


def swap_template(values):
    template = values["post_processor"]
    template["single"], template["pair"] = template["pair"], template["single"]


TOKENIZERS = {
    "text": lambda values: "text",
    "nested": lambda values: NESTED,
    "a token beyond all": lambda values: values["model"]["vocab"].update(a=2**31 - 1),
    "the template of pairs": swap_template,  # at which the library panics
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_that_are_stored(kind):
    tokenizer = byte_tokenizer()
    values = json.loads(tokenizer.json)
    text = TOKENIZERS[kind](values) or json.dumps(values)
    with pytest.raises(UsageError, match=r"^tokenizer: "):
        TextTokenizer.from_entry({"tokenizer": text, "bos_token_id": 0, "eos_token_id": 1})


JSON_OF_FOLDERS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "X.index.json")


@pytest.mark.parametrize("content", [NESTED, "1" * 5_000, "[]", "\xff".encode("latin-1"), "pipe"])
@pytest.mark.parametrize("name", JSON_OF_FOLDERS)
def test_json_of_a_hugging_face_folder(tmp_path, name, content):
    folder = make_folder(tmp_path / "hf", layout="index of safetensors", tokenizer=True)
    path = folder / name.replace("X", "model.safetensors")
    path.unlink(missing_ok=True)
    if content == "pipe":
        if name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            return  # as if it were not there
        os.mkfifo(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError):
        open_checkpoint(folder)


@pytest.mark.parametrize("config", [{"model_type": ["llama"]}, {"rope_scaling": {"rope_type": ["yarn"]}}])
def test_lists_for_names_in_config_json(tmp_path, config):
    with pytest.raises(UsageError, match=r"config\.json: .* is not supported; supported are"):
        open_checkpoint(make_folder(tmp_path / "hf", **config))


def test_a_weight_of_pytorch_model_bin_that_has_changed(tmp_path):
    folder = make_folder(tmp_path / "hf", layout="pytorch_model.bin")
    weights = open_checkpoint(folder)["state_dict"]
    path = folder / "pytorch_model.bin"
    content = bytearray(path.read_bytes())
    content[content.index(next(iter(weights.values())).numpy().tobytes()) + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"pytorch_model\.bin: .*the checksum of pytorch_model/data/\d+ in it is"):
        open_checkpoint(folder)


def test_tables_with_text_that_is_not_utf_8(tmp_path):
    buffers = [None, pyarrow.py_buffer(b"\0\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xff\xfe")]
    array = pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)
    table = pyarrow.table({"text": array})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "names.arrow").write_bytes(content.replace(b"text", b"t\xffxt"))
    length = (tmp_path / "a.arrow").read_bytes()[8:]  # of a stream within the file
    (tmp_path / "length.arrow").write_bytes(length[:4] + (2**31 - 1).to_bytes(4, "little") + length[8:])
    for name in ("a.parquet", "a.arrow", "names.arrow", "length.arrow"):
        ((_, record),) = Reader(find_files([str(tmp_path / name)], key="SOURCE"), text_key="text")
        assert record.problem.startswith("unreadable: "), record


def measured(**changes):
    return lambda kept: kept["measurements"][0].update(changes)


KEPT = {
    "a number": lambda kept: kept["measurements"][0]["numerators"].__setitem__(0, 2.0),
    "an answer": lambda kept: kept["answers"][0].update(written="c"),
    "another piece": lambda kept: kept.update(key={"a": 2}),
}
UNSEALED = {
    "a text for numbers": measured(numerators="12"),
    "a list for a name": measured(task=["a"]),
    "fewer numbers": measured(denominators=[1.0]),
    "no such aggregation": measured(aggregation="median"),
    "a key more": measured(more=1),
    "no measurements": lambda kept: kept.pop("measurements"),
    "measurements that are none": lambda kept: kept.update(measurements=["a"]),
    "answers that are none": lambda kept: kept.update(answers={"a": 1}),
    "no seconds": lambda kept: kept.update(seconds=None),
}


@pytest.mark.parametrize("kind", [*KEPT, *UNSEALED])
def test_a_damaged_piece_of_an_evaluation_is_measured_again(tmp_path, capsys, kind):
    measurement = Measurement(task="t", metric="loss", numerators=[1.0, 3.0], denominators=[1.0, 1.0])
    answer = Answer(number=0, prompt="p", expected="e", written="w", score=1.0)
    piece = Piece(None, {"a": 1}, tmp_path / "piece.json", 0)  # type: ignore[arg-type]
    kept = vars(CachedResult({"a": 1}, 0.5, [measurement.to_dict()], [vars(answer)]))
    work = Work.__new__(Work)
    work.pieces = [[piece]]
    for values in (sealed(kept), kept):  # of an earlier version
        piece.path.write_text(json.dumps(values))
        work._delete_damaged()
        assert piece.read() == CachedResult({"a": 1}, 0.5, [measurement], [answer])
    values = json.loads(json.dumps(sealed(kept) if kind in KEPT else kept))
    {**KEPT, **UNSEALED}[kind](values)
    piece.path.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"piece\.json: damaged \(.*\); delete it"):
        piece.read()
    work._delete_damaged()
    assert not piece.path.exists()
    assert capsys.readouterr().out == f"{piece.path}: damaged; it is measured again\n"


REPORTS = ["", "[]", NESTED, "{}", '{"settings": {"tasks": [], "lengths": ["a"]}, "models": []}',
           '{"settings": {"tasks": [], "lengths": []}, "models": [{"name": "a"}]}', '{"settings": 1}']  # fmt: skip


@pytest.mark.parametrize("content", REPORTS)
def test_a_damaged_report_is_replaced(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    (line,) = _replaced(tmp_path, {"tasks": [], "lengths": []}, [])
    assert line == f"\nNote: {tmp_path / 'results.json'} was damaged and is replaced."


IDENTITY, ANSWER = {"seed": 0}, {"row": 0, "text": "a", "finish_reason": "stop", "tokens": 1}
PARTIALS = {
    "an answer that changed": lambda lines: [lines[0], lines[1].replace(b'"text": "a"', b'"text": "b"')],
    "an answer without a checksum": lambda lines: [lines[0], json_line(ANSWER)],
    "settings that changed": lambda lines: [lines[0].replace(b"0", b"1", 1), lines[1]],
    "a list for settings": lambda lines: [b"[]\n", lines[1]],
    "nested": lambda lines: [lines[0], NESTED.encode() + b"\n"],
    "a row of another type": lambda lines: [lines[0], json_line(sealed({**ANSWER, "row": ["a"]}))],
    "tokens of another type": lambda lines: [lines[0], json_line(sealed({**ANSWER, "tokens": {}}))],
}


@pytest.mark.parametrize("kind", PARTIALS)
def test_damaged_saved_answers(tmp_path, kind):
    partial, lines = tmp_path / "out.jsonl.partial", [json_line(sealed(IDENTITY)), json_line(sealed(ANSWER))]
    partial.write_bytes(b"".join(lines))
    assert _resume(partial, IDENTITY, [[0]])[0].text == "a"
    changed = b"".join(PARTIALS[kind](lines))
    partial.write_bytes(changed)
    with pytest.raises(UsageError, match=r"out\.jsonl\.partial: damaged; delete it to start again"):
        _resume(partial, IDENTITY, [[0]])
    assert partial.read_bytes() == changed


@pytest.mark.parametrize("content", [b"a: \xff", b"a: [", NESTED.encode(), b"a: " + b"1" * 5_000, b"a: \0"])
def test_recipe_with_invalid_yaml(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=r"recipe\.yaml: not valid YAML: "):
        check_classes(["fit", "--config", str(tmp_path / "recipe.yaml")])


SECTIONS = {
    "trainer: [a]": "trainer: \"['a']\" must be a mapping of settings",
    "model: {decoder: [a]}": "model.decoder: \"['a']\" must be a mapping of settings",
    "sample: {max_new_tokens: null}": "sample.max_new_tokens: must not be null",
    "model: {frequencies: {class_path: Yarn, init_args: {factor: 2, beta_fast: null}}}": "must not be null",
    "model: {frequencies: {class_path: Yarn, init_args: {factor: .inf}}}": "must be 1 or more, and finite",
    "model: {optimizer: '..'}": "is not the name of a class",
    "trainer: {devices: []}": "trainer.devices: [] must name one or more",
    'data: "a\\0b"': "embedded null byte",
}


def test_sections_of_a_recipe(mistake, tmp_path):
    for content, message in SECTIONS.items():
        (tmp_path / "recipe.yaml").write_text(content)
        assert message in mistake("--config", tmp_path / "recipe.yaml", subcommand="plan")


def test_dtype_of_a_checkpoint_without_weights():
    with pytest.raises(UsageError, match="no weights of layers"):
        checkpoint.compute_dtype({"state_dict": {}})
