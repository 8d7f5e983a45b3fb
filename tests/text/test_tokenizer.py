import json
import re
from pathlib import Path

import others
import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

import ropepp_lit
from ropepp_lit.errors import UsageError
from ropepp_lit.text.stream import TextStream
from ropepp_lit.text.tokenizer import TextTokenizer, byte_tokenizer, load_tokenizer, train_tokenizer
from ropepp_lit.text.tokenizer_files import added_around, processor_around

DOCUMENTS = [f"Document {n}: " + "the quick brown fox – äöü 漢字 🙂\r\n" * (1 + n % 7) for n in range(60)]


@pytest.fixture(scope="module", params=others.KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(kind)
    others.make_tokenizer(kind, path)
    return path


def read_settings(folder: Path) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))


def test_tokenizers_round_trip_any_text():
    text = "naïve – 漢字 🙂\t\r\n  def f(x):\n        return '''x'''\n\x00\x1f"
    for tokenizer in (byte_tokenizer(), train_tokenizer(["abc abc abc", text], vocab_size=270)):
        (ids,) = tokenizer.encode([text])
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
        assert tokenizer.decode(ids.tolist()) == text
        assert ids[1:-1].tolist() == tokenizer.encode_text(text)  # the table look-up of bytes gives the same ids
        assert added_around(tokenizer.tokenizer) == ((0,), ())
    assert byte_tokenizer().vocab_size == 258


def test_training_a_tokenizer_is_deterministic():
    documents = [f"some words {number} and more words" for number in range(200)]
    one, other = (train_tokenizer(documents, vocab_size=300).json for _ in range(2))
    assert one == other


@pytest.mark.parametrize("text", [others.LONG, "", " a  b ", "<s> is spelt", "x" * 300])
def test_ids_equal_those_of_transformers(folder, text):
    """With any truncation, padding and special tokens in the files."""
    loaded, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    expected = theirs(text, split_special_tokens=True).input_ids
    assert loaded.encode_whole(text) == expected
    (document,) = loaded.encode([text])
    assert document.tolist() == [*expected, theirs.eos_token_id]
    again = TextTokenizer.from_entry(
        {
            "tokenizer": loaded.json,
            "bos_token_id": loaded.bos_token_id,
            "eos_token_id": loaded.eos_token_id,
            "opening": list(loaded.opening),
        }
    )
    assert again.encode_whole(text) == expected


def test_a_folder_and_its_file_give_the_same_tokenizer(folder):
    by_folder, by_file = load_tokenizer(str(folder)), load_tokenizer(str(folder / "tokenizer.json"))
    assert by_folder.fingerprint == by_file.fingerprint
    assert by_folder.settings == by_file.settings


def test_opening_and_eos_tokens(kind, folder):
    assert (
        load_tokenizer(str(folder)).description
        == {
            "gpt2": "texts begin with no token, documents end with <|endoftext|>",
            "llama2": "texts begin with <s>, documents end with </s>",
            "llama3": "texts begin with <|begin_of_text|>, documents end with <|end_of_text|>",
            "qwen": "texts begin with no token, documents end with <|endoftext|>",
            "chat": "texts begin with no token, documents end with <|im_end|>",
        }[kind]
    )


def test_options_replace_bos_and_eos_tokens(kind, folder):
    plain = load_tokenizer(str(folder))
    eos = plain.token(plain.eos_token_id)
    opened = load_tokenizer(str(folder), bos_token=eos)
    assert opened.encode_whole("a") == [plain.eos_token_id, *plain.encode_text("a")]
    assert load_tokenizer(str(folder), bos_token="").encode_whole("a") == plain.encode_text("a")
    with pytest.raises(UsageError, match=r"bos_token: '<none>' is not in the vocabulary"):
        load_tokenizer(str(folder), bos_token="<none>")
    with pytest.raises(UsageError, match=r"eos_token: '<none>' is not in the vocabulary"):
        load_tokenizer(str(folder), eos_token="<none>")


