"""Exports checkpoints as GGUF files for llama.cpp. Only plain RoPE is supported, because llama.cpp has no RoPE++."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, pre_tokenizers
from torch import Tensor

from ropepp_lit.checkpoint import KEY, compute_dtype
from ropepp_lit.errors import UsageError
from ropepp_lit.files import whole_file, write_errors
from ropepp_lit.hf.config import Architecture
from ropepp_lit.hf.export import architecture_of
from ropepp_lit.hf.folder import weights_of
from ropepp_lit.nn import Frequencies, Linear, RoPE, Yarn
from ropepp_lit.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

_USE_CONVERTER = "export a folder and try llama.cpp's convert_hf_to_gguf.py"

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2, _DIGITS, _LLAMA3, _QWEN2 = "GPT-2", "single digits, GPT-2", _WORDS % "{1,3}", _WORDS % ""

_PRE_TOKENIZERS: dict[tuple[str | None, bool], str] = {
    (_GPT2, False): "gpt-2",
    (_DIGITS, False): "smollm",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "smaug-bpe",
    (_QWEN2, False): "qwen2",
}
"""Values of `tokenizer.ggml.pre`, by split pattern and `ignore_merges` (words that are tokens are not split)."""


class GGUFExport(NamedTuple):
    """Description of an exported GGUF file."""

    architecture: str
    """`general.architecture`."""

    pre_tokenizer: str
    """`tokenizer.ggml.pre`."""

    notices: list[str]
    """Differences in the behavior of llama.cpp."""


class _Vocabulary(NamedTuple):
    """Vocabulary of a tokenizer in GGUF's format."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre_tokenizer: str
    notices: list[str]


