"""Hugging Face folders with tokenizers of five kinds and tiny models, saved by transformers' classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

KINDS = ("gpt2", "llama2", "llama3", "qwen", "chat")
"""GPT-2's (BOS = EOS, nothing added), Llama 2's (byte fallback, BOS added), Llama 3's (BOS added by a template, two
EOS), Qwen's (no BOS), and a chat model's with truncation to 64 tokens and padding saved in tokenizer.json."""

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps.\n",
    "def add(first, second):\n    return first + second\n",
    "Naïve café, 漢字 and 🙂: everything that a tokenizer meets.\n",
    "A model that reads 4,096 tokens reads more than one that reads 512.\n",
] * 40
"""Training texts of the tokenizers."""

LONG = "".join(f"Line {number}: the fox reads 漢字 and sleeps in café {number % 7} 🙂.\n" for number in range(60))
"""A text of more than 64 tokens in every kind."""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pre-tokenization pattern of Qwen; Llama 3's groups up to three digits."""


def _byte_level(special: list[str], *, size: int = 300, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


def _splitting(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def make_gpt2() -> tuple[Tokenizer, dict, dict]:
    """Return a tokenizer like those of GPT-2, SmolLM, OLMo and Pythia."""
    tokenizer = _byte_level(["<|endoftext|>"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return tokenizer, {"tokenizer_class": "GPT2Tokenizer", **names}, {}


def make_llama2() -> tuple[Tokenizer, dict, dict]:
    """Return a tokenizer like those of Llama 2, Mistral and Gemma: characters with byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < 3]  # bytes are plain tokens
    tokenizer = Tokenizer.from_str(json.dumps(values))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tokenizer, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **names}, {}


def make_llama3() -> tuple[Tokenizer, dict, dict]:
    """Return a tokenizer like that of Llama 3: a template adds BOS; two EOS tokens."""
    tokenizer = _byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.pre_tokenizer = _splitting(SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|"))
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "clean_up_tokenization_spaces": True}
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **names}, {"eos_token_id": [bos + 1, bos + 2]}


def make_qwen() -> tuple[Tokenizer, dict, dict]:
    """Return a tokenizer like that of Qwen 2.5: no BOS, although config.json has an id."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizer=normalizers.NFC())
    tokenizer.pre_tokenizer = _splitting(SPLIT)
    names = {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    return tokenizer, {"tokenizer_class": "Qwen2Tokenizer", **names}, {"bos_token_id": 1}


def make_chat() -> tuple[Tokenizer, dict, dict]:
    """Return a tokenizer like that of SmolLM2-Instruct, saved with truncation and padding enabled."""
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<|im_end|>"), pad_token="<|im_end|>", length=64)
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return tokenizer, {"tokenizer_class": "GPT2Tokenizer", "chat_template": template, **names}, {}


def make_tokenizer(kind: str, folder: Path) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json of a kind into a folder.

    Returns:
        The tokenizer.
    """
    tokenizer, settings, _ = globals()[f"make_{kind}"]()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tokenizer


def make_folder(kind: str, folder: Path, *, seed: int = 0, **options: int) -> Path:
    """Write a folder of a kind: tokenizer, and a model of 64 wide and 2 layers with weights of std 0.3.

    Args:
        kind: One of KINDS.
        folder: New.
        seed: Of the weights.
        options: Fields of the model's configuration.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer(kind, folder)
    _, settings, generation = globals()[f"make_{kind}"]()
    ids = {
        f"{key}_token_id": tokenizer.token_to_id(settings[f"{key}_token"]) if settings[f"{key}_token"] else None
        for key in ("bos", "eos")
    }
    fields = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        **ids,
        **{key: value for key, value in generation.items() if key == "bos_token_id"},
        **options,
    }
    torch.manual_seed(seed)
    kinds = (Qwen2Config, Qwen2ForCausalLM) if kind == "qwen" else (LlamaConfig, LlamaForCausalLM)
    model = kinds[1](kinds[0](**fields))
    model.generation_config.eos_token_id = generation.get("eos_token_id", ids["eos_token_id"])
    model.save_pretrained(folder)
    return folder


def add_special(tokenizer: Tokenizer, content: str, *, special: bool) -> None:
    """Add a token that is or is not special."""
    tokenizer.add_tokens([AddedToken(content, special=special)])
