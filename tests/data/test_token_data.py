import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ropepp_lit.data.comparison import continued_at
from ropepp_lit.data.prepare import PrepareSettings, prepare
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.text.tokenizer import _byte_characters, train_tokenizer

EOS = 1


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"text {number} " * (5 + number % 11))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(source, cache):
    def make(*, source=source, max_steps=10, accumulate=1, replicas=1, rank=0, **settings):
        defaults = {"tokenizer": "bytes", "context_length": 32, "batch_size": 4, "validation_fraction": 0.2}
        data = TokenData(
            source=source if isinstance(source, dict) else str(source), cache_dir=str(cache), **{**defaults, **settings}
        )
        data.trainer = SimpleNamespace(
            max_steps=max_steps,
            accumulate_grad_batches=accumulate,
            distributed_sampler_kwargs={"num_replicas": replicas, "rank": rank},
        )
        data.prepare_data()
        data.setup("fit")
        return data

    return make


def rows(loader, count):
    return [batch.input_ids for _, batch in zip(range(count), loader, strict=False)]


def test_labels_are_the_next_tokens(make):
    batch = next(iter(make(intra_document_masking=False).train_dataloader()))
    assert batch.input_ids.shape == batch.labels.shape == (4, 32)
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    assert batch.documents is None


def test_documents_do_not_predict_each_other(make):
    for batch in make(max_steps=20).train_dataloader():
        ends = batch.input_ids == EOS
        assert (batch.labels[ends] == -100).all()
        assert (batch.labels[~ends] >= 0).all()
        assert (batch.documents.positions[:, 1:][ends[:, :-1]] == 0).all()
        if ends.any():
            return
    pytest.fail("no document ended within 20 batches")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_read_the_same_global_order(make, num_workers):
    alone = torch.stack(rows(make(batch_size=8, num_workers=num_workers).train_dataloader(), 6))
    loaders = [make(replicas=2, rank=rank, num_workers=num_workers).train_dataloader() for rank in range(2)]
    together = [torch.stack(rows(loader, 6)) for loader in loaders]
    assert torch.equal(alone, torch.cat(together, dim=1))


def test_one_rank_resumes_a_run_of_two(make):
    uninterrupted = torch.cat(rows(make(max_steps=12).train_dataloader(), 12))
    first = [make(replicas=2, rank=rank).train_dataloader() for rank in range(2)]
    before = [rows(loader, 4) for loader in first]
    states = [loader.state_dict() for loader in first]
    assert states[0] == states[1]
    rest = make(batch_size=4).train_dataloader()
    rest.load_state_dict(states[0])
    order = [row for pair in zip(*before, strict=True) for row in pair] + rows(rest, 4)
    assert torch.equal(torch.cat(order), uninterrupted)


def test_iterating_twice_does_not_rewind(make):
    loader = make().train_dataloader()
    first, second = rows(loader, 3), rows(loader, 3)
    assert torch.equal(torch.cat(first + second), torch.cat(rows(make().train_dataloader(), 6)))


def test_different_data_restarts_at_the_first_sample(make):
    state = {**make().train_dataloader().state_dict(), "samples": 40}
    for changed in ({"context_length": 16}, {"seed": 5}, {"validation_fraction": 0.3}):
        loader = make(**changed).train_dataloader()
        loader.load_state_dict(state)
        assert loader.samples == 0
    same = make(batch_size=2, num_workers=1).train_dataloader()
    same.load_state_dict(state)
    assert same.samples == 40


def copy_texts(source, folder):
    shutil.copytree(source, folder)
    return folder


def test_a_position_depends_on_contents_not_on_paths(make, source, tmp_path, monkeypatch):
    """Touched, moved or renamed files keep the position; changed bytes do not."""
    folder = copy_texts(source, tmp_path / "texts")
    state = {**make(source=folder).train_dataloader().state_dict(), "samples": 40}

    def samples(**settings):
        loader = make(**settings).train_dataloader()
        loader.load_state_dict(state)
        return loader.samples

    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert samples(source=folder) == 40
    monkeypatch.chdir(tmp_path)
    assert samples(source="texts") == 40
    assert samples(source=copy_texts(folder, tmp_path / "moved" / "other name")) == 40
    weight = {str(folder): 7.0}
    assert samples(source=weight) == 40  # a single source has the full weight, for any value
    (folder / "0.txt").write_text("Other text " * 5)
    assert samples(source=folder) == 0


def test_reasons_for_restarting_the_data(make):
    state = {**make().train_dataloader().state_dict(), "samples": 40}
    (name,) = state["identity"]["names"]
    for settings, reason in (
        ({"context_length": 16}, "data.context_length is 16 instead of 32"),
        ({"seed": 5}, "data.seed is 5 instead of 0"),
        ({"validation_fraction": 0.3}, f"the training documents of {name} have different contents"),
        ({"seed": 5, "context_length": 16}, "data.context_length is 16 instead of 32; data.seed is 5 instead of 0"),
    ):
        assert continued_at(state, make(**settings).identity) == (0, reason)
    old = {key: state["identity"][key] for key in ("sources", "context_length", "seed")}  # of an earlier version
    assert continued_at({"samples": 40, "identity": old}, make().identity) == (40, "")
    sample, reason = continued_at({"samples": 40, "identity": {**old, "sources": [["other", 1.0]]}}, make().identity)
    assert sample == 0
    assert reason.startswith("the checkpoint is of an earlier version")


