"""Untrusted folders that state wrong sizes, or contain pipes instead of files: one line, immediately."""

import json
import os
import pickle
import warnings

import pytest
import torch
from folders import CONFIG, make_folder
from marked import conversations, write_marked
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import metadata

from ropepp_lit import checkpoint, sharded
from ropepp_lit.data.manifest import Manifest
from ropepp_lit.data.verify import verify
from ropepp_lit.errors import UsageError
from ropepp_lit.hf.folder import open_checkpoint
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPE

GEOMETRY = {key: value for key, value in CONFIG.items() if key in DecoderConfig.__dataclass_fields__}


@pytest.fixture
def shards(tmp_path):
    """A checkpoint in a folder of shards."""
    decoder = Decoder(DecoderConfig(**GEOMETRY), RoPE(), Frequencies())
    architecture = checkpoint.describe_architecture(decoder.config, decoder.scheme, decoder.frequencies)
    whole = checkpoint.make_checkpoint(dict(decoder.state_dict()), architecture=architecture)
    path = tmp_path / "shared.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed_checkpoint.save({"state_dict": whole.pop("state_dict")}, checkpoint_id=path)
    torch.save(whole, path / sharded.SHARDED_METADATA)
    return path


def resize(size):
    def change(table):
        for stored in table.state_dict_metadata.values():
            if isinstance(stored, metadata.TensorStorageMetadata):
                stored.size = size

    return change


def place(**values):
    def change(table):
        stored = next(x for x in table.state_dict_metadata.values() if isinstance(x, metadata.TensorStorageMetadata))
        for name, value in values.items():
            setattr(stored.chunks[0], name, torch.Size(value))

    return change


def move(**values):
    def change(table):
        for stored in table.storage_data.values():
            vars(stored).update(values)

    return change