def export_gguf(checkpoint: dict[str, Any], path: Path, *, dtype: torch.dtype | None) -> GGUFExport:
    """Export a checkpoint as a GGUF file, which is written atomically.

    The model is exported as llama.cpp's architecture `llama`, with permuted rows of queries and keys because it rotates
    adjacent dimensions, or as `qwen3` if queries and keys are normalized.

    Args:
        checkpoint: Checkpoint from :func:`~ropepp_lit.hf.folder.open_checkpoint`.
        path: Output file; must not exist.
        dtype: Dtype of the matrices, float32, float16 or bfloat16; None keeps the dtype of each. Norms and biases are
            float32, as llama.cpp requires.

    Raises:
        UsageError: llama.cpp does not support the model or tokenizer, the file exists or cannot be written, or the
            package gguf is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError("gguf: needs the package gguf: pip install 'ropepp-lit[gguf]'") from error

    if path.exists():
        raise UsageError(f"gguf: {path}: already exists; name another file")
    architecture = architecture_of(checkpoint)
    name = _architecture_name(architecture)
    factors = _frequency_factors(architecture, name)
    tokenizer, vocabulary = _read_tokenizer(checkpoint[KEY], architecture.decoder.vocab_size)
    dtypes = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    model = gguf.MODEL_ARCH.QWEN3 if name == "qwen3" else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(model, architecture.decoder.num_hidden_layers)
    tensors: dict[str, tuple[str, Tensor, torch.dtype]] = {}
    for key, value in weights_of(checkpoint).items():
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        stored = torch.float32 if value.ndim == 1 else dtype or value.dtype
        if stored not in dtypes:
            raise UsageError(f"dtype: {key} is {str(stored).removeprefix('torch.')}; give --dtype float32")
        assert target is not None
        tensors[target] = key, value, stored
    if factors is not None:
        tensors["rope_freqs.weight"] = "rope_freqs.weight", factors, torch.float32

    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            writer = gguf.GGUFWriter(partial, name)
            try:
                _describe(writer, checkpoint, architecture, path.stem, dtype or compute_dtype(checkpoint))
                _describe_rotary(writer, architecture, has_factors=factors is not None)
                _describe_tokenizer(writer, checkpoint[KEY], tokenizer, vocabulary)
                for target, (_, value, stored) in tensors.items():
                    size = value.numel() * stored.itemsize
                    writer.add_tensor_info(target, value.shape, np.dtype(np.float32), size, dtypes[stored])
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for key, value, stored in tensors.values():  # one in memory at a time
                    if name == "llama":
                        value = _permute(key, value, architecture)
                    value = value.to(stored).contiguous()
                    writer.write_tensor_data((value.view(torch.uint8) if stored is torch.bfloat16 else value).numpy())
            finally:
                writer.close()
    return GGUFExport(name, vocabulary.pre_tokenizer, vocabulary.notices)


def _architecture_name(architecture: Architecture) -> str:
    """Return the equivalent architecture of llama.cpp.

    Raises:
        UsageError: There is none.
    """
    config, scheme = architecture.decoder, architecture.scheme
    if type(scheme) is not RoPE:
        raise UsageError(
            f"gguf: model.positions is {type(scheme).__name__} ({scheme}), and llama.cpp supports only plain RoPE; "
            "export a folder for transformers"
        )
    if not config.qk_norm:
        return "llama"
    if config.attention_bias or config.attention_output_bias or config.mlp_bias:
        raise UsageError("gguf: llama.cpp has no architecture with qk_norm and biases (model.decoder)")
    return "qwen3"


def _frequency_factors(architecture: Architecture, name: str) -> Tensor | None:
    """Return the divisors of the unscaled frequencies, [head_dim / 2], float32; None if metadata can describe them.

    Raises:
        UsageError: The architecture does not support divisors.
    """
    frequencies, head_dim = architecture.frequencies, architecture.decoder.head_dim
    if type(frequencies) in (Frequencies, Linear) or _is_yarn_of_llama_cpp(frequencies):
        return None
    if name != "llama":
        raise UsageError(
            f"gguf: model.frequencies is {frequencies}; with qk_norm llama.cpp supports only Frequencies, Linear, and "
            "Yarn with beta_fast 32, beta_slow 1 and truncate"
        )
    plain = Frequencies(rope_theta=frequencies.rope_theta).inverse_frequencies(head_dim, dtype=torch.float64)
    return (plain / frequencies.inverse_frequencies(head_dim, dtype=torch.float64)).float()


def _is_yarn_of_llama_cpp(frequencies: Frequencies) -> bool:
    """Return whether the frequencies are YaRN with the ramp that llama.cpp hard-codes for these architectures."""
    if type(frequencies) is not Yarn:
        return False
    return (frequencies.beta_fast, frequencies.beta_slow, frequencies.truncate) == (32, 1, True)


def _permute(name: str, value: Tensor, architecture: Architecture) -> Tensor:
    """Permute rows of query and key heads from halves (pair n is n and n + D/2) to adjacent pairs (2n and 2n + 1)."""
    if not any(f".{part}_proj." in name for part in "qk"):
        return value
    heads = value.shape[0] // architecture.decoder.head_dim
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _describe(
    writer: GGUFWriter, checkpoint: dict[str, Any], architecture: Architecture, name: str, dtype: torch.dtype
) -> None:
    """Write metadata of the file and the geometry."""
    import gguf

    config, card = architecture.decoder, checkpoint[KEY].get("card") or {}
    kinds = {torch.float16: gguf.LlamaFileType.MOSTLY_F16, torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16}
    writer.add_type("model")
    writer.add_name(name)
    if isinstance(card.get("license"), str):
        writer.add_license(card["license"])
    writer.add_file_type(kinds.get(dtype, gguf.LlamaFileType.ALL_F32))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(architecture.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _describe_rotary(writer: GGUFWriter, architecture: Architecture, *, has_factors: bool) -> None:
    """Write the base, the scaling, and the factor of cos and sin."""
    import gguf

    frequencies, attention_factor = architecture.frequencies, architecture.frequencies.attention_factor
    writer.add_rope_dimension_count(architecture.decoder.head_dim)
    writer.add_rope_freq_base(frequencies.rope_theta)
    if isinstance(frequencies, Linear):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(frequencies.factor)
    elif isinstance(frequencies, Yarn) and not has_factors:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(frequencies.factor)
        writer.add_rope_scaling_orig_ctx_len(frequencies.original_max_position_embeddings)
        # llama.cpp multiplies by this factor itself.
        attention_factor /= 0.1 * float(np.log(frequencies.factor)) + 1
    if attention_factor != 1:
        writer.add_rope_scaling_attn_factors(attention_factor)


def _describe_tokenizer(
    writer: GGUFWriter, entry: Mapping[str, Any], tokenizer: TextTokenizer, vocabulary: _Vocabulary
) -> None:
    """Write the vocabulary, special tokens and chat template."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    bos = tokenizer.opening[0] if tokenizer.opening else tokenizer.bos_token_id
    if bos is not None:
        writer.add_bos_token_id(bos)
    assert tokenizer.eos_token_id is not None
    writer.add_eos_token_id(tokenizer.eos_token_id)
    others = sorted(tokenizer.stop_token_ids - {tokenizer.eos_token_id})
    for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(token)
    writer.add_add_bos_token(bool(tokenizer.opening))
    writer.add_add_eos_token(False)  # prompts are continued
    if template := json.loads(entry.get("tokenizer_config") or "{}").get("chat_template"):
        writer.add_chat_template(template)


