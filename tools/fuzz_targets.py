"""What is fuzzed: a whole, tiny input, the files of it that are changed, the action that reads it, and what comes out.

An action is a subcommand or the deepest public function that it calls first. It returns what was read, in plain values:
where it succeeds although the input was changed, a target's `judge` decides from these whether that is right.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import save_file
from torch.distributed import checkpoint as distributed_checkpoint

from ropepp_lit import commands
from ropepp_lit.checkpoint import KEY, decoder_weights, describe_architecture, load_decoder, make_checkpoint
from ropepp_lit.cli import main
from ropepp_lit.commands.evaluate import _replaced
from ropepp_lit.data.encoders import make_encoder
from ropepp_lit.data.prepare import Settings as PrepareSettings
from ropepp_lit.data.prepare import prepare
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.eval.harness import Options
from ropepp_lit.eval.models import load_model as load_measured
from ropepp_lit.eval.pieces import Work
from ropepp_lit.eval.report.examples import choose_examples
from ropepp_lit.eval.results import summarize
from ropepp_lit.eval.tasks import Settings
from ropepp_lit.hf.export import export
from ropepp_lit.hf.folder import open_checkpoint
from ropepp_lit.inference.model import Writing, load_model
from ropepp_lit.inference.prompts import PromptFile
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPE, RoPEPP
from ropepp_lit.sharded import SHARDED_METADATA
from ropepp_lit.text.identity import tokenizer_digest
from ropepp_lit.text.sources import Reader, find_files
from ropepp_lit.text.tokenizer import byte_tokenizer, load_tokenizer, train_tokenizer

GEOMETRY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

Judge = Callable[[Any, Any, str, Path], str | None]
"""From what came out of the whole input and of the changed one, the change in words and the changed file: what is
wrong, or None."""


def same(whole: Any, found: Any, change: str, path: Path) -> str | None:
    """Checksums or a manifest tell of every change that matters: what comes out is the same."""
    if found == whole:
        return None
    keys = [key for key in whole if whole[key] != found.get(key)] if isinstance(whole, dict) else []
    return f"what came out differs: {', '.join(keys) or str(found)[:200]}"


def any_success(whole: Any, found: Any, change: str, path: Path) -> str | None:
    """Nothing in the input could tell what is right; it was read without a crash."""
    return None


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is fuzzed."""

    make: Callable[[Path], None]
    """Makes the whole input in a folder."""
    files: dict[str, str]
    """Globs of the files that are changed, and their format (:data:`fuzz_mutations.MUTATIONS`)."""
    read: Callable[[Path, Path], Any]
    """Reads the input in a folder, of which a file was changed; returns what came out."""
    judge: Judge
    """Whether a success is right."""


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Names and contents of tensors."""
    return {
        name: f"{value.dtype} {tuple(value.shape)} "
        + hashlib.sha256(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        for name, value in tensors.items()
    }


TEXTS = [" ".join(f"word{(n * step) % 97}" for step in range(1, 20 + n)) + f" naïve 漢字 {n}" for n in range(12)]


@cache
def trained_tokenizer() -> Any:
    """A byte-level BPE of 300 tokens."""
    return train_tokenizer(TEXTS, vocab_size=300)


def make_decoder(scheme: Any = None) -> Decoder:
    """A tiny model for the 300 tokens."""
    torch.manual_seed(0)
    return Decoder(DecoderConfig(vocab_size=300, **GEOMETRY), scheme or RoPE(), Frequencies())


def make_whole(scheme: Any = None) -> dict[str, Any]:
    """A checkpoint of it, with a tokenizer that has a chat template."""
    decoder, tokenizer = make_decoder(scheme), trained_tokenizer()
    return make_checkpoint(
        dict(decoder.state_dict()),
        architecture=describe_architecture(decoder.config, decoder.scheme, decoder.frequencies),
        context_length=64,
        tokenizer=tokenizer.json,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        opening=list(tokenizer.opening),
        tokenizer_config=json.dumps({"chat_template": TEMPLATE, "bos_token": "<|begin_of_text|>"}),
        generation_config=json.dumps({"eos_token_id": [1, 2]}),
    )


# Token shards.


def make_shards(folder: Path) -> None:
    """Folders of token shards: of text, of conversations and of pairs of answers."""
    source = folder / "source"
    source.mkdir(parents=True)
    text = source / "text.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [{**turns[0], "content": text[:30]}, {**turns[1], "content": text[30:90]}]} for text in TEXTS]
    (source / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": text[:20], "chosen": text[20:50], "rejected": f"no {n}"} for n, text in enumerate(TEXTS)]
    (source / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    for name, options in (
        ("text", {}),
        ("chat", {"format": "chat", "chat_template": TEMPLATE}),
        ("pairs", {"format": "completion_pairs"}),
    ):
        settings = PrepareSettings(tokenizer="bytes", validation_fraction=0.3, chunk_bytes=2048, **options)
        prepare([str(source / f"{name}.jsonl")], settings, out=folder / name, show_progress=False)
        (folder / f".{name}.lock").unlink(missing_ok=True)
    shutil.rmtree(source)


def read_shards(folder: Path, changed: Path) -> Any:
    """`prepare --verify` or, where the checks of `fit` read the shards, their documents and a batch."""
    shards = folder / changed.relative_to(folder).parts[0]
    if hash_of(changed) % 2:
        commands.prepare.prepare(verify=str(shards))
    data = TokenData(source=str(shards), context_length=128, batch_size=2, cache_dir=str(folder / "cache"))
    data.trainer = SimpleNamespace(max_steps=4, accumulate_grad_batches=1, distributed_sampler_kwargs=None)  # type: ignore[assignment]
    data.check()
    data.prepare_data()
    data.setup("fit")
    batch = data.first_batch()
    manifest = data.manifest
    return {
        "batch": None if batch is None else [batch.input_ids.tolist(), batch.labels.tolist()],
        "held out": [document.tolist() for name in data.validation_sets for document in data.held_out_documents(name)],
        **{
            name: getattr(manifest, name)
            for name in ("vocab_size", "bos_token_id", "eos_token_id", "opening", "end_of_turn")
        },
        "marks": (manifest.marks_trained_tokens, manifest.holds_pairs),
        "tokens": {name: tokens.digest for name, tokens in manifest.splits.items()},
        "predicted": {name: tokens.predicted(documents_apart=True) for name, tokens in manifest.splits.items()},
        "entry": {name: value for name, value in data.entry.items() if name not in ("recipe", "tokenizer")},
        "tokenizer": tokenizer_digest(data.entry["tokenizer"]),
        "bytes per token": data.bytes_per_token(),
    }


def hash_of(path: Path) -> int:
    """A number of a file's contents, by which one of several ways to read is chosen."""
    with contextlib.suppress(OSError):
        if path.is_file():
            return path.read_bytes()[:10_000].__len__() + sum(path.read_bytes()[-1000:])
    return 0


