"""Untrusted checkpoints, manifests and folders: one line, and nothing is executed, written or deleted."""

import io
import json
import os
import pathlib
import pickle
import warnings

import pytest
import torch
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import filesystem, metadata
from transformers import LlamaConfig, LlamaForCausalLM

from ropepp_lit import checkpoint, sharded
from ropepp_lit.data.manifest import MANIFEST, Manifest
from ropepp_lit.data.prepare import PrepareSettings, prepare
from ropepp_lit.data.verify import verify
from ropepp_lit.errors import UsageError
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPEPP
from ropepp_lit.text.tokenizer import byte_tokenizer

CONFIG = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def make_decoder():
    return Decoder(DecoderConfig(**CONFIG), RoPEPP(variant="ec"), Frequencies())


def contents():
    decoder = make_decoder()
    architecture = checkpoint.describe_architecture(decoder.config, decoder.scheme, decoder.frequencies)
    return checkpoint.make_checkpoint(dict(decoder.state_dict()), architecture=architecture)


@pytest.fixture
def folder(tmp_path):
    """A sharded checkpoint as saved by FSDP2: weights, an optimizer state with plain values, and the rest."""
    path, whole = tmp_path / "shared.ckpt", contents()
    state = {
        "state_dict": whole.pop("state_dict"),
        "optimizer_0": {"state": {}, "param_groups": [{"lr": 0.25, "betas": (0.9, 0.95)}]},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed_checkpoint.save(state, checkpoint_id=path)
    torch.save(whole, path / sharded.SHARDED_METADATA)
    return path


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


class Named:
    """A value that is pickled as an arbitrary name."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return Marker, (self.function, self.arguments)


def Marker(*_):  # noqa: N802
    raise AssertionError("never called here")


class Pickler(pickle._Pickler):
    """Python's pickler without the check that pickled names exist."""

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Named):
            self.save(value.module)
            self.save(value.name)
            self.write(pickle.STACK_GLOBAL)
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(tuple(value.arguments))
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def pickled(value, protocol=4):
    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


FILESYSTEM, METADATA = "torch.distributed.checkpoint.filesystem", "torch.distributed.checkpoint.metadata"

ATTACKS = {
    "Path.write_text": lambda target: Call(
        Named(FILESYSTEM, "Path.write_text"), Call(Named("pathlib", "PosixPath"), target), "x"
    ),
    "Path.write_text of a path in the same module": lambda target: Call(
        Named(FILESYSTEM, "Path.write_text"), Call(Named(FILESYSTEM, "Path"), target), "x"
    ),
    "a class of the module that is no part of a table": lambda target: Call(
        Named(FILESYSTEM, "FileSystemWriter"), target
    ),
    "FileSystem.mkdir": lambda target: Call(
        Named(FILESYSTEM, "FileSystem.mkdir"), Call(Named(FILESYSTEM, "FileSystem")), target
    ),
    "os.system": lambda target: Call(Named("os", "system"), f"touch {target}"),
    "posix.system": lambda target: Call(Named("posix", "system"), f"touch {target}"),
    "os.system by the way of an allowed module": lambda target: Call(Named(FILESYSTEM, "os.system"), f"touch {target}"),
    "os.system by a name that begins with a capital": lambda target: Call(
        Named(METADATA, "Metadata.__init__.__globals__"), f"touch {target}"
    ),
    "os.system by the way of torch": lambda target: Call(Named("torch", "os.system"), f"touch {target}"),
    "a name below a dtype": lambda target: Call(Named("torch", "float32.__class__"), target),
    "torch.load": lambda target: Call(Named("torch", "load"), target),
    "torch.save": lambda target: Call(Named("torch", "save"), {}, target),
    "functools.partial": lambda target: Call(Named("functools", "partial"), Named("os", "system"), f"touch {target}"),
    "open": lambda target: Call(Named("builtins", "open"), target, "w"),
    "eval": lambda target: Call(Named("builtins", "eval"), f"open({target!r}, 'w')"),
    "builtins of Python 2": lambda target: Call(Named("__builtin__", "eval"), f"open({target!r}, 'w')"),
    "getattr of a class that is no enumeration": lambda target: Call(
        Call(Named("builtins", "getattr"), Named("pathlib", "PosixPath"), "write_text"),
        Call(Named("pathlib", "PosixPath"), target),
        "x",
    ),
    "getattr by a dotted name": lambda target: Call(Named("builtins", "getattr.__self__.open"), target, "w"),
    "an attribute of an enumeration that is no member": lambda target: Call(
        Call(Named("builtins", "getattr"), Named(METADATA, "_MEM_FORMAT_ENCODING"), "__init_subclass__"), target
    ),
    "a layout's function by a dotted name": lambda target: Call(
        Named("torch.serialization", "_get_layout.__globals__"), target
    ),
    "touch of an allowed path": lambda target: Call(
        Named("pathlib", "PosixPath.touch"), Call(Named("pathlib", "PosixPath"), target)
    ),
    "a list in place of the table": lambda target: [1, 2],
    "a table without files": lambda target: metadata.Metadata({}),
    "files of another kind": lambda target: metadata.Metadata({}, storage_data={"a": target}),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("protocol", [4, 5])
def test_metadata_executes_no_code(folder, tmp_path, attack, protocol):
    target = tmp_path / "target"
    (folder / ".metadata").write_bytes(pickled(ATTACKS[attack](str(target)), protocol))
    before = tree(tmp_path)
    for shapes_only in (True, False):
        with pytest.raises(UsageError, match=r"shared\.ckpt: not a readable checkpoint") as error:
            checkpoint.read_checkpoint(folder, shapes_only=shapes_only)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"shared\.ckpt: not a readable checkpoint"):
        checkpoint.load_shards(folder, dict(make_decoder().state_dict()), is_distributed=False)
    assert tree(tmp_path) == before


