"""Document bounds are those of the written documents, independent of the tokens in them."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ropepp_lit.data.manifest import Manifest
from ropepp_lit.data.prepare import PrepareSettings, prepare
from ropepp_lit.data.shards import TokenShards
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.data.verify import verify
from ropepp_lit.errors import UsageError
from ropepp_lit.files import checksum
from ropepp_lit.nn.context_parallel import ContextShard

DOCUMENTS = [
    "one <e> two",
    "three",
    "",
    "four <e><e>",
    "x",
    "<e>",
    *(f"text {n} <e> " * (1 + n % 7) for n in range(40)),
]
"""Documents of different lengths, with the EOS token `<e>` at different positions."""


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """Write a byte tokenizer with two added tokens that are not special, so that texts can contain them."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<e>", special=False), AddedToken("<f>", special=False)])
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def prepared(tokenizer_file, tmp_path_factory):
    """Function that prepares the documents and returns the folder."""
    folder = tmp_path_factory.mktemp("prepared")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))

    def prepared(name, **settings):
        out = folder / name
        settings = {"tokenizer": str(tokenizer_file), "eos_token": "<e>", "validation_fraction": 0.4, **settings}
        settings.setdefault("on_error", "skip")  # for the empty document
        prepare([str(text)], PrepareSettings(**settings), out=out, show_progress=False)
        return out

    return prepared


OPENINGS = {"none": None, "separate token": "<f>", "same as EOS": "<e>"}


@pytest.fixture(params=OPENINGS.values(), ids=OPENINGS)
def shards(request, prepared):
    return prepared(f"opened by {request.param}", bos_token=request.param)


def open_data(source, **settings):
    data = TokenData(source=source if isinstance(source, dict) else str(source), context_length=32, **settings)
    data.trainer = SimpleNamespace(max_steps=40, accumulate_grad_batches=1, distributed_sampler_kwargs=None)
    data.setup("fit")
    return data