# Models.


def make_folder(folder: Path, *, parts: int = 1, pickled: bool = False) -> None:
    """A Hugging Face folder."""
    folder.mkdir(parents=True)
    export(make_whole(), folder / "hf", dtype=None, max_shard_bytes=10**9, check=False)
    hf = folder / "hf"
    weights = {name: value.clone() for name, value in make_decoder().state_dict().items()}
    if parts == 1 and not pickled:
        return
    (hf / "model.safetensors").unlink()
    if pickled:
        torch.save(weights, hf / "pytorch_model.bin")
        return
    places = {}
    for number in range(parts):
        name = f"model-{number + 1:05}-of-{parts:05}.safetensors"
        part = dict(list(weights.items())[number::parts])
        save_file(part, hf / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))


def read_folder(folder: Path, changed: Path) -> Any:
    """What `import`, `generate`, `export`, `upcycle` and `evaluate` do first with a Hugging Face folder."""
    return _loaded(open_checkpoint(str(folder / "hf"), checksums=True))


def _loaded(checkpoint: dict[str, Any]) -> dict[str, Any]:
    decoder = load_decoder(checkpoint)
    entry = checkpoint[KEY]
    with torch.no_grad():
        logits = decoder(torch.tensor([[0, 5, 9, 200]]))
    return {
        "weights": digest(decoder_weights(checkpoint)),
        "decoder": decoder.config.to_dict(),
        "positions": decoder.positions_in_words,
        "theta": decoder.frequencies.rope_theta,
        "logits": logits.double().sum().item(),
        **{name: value for name, value in entry.items() if name not in ("architecture", "origin", "card")},
    }