def test_opening_tokens_of_a_prompt_are_not_repeated(folder):
    loaded = load_tokenizer(str(folder))
    begin = "".join(str(loaded.token(token)) for token in loaded.opening)
    assert loaded.encode_prompt(begin + "A fox")[: len(loaded.opening) + 1].count(loaded.bos_token_id) == len(begin[:1])
    assert loaded.encode_prompt("A fox") == loaded.encode_whole("A fox")
    eos = str(loaded.token(loaded.eos_token_id))
    assert loaded.encode_prompt(f"A fox{eos}")[-1] == loaded.eos_token_id  # special tokens in a prompt are parsed
    assert loaded.eos_token_id not in loaded.encode_text(f"A fox{eos}")
    assert loaded.encode_prompt("") == (list(loaded.opening) or [loaded.eos_token_id])


def test_invalid_bytes_are_streamed_after_a_bounded_number_of_tokens():
    tokenizer = byte_tokenizer()
    invalid = tokenizer.encode_text("é")[0]
    stream = TextStream(tokenizer)
    assert sum(len(stream.push(invalid)) for _ in range(500)) > 400


def test_special_tokens_of_special_tokens_map(kind, tmp_path):
    tokenizer = others.make_tokenizer(kind, tmp_path)
    settings = read_settings(tmp_path)
    names = {key: settings.pop(key) for key in ("bos_token", "eos_token") if settings.get(key)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.eos_token_id == tokenizer.token_to_id(names["eos_token"])
    assert loaded.settings["eos_token"] == names["eos_token"]


def test_eos_of_config_json_is_used_if_it_is_a_special_token(tmp_path):
    tokenizer = others.make_tokenizer("llama3", tmp_path)
    settings = read_settings(tmp_path)
    del settings["bos_token"], settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for end, expected in ((2, None), (10**6, None), ([301, 302], 301), (302, 302)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": end}))
        found = load_tokenizer(str(tmp_path)).eos_token_id
        assert found == (expected or tokenizer.token_to_id("<|end_of_text|>"))  # otherwise the first known EOS token
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [301, 302, 10**6]}))
    assert load_tokenizer(str(tmp_path)).stop_token_ids == {301, 302}


def test_a_tokenizer_that_appends_tokens_to_texts(tmp_path):
    tokenizer = others.make_tokenizer("llama2", tmp_path)
    tokenizer.post_processor = processor_around(tokenizer, [1], [2])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").unlink()
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.opening, loaded.closing) == ((1,), (2,))
    assert loaded.encode(["a"])[0].tolist() == loaded.encode_whole("a")  # EOS once
    assert loaded.encode_prompt("a") == loaded.encode_whole("a")[:-1]


def test_vocabulary_and_merges_without_tokenizer_json(tmp_path):
    tokenizer = others.make_tokenizer("gpt2", tmp_path)
    tokenizer.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode_text(others.LONG) == tokenizer.encode(others.LONG).ids


def test_a_sentencepiece_model_without_tokenizer_json(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(others.TEXTS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=400,
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(str(tmp_path))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    text = "The quick brown fox reads 漢字."
    assert loaded.encode_whole(text) == [1, *reference.encode(text)]


def test_code_of_a_folder_does_not_run(tmp_path, capsys):
    others.make_tokenizer("gpt2", tmp_path)
    hostile = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**read_settings(tmp_path), **hostile}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": hostile["auto_map"]}))
    assert load_tokenizer(str(tmp_path)).eos_token_id == 300
    assert not (tmp_path / "ran").exists()
    assert "only tokenizer.json is used" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"tokenizer: .*: no such tokenizer"):
        load_tokenizer(str(tmp_path))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 9\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_git_lfs_pointers_are_reported(name, tmp_path):
    others.make_tokenizer("llama3", tmp_path)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UsageError, match=rf"{name}: a git-lfs pointer, not the file; run `git lfs pull`"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer.json", "", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: not a JSON object"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not JSON"),
        ("generation_config.json", "{", r"generation_config\.json: not JSON"),
    ],
)
def test_damaged_files_are_reported(name, content, message, tmp_path):
    others.make_tokenizer("llama3", tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        load_tokenizer(str(tmp_path))


def test_bpe_dropout_is_disabled(tmp_path):
    """With dropout, each encoding of a text would give different tokens."""
    tokenizer = others.make_tokenizer("qwen", tmp_path)
    expected = tokenizer.encode(others.LONG).ids
    tokenizer.model.dropout = 0.5
    tokenizer.save(str(tmp_path / "mine.json"))
    assert tokenizer.encode(others.LONG).ids != expected
    loaded = load_tokenizer(str(tmp_path / "mine.json"))
    entry = {"tokenizer": tokenizer.to_str(), "bos_token_id": None, "eos_token_id": 300}
    for found in (loaded, TextTokenizer.from_entry(entry)):
        assert found.encode_text(others.LONG) == expected
        assert found.encode([others.LONG])[0].tolist() == [*expected, 300]


@pytest.mark.parametrize("token", [5, [], {"content": None}, ""])
def test_special_tokens_that_are_not_strings_are_ignored(token, tmp_path):
    others.make_tokenizer("qwen", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**read_settings(tmp_path), "eos_token": token}))
    assert load_tokenizer(str(tmp_path)).eos_token_id == 300  # the first known EOS token