def test_checkpoint_written_by_torch(folder):
    whole = checkpoint.read_checkpoint(folder)
    assert whole["state_dict"].keys() == contents()["state_dict"].keys()
    checkpoint.load_decoder(whole)
    table = sharded._Reader(folder).read_metadata()
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool):
        for layout in (torch.strided, torch.sparse_coo):
            properties = metadata.TensorProperties(dtype=dtype, layout=layout)
            for member in (torch.contiguous_format, torch.channels_last, torch.preserve_format):
                properties.memory_format = member
                table.state_dict_metadata["other"] = metadata.TensorStorageMetadata(properties, torch.Size([0]), [])
                table.storage_meta = metadata.StorageMeta(checkpoint_id=pathlib.Path("/elsewhere"))
                (folder / ".metadata").write_bytes(pickle.dumps(table))
                again = sharded._Reader(folder).read_metadata()
                assert again.state_dict_metadata == table.state_dict_metadata
                assert again.storage_data == table.storage_data


@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath"])
def test_path_types_of_any_system(folder, name):
    table = sharded._Reader(folder).read_metadata()
    table.storage_meta.checkpoint_id = Call(Named("pathlib", name), "C:", "elsewhere")
    (folder / ".metadata").write_bytes(pickled(table))
    checkpoint.read_checkpoint(folder)


class Attribute:
    """Pickled as early releases of Python 3.11 pickle members of enumerations."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_members_of_enumerations_by_getattr_and_no_other_attribute():
    def read(value):
        return sharded._Unpickler(io.BytesIO(pickle.dumps(value))).load()

    kind = metadata._MEM_FORMAT_ENCODING
    assert [read(Attribute(kind, member.name)) for member in kind] == list(kind)
    for owner, name in ((kind, "__base__"), (metadata.Metadata, "__init__"), (kind.TORCH_CHANNELS_LAST, "name")):
        with pytest.raises((pickle.UnpicklingError, KeyError)):
            read(Attribute(owner, name))


class Touch:
    """An object that executes code when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def replace_value(folder, name, value):
    """Replace a value of the folder, a weight or one that is not a tensor."""
    table = sharded._Reader(folder).read_metadata()
    file = io.BytesIO()
    torch.save(value, file)
    (folder / "value.distcp").write_bytes(file.getvalue())
    table.state_dict_metadata[name] = metadata.BytesStorageMetadata()
    table.storage_data = {index: stored for index, stored in table.storage_data.items() if index.fqn != name}
    table.storage_data[metadata.MetadataIndex(name)] = filesystem._StorageInfo("value.distcp", 0, len(file.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def test_pickled_object_as_a_weight_is_not_executed(folder, tmp_path):
    weights = {f"decoder.{name}": value for name, value in make_decoder().state_dict().items()}
    replace_value(folder, f"state_dict.{next(iter(weights))}", Touch(tmp_path / "target"))
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=r"shared\.ckpt: not a readable checkpoint"):
        checkpoint.load_shards(folder, weights, is_distributed=False)
    assert tree(tmp_path) == before


def test_pickled_object_as_a_learning_rate_is_not_executed(folder, tmp_path):
    def state():
        return {"optimizer_0": {"param_groups": [{"lr": 0.0, "betas": (0.0, 0.0)}]}}

    wanted = state()
    sharded.load_sharded_state(folder, wanted, is_distributed=False)
    assert wanted["optimizer_0"]["param_groups"] == [{"lr": 0.25, "betas": (0.9, 0.95)}]
    name = next(name for name in sharded._Reader(folder).read_metadata().state_dict_metadata if name.endswith("lr"))
    replace_value(folder, name, Touch(tmp_path / "target"))
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=r"shared\.ckpt: not a readable checkpoint"):
        sharded.load_sharded_state(folder, state(), is_distributed=False)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "", "a\\b", "C:x", "a\0b", 7])