def judge_config(whole: Any, found: Any, change: str, path: Path) -> str | None:
    """config.json may state another model of the same shapes: it is used as it says, and weights are the same."""
    if whole["weights"] != found["weights"]:
        return "other weights"
    stated = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "rms_norm_eps",
        "num_attention_heads",
    )
    for name in names:
        if name in stated and stated[name] is not None and found["decoder"][name] != stated[name]:
            return f"{name} {found['decoder'][name]} instead of {stated[name]}"
    context = stated.get("max_position_embeddings")
    if context is not None and found["context_length"] != context:
        return f"context_length {found['context_length']} instead of {context}"
    numbers = [found["theta"], found["decoder"]["rms_norm_eps"], found["logits"]]
    if not all(math.isfinite(number) for number in numbers):
        return f"not finite: {numbers}"
    return None


def judge_weights(whole: Any, found: Any, change: str, path: Path) -> str | None:
    """Safetensors has no checksums: contents may change, names and shapes may not."""
    shapes = [
        {name: text.split(") ")[0].split(" (")[1] for name, text in one["weights"].items()} for one in (whole, found)
    ]
    if shapes[0] != shapes[1]:
        return "other names or shapes"
    return same({**whole, "weights": 0, "logits": 0}, {**found, "weights": 0, "logits": 0}, change, path)


def make_tokenizer(folder: Path) -> None:
    """A Hugging Face folder's tokenizer with every file that goes with one."""
    make_folder(folder)
    hf = folder / "hf"
    for name in ("model.safetensors", "README.md"):
        (hf / name).unlink(missing_ok=True)
    special = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>", "lstrip": False}}
    (hf / "special_tokens_map.json").write_text(json.dumps(special))


def read_tokenizer(folder: Path, changed: Path) -> Any:
    """What `prepare --tokenizer`, `fit` and `import` do first with a tokenizer: load it, encode and decode."""
    tokenizer = load_tokenizer(str(folder / "hf"))
    text = "word1 naïve 漢字 <|end_of_text|>"
    ids = tokenizer.encode([text])[0].tolist()
    return {"ids": ids, "text": tokenizer.decode(tokenizer.encode_text(text)), "prompt": tokenizer.encode_prompt("a"),
            "description": tokenizer.description, "name": len(tokenizer.fingerprint), "size": tokenizer.vocab_size}  # fmt: skip


def make_checkpoint_file(folder: Path) -> None:
    """A checkpoint in one file."""
    folder.mkdir(parents=True)
    torch.save(make_whole(RoPEPP(variant="ec")), folder / "model.ckpt")


def read_checkpoint_file(folder: Path, changed: Path) -> Any:
    """What every subcommand does first with a checkpoint, and a token that it writes."""
    found = _loaded(open_checkpoint(str(folder / "model.ckpt"), checksums=True))
    commands.generate.generate(str(folder / "model.ckpt"), max_new_tokens=1, prompt="word")
    return found


def read_entries(folder: Path, changed: Path) -> Any:
    """The same, or `export`, `upcycle`, `validate`'s and `fit`'s checks, or those of `evaluate`."""
    way = hash_of(changed) % 4
    path = str(folder / "model.ckpt")
    if way == 0:
        return read_checkpoint_file(folder, changed)
    if way == 1:
        commands.convert.export(path, str(folder / "exported"), check=False)
    elif way == 2:
        load_measured(path, dtype=torch.float32, device=torch.device("cpu")).describe()
        load_tokenizer(path)
    else:
        commands.generate.generate(path, max_new_tokens=1, prompt="word", chat=True)
    return None