def test_length_is_that_of_the_run(make):
    assert len(make(max_steps=7, accumulate=3).train_dataloader()) == 21


@pytest.mark.parametrize("masking", [True, False])
def test_validation_predicts_every_token_once(make, source, masking):
    for replicas in (1, 2, 3):
        loaders = [
            loader
            for rank in range(replicas)
            for loader in make(replicas=replicas, rank=rank, intra_document_masking=masking).val_dataloader()
        ]
        assert len({len(loader) for loader in loaders}) == 1
        labels = torch.cat([batch.labels[batch.labels >= 0] for loader in loaders for batch in loader])
        tokens = make().manifest.splits["validation"]
        assert len(labels) == tokens.tokens - (tokens.documents if masking else 1)
        assert make(intra_document_masking=masking).bytes_per_token(source.name) == tokens.bytes / len(labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": None}, r"data\.tokenizer: set either"),
        ({"train_tokenizer": 300}, r"data\.tokenizer: set either"),
        ({"tokenizer": "words"}, r"tokenizer: words: no such tokenizer"),
        ({"tokenizer": None, "train_tokenizer": 100}, r"data\.train_tokenizer: 100 must be 258 or more"),
        ({"context_length": 0}, r"data\.context_length: 0 must be 1 or more"),
        ({"batch_size": 0}, r"data\.batch_size: 0 must be 1 or more"),
        ({"num_workers": -1}, r"data\.num_workers: -1 must be 0 or more"),
        ({"validation_fraction": 1.5}, r"data\.validation_fraction: 1.5 must be between 0 and 1"),
        ({"context_length": 100_000}, r"data\.context_length: 100000 is longer than the .* tokens of train"),
    ],
)
def test_invalid_settings(make, settings, message):
    with pytest.raises(UsageError, match=message):
        make(**settings)


def test_a_prepared_folder_gives_the_same_batches(make, source, tmp_path):
    settings = PrepareSettings(tokenizer="bytes", validation_fraction=0.2)
    prepare([str(source)], settings, out=tmp_path / "shards", show_progress=False)
    prepared = make(source=tmp_path / "shards", tokenizer=None)
    assert torch.equal(torch.cat(rows(prepared.train_dataloader(), 5)), torch.cat(rows(make().train_dataloader(), 5)))
    again = make(source=tmp_path / "shards", tokenizer="bytes")  # as in a recipe by `convert`
    assert torch.equal(torch.cat(rows(again.train_dataloader(), 5)), torch.cat(rows(prepared.train_dataloader(), 5)))
    other = tmp_path / "other.json"
    train_tokenizer(["one two three"], vocab_size=300).tokenizer.save(str(other))
    with pytest.raises(UsageError, match=r"data\.tokenizer: .*other.json is not the tokenizer that .*shards was prep"):
        make(source=tmp_path / "shards", tokenizer=str(other))
    with pytest.raises(UsageError, match=r"data\.train_tokenizer: .*shards contains token shards with their tokenizer"):
        make(source=tmp_path / "shards", tokenizer=None, train_tokenizer=300)
    prepare([str(source)], PrepareSettings(tokenizer="bytes"), out=tmp_path / "none", show_progress=False)
    with pytest.raises(UsageError, match=r"data\.source: no source has validation documents"):
        make(source=tmp_path / "none", tokenizer=None)


@pytest.fixture(scope="module")
def mixture(source, tmp_path_factory):
    """Prepare two folders; returns their weights."""
    folder = tmp_path_factory.mktemp("mixture")
    other = folder / "other"
    other.mkdir()
    for number in range(30):
        (other / f"{number}.txt").write_text(f"OTHER {number} " * 40)
    settings = PrepareSettings(tokenizer="bytes", validation_fraction=0.2)
    for name, text in (("long", other), ("short", source)):
        prepare([str(text)], settings, out=folder / name, show_progress=False)
    return {str(folder / "long"): 0.6, str(folder / "short"): 0.4}


def test_a_mixture_has_exact_proportions_and_one_global_order(make, mixture):
    def read(count, **settings):
        return torch.cat(
            rows(make(source=mixture, tokenizer=None, max_steps=999, **settings).train_dataloader(), count)
        )

    alone = read(250)
    longs = (alone == 2 + sorted(_byte_characters()).index("O")).any(dim=1)
    assert longs.sum() == 600  # of 1,000 samples; only the long source has capital letters such as O
    with_workers = read(25, batch_size=8, num_workers=2)
    assert torch.equal(with_workers, alone[:200])
    ranks = [read(25, replicas=2, rank=rank, num_workers=rank) for rank in range(2)]
    together = torch.stack([x.view(25, 4, -1) for x in ranks], dim=1).flatten(0, 2)
    assert torch.equal(together, alone[:200])