@pytest.mark.parametrize("word", ["a", "b"])
def test_encoding_errors_are_reported_in_one_line(word, tmp_path):
    """A word-level vocabulary without a token for unknown words."""
    tokenizer = Tokenizer(models.WordLevel({word: 0, "</s>": 1}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match=r"tokenizer: it cannot encode a text \(WordLevel error: Missing \[UNK\]"):
        load_tokenizer(str(tmp_path / "tokenizer.json")).encode(["a b"])
    with pytest.raises(UsageError, match=r"eos_token: .* is not in the vocabulary of bytes"):
        load_tokenizer("bytes", eos_token="\udcff")
    with pytest.raises(UsageError, match="a text is not UTF-8; correct it"):
        byte_tokenizer().encode_prompt("a\udcffb")


def test_a_bare_file_and_no_file(tmp_path):
    tokenizer = train_tokenizer(DOCUMENTS, vocab_size=300).tokenizer
    tokenizer.save(str(tmp_path / "mine.json"))
    assert load_tokenizer(str(tmp_path / "mine.json")).description == (
        "texts begin with <|begin_of_text|>, documents end with <|end_of_text|>"
    )
    with pytest.raises(UsageError, match=r"tokenizer: nowhere: no such tokenizer"):
        load_tokenizer("nowhere")
    plain = Tokenizer.from_str(tokenizer.to_str().replace("<|end_of_text|>", "<|stop|>"))
    plain.post_processor = processors.ByteLevel()
    plain.save(str(tmp_path / "mine.json"))
    with pytest.raises(UsageError, match=r"eos_token: .* pass the token by ropepp-lit prepare --eos_token"):
        load_tokenizer(str(tmp_path / "mine.json"))


def test_a_tokenizer_by_its_name_on_the_hub(tmp_path, monkeypatch):
    """The tokenizer is in the local cache of the Hub's library: no connection is tokenizer."""
    folder = tmp_path / "models--someone--model"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    byte_tokenizer().tokenizer.save(str(snapshot / "tokenizer.json"))
    (snapshot / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|begin_of_text|>"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_tokenizer("someone/model").eos_token_id == 0
    with pytest.raises(UsageError, match=r"tokenizer: someone/else: not found locally or on the Hugging Face"):
        load_tokenizer("someone/else")


def test_tokenizers_are_created_in_one_module():
    """In other modules, truncation, padding or opening tokens could silently apply or be lost."""
    package = Path(ropepp_lit.__file__).parent
    bare = re.compile(r"\bTokenizer\.from_\w+|AutoTokenizer\.from_pretrained|\bTokenizer\(|PreTrainedTokenizer")
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.parent.name != "text" and bare.search(path.read_text(encoding="utf-8"))
    }
    assert found <= {
        "hf/export.py",
        "train/checks.py",
        "eval/language_model.py",
    }  # the last for lm-eval