def make_sharded(folder: Path) -> None:
    """A checkpoint in a folder of shards."""
    path, whole = folder / "model.ckpt", make_whole()
    folder.mkdir(parents=True)
    state = {
        "state_dict": whole.pop("state_dict"),
        "optimizer_0": {"param_groups": [{"lr": 0.25, "betas": (0.9, 0.95)}]},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed_checkpoint.save(state, checkpoint_id=path)
    torch.save(whole, path / SHARDED_METADATA)


def read_sharded(folder: Path, changed: Path) -> Any:
    """What every subcommand does first with a folder of shards, weights and shapes alone."""
    found = _loaded(open_checkpoint(str(folder / "model.ckpt"), checksums=True))
    shapes = open_checkpoint(str(folder / "model.ckpt"), shapes_only=True, checksums=True)["state_dict"]
    return {**found, "shapes": {name: (tuple(value.shape), str(value.dtype)) for name, value in shapes.items()}}


# Recipes.


def make_recipe(folder: Path) -> None:
    """A recipe that names most kinds of settings."""
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text("\n".join(TEXTS))
    (folder / "recipe.yaml").write_text(RECIPE)


RECIPE = """\
seed_everything: 0
model:
  decoder:
    vocab_size: 258
    hidden_size: 16
    intermediate_size: 24
    num_hidden_layers: 1
    num_attention_heads: 2
    num_key_value_heads: 1
    rms_norm_eps: 1.0e-05
  positions:
    class_path: RoPEPP
    init_args:
      variant: ec
  frequencies:
    class_path: Yarn
    init_args:
      rope_theta: 10000.0
      factor: 2.0
      original_max_position_embeddings: 32
  optimizer:
    class_path: AdamW
    init_args:
      lr: 0.001
      betas: [0.9, 0.95]
      weight_decay: 0.1
  schedule:
    class_path: Cosine
    init_args:
      warmup_steps: 2
      total_steps: 8
data:
  source:
    text.txt: 1.0
  tokenizer: bytes
  context_length: 64
  batch_size: 2
  validation_fraction: 0.2
  cache_dir: cache
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 8
  precision: 32-true
  gradient_clip_val: 1.0
  accumulate_grad_batches: 2
  limit_val_batches: 2
  val_check_interval: 4
  log_every_n_steps: 1
  default_root_dir: run
checkpoints:
  every_n_steps: 2
  keep: 2
sample:
  prompt: ''
  max_new_tokens: 8
"""


def read_recipe(folder: Path, changed: Path) -> Any:
    """`plan`: parses and checks as `fit` does, which would go on to train."""
    with contextlib.chdir(folder), _kept_parsers():
        main(["plan", "--config", "recipe.yaml", "--simulate", "false"])


_PARSERS: dict[type, dict[str, Any]] = {}


@contextlib.contextmanager
def _kept_parsers() -> Iterator[None]:
    """Make the parser of a subcommand once: that takes longer than all else."""
    made = LightningCLI.setup_parser

    def setup_parser(cli: Any, *arguments: Any, **options: Any) -> None:
        if type(cli) not in _PARSERS:
            before = set(vars(cli))
            made(cli, *arguments, **options)
            _PARSERS[type(cli)] = {name: value for name, value in vars(cli).items() if name not in before}
        vars(cli).update(_PARSERS[type(cli)])

    with mock.patch.object(LightningCLI, "setup_parser", setup_parser):
        yield


# Data.


def make_rows(folder: Path) -> None:
    """Conversations, prompts and completions, pairs of answers, and texts."""
    folder.mkdir(parents=True)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    rows = {
        "chat": {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": [{"type": "text", "text": "How much is 1 + 1?"}]},
                {"role": "assistant", "content": "2", "tool_calls": [call]},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        "sharegpt": {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}], "system": "c"},
        "completion": {"prompt": "a b", "completion": " c d"},
        "chat_pairs": {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],
                       "rejected": "c"},
        "completion_pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "text": {"text": "a text", "id": 1},
    }  # fmt: skip
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(3)))


@cache
def encoder(kind: str) -> Any:
    """The encoder of a format."""
    template = TEMPLATE.replace("message['content']", "(message['content'] if message['content'] is string else 'x')")
    return make_encoder(
        kind, byte_tokenizer(), text_key="text", special_tokens=False, template=template if "chat" in kind else None,
        train_on="assistant",
    )  # type: ignore[arg-type]  # fmt: skip


def read_rows(folder: Path, changed: Path) -> Any:
    """What `prepare --format` does with each row: read, render and encode it; rows that are not changed come out."""
    kind = "chat" if changed.stem == "sharegpt" else changed.stem
    made, found = encoder(kind), []
    for _, read in Reader(find_files([str(changed)], key="SOURCE"), columns=made.columns):
        record = made.render(read)
        if record.text is None:
            found.append(f"{record.problem}; {record.remedy}")
        else:
            found.append(made.encode([record])[0].tolist())
    if found and all(isinstance(item, str) for item in found):
        raise UsageError("; ".join(found))
    return found