def _read_tokenizer(entry: Mapping[str, Any], vocab_size: int) -> tuple[TextTokenizer, _Vocabulary]:
    """Return a checkpoint's tokenizer, and its vocabulary in GGUF's format.

    Raises:
        UsageError: llama.cpp would tokenize texts differently.
    """
    if entry["tokenizer"] is None:
        raise UsageError("gguf: the checkpoint stores no tokenizer, which llama.cpp requires")
    tokenizer = TextTokenizer.from_entry(entry)
    if tokenizer.eos_token_id is None:
        raise UsageError("gguf: the tokenizer has no EOS token, which llama.cpp requires")
    if len(tokenizer.opening) > 1 or len(tokenizer.stop_token_ids) > 3:
        raise UsageError(
            "gguf: llama.cpp supports one token before a text and three stop tokens; the tokenizer has "
            f"{len(tokenizer.opening)} and {len(tokenizer.stop_token_ids)}"
        )
    if tokenizer.vocab_size > vocab_size:
        raise UsageError(
            f"gguf: the tokenizer has {tokenizer.vocab_size:,} tokens, and the embedding has {vocab_size:,} rows"
        )
    values = json.loads(tokenizer.json)
    model = values["model"]
    decoder = (values.get("decoder") or {}).get("type")
    affixes = (model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"))
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - set(model["vocab"])
    is_byte_level = model.get("type") == "BPE" and decoder == "ByteLevel" and not any(affixes)
    if not is_byte_level or (missing and model.get("unk_token") is not None):
        kind = "a BPE with byte fallback" if model.get("byte_fallback") else f"{model.get('type')}, not byte-level BPE"
        raise UsageError(f"gguf: the tokenizer is {kind}, which is not supported; {_USE_CONVERTER}")
    splitting = _splitting(values["pre_tokenizer"])
    pre_tokenizer = None if splitting is None else _PRE_TOKENIZERS.get((splitting, bool(model.get("ignore_merges"))))
    if pre_tokenizer is None:
        raise UsageError(
            "gguf: the tokenizer's pre_tokenizer with its ignore_merges is not supported; supported are "
            f"{', '.join(sorted(_PRE_TOKENIZERS.values()))}; {_USE_CONVERTER}"
        )
    normalizer = (values.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise UsageError(f"gguf: llama.cpp has no normalizer {normalizer}, which the tokenizer uses; {_USE_CONVERTER}")
    notices = []
    if normalizer is not None:
        notices.append(
            f"llama.cpp does not apply the tokenizer's normalizer {normalizer}; only texts that are already normalized "
            "get the same tokens"
        )
    if missing:
        notices.append(
            f"the tokenizer has no tokens for {len(missing)} of the 256 bytes and drops them, as llama.cpp does; the "
            "text around them may be tokenized differently"
        )
    tokens, types = _tokens(tokenizer, vocab_size)
    merges = [" ".join(pair) for pair in model["merges"]]
    if not merges:  # llama.cpp rejects files without merges; this one never applies, because merges start with bytes
        merges = [" ".join([tokens[tokenizer.eos_token_id]] * 2)]
    return tokenizer, _Vocabulary(tokens, types, merges, pre_tokenizer, notices)


def _tokens(tokenizer: TextTokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    """Return tokens and their types by id, padded with unused tokens to the rows of the embedding."""
    import gguf

    by_id = {token: text for text, token in tokenizer.tokenizer.get_vocab(with_added_tokens=True).items()}
    added: dict[int, AddedToken] = tokenizer.tokenizer.get_added_tokens_decoder()
    for token in added.values():
        if token.lstrip or token.rstrip or token.single_word:
            raise UsageError(
                f"gguf: the token {token.content!r} depends on adjacent characters (lstrip, rstrip or single_word), "
                "which the GGUF format does not support"
            )
    tokens, types = [], []
    for index in range(vocab_size):
        if index not in by_id:
            kind = gguf.TokenType.UNUSED
        elif index in added:
            kind = gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED
        else:
            kind = gguf.TokenType.NORMAL
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        types.append(int(kind))
    return tokens, types


def _splitting(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Return the split pattern of a pre-tokenizer, as in the keys of `_PRE_TOKENIZERS`; None if it is another one."""
    parts = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    last = parts[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if last.get("use_regex", True):
        if len(parts) == 1:
            return _GPT2
        is_digits = len(parts) == 2 and parts[0].get("type") == "Digits" and parts[0].get("individual_digits")
        return _DIGITS if is_digits else None
    split = parts[0]
    if len(parts) != 2 or split.get("type") != "Split" or split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    return (split.get("pattern") or {}).get("Regex")