def plain_documents(shards, split, tokenizer_file):
    """Return the ids of each document, computed by a loop over the texts."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    manifest = Manifest.read(shards)
    opening = [] if manifest.bos_token_id is None else [manifest.bos_token_id]
    expected_documents = [[*opening, *tokenizer.encode(text).ids, manifest.eos_token_id] for text in DOCUMENTS if text]
    stored = [document.tolist() for document in TokenShards(shards, manifest, split).documents()]
    assert all(document in expected_documents for document in stored)
    return stored


def test_every_document_is_stored_once_and_verified(shards, tokenizer_file):
    splits = [plain_documents(shards, split, tokenizer_file) for split in ("train", "validation")]
    assert sum(map(len, splits)) == len(DOCUMENTS) - 1
    assert verify(shards) == []


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_every_token_after_the_first_of_a_document_is_predicted_once(shards, tokenizer_file, rank):
    """Compare inputs with labels, visible tokens and bytes per token with a plain loop over documents."""
    documents = plain_documents(shards, "validation", tokenizer_file)
    expected = sorted(pair for document in documents for pair in itertools.pairwise(document))
    data = open_data(shards, batch_size=3, num_workers=0 if rank is None else 1)
    found = []
    for loader in data.val_dataloader():
        for batch in loader:
            counts = batch.labels != -100
            found += zip(batch.input_ids[counts].tolist(), batch.labels[counts].tolist(), strict=True)
    assert sorted(found) == expected
    (tokens,) = data.validation_sets.values()
    assert tokens.predicted(documents_apart=data.intra_document_masking) == len(expected)
    assert data.bytes_per_token(next(iter(data.validation_sets))) == tokens.bytes / len(expected)
    if rank is not None:  # each of two ranks has half of the tokens of the same documents
        shard = ContextShard(2, rank, "gather")
        samples = data.train_samples.__getitems__(list(range(4)))
        full, part = data.train_samples.collate(samples), data.train_samples.collate(samples, shard=shard)
        assert torch.equal(part.labels, shard.take(full.labels))
        assert torch.equal(part.documents.positions, shard.take(full.documents.positions))


def test_document_bounds_in_rows(shards):
    """Also in shuffled training rows, positions restart exactly at the starts of the stored documents."""
    data = open_data(shards)
    manifest = data.manifest
    blocks = data.train_samples
    plan, files = blocks.plans[0], blocks._shards[0]
    starts = {}
    for index, chunk in enumerate(manifest.splits["train"].chunks):
        one = TokenShards(shards, manifest, "train", [chunk])
        lengths = [len(document) for document in one.documents()]
        starts[index] = {0, *np.cumsum(lengths)[:-1].tolist()}
    assert files.chunks == manifest.splits["train"].chunks
    tokens, found = blocks.__getitems__(list(range(30)))
    for sample in range(30):
        expected = [
            token in starts[span.chunk]
            for span in plan.locate(sample)
            for token in range(span.start, span.start + span.num_tokens)
        ]
        assert found[sample].tolist() == expected
    batch = blocks.collate((tokens, found))
    assert torch.equal(batch.labels == -100, found[:, 1:])
    restarts = batch.documents.positions == 0
    assert torch.equal(restarts[:, 1:], found[:, 1:-1])
    assert restarts[:, 0].all()


def test_a_mixture_with_different_special_tokens_keeps_bounds_and_prints_a_note(prepared):
    one, other = prepared("ends with e"), prepared("ends with f", eos_token="<f>", bos_token="<e>")
    data = open_data({str(one): 0.5, str(other): 0.5})
    assert len(data.notices) == 2
    assert data.notices[1].startswith("Note: eos_token_id is 257 in ends with f and 256 in ends with e; prompts and")
    for blocks, folder in zip(data._validation, (one, other), strict=True):
        manifest = Manifest.read(folder)
        assert sum(1 for _ in blocks.documents()) == manifest.splits["validation"].documents
    predicted = [sum(int((batch.labels >= 0).sum()) for batch in loader) for loader in data.val_dataloader()]
    assert predicted == [
        tokens.predicted(documents_apart=data.intra_document_masking) for tokens in data.validation_sets.values()
    ]


def test_bytes_per_token_of_a_mixture_match_the_batches(prepared, tmp_path):
    """Short documents have fewer labels per token than long ones."""
    (tmp_path / "short.jsonl").write_text('{"text": "ab"}\n' * 3000)
    settings = PrepareSettings(tokenizer="bytes", validation_fraction=0)
    prepare([str(tmp_path / "short.jsonl")], settings, out=tmp_path / "short", show_progress=False)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "cd" * 5000}) + "\n")
    (tmp_path / "more.jsonl").write_text('{"text": "xy"}\n' * 300)
    for name in ("long", "more"):
        prepare([str(tmp_path / f"{name}.jsonl")], settings, out=tmp_path / name, show_progress=False)
    weights = {str(tmp_path / "short"): 0.5, str(tmp_path / "long"): 0.5}
    data = open_data(weights, validation={"more": str(tmp_path / "more")}, batch_size=25)
    read = labels = 0
    for batch in data.train_dataloader():
        read += int((batch.input_ids > 1).sum())  # each token is a byte
        labels += batch.num_labels
    assert data.bytes_per_token() == pytest.approx(read / labels, rel=0.01)


def test_held_out_documents_are_read_once(prepared, tmp_path):
    """A document of 5 million tokens takes seconds; a loop that concatenated rows took hours."""
    with (tmp_path / "long.jsonl").open("w") as file:
        file.write(json.dumps({"text": "ab" * 2_500_000}) + "\n" + json.dumps({"text": "short"}) + "\n")
    out = tmp_path / "long"
    prepare([str(tmp_path / "long.jsonl")], PrepareSettings(tokenizer="bytes"), out=out, show_progress=False)
    data = open_data(out, validation={"all": str(out)})
    assert [len(document) for document in data.held_out_documents("all")] == [5_000_002, 7]


def rewrite(path, change):
    contents = bytearray(path.read_bytes())
    change(contents)
    path.write_bytes(contents)


def set_first(contents, value):
    contents[:4] = np.uint32(value).tobytes()


def move_bound(contents):
    offsets = np.frombuffer(contents, dtype=np.uint32, count=3, offset=4).copy()
    offsets[1] += 1  # not at a token boundary
    contents[4:16] = offsets.tobytes()


def move_document(contents):
    offsets = np.frombuffer(contents, dtype=np.uint32, count=3, offset=4).copy()
    offsets[1] += 2  # one token further
    contents[4:16] = offsets.tobytes()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda contents: set_first(contents, 3), "its header does not have valid offsets of"),
        (move_bound, "its header does not have valid offsets of"),
        (move_document, "1 documents do not end with the token"),
    ],
)
def test_verify_finds_wrong_document_bounds(prepared, request, change, fault):
    """Also if the checksums have been recomputed."""
    folder = prepared(request.node.name.replace("/", " "))
    manifest = Manifest.read(folder)
    chunk = manifest.splits["train"].chunks[0]
    rewrite(folder / "train" / chunk.filename, change)
    chunks = [dataclasses.replace(chunk, sha256=checksum(folder / "train" / chunk.filename))]
    manifest.splits["train"].chunks = chunks + manifest.splits["train"].chunks[1:]
    manifest.write(folder)
    faults = verify(folder)
    assert len(faults) == 1
    assert fault in faults[0]


def test_another_tokenizer_than_that_of_the_shards_is_refused(prepared):
    one = prepared("its tokenizer")
    path = one / "tokenizer.json"
    original = path.read_text()
    values = json.loads(original)
    values["truncation"] = {"max_length": 64, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    path.write_text(json.dumps(values, indent=7, ensure_ascii=True))
    assert verify(one) == []
    other = prepared("other white space")
    assert open_data({str(one): 0.5, str(other): 0.5}).notices == []
    values = json.loads(original)
    values["model"]["vocab"]["a"], values["model"]["vocab"]["b"] = values["model"]["vocab"]["b"], 0
    path.write_text(json.dumps(values))
    assert verify(one) == [
        f"{path}: not the tokenizer with which the shards were prepared; restore that file, "
        f"or remove {one} to prepare it again"
    ]
    with pytest.raises(UsageError, match="not the tokenizer with which the shards were prepared"):
        open_data(one)