def judge_rows(whole: Any, found: Any, change: str, path: Path) -> str | None:
    """The rows that were not changed are there."""
    if change.startswith("line ") and sum(item == whole[0] for item in found) < 2:
        return f"a row that was not changed is not there: {str(found)[:100]}"
    return None


def make_tables(folder: Path) -> None:
    """Texts in every kind of file."""
    import bz2
    import gzip
    import lzma

    import pyarrow
    import pyarrow.csv
    import pyarrow.feather
    import pyarrow.parquet
    from backports import zstd

    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:4]).encode()
    table = pyarrow.table({"text": TEXTS[:4], "id": list(range(4))})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    pyarrow.feather.write_feather(table, folder / "a.feather", compression="uncompressed")
    with pyarrow.ipc.new_stream(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    pyarrow.csv.write_csv(table, folder / "a.csv")
    for ending, compress in (
        ("gz", gzip.compress),
        ("bz2", bz2.compress),
        ("xz", lzma.compress),
        ("zst", zstd.compress),
    ):
        (folder / f"a.jsonl.{ending}").write_bytes(compress(lines))
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS[:4]], indent=1))
    (folder / "a.txt").write_text(TEXTS[0])


def read_tables(folder: Path, changed: Path) -> Any:
    """What `prepare` and `evaluate --text` do with each document."""
    found = []
    for _, record in Reader(find_files([str(changed)], key="SOURCE"), text_key="text"):
        if record.text is None:
            raise UsageError(f"{record.where}: {record.problem}; {record.remedy}")
        record.text.encode()
        found.append(hashlib.sha256(record.text.encode()).hexdigest())
    return found


# Prompts and evaluations.


@cache
def model_file() -> str:
    """A checkpoint that stays whole."""
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="ropepp-fuzz-model-")) / "model.ckpt"
    torch.save(make_whole(), path)
    return str(path)


@cache
def writer() -> Any:
    """The model of it."""
    return load_model(model_file())


WRITING = Writing(max_new_tokens=2)