def test_one_rank_resumes_a_mixture_of_two(make, mixture):
    settings = {"source": mixture, "tokenizer": None, "max_steps": 99}
    uninterrupted = torch.cat(rows(make(**settings).train_dataloader(), 30))
    loaders = [make(replicas=2, rank=rank, **settings).train_dataloader() for rank in range(2)]
    before = [rows(loader, 10) for loader in loaders]
    rest = make(**settings).train_dataloader()
    rest.load_state_dict(loaders[1].state_dict())
    order = [row for pair in zip(*before, strict=True) for row in pair] + rows(rest, 10)
    assert torch.equal(torch.cat(order), uninterrupted)
    heavier = make(**{**settings, "source": {**mixture, next(iter(mixture)): 0.7}}).train_dataloader()
    heavier.load_state_dict(loaders[1].state_dict())
    assert heavier.samples == 0
    state = loaders[1].state_dict()
    long, short = (Path(name).name for name in mixture)
    assert continued_at(state, make(**{**settings, "source": {**mixture, next(iter(mixture)): 1.6}}).identity)[1] == (
        f"the weight of {long} is 0.8 instead of 0.6; the weight of {short} is 0.2 instead of 0.4"
    )
    one = make(**{**settings, "source": next(iter(mixture))})
    assert continued_at(state, one.identity)[1] == "data.source has 1 sources instead of 2"


def test_validation_sets_of_a_mixture(make, mixture):
    data = make(source=mixture, tokenizer=None)
    assert list(data.validation_sets) == ["long", "short"]
    for tokens, loader in zip(data.validation_sets.values(), data.val_dataloader(), strict=True):
        assert sum((batch.labels >= 0).sum() for batch in loader) == tokens.predicted(
            documents_apart=data.intra_document_masking
        )


def test_additional_validation_sets(make, source, tmp_path):
    prepare([str(source)], PrepareSettings(tokenizer="bytes"), out=tmp_path / "all", show_progress=False)
    prepare(
        [str(source)],
        PrepareSettings(tokenizer="bytes", validation_fraction=0.3),
        out=tmp_path / "some",
        show_progress=False,
    )
    sets = {"everything": str(tmp_path / "all"), "held out": str(tmp_path / "some")}
    data = make(source=tmp_path / "all", tokenizer=None, validation=sets)
    documents = {name: tokens.documents for name, tokens in data.validation_sets.items()}
    assert documents == {"everything": 60, "held out": data.validation_sets["held out"].documents}
    assert 0 < documents["held out"] < 40
    for tokens, loader in zip(data.validation_sets.values(), data.val_dataloader(), strict=True):
        assert sum((batch.labels >= 0).sum() for batch in loader) == tokens.predicted(
            documents_apart=data.intra_document_masking
        )
    with pytest.raises(UsageError, match=r"data\.validation: .*nowhere contains no token shards; prepare them by"):
        make(validation={"text": str(tmp_path / "nowhere")})
    with pytest.raises(UsageError, match=r"data\.validation: some is already the name of a source"):
        make(source=tmp_path / "some", tokenizer=None, validation={"some": str(tmp_path / "all")})


def test_invalid_mixtures(make, mixture, source, tmp_path):
    long, short = mixture
    with pytest.raises(UsageError, match=r"data\.source: .*short: weight 0 must be at least a thousandth"):
        make(source={long: 1, short: 0}, tokenizer=None)
    prepare([str(source)], PrepareSettings(train_tokenizer=300), out=tmp_path / "bpe", show_progress=False)
    with pytest.raises(UsageError, match=r"data\.source: bpe was tokenized by another tokenizer than long"):
        make(source={long: 1, str(tmp_path / "bpe"): 1}, tokenizer=None)
    with pytest.raises(UsageError, match=rf"data\.source: two sources have the name {source.name}"):
        make(source={str(source): 1, str(source) + "/": 1})


def test_held_out_documents(tmp_path, texts):
    data = TokenData(
        source=str(texts), tokenizer="bytes", context_length=64, batch_size=2, validation_fraction=0.2,
        cache_dir=str(tmp_path),
    )  # fmt: skip
    data.setup("evaluate")
    (name,) = data.validation_sets
    found = data.held_out_texts(1000)[name]
    originals = {path.read_text() for path in texts.iterdir()}
    assert len(found) == len(set(found)) == data.validation_sets[name].documents
    assert set(found) < originals
    ids, tokenizer = list(data.held_out_documents(name)), data.text_tokenizer
    assert sum(map(len, ids)) == data.validation_sets[name].tokens
    assert all(document[-1] == data.manifest.eos_token_id for document in ids)
    long = sorted(map(len, found))[len(found) // 2]
    assert set(data.held_out_texts(1000, min_tokens=long)[name]) == {text for text in found if len(text) >= long}
    assert data.held_out_texts(2) == {name: found[:2]}
    in_order = [tokenizer.decode(document.tolist()) for document in ids]
    assert sorted(found) == sorted(in_order)
    assert found != in_order  # chosen by a hash, not the head of the set
