"""Models and tokenizers that llama.cpp does not support are rejected, and no file is written."""

import json

import others
import pytest
import torch
from small_checkpoints import DIGITS, PLAIN, YARN, assign, changed, make, without
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ropepp_lit.errors import UsageError
from ropepp_lit.hf.export_gguf import export_gguf
from ropepp_lit.nn import (
    Llama3,
    RNoPE,
    RoPEPP,
    Yarn,
    baselines,
)

pytest.importorskip("gguf")


def word_level(tokenizer):
    vocabulary = tokenizer.get_vocab()
    changed = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end_of_text|>"))
    changed.decoder = decoders.ByteLevel()
    return changed


def with_model(**values):
    def change(tokenizer):
        contents = json.loads(tokenizer.to_str())
        contents["model"] |= values
        return Tokenizer.from_str(json.dumps(contents))

    return change


def llama2():
    tokenizer, _, _ = others.make_llama2()
    return make(vocab_size=420, entry={"tokenizer": tokenizer.to_str(), "opening": [1]})


KNOWN = r"is not supported; supported are gpt-2, llama-bpe, qwen2, smaug-bpe, smollm; export a folder"


REFUSED = {
    "EC": (lambda: make(RoPEPP(variant="ec")), r"is RoPEPP \(RoPE\+\+ EC\), and llama\.cpp supports only plain RoPE"),
    "EH": (lambda: make(RoPEPP(variant="eh")), r"model\.positions is RoPEPP \(RoPE\+\+ EH\), and"),
    "RNoPE": (lambda: make(RNoPE(nope_layers=[1])), r"model\.positions is RNoPE"),
    "NoPE": (lambda: make(baselines.NoPE()), r"model\.positions is NoPE \(NoPE\), and"),
    "ALiBi": (lambda: make(baselines.ALiBi()), r"model\.positions is ALiBi \(ALiBi\), and"),
    "FoPE": (lambda: make(baselines.FoPE()), r"model\.positions is FoPE"),
    "PartialRoPE": (lambda: make(baselines.PartialRoPE(partial_rotary_factor=0.5)), r"model\.positions is PartialRoPE"),
    "qk_norm and biases": (lambda: make(qk_norm=True, attention_bias=True), r"no architecture with qk_norm and biases"),
    "qk_norm and Llama3": (lambda: make(qk_norm=True, frequencies=Llama3()), r"model\.frequencies is .*Llama3 × 8"),
    "qk_norm and a ramp": (lambda: make(qk_norm=True, frequencies=Yarn(**YARN, beta_slow=2.0)), r"Yarn with beta_fast"),
    "float64": (lambda: make(dtype=torch.float64), r"embed_tokens\.weight is float64; give --dtype float32"),
    "no tokenizer": (lambda: make(entry={"tokenizer": None}), r"stores no tokenizer"),
    "no EOS": (lambda: make(entry={"eos_token_id": None}), r"has no EOS token"),
    "two before": (
        lambda: make(entry={"opening": [0, 1]}),
        r"before a text and three stop tokens; the tokenizer has 2",
    ),
    "four ends": (
        lambda: make(entry={"generation_config": '{"eos_token_id": [1, 2, 3, 4]}'}),
        r"the tokenizer has 1 and 4",
    ),
    "too many tokens": (lambda: make(vocab_size=200), r"the tokenizer has 258 tokens, and the embedding has 200 rows"),
    "byte fallback": (llama2, r"the tokenizer is a BPE with byte fallback, which is not supported; export a folder"),
    "bytes as unknown": (
        changed(without("Ą", unk_token="<|end_of_text|>")),
        r"BPE, not byte-level BPE, which is not sup",
    ),
    "words": (changed(word_level), r"the tokenizer is WordLevel, not byte-level BPE"),
    "ignore_merges": (changed(with_model(ignore_merges=True)), KNOWN),
    "prefix space": (changed(assign("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))), KNOWN),
    "other words": (changed(assign("pre_tokenizer", others._splitting(r"\s+"))), KNOWN),
    "more parts": (changed(assign("pre_tokenizer", pre_tokenizers.Sequence([DIGITS, DIGITS, PLAIN]))), KNOWN),
    "lower case": (changed(assign("normalizer", normalizers.Lowercase())), r"llama.cpp has no normalizer Lowercase"),
    "token that strips": (
        changed(lambda tokenizer: tokenizer.add_tokens([AddedToken("<|user|>", rstrip=True)]) and None),
        r"the token '<\|user\|>' depends on adjacent characters",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_models_and_tokenizers(tmp_path, name):
    make_it, message = REFUSED[name]
    with pytest.raises(UsageError, match=message) as caught:
        export_gguf(make_it(), tmp_path / "model.gguf", dtype=None)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