def make_prompts(folder: Path) -> None:
    """Prompts, and answers that were kept when half was done."""
    folder.mkdir(parents=True)
    rows = [{"prompt": f"word{number}", "id": number} for number in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = PromptFile(folder / "prompts.jsonl", writer(), None)
    kept = folder / "answers.jsonl.partial"
    unlink, Path.unlink = Path.unlink, lambda path, **options: None  # type: ignore[assignment,method-assign]
    try:
        prompts.answer(folder / "answers.jsonl", WRITING, batch_size=2, show_progress=False)
    finally:
        Path.unlink = unlink  # type: ignore[method-assign]
    (folder / "answers.jsonl").unlink()
    kept.write_bytes(b"".join(kept.read_bytes().splitlines(keepends=True)[:3]))


def read_prompts(folder: Path, changed: Path) -> Any:
    """`generate --prompts`, which goes on from what was kept."""
    out = folder / "answers.jsonl"
    PromptFile(folder / "prompts.jsonl", writer(), None).answer(out, WRITING, batch_size=2, show_progress=False)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def judge_prompts(whole: Any, found: Any, change: str, path: Path) -> str | None:
    """What was kept must be what was written; other prompts have other answers."""
    return same(whole, found, change, path) if path.name.endswith(".partial") else None


def _work(folder: Path) -> Work:
    model = load_measured(model_file(), dtype=torch.float32, device=torch.device("cpu"), weights=False)
    settings = Settings(
        tasks=("perplexity", "retrieval:single"), lengths=(64,), limit=2, stride=None, noise_std=(0.0,), seed=0,
        options=Options(num_fewshot=None, include_path=None, apply_chat_template=False, max_length=None), has_essays=True, checkpoint=model_file(), load=None,
    )  # type: ignore[arg-type]  # fmt: skip

    def load(number: int) -> Any:
        return load_measured(model_file(), dtype=torch.float32, device=torch.device("cpu"))

    return Work(
        [model], load=load, settings=settings, sets={"text": TEXTS[:4]}, folder=folder / "evaluated", dtype="float32",
        device=torch.device("cpu"),
    )  # fmt: skip


def make_evaluation(folder: Path) -> None:
    """A finished evaluation."""
    folder.mkdir(parents=True)
    work = _work(folder)
    work.measure()
    work.write_answers()
    models = [{"name": "model", "path": "model.ckpt", "fingerprint": "sha256:0"}]
    settings = {"tasks": ["perplexity", "retrieval:single"], "lengths": [64]}
    results = {"format_version": 1, "settings": settings, "models": models, "scores": []}
    (folder / "evaluated" / "results.json").write_text(json.dumps(results))
    for path in (folder / "evaluated" / "parts").glob("*.lock"):
        path.unlink()


def read_evaluation(folder: Path, changed: Path) -> Any:
    """`evaluate` again, which finds all of it done: what was measured, the rows, the answers, the old report."""
    work = _work(folder)
    work.measure()
    measurements, _ = work.found(0)
    rows = summarize([("model", measurements)], seeds=[None])
    work.write_answers()
    said = {"tasks": ["perplexity"], "lengths": [64]}
    list(_replaced(folder / "evaluated", said, [{"name": "other", "path": "x", "fingerprint": "sha256:1"}]))
    choose_examples(folder / "evaluated" / "answers.jsonl")
    answers = (folder / "evaluated" / "answers.jsonl").read_text(encoding="utf-8")
    return {"rows": json.loads(json.dumps(rows)), "answers": answers}


TARGETS = {
    "manifests": Target(make=make_shards, files={"*/manifest.json": "json"}, read=read_shards, judge=same),
    "indexes": Target(
        make=make_shards, files={"*/*/index.json": "json", "*/tokenizer.json": "json"}, read=read_shards, judge=same
    ),
    "chunks": Target(make=make_shards, files={"*/*/*.bin": "bytes"}, read=read_shards, judge=same),
    "recipes": Target(make=make_recipe, files={"recipe.yaml": "yaml"}, read=read_recipe, judge=any_success),
    "config.json": Target(make=make_folder, files={"hf/config.json": "json"}, read=read_folder, judge=judge_config),
    "safetensors": Target(
        make=make_folder, files={"hf/model.safetensors": "safetensors"}, read=read_folder, judge=judge_weights
    ),
    "weight indexes": Target(
        make=lambda folder: make_folder(folder, parts=3), files={"hf/*.index.json": "json"}, read=read_folder, judge=same
    ),
    "pytorch_model.bin": Target(
        make=lambda folder: make_folder(folder, pickled=True), files={"hf/*.bin": "bytes"}, read=read_folder, judge=same
    ),
    "tokenizers": Target(
        make=make_tokenizer,
        files={"hf/tokenizer.json": "json", "hf/*_config.json": "json", "hf/special_tokens_map.json": "json",
               "hf/chat_template.jinja": "bytes"},
        read=read_tokenizer, judge=any_success,
    ),
    "checkpoints": Target(
        make=make_checkpoint_file, files={"model.ckpt": "bytes"}, read=read_checkpoint_file, judge=same
    ),
    "entries": Target(make=make_checkpoint_file, files={"model.ckpt": "entries"}, read=read_entries, judge=any_success),
    "sharded tables": Target(make=make_sharded, files={"model.ckpt/.metadata": "table"}, read=read_sharded, judge=same),
    "shards": Target(
        make=make_sharded, files={"model.ckpt/*.distcp": "bytes", "model.ckpt/meta.pt": "bytes"}, read=read_sharded,
        judge=same,
    ),
    "conversations": Target(make=make_rows, files={"*.jsonl": "jsonl"}, read=read_rows, judge=judge_rows),
    "texts": Target(
        make=make_tables, files={"a.json": "json", "*.jsonl.*": "bytes", "a.[pfact]*": "bytes"}, read=read_tables,
        judge=any_success,
    ),
    "prompts": Target(
        make=make_prompts, files={"prompts.jsonl": "jsonl", "*.partial": "jsonl"}, read=read_prompts, judge=judge_prompts
    ),
    "evaluations": Target(
        make=make_evaluation,
        files={"evaluated/parts/*.json": "json", "evaluated/results.json": "json", "evaluated/answers.jsonl": "jsonl"},
        read=read_evaluation, judge=same,
    ),
}  # fmt: skip
"""By name."""