def test_metadata_paths_stay_in_the_folder(folder, name):
    table = sharded._Reader(folder).read_metadata()
    next(iter(table.storage_data.values())).relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(UsageError, match=r"\.metadata: .* is not a file name inside its folder"):
        checkpoint.read_checkpoint(folder)


def broken(change):
    whole = contents()
    change(whole)
    return whole


FILES = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("no checkpoint\n"),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Touch(path.with_name("target")))),
    "torch.save of an object": lambda path: torch.save(Touch(path.with_name("target")), path),
    "torch's old format": lambda path: torch.save(
        {"a": Touch(path.with_name("target"))}, path, _use_new_zipfile_serialization=False
    ),
    "an archive of something else": lambda path: __import__("zipfile").ZipFile(path, "w").writestr("a.txt", "a"),
    "no entry": lambda path: torch.save({"state_dict": {}}, path),
    "a list": lambda path: torch.save([1], path),
    "an entry that is no dictionary": lambda path: torch.save({"ropepp_lit": 1}, path),
    "an entry without a version": lambda path: torch.save({"ropepp_lit": {}}, path),
    "no weights": lambda path: torch.save(broken(lambda whole: whole.pop("state_dict")), path),
    "no architecture": lambda path: torch.save(broken(lambda whole: whole["ropepp_lit"].pop("architecture")), path),
    "half an architecture": lambda path: torch.save(
        broken(lambda whole: whole["ropepp_lit"]["architecture"].pop("positions")), path
    ),
    "unknown field": lambda path: torch.save(
        broken(lambda whole: whole["ropepp_lit"]["architecture"]["decoder"].update(depth=3)), path
    ),
    "unknown setting": lambda path: torch.save(
        broken(lambda whole: whole["ropepp_lit"]["architecture"]["positions"]["init_args"].update(depth=3)), path
    ),
    "a weight is missing": lambda path: torch.save(broken(lambda whole: whole["state_dict"].popitem()), path),
    "a weight has another shape": lambda path: torch.save(
        broken(lambda whole: whole["state_dict"].update({next(iter(whole["state_dict"])): torch.ones(3)})), path
    ),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_not_checkpoints(tmp_path, kind):
    path = tmp_path / "shared.ckpt"
    FILES[kind](path)
    before = tree(tmp_path)
    with pytest.raises(UsageError) as error:
        checkpoint.load_decoder(checkpoint.read_checkpoint(path))
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == before


def attack_split(values):
    values["splits"]["../../outside"] = values["splits"].pop("train")


def attack_chunk(name):
    def attack(values):
        values["splits"]["train"]["chunks"][0]["filename"] = name

    return attack


MANIFESTS = {
    "a split outside": attack_split,
    "a chunk outside": attack_chunk("../../../../../../home/user/.bashrc"),
    "an absolute chunk": attack_chunk("/etc/passwd"),
    "a chunk of another system": attack_chunk("..\\..\\file"),
    "a drive": attack_chunk("C:file"),
    "a chunk without a name": attack_chunk(""),
    "a number": attack_chunk(3),
    "NUL": attack_chunk("a\0b"),
    "objects as tokens": lambda values: values.update(dtype="O"),
    "no type": lambda values: values.update(dtype="nothing"),
}


@pytest.mark.parametrize("attack", MANIFESTS)
def test_manifest_paths_stay_in_the_folder(texts, tmp_path, attack):
    folder = tmp_path / "shards"
    prepare([str(texts)], PrepareSettings(tokenizer="bytes"), out=folder, show_progress=False)
    values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    MANIFESTS[attack](values)
    (folder / MANIFEST).write_text(json.dumps(values), encoding="utf-8")
    before = tree(tmp_path)
    for read in (Manifest.read, verify):
        with pytest.raises(UsageError, match=r"manifest\.json: ") as error:
            read(folder)
        assert "\n" not in str(error.value)
    assert tree(tmp_path) == before


CODE = "open({target!r}, 'w')\n"


def test_code_in_a_folder_is_never_executed(run, tmp_path):
    """`auto_map` in config.json and tokenizer_config.json."""
    torch.manual_seed(0)
    folder, target = tmp_path / "shared", str(tmp_path / "target")
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, max_position_embeddings=64))
    model.save_pretrained(folder)
    byte_tokenizer().tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    maps = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": maps}), encoding="utf-8")
    places = [f"{folder}--evil.Evil"] * 2  # another folder or one of the Hub, which is no file of the export
    settings = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": places}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "evil.py").write_text(CODE.format(target=target), encoding="utf-8")
    for words in (["import", "shared", "new.ckpt"], ["generate", "shared", "--max_new_tokens", 1],
                  ["export", "shared", "again"]):  # fmt: skip
        run(*words, cwd=tmp_path)
        assert not (tmp_path / "target").exists(), words
    settings = json.loads((tmp_path / "again/tokenizer_config.json").read_text(encoding="utf-8"))
    assert "auto_map" not in settings  # lm-eval loads the export with trust_remote_code
