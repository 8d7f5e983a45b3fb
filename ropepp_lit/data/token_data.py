"""LightningDataModule of token shards. The order of samples is defined in :mod:`ropepp_lit.data.plan`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from ropepp_lit.data.batch import Batch
from ropepp_lit.data.comparison import identity_of
from ropepp_lit.data.conversations import (
    chat_settings,
    check_conversations,
    packing_line,
    special_token_notes,
    too_long_line,
)
from ropepp_lit.data.encoders import Format
from ropepp_lit.data.held_out import sample_texts
from ropepp_lit.data.loader import TrainLoader, make_loader, replica_of
from ropepp_lit.data.manifest import Manifest, TokenSet, bytes_per_token
from ropepp_lit.data.packing import PackedPlan, TooLong
from ropepp_lit.data.plan import PATTERN_SAMPLES
from ropepp_lit.data.prepare import PrepareSettings
from ropepp_lit.data.remote import default_cache_dir
from ropepp_lit.data.report import skipped_lines
from ropepp_lit.data.sampler import RankBatches
from ropepp_lit.data.samples import Samples, TokenSource
from ropepp_lit.data.source_folders import SourceFolders
from ropepp_lit.data.tokenizer_choice import TokenizerChoice
from ropepp_lit.errors import UsageError
from ropepp_lit.sizes import parse_bytes
from ropepp_lit.text.chat import read_template
from ropepp_lit.text.identity import same_tokenizer
from ropepp_lit.text.sources import BUILTIN
from ropepp_lit.text.tokenizer import TextTokenizer


class TokenData(LightningDataModule):
    r"""Token shards as batches. Text sources are prepared at the first run and reused by later runs.

    Args:
        source: Training data: a folder of token shards written by `ropepp-lit prepare`, local or in an object store
            (`s3://…`, `gs://…`); or text to prepare in the cache: `builtin` (the source code of Python's standard
            library), or files or folders of text, JSON and tables as for `ropepp-lit prepare`. For a mixture, pass
            sources with their weights: `{shards/long: 0.6, shards/short: 0.4}`.
        validation: Additional validation sets: names, each with a folder of token shards. The folder's held-out
            documents are read if there are any, otherwise all documents. Each set is reported separately.
        tokenizer: `bytes` (one token per byte), a tokenizer.json, or a Hugging Face folder or name on the Hub.
        train_tokenizer: Instead of `tokenizer`: train a byte-level BPE with this vocabulary size on the training
            documents.
        text_key: Key or column of the text in JSON and tables.
        format: Format of text sources: `text`, conversations (`chat`), prompts with answers (`completion`), or pairs of
            a chosen and a rejected answer (`chat_pairs`, `completion_pairs`); see `ropepp-lit prepare --format`.
        chat_template: File with a Jinja template for conversations, instead of the tokenizer's own chat template.
        train_on: Tokens of a conversation to train on: all turns of the `assistant`, the `last` one, or `all` tokens.
        split: Separator of documents in text files, such as `\n\n`; empty means that each file is one document.
        on_error: Action for a document or file that cannot be read: `stop`, or `skip` and count it.
        context_length: Tokens per row.
        batch_size: Rows per batch on each device.
        intra_document_masking: Prevent documents packed in one row from attending to each other, and restart positions
            at each document. If false, rows are plain causal ones, as in the paper.
        too_long: Handling of conversations that are longer than a row, because they are packed as a whole: `drop` them,
            or `cut` them to their beginning. The numbers are reported. A pair of answers is packed as one document and
            cannot be cut. (Conversations are packed when the run starts; for this, sets in object stores are fetched.)
        validation_fraction: Fraction of the documents of text sources to hold out for validation, selected by a hash of
            their text. For folders of token shards, the fraction set in their preparation applies.
        seed: Seed of the data order.
        num_workers: Worker processes that prefetch batches; 0 or 1 is best, because reading is cheap.
        cache_dir: Folder for prepared and fetched data; empty means `ropepp_lit` in the user's cache folder.
        max_cache_size: Maximum size of the chunks fetched from object stores, such as 100GB; the least recently used
            chunks are deleted.
    """

    def __init__(
        self,
        *,
        source: dict[str, float] | str = "builtin",
        validation: dict[str, str] | None = None,
        tokenizer: str | None = None,
        train_tokenizer: int | None = None,
        text_key: str = "text",
        format: Format = "text",
        chat_template: str | None = None,
        train_on: Literal["assistant", "last", "all"] = "assistant",
        split: str = "",
        on_error: Literal["stop", "skip"] = "stop",
        context_length: int = 512,
        batch_size: int = 8,
        intra_document_masking: bool = True,
        too_long: TooLong = "drop",
        validation_fraction: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        max_cache_size: str = "100GB",
    ) -> None:
        super().__init__()
        self.weights = {source: 1.0} if isinstance(source, str) else dict(source)
        """Weight of each source."""
        if not self.weights:
            raise UsageError("data.source: pass at least one source")
        for name, weight in self.weights.items():
            if not weight / sum(self.weights.values()) >= 1 / PATTERN_SAMPLES:
                raise UsageError(f"data.source: {name}: weight {weight} must be at least a thousandth of their sum")
        self.validation = dict(validation or {})
        max_bytes = parse_bytes("data.max_cache_size", max_cache_size)
        self.skipped_samples: list[list[int]] = []
        """Ranges of training samples to skip, set by the command."""
        self.notices: list[str] = []
        """Lines to print before the data is used."""
        for name, value, least in (
            ("context_length", context_length, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise UsageError(f"data.{name}: {value} must be {least} or more")
        if not 0 < validation_fraction < 1:
            raise UsageError(f"data.validation_fraction: {validation_fraction} must be between 0 and 1")
        self.tokenizer, self.train_tokenizer = tokenizer, train_tokenizer
        self._tokenizer = TokenizerChoice(tokenizer, train_tokenizer)
        self._has_reported = False
        self._folders = SourceFolders(
            self.weights,
            list(self.validation.values()),
            self._tokenizer,
            settings=self._prepare_settings,
            cache_dir=Path(cache_dir).expanduser() if cache_dir else default_cache_dir(),
            max_bytes=max_bytes,
        )
        self.text_key, self.split, self.on_error = text_key, split or None, on_error
        self.format, self.chat_template, self.train_on = format, chat_template, train_on
        self.context_length, self.batch_size = context_length, batch_size
        self.intra_document_masking, self.validation_fraction = intra_document_masking, validation_fraction
        self.seed, self.num_workers, self.too_long = seed, num_workers, too_long

    def check(self) -> None:
        """Find prepared sources, and check the others as far as possible before anything is written.

        Raises:
            UsageError: A source is missing or empty, a validation set is not prepared, or the choice of the tokenizer
                is not valid.
        """
        self._folders.check()
        self.notices = list(self._tokenizer.notices)

    def continue_from(self, path: str, entry: dict[str, Any]) -> None:
        """Use the tokenizer of the checkpoint from which a run resumes, or which is evaluated.

        Text is prepared with it if the recipe trains a tokenizer, or sets one that can no longer be loaded.

        Args:
            path: Path of the checkpoint.
            entry: Entry `ropepp_lit` of the checkpoint.
        """
        self._tokenizer.continue_from(path, entry)

    def prepare_data(self) -> None:
        """Prepare missing token shards, and print what was skipped (one process per machine)."""
        self.check()
        self._folders.prepare()
        for source in self._folders.folders if not self._has_reported else ():
            for line in skipped_lines(self._folders.read_manifest(source)):
                print(f"data: {source}: {line}")
        self._has_reported = True

    def setup(self, stage: str) -> None:
        """Open the token shards.

        Raises:
            UsageError: Shards are damaged, have different tokenizers, or have too few tokens for the context length;
                two sources have the same name; or there are no validation documents.
        """
        self.check()
        self._folders.prepare()
        self.manifests: dict[str, Manifest] = {}
        """Manifest of each training source, by name."""
        self.validation_sets: dict[str, TokenSet] = {}
        """Token set of each validation set, by name: documents held out of the sources, and `validation`."""
        tokenizers: dict[str, str] = {}
        others: list[tuple[str, Manifest]] = []
        train, validation = [], []
        for source, weight in self.weights.items():
            name = source if source == BUILTIN else Path(source).resolve().name
            if name in self.manifests:
                raise UsageError(f"data.source: two sources have the name {name}; rename a folder")
            opened = self._open(source, name, tokenizers, weight)
            self.manifests[name] = opened.manifest
            train.append(opened)
            if "validation" in opened.manifest.splits:
                self.validation_sets[name] = opened.manifest.splits["validation"]
                validation.append((opened, "validation"))
        for name, folder in self.validation.items():
            if name in self.validation_sets:
                raise UsageError(f"data.validation: {name} is already the name of a source; use another name")
            opened = self._open(folder, name, tokenizers)
            others.append((name, opened.manifest))
            split = "validation" if "validation" in opened.manifest.splits else "train"
            self.validation_sets[name] = opened.manifest.splits[split]
            validation.append((opened, split))
        if not self.validation_sets:
            raise UsageError(
                "data.source: no source has validation documents; prepare one with --validation_fraction, or set "
                "data.validation"
            )
        self.manifest = next(iter(self.manifests.values()))
        """Manifest of the first training source."""
        self.tokenizer_json = next(iter(tokenizers.values()))
        """Content of tokenizer.json."""
        self.held_out = {name: tokens.digest for name, tokens in self.validation_sets.items()}
        """Digest of each validation set, by name."""
        self.text_tokenizer = TextTokenizer.from_entry(self.entry)
        all_manifests = [*self.manifests.items(), *others]
        self.largest_token_id = max(manifest.largest_token_id for _, manifest in all_manifests)
        """Largest token id that occurs."""
        self.notices += special_token_notes(all_manifests)
        check_conversations(
            self.manifests, others, intra_document_masking=self.intra_document_masking, too_long=self.too_long
        )
        settings: dict[str, Any] = {
            "context_length": self.context_length,
            "intra_document_masking": self.intra_document_masking,
            "seed": self.seed,
            "too_long": self.too_long,
        }
        self.train_samples = Samples(train, "train", in_order=False, **settings)
        """Samples of the training mixture."""
        in_order = [*validation, *((opened, "train") for opened in train if self.holds_pairs)]
        self._in_order = [Samples([opened], split, in_order=True, **settings) for opened, split in in_order]
        self._validation = self._in_order[: len(validation)]
        packed = [each for samples in (self.train_samples, *self._validation) for each in samples.packed()]
        self.notices += filter(None, (too_long_line(*each, self.too_long) for each in packed))

    def _open(self, source: str, name: str, tokenizers: dict[str, str], weight: float = 1.0) -> TokenSource:
        """Open a source, and check that its tokenizer is that of the other ones."""
        opened, tokenizer = self._folders.open(source, weight)
        for other, other_tokenizer in tokenizers.items():
            if not same_tokenizer(tokenizer, other_tokenizer):
                raise UsageError(
                    f"data.source: {name} was tokenized by another tokenizer than {other}; prepare one of them again"
                )
        tokenizers[name] = tokenizer
        return opened

    def _prepare_settings(self) -> PrepareSettings:
        """Return the settings for preparing text, without the tokenizer."""
        return PrepareSettings(
            validation_fraction=self.validation_fraction,
            text_key=self.text_key,
            split=self.split,
            on_error=self.on_error,
            format=self.format,
            chat_template=None if self.chat_template is None else read_template(self.chat_template),
            train_on=self.train_on,
        )

    def first_batch(self) -> Batch | None:
        """Return the first batch of training, or None if its text is missing or not yet prepared."""
        if not self._folders.exist:
            return None
        self.check()
        if not self._folders.are_prepared:
            return None
        self.setup("plan")
        return self.train_samples.collate(self.train_samples.__getitems__(list(range(self.batch_size))))

    @property
    def identity(self) -> dict[str, Any]:
        """Values that determine the order of samples, see :func:`~ropepp_lit.data.comparison.identity_of`."""
        return identity_of(
            self.manifests,
            list(self.weights.values()),
            context_length=self.context_length,
            seed=self.seed,
            too_long=self.too_long,
        )

    @property
    def marks_trained_tokens(self) -> bool:
        """Whether only some tokens of a training set are trained, as in conversations; requires :meth:`setup`."""
        return any(manifest.marks_trained_tokens for manifest in self.manifests.values())

    @property
    def holds_pairs(self) -> bool:
        """Whether the training sets contain pairs of answers; requires :meth:`setup`."""
        return self.manifest.holds_pairs

    def packing_lines(self, rows_per_step: int) -> list[str]:
        """Return a line about the packing of each training set of conversations; requires :meth:`setup`."""
        sets = zip(self.manifests.items(), self.train_samples.plans, self.weights.values(), strict=True)
        return [
            packing_line(name, plan, manifest, rows_per_step=rows_per_step * weight / sum(self.weights.values()))
            for (name, manifest), plan, weight in sets
            if isinstance(plan, PackedPlan)
        ]

    @property
    def entry(self) -> dict[str, Any]:
        """Values of the data that a checkpoint stores, see :mod:`ropepp_lit.checkpoint`; requires :meth:`setup`."""
        return {
            **chat_settings(list(self.manifests.values())),
            "tokenizer": self.tokenizer_json,
            **{name: getattr(self.manifest, name) for name in ("bos_token_id", "eos_token_id", "opening")},
            "context_length": self.context_length,
            "held_out": self.held_out,
        }

    def held_out_documents(self, name: str) -> Iterator[np.ndarray]:
        """Iterate over the token ids of a validation set's documents in order, including opening and closing tokens."""
        return self._validation[list(self.validation_sets).index(name)].documents()

    def held_out_texts(self, limit: int, *, min_tokens: int = 0) -> dict[str, list[str]]:
        """Return texts of documents of each validation set, by name: those whose tokens have the smallest hashes.

        Args:
            limit: Maximum number of documents of each set.
            min_tokens: Minimum number of tokens of a document, excluding opening and EOS tokens.
        """
        tokenizer, min_tokens = self.text_tokenizer, min_tokens + len(self.manifest.opening) + 1
        return {
            name: sample_texts(self.held_out_documents(name), tokenizer, limit=limit, min_tokens=min_tokens)
            for name in self.validation_sets
        }

    def bytes_per_token(self, name: str | None = None) -> float | None:
        """Return the UTF-8 bytes of text per predicted token, for bits per byte; None if only some tokens are trained.

        Args:
            name: Name of a validation set; None means the training mixture, weighted by tokens.
        """
        sets = [manifest.splits["train"] for manifest in self.manifests.values()]
        weights = list(self.weights.values())
        if name is not None:
            sets, weights = [self.validation_sets[name]], [1.0]
        return bytes_per_token(sets, weights, documents_apart=self.intra_document_masking)

    def train_dataloader(self) -> TrainLoader:
        """Return the loader of the complete run."""
        trainer = self._trainer()
        return TrainLoader(
            self.train_samples,
            batch_size=self.batch_size,
            num_batches=trainer.max_steps * trainer.accumulate_grad_batches,
            identity=self.identity,
            skipped=self.skipped_samples,
            **self._loading(),
            **replica_of(trainer),
        )

    def val_dataloader(self) -> list[DataLoader]:
        """Return a loader of each validation set: every token once, in order. Ranks get equal, padded batch counts."""
        return self._loaders(self._validation)

    def pair_dataloaders(self) -> list[DataLoader]:
        """Return a loader of each validation and training set: every pair once, as :meth:`val_dataloader`."""
        return self._loaders(self._in_order)

    def _loaders(self, sets: list[Samples]) -> list[DataLoader]:
        replica = replica_of(self._trainer())
        loaders = []
        for samples in sets:
            num_batches = -(-len(samples) // (self.batch_size * replica["num_replicas"]))
            batches = RankBatches(0, num_batches, (), batch_size=self.batch_size, **replica)
            loaders.append(make_loader(samples, batches, **self._loading()))
        return loaders

    def _loading(self) -> dict[str, Any]:
        """Return the arguments of :func:`~ropepp_lit.data.loader.make_loader` that depend on the trainer."""
        strategy = getattr(self._trainer(), "strategy", None)
        device = getattr(strategy, "root_device", None)
        return {
            "num_workers": self.num_workers,
            "shard": getattr(strategy, "context_shard", None),
            "pin_memory": device is not None and device.type == "cuda",
        }

    def tokens_per_step(self, *, accumulate_grad_batches: int, num_replicas: int) -> int:
        """Return the number of tokens per optimizer step, over all replicas that read different data."""
        return self.context_length * self.batch_size * accumulate_grad_batches * num_replicas

    def _trainer(self) -> Trainer:
        assert self.trainer is not None, "a trainer must be attached"
        return self.trainer
