"""The LightningDataModule: token shards as batches, in an order that is a pure function of seed and sample number."""

from __future__ import annotations

import glob
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
    left_out_line,
    notes_on_special_ids,
    packing_line,
)
from ropepp_lit.data.encoders import Format
from ropepp_lit.data.loader import RankBatches, Samples, Source, TrainLoader, make_loader, replica_of, sample_texts
from ropepp_lit.data.packing import PackedPlan, TooLong
from ropepp_lit.data.plan import PATTERN_SAMPLES
from ropepp_lit.data.prepare import Settings, cached_folder, prepare_cached
from ropepp_lit.data.remote import RemoteFolder, default_cache_dir, is_remote
from ropepp_lit.data.report import left_out_lines
from ropepp_lit.data.shards import MANIFEST, TOKENIZER, Manifest, TokenSet, bytes_per_token
from ropepp_lit.data.tokenizer_choice import TokenizerChoice
from ropepp_lit.errors import UsageError
from ropepp_lit.sizes import parse_bytes
from ropepp_lit.text.chat import read_template
from ropepp_lit.text.identity import same_tokenizer
from ropepp_lit.text.sources import BUILTIN, HUB, find_files
from ropepp_lit.text.tokenizer import TextTokenizer


class TokenData(LightningDataModule):
    r"""Text as batches of tokens: prepared once, found again at the next run.

    Args:
        source: A folder that `ropepp-lit prepare` wrote, here or in an object store (`s3://…`, `gs://…`); or text to be
            prepared now: `builtin` (the source code of Python's standard library), files or folders of text, JSON and
            tables, as `ropepp-lit prepare` reads them. Or several, each with its weight:
            `{shards/long: 0.6, shards/short: 0.4}`.
        validation: Further validation sets: a name, and a folder that `ropepp-lit prepare` wrote; all of its documents
            are read unless some are held out there. Each set is reported by itself.
        tokenizer: `bytes` (one token per byte), a tokenizer.json, or a Hugging Face folder or name on the Hub.
        train_tokenizer: Instead of `tokenizer`: train a byte-level BPE with so many tokens on the training documents.
        text_key: Key or column of the text in JSON and tables.
        format: What sources that are prepared now hold: `text`, conversations (`chat`), prompts with answers
            (`completion`), or pairs of a chosen and a rejected answer, as `ropepp-lit prepare --format` reads them.
        chat_template: A file with a Jinja template by which conversations become text, instead of the tokenizer's own.
        train_on: What is trained of a conversation: every turn of the `assistant`, the `last` one, or `all` tokens.
        split: What separates documents in text files, such as `\n\n`; empty means that each file is one.
        on_error: What a document or file that cannot be read does: `stop`, or `skip` it and count it.
        context_length: Tokens in each row.
        batch_size: Rows in each batch of each device.
        intra_document_masking: Documents packed in one row don't see each other and their positions restart. Without
            it rows are plain causal ones, as in the paper.
        too_long: What becomes of conversations that are longer than a row, as they are packed whole: `drop` them, or
            `cut` them to their beginnings. Either is counted and said. A pair of answers is packed as one and cannot be
            cut. (Sets of conversations are packed when the run starts; one in an object store is fetched for that.)
        validation_fraction: Share of the documents that is held out for validation, chosen by a hash of their text;
            of a prepared folder, what was said when it was prepared.
        seed: Of the order in which blocks are read.
        num_workers: Processes that read ahead; 0 or 1 is best, as reading costs next to nothing.
        cache_dir: Where prepared and fetched data are kept; empty means `ropepp_lit` in the user's cache folder.
        max_cache_size: Of the chunks fetched from object stores, such as 100GB; the least recently used give way.
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
            raise UsageError("data.source: name at least one source")
        for name, weight in self.weights.items():
            if not weight / sum(self.weights.values()) >= 1 / PATTERN_SAMPLES:
                raise UsageError(f"data.source: {name}: weight {weight} must be at least a thousandth of their sum")
        self.validation = dict(validation or {})
        self._cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self._max_bytes = parse_bytes("data.max_cache_size", max_cache_size)
        self._remotes: dict[str, RemoteFolder] = {}
        self._folders: dict[str, Path] = {}
        self.skipped_samples: list[list[int]] = []  # ranges of training samples to leave out; the command sets it
        self.notices: list[str] = []
        """Lines to print before the data are used."""
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
        self.text_key, self.split, self.on_error = text_key, split or None, on_error
        self.format, self.chat_template, self.train_on = format, chat_template, train_on
        self.context_length, self.batch_size = context_length, batch_size
        self.intra_document_masking, self.validation_fraction = intra_document_masking, validation_fraction
        self.seed, self.num_workers, self.too_long = seed, num_workers, too_long

    def check(self) -> None:
        """Find what is prepared, and raise what can be known to be wrong before anything is written or started.

        Raises:
            UsageError: a source is missing or empty, a validation set is not prepared, no tokenizer or one too many.
        """
        texts = []
        for name in (*self.weights, *self.validation.values()):
            if is_remote(name):
                self._remotes[name] = RemoteFolder(name, self._cache_dir, max_bytes=self._max_bytes)
                self._folders[name] = self._remotes[name].folder
            elif (Path(name).expanduser() / MANIFEST).is_file():
                self._folders[name] = Path(name).expanduser()
            elif name not in self.weights:
                raise UsageError(f"data.validation: {name} holds no token shards; make them by `ropepp-lit prepare`")
            else:
                texts.append(name)
        find_files(texts, key="data.source")
        self._tokenizer.check(shards=[name for name in self.weights if name not in texts], texts=texts)
        self.notices = list(self._tokenizer.notices)

    def continue_from(self, path: str, entry: dict[str, Any]) -> None:
        """Use the tokenizer of the checkpoint of a run that goes on, or that is measured.

        Text is prepared with it where the recipe trains a tokenizer, or names one that cannot be loaded any more.

        Args:
            path: The checkpoint.
            entry: Its entry `ropepp_lit`.
        """
        self._tokenizer.continue_from(path, entry)

    def prepare_data(self) -> None:
        """Make the token shards that are not there, and print what was left out (one process per machine)."""
        self._find()
        for source, folder in self._folders.items():
            for line in left_out_lines(Manifest.read(folder, url=self._url(source))):
                print(f"data: {source}: {line}")

    def setup(self, stage: str) -> None:
        """Open the shards.

        Raises:
            UsageError: shards are damaged, of different tokenizers, or too few for the context length; sources of one
                name; nothing is held out.
        """
        self._find()
        self.manifests: dict[str, Manifest] = {}
        self.validation_sets: dict[str, TokenSet] = {}
        """What each validation set holds, by name: documents held out of the sources, and `validation`."""
        tokenizers: dict[str, str] = {}
        others: list[tuple[str, Manifest]] = []
        train, validation = [], []
        for source, weight in self.weights.items():
            name = source if source == BUILTIN else Path(source).resolve().name
            if name in self.manifests:
                raise UsageError(f"data.source: two sources are called {name}; rename a folder")
            opened = self._open(source, name, tokenizers, weight)
            self.manifests[name] = opened.manifest
            train.append(opened)
            if "validation" in opened.manifest.splits:
                self.validation_sets[name] = opened.manifest.splits["validation"]
                validation.append((opened, "validation"))
        for name, folder in self.validation.items():
            if name in self.validation_sets:
                raise UsageError(f"data.validation: a source holds out documents as {name}; choose another name")
            opened = self._open(folder, name, tokenizers)
            others.append((name, opened.manifest))
            split = "validation" if "validation" in opened.manifest.splits else "train"
            self.validation_sets[name] = opened.manifest.splits[split]
            validation.append((opened, split))
        if not self.validation_sets:
            raise UsageError(
                "data.source: no source holds validation documents; prepare one with --validation_fraction, or name a "
                "folder by data.validation"
            )
        self.manifest = next(iter(self.manifests.values()))
        self.tokenizer_json = next(iter(tokenizers.values()))
        self.held_out = {name: tokens.digest for name, tokens in self.validation_sets.items()}
        """A name for the documents of each validation set."""
        self.text_tokenizer = TextTokenizer.from_entry(self.entry)
        everything = [*self.manifests.items(), *others]
        self.largest_token_id = max(manifest.largest_token_id for _, manifest in everything)
        """Of the tokens that occur."""
        self.notices += notes_on_special_ids(everything)
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
        """What training reads."""
        whole = [*validation, *((opened, "train") for opened in train if self.holds_pairs)]
        self._whole = [Samples([opened], split, in_order=True, **settings) for opened, split in whole]
        self._validation = self._whole[: len(validation)]
        packed = [found for samples in (self.train_samples, *self._validation) for found in samples.packed()]
        self.notices += filter(None, (left_out_line(*found, self.too_long) for found in packed))

    def _url(self, source: str) -> str | None:
        return self._remotes[source].url if source in self._remotes else None

    def _open(self, source: str, name: str, tokenizers: dict[str, str], weight: float = 1.0) -> Source:
        folder = self._folders[source]
        manifest = Manifest.read(folder, url=self._url(source))
        text = manifest.read_tokenizer(folder, url=self._url(source))
        self._tokenizer.check_shards(source, text)
        for other, known in tokenizers.items():
            if not same_tokenizer(text, known):
                raise UsageError(f"data.source: {name} was tokenized by another tokenizer than {other}")
        tokenizers[name] = text
        return Source(source, folder, manifest, self._remotes.get(source), weight)

    def _settings(self, source: str) -> Settings:
        """How the text of a source is prepared."""
        others = Settings(
            validation_fraction=self.validation_fraction,
            text_key=self.text_key,
            split=self.split,
            on_error=self.on_error,
            format=self.format,
            chat_template=None if self.chat_template is None else read_template(self.chat_template),
            train_on=self.train_on,
        )
        return self._tokenizer.settings(source, others, cache_dir=self._cache_dir)

    def _find(self) -> None:
        """Make the folder of each source known."""
        self.check()
        for remote in self._remotes.values():
            for file in (MANIFEST, TOKENIZER):
                remote.fetch_small(file)
        for source in self.weights:
            if source not in self._folders:
                settings = self._settings(source)
                self._folders[source] = prepare_cached(source, settings, cache_dir=self._cache_dir)

    def first_batch(self) -> Batch | None:
        """The first batch of training, or None where its text is not here or still to be prepared."""
        names = (*self.weights, *self.validation.values())
        if not all(is_remote(name) or name.startswith(HUB) or name == BUILTIN or glob.glob(name) for name in names):
            return None
        self.check()
        for source in self.weights:
            if source not in self._folders:
                folder = cached_folder(source, self._settings(source), cache_dir=self._cache_dir)
                if not (folder / MANIFEST).is_file():
                    return None
        self.setup("plan")
        return self.train_samples.collate(self.train_samples.__getitems__(list(range(self.batch_size))))

    @property
    def identity(self) -> dict[str, Any]:
        """What the order of samples depends on, see :func:`~ropepp_lit.data.comparison.identity_of`."""
        return identity_of(
            self.manifests,
            list(self.weights.values()),
            context_length=self.context_length,
            seed=self.seed,
            too_long=self.too_long,
        )

    @property
    def marks_trained_tokens(self) -> bool:
        """Whether only some tokens of a training set are trained, as of conversations; the data must be set up."""
        return any(manifest.marks_trained_tokens for manifest in self.manifests.values())

    @property
    def holds_pairs(self) -> bool:
        """Whether the training sets hold pairs of answers; the data must be set up."""
        return self.manifest.holds_pairs

    def packing_lines(self, rows_per_step: int) -> list[str]:
        """How the conversations of each training set are packed; none for text. The data must be set up."""
        sets = zip(self.manifests.items(), self.train_samples.plans, self.weights.values(), strict=True)
        return [
            packing_line(name, plan, manifest, rows_per_step=rows_per_step * weight / sum(self.weights.values()))
            for (name, manifest), plan, weight in sets
            if isinstance(plan, PackedPlan)
        ]

    @property
    def entry(self) -> dict[str, Any]:
        """What a checkpoint stores of the data, see :mod:`ropepp_lit.checkpoint`; the data must be set up."""
        return {
            **chat_settings(list(self.manifests.values())),
            "tokenizer": self.tokenizer_json,
            **{name: getattr(self.manifest, name) for name in ("bos_token_id", "eos_token_id", "opening")},
            "context_length": self.context_length,
            "held_out": self.held_out,
        }

    def held_out_documents(self, name: str) -> Iterator[np.ndarray]:
        """Token ids of a validation set's documents in their order, each with its opening and closing token."""
        return self._validation[list(self.validation_sets).index(name)].documents()

    def held_out_texts(self, limit: int, *, min_tokens: int = 0) -> dict[str, list[str]]:
        """Documents of each validation set as text, by name: those whose tokens have the least hash.

        Args:
            limit: Documents of each set at most.
            min_tokens: Leave out those of fewer tokens, beside those that open and close a document.
        """
        tokenizer, around = self.text_tokenizer, len(self.manifest.opening) + 1
        return {
            name: sample_texts(self.held_out_documents(name), tokenizer, limit=limit, min_tokens=min_tokens + around)
            for name in self.validation_sets
        }

    def bytes_per_token(self, name: str | None = None) -> float | None:
        """UTF-8 bytes of text per predicted token, for bits per byte; None where only some tokens are trained.

        Args:
            name: Of a validation set; empty means the training data as they are mixed, by tokens.
        """
        sets = [manifest.splits["train"] for manifest in self.manifests.values()]
        weights = list(self.weights.values())
        if name is not None:
            sets, weights = [self.validation_sets[name]], [1.0]
        return bytes_per_token(sets, weights, documents_apart=self.intra_document_masking)

    def train_dataloader(self) -> TrainLoader:
        """Batches of the whole run."""
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
        """For each validation set every token once, in order; ranks get equally many batches, the last ones padded."""
        return self._loaders(self._validation)

    def pair_dataloaders(self) -> list[DataLoader]:
        """For each training and validation set every pair of answers once, as :meth:`val_dataloader`."""
        return self._loaders(self._whole)

    def _loaders(self, sets: list[Samples]) -> list[DataLoader]:
        replica = replica_of(self._trainer())
        loaders = []
        for blocks in sets:
            num_batches = -(-len(blocks) // (self.batch_size * replica["num_replicas"]))
            batches = RankBatches(0, num_batches, (), batch_size=self.batch_size, **replica)
            loaders.append(make_loader(blocks, batches, **self._loading()))
        return loaders

    def _loading(self) -> dict[str, Any]:
        """Arguments of :func:`_loader` that depend on the trainer."""
        strategy = getattr(self._trainer(), "strategy", None)
        device = getattr(strategy, "root_device", None)
        return {
            "num_workers": self.num_workers,
            "shard": getattr(strategy, "context_shard", None),
            "pin_memory": device is not None and device.type == "cuda",
        }

    def tokens_per_step(self, *, accumulate_grad_batches: int, num_replicas: int) -> int:
        """Tokens read for one step of the optimizer by all replicas, which read different data, together."""
        return self.context_length * self.batch_size * accumulate_grad_batches * num_replicas

    def _trainer(self) -> Trainer:
        assert self.trainer is not None, "a trainer asks for batches"
        return self.trainer
