"""`ropepp-lit import`, `export` and `upcycle`: conversion from and to Hugging Face, and from RoPE to RoPE++."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ropepp_lit.arguments import call, command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

Scaling = Literal["default", "linear", "yarn", "yarn_by_rotations", "llama3"]


def import_(
    source: str,
    out: str,
    *,
    revision: str | None = None,
    variant: Literal["rope", "ec", "eh"] | None = None,
    rope_theta: float | None = None,
    scaling: Scaling | None = None,
    factor: float | None = None,
    original_max_position_embeddings: int | None = None,
    ignore: str = "",
) -> None:
    """Convert a Hugging Face model to a checkpoint, with a recipe that continues training from it.

    Supports the families llama, mistral, qwen2, qwen3, phi3, granite and smollm3, folders of the public RoPE++ code,
    and exports of ropepp-lit. No code in the folder is run.

    Args:
        source: Folder with config.json and weights: model.safetensors or pytorch_model.bin (weights only), in one file
            of any name or in shards with or without an index; or the name of a model on the Hugging Face Hub
            (ORGANIZATION/MODEL or ORGANIZATION/MODEL@REVISION).
        out: Checkpoint to write, such as model.ckpt; a recipe of the same name is written next to it.
        revision: Branch, tag or commit on the Hub; the commit is stored in the checkpoint.
        variant: Variant that the weights must have; empty means the variant that their shapes show.
        rope_theta: Base of the rotary frequencies, if config.json does not contain it.
        scaling: Scaling of the rotary frequencies, if config.json does not contain it (old RoPE++ folders).
        factor: Factor of the scaling.
        original_max_position_embeddings: Context length before scaling.
        ignore: Comma-separated fields of config.json to ignore because they do not affect the model.
    """
    from ropepp_lit.hf.folder import find_folder, read_folder

    path = _new_checkpoint(out)
    options = _folder_options(variant, rope_theta, scaling, factor, original_max_position_embeddings, ignore)
    checkpoint = read_folder(find_folder(source, revision=revision), **options)
    _write(path, checkpoint)


def upcycle(
    source: str,
    out: str,
    *,
    variant: Literal["ec", "eh"],
    pairs: Literal["average", "first"] = "average",
    text: str | None = None,
    revision: str | None = None,
    rope_theta: float | None = None,
    scaling: Scaling | None = None,
    factor: float | None = None,
    original_max_position_embeddings: int | None = None,
    ignore: str = "",
) -> None:
    """Convert a RoPE checkpoint to a RoPE++ checkpoint for continued training.

    EC computes exactly the output of the original, because the imaginary heads start with zeros in the output
    projection. EH has half the heads and only approximates it; --text measures the change of the loss.

    Args:
        source: A .ckpt file with plain RoPE, a Hugging Face folder, or the name of a model on the Hugging Face Hub.
        out: Checkpoint to write, such as model-ec.ckpt; a recipe of the same name is written next to it.
        variant: `ec` keeps the KV cache and doubles the attention heads; `eh` keeps the heads and halves the cache.
        pairs: For EH: `average` each pair of heads, or keep the `first` of it.
        text: UTF-8 file on which the loss is measured before and after the conversion.
        revision: Branch, tag or commit of a model on the Hub.
        rope_theta: Base of the rotary frequencies of a Hugging Face folder, if config.json does not contain it.
        scaling: Scaling of the rotary frequencies of a Hugging Face folder, if config.json does not contain it.
        factor: Factor of the scaling.
        original_max_position_embeddings: Context length before scaling.
        ignore: Comma-separated fields of config.json to ignore because they do not affect the model.
    """
    from pathlib import Path

    from ropepp_lit.hf.compare import compare
    from ropepp_lit.hf.folder import open_checkpoint
    from ropepp_lit.hf.upcycle import upcycle as work

    path = _new_checkpoint(out)
    options = _folder_options(None, rope_theta, scaling, factor, original_max_position_embeddings, ignore)
    original = open_checkpoint(source, revision=revision, checksums=True, **options)
    checkpoint = work(original, variant=variant, pairs=pairs)
    print(compare(original, checkpoint, None if text is None else Path(text)))
    _write(path, checkpoint)


def export(
    checkpoint: str,
    out: str | None = None,
    *,
    gguf: str | None = None,
    adapter: str | None = None,
    base: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str | None = None,
    check: bool | None = None,
) -> None:
    """Convert a checkpoint to a transformers folder, a GGUF file for llama.cpp, or a peft adapter.

    Plain RoPE becomes a standard Llama (or Qwen) model. RoPE++ includes its own modeling files, which need only
    transformers (trust_remote_code=True); llama.cpp does not support it. Adapters are merged into their base model in
    float32.

    Args:
        checkpoint: A .ckpt file, a Hugging Face folder, or the name of a model on the Hugging Face Hub.
        out: Folder to write; new or empty.
        adapter: Folder for the adapter only (of model.lora), instead of the full model, in the format of peft;
            PeftModel.from_pretrained loads it over the exported base model.
        base: Base model of an adapter, if it has moved since training: a .ckpt file or folder, a Hugging Face folder,
            or a name on the Hub.
        gguf: New GGUF file, such as model.gguf, instead of a folder; plain RoPE and byte-level BPE tokenizers only.
        dtype: dtype of the weights; empty keeps the dtype of each tensor. Norms and biases in a GGUF file are float32.
        max_shard_size: Maximum size of a file of weights in the folder; empty means 5GB.
        check: Load the folder in a new process without ropepp-lit and compare logits, also beyond the trained context;
            empty means true.
    """
    from pathlib import Path

    import torch

    from ropepp_lit.checkpoint import KEY, read_checkpoint
    from ropepp_lit.errors import UsageError
    from ropepp_lit.hf.adapters import write_peft
    from ropepp_lit.hf.export import export as work
    from ropepp_lit.hf.folder import describe_dtypes, open_checkpoint
    from ropepp_lit.sizes import parse_bytes

    if sum(place is not None for place in (out, gguf, adapter)) != 1:
        raise UsageError("out: name a folder, or a file by --gguf, or a folder for adapters alone by --adapter")
    if out is not None and Path(out).suffix == ".gguf":
        raise UsageError(f"out: names a folder; for a GGUF file: ropepp-lit export {checkpoint} --gguf {out}")
    torch_dtype = None if dtype is None else getattr(torch, dtype)
    if gguf is not None or adapter is not None:
        other = "--gguf" if gguf is not None else "--adapter"
        options = {"max_shard_size": max_shard_size, "check": check}
        if adapter is not None:
            options |= {"dtype": dtype, "base": base}
        for name, value in options.items():
            if value is not None:
                raise UsageError(f"{name}: is for folders of a whole model; leave it out with {other}")
    if adapter is not None:
        write_peft(read_checkpoint(checkpoint, checksums=True), checkpoint, Path(adapter))
        print(f"{adapter} is written; load it over the exported base by peft's PeftModel.from_pretrained.")
        return
    contents = open_checkpoint(checkpoint, base=base, checksums=True)
    if gguf is not None:
        _export_gguf(contents, Path(gguf), torch_dtype)
        return
    assert out is not None
    difference = work(
        contents,
        Path(out),
        dtype=torch_dtype,
        max_shard_bytes=parse_bytes("max_shard_size", max_shard_size or "5GB"),
        check=check is not False,
    )
    if difference is None:
        print(f"{out} is written, and was not loaded to compare it.")
    else:
        print(f"{out} is written; loaded by transformers, its logits differ by {difference:.1e} of the largest.")
    if contents[KEY]["tokenizer"] is None:
        print("Notice: the checkpoint stores no tokenizer, so the folder has none.")
    if dtype is None and (notice := describe_dtypes(contents)):
        print(f"Notice: {notice}; transformers computes in the first.")


def _export_gguf(contents: dict[str, Any], path: Path, dtype: torch.dtype | None) -> None:
    from ropepp_lit.hf.export_gguf import export_gguf

    written = export_gguf(contents, path, dtype=dtype)
    print(
        f"{path} is written for llama.cpp: architecture {written.architecture}, pre-tokenizer {written.pre_tokenizer}."
    )
    for notice in written.notices:
        print(f"Notice: {notice}.")


def _folder_options(
    variant: str | None,
    rope_theta: float | None,
    scaling: str | None,
    factor: float | None,
    original_max_position_embeddings: int | None,
    ignore: str,
) -> dict[str, Any]:
    """Return the options for reading a Hugging Face folder that the user gave."""
    from ropepp_lit.hf.rotary import Rotary

    rotary = Rotary(scaling, factor, original_max_position_embeddings, rope_theta)
    fields = tuple(filter(None, (field.strip() for field in ignore.split(","))))
    given = {"variant": variant, "rotary": None if rotary == Rotary() else rotary, "ignore": fields}
    return {key: value for key, value in given.items() if value}


def _new_checkpoint(out: str) -> Path:
    from pathlib import Path

    from ropepp_lit.errors import UsageError

    path = Path(out)
    if path.suffix != ".ckpt":
        raise UsageError(f"out: {out}: name a file that ends with .ckpt")
    if path.exists():
        raise UsageError(f"out: {path}: already exists; name another file")
    return path


def _write(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint and the recipe that continues from it; print a summary and the next commands."""
    from ropepp_lit.checkpoint import KEY, load_decoder, write_checkpoint
    from ropepp_lit.errors import UsageError
    from ropepp_lit.files import write_errors, write_whole
    from ropepp_lit.hf.folder import describe_dtypes
    from ropepp_lit.text.tokenizer import TextTokenizer
    from ropepp_lit.train.recipe import recipe_from, to_yaml

    ours = checkpoint[KEY]
    decoder = load_decoder(checkpoint)
    layout = decoder.head_layout
    fragment = path.with_suffix(".yaml")
    recipe = to_yaml(recipe_from(path, ours))
    # The recipe comes first, so that the same command succeeds if it was killed before the checkpoint was written.
    if fragment.exists() and fragment.read_bytes() != recipe.encode():
        raise UsageError(f"out: {fragment}: already exists; name another file")
    with write_errors(fragment):
        write_whole(fragment, recipe)
    try:
        write_checkpoint(path, checkpoint)
    except BaseException:
        fragment.unlink()
        raise
    texts = "" if ours["tokenizer"] is None else f"\n{TextTokenizer.from_entry(ours).description}"
    print(
        f"""{path}: {decoder.positions_description}, {decoder.num_parameters:,} parameters
{layout.num_query_heads} query projections → {layout.num_attention_heads} attention heads, \
{layout.num_key_value_heads} key/value heads of {decoder.config.head_dim}; context \
length {ours["context_length"] or 0:,} tokens{texts}

Next:
  ropepp-lit fit --config RECIPE {command(config=fragment)}    # RECIPE defines trainer and data
  {command("ropepp-lit", "generate", path, prompt="TEXT")}
  {command("ropepp-lit", "export", path, "FOLDER")}"""
    )
    frequencies, context = decoder.frequencies, ours["context_length"]
    if notice := describe_dtypes(checkpoint):
        print(f"Notice: {notice}; generate computes in the first, an export keeps each.")
    if frequencies.reach is not None and context is not None and context > frequencies.reach:
        print(
            f"Notice: the model states {context:,} tokens, more than factor × original_max_position_embeddings "
            f"({frequencies.reach:,})."
        )
    if ours["tokenizer"] is None:
        print("Notice: the source has no tokenizer, so the checkpoint cannot read or write text.")


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    functions: dict[str, Callable[..., None]] = {"import": import_, "upcycle": upcycle, "export": export}
    call(functions[arguments[0]], arguments, flags=("quiet",))
