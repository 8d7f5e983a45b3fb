import json

import pytest

from ropepp_lit.errors import UsageError
from ropepp_lit.text.tokenizer import byte_tokenizer, load_tokenizer, train_tokenizer

DOCUMENTS = [f"Document {n}: " + "the quick brown fox – äöü 漢字 🙂\r\n" * (1 + n % 7) for n in range(60)]


def test_tokenizers_give_back_any_text():
    text = "naïve – 漢字 🙂\t\r\n  def f(x):\n        return '''x'''\n\x00\x1f"
    for made in (byte_tokenizer(), train_tokenizer(["abc abc abc", text], vocab_size=270)):
        (ids,) = made.encode([text])
        assert (ids[0], ids[-1]) == (made.bos_token_id, made.eos_token_id) == (0, 1)
        assert made.tokenizer.decode(ids[1:-1].tolist()) == text
        assert ids[1:-1].tolist() == made.tokenizer.encode(text).ids  # the look-up of bytes too
    assert byte_tokenizer().vocab_size == 258


def test_a_trained_tokenizer_is_the_same_each_time():
    documents = [f"some words {number} and more words" for number in range(200)]
    one, other = (train_tokenizer(documents, vocab_size=300).tokenizer.to_str() for _ in range(2))
    assert one == other


def test_tokenizers_by_name(tmp_path):
    made = train_tokenizer(DOCUMENTS, vocab_size=300).tokenizer
    made.add_special_tokens(["<s>", "<stop>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "<stop>"})
    )
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.vocab_size) == (300, 301, 302)
    bare = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (bare.bos_token_id, bare.eos_token_id) == (None, 1)  # the first known one
    assert load_tokenizer(str(tmp_path / "tokenizer.json"), eos_token="<s>").eos_token_id == 300
    with pytest.raises(UsageError, match=r"bos_token: '<none>' is not in the vocabulary"):
        load_tokenizer(str(tmp_path), bos_token="<none>")
    with pytest.raises(UsageError, match=r"tokenizer: nowhere: no such tokenizer"):
        load_tokenizer("nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_by_its_name_on_the_hub(tmp_path, monkeypatch):
    """As the Hub's own library keeps it on this machine: no connection is made."""
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
    with pytest.raises(UsageError, match=r"tokenizer: someone/else: neither here nor to be had from the Hugging Face"):
        load_tokenizer("someone/else")