TABLES = {
    "terabytes": resize(torch.Size([10**9, 10**6])),
    "no size": resize("abc"),
    "negative": resize((-1, -8)),
    "a part elsewhere": place(offsets=(1, 0)),
    "half of it": place(sizes=(129, 32)),
    "a part of other dimensions": place(offsets=(0,)),
    "before the file": move(offset=-5),
    "behind the file": move(offset=10**12),
    "a text for a length": move(length="many"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_metadata_with_wrong_sizes(shards, kind):
    table = sharded._Reader(shards).read_metadata()
    TABLES[kind](table)
    (shards / ".metadata").write_bytes(pickle.dumps(table))
    for shapes_only in (True, False):
        with pytest.raises(UsageError, match=r"shared\.ckpt: not a readable checkpoint"):
            checkpoint.read_checkpoint(shards, shapes_only=shapes_only)


MEMORY = {
    "a place in the memo": b"\x80\x02]r\xff\xff\xff\x0f.",
    "an array of bytes": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "a text": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b".",
}


@pytest.mark.parametrize("kind", MEMORY)
def test_metadata_that_would_exhaust_memory(shards, kind):
    (shards / ".metadata").write_bytes(MEMORY[kind])
    with pytest.raises(UsageError, match=r"shared\.ckpt: not a readable checkpoint"):
        checkpoint.read_checkpoint(shards)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_pipes_in_a_checkpoint(shards, name):
    (shards / name).unlink()
    os.mkfifo(shards / name)
    with pytest.raises(UsageError, match=r"shared\.ckpt: not a readable checkpoint"):
        checkpoint.read_checkpoint(shards)


CONFIGS = {
    "layers": ({"num_hidden_layers": 9_999}, "num_hidden_layers is 9,999, and there is no weight of layer 2"),
    "too many layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 must be above 0 and below 10,000"),
    "rows": ({"vocab_size": 10**8}, "has the shape"),
    "too many rows": ({"vocab_size": 2**64}, "vocab_size: 18446744073709551616 must be above 0 and below 268,435,456"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads 0 is not a number above 0"),
    "no heads stated": ({"num_attention_heads": None}, "num_attention_heads is missing"),
    "half a head": ({"num_attention_heads": 0.5}, "num_attention_heads 0.5 is not a number above 0"),
    "true": ({"num_key_value_heads": True}, "num_key_value_heads True is not a number above 0"),
    "context": ({"max_position_embeddings": -1}, "max_position_embeddings -1 is not a number above 0"),
    "text": ({"hidden_size": "a"}, "hidden_size 'a' is not a number above 0"),
}


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_sizes_that_config_json_states(tmp_path, kind, model_type):
    changes, message = CONFIGS[kind]
    folder = make_folder(tmp_path / "hf", model_type=model_type, **changes)
    with pytest.raises(UsageError, match=message):
        open_checkpoint(folder)


def test_layers_that_a_checkpoint_states(tmp_path, shards):
    whole = checkpoint.read_checkpoint(shards)
    whole[checkpoint.KEY]["architecture"]["decoder"]["num_hidden_layers"] = 9_999
    with pytest.raises(UsageError, match="there is no weight of layer 2"):
        checkpoint.load_decoder(whole)


def test_pipes_in_a_hugging_face_folder(tmp_path):
    folder = make_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(UsageError, match="no weights in a supported layout"):
        open_checkpoint(folder)


def changed(**changes):
    return lambda values: values.update(changes)


def split_changed(**changes):
    return lambda values: values["splits"]["train"].update(changes)


def chunk_changed(**changes):
    return lambda values: values["splits"]["train"]["chunks"][0].update(changes)


MANIFESTS = {
    "no object": (lambda values: None, "not a manifest"),
    "tokens": (chunk_changed(tokens=10**15), r"chunk-000000-0000.bin tokens is 1000000000000000\)"),
    "negative tokens": (chunk_changed(tokens=-5), r"tokens is -5\)"),
    "documents": (chunk_changed(documents="7"), r"documents is '7'\)"),
    "checksum": (chunk_changed(sha256=7), r"sha256 is 7\)"),
    "chunks": (split_changed(chunks={}), "chunks is not a list"),
    "totals": (split_changed(chunks=[]), "the documents of train are not the sum over its chunks"),
    "lengths": (split_changed(lengths=[[1, None]]), "train lengths is None"),
    "vocabulary": (changed(vocab_size=-1), "vocab_size is -1"),
    "opening": (changed(opening=[99999]), "opening is 99999"),
    "no EOS": (changed(eos_token_id=None), "eos_token_id is None"),
    "dtype": (changed(dtype="object"), "dtype 'object' is not an integer dtype"),
    "marks": (changed(marks_trained_tokens=1), "marks_trained_tokens is 1"),
    "pairs": (changed(marks_trained_tokens=False, holds_pairs=True), "holds_pairs is set without marks_trained"),
    "reasons": (changed(skipped=[1]), "skipped is not an object"),
    "a source": (changed(sources=["x"]), "its checksum is wrong"),
    "another template": (changed(chat_template="x"), "its checksum is wrong"),
    "version": (changed(format_version=99), "format_version is 99 instead of 1"),
}


@pytest.mark.parametrize("url", [None, "s3://bucket/shards"])
@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_with_wrong_values(tmp_path, kind, url):
    folder = write_marked(tmp_path / "shards", train=conversations(3), validation=conversations(2))
    values = json.loads((folder / "manifest.json").read_text())
    change, message = MANIFESTS[kind]
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values if kind != "no object" else []))
    remedy = "upload the shards again" if url else f"remove {folder} to prepare it again"
    with pytest.raises(UsageError, match=rf"^{url or folder}/manifest\.json: .*{message}.*; {remedy}$"):
        Manifest.read(folder, url=url)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "train/index.json"])
@pytest.mark.parametrize("kind", ["pipe", "nested", "digits"])
def test_json_of_token_shards_that_cannot_be_read(tmp_path, name, kind):
    folder = write_marked(tmp_path / "shards", train=conversations(3), validation=conversations(2))
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).write_text("[" * 100_000 if kind == "nested" else "1" * 5_000)
    if name == "manifest.json":
        with pytest.raises(UsageError, match=r"manifest\.json: (No such file|not a manifest)"):
            verify(folder)
    else:
        (fault,) = verify(folder)
        assert name in fault
