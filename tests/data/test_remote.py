import errno
import json
import os
import pickle
import socket
import time
from types import SimpleNamespace

import boto3
import pytest
import torch
from marked import conversations, write_marked
from moto.server import ThreadedMotoServer

from ropepp_lit.data.manifest import Manifest
from ropepp_lit.data.prepare import PrepareSettings, prepare
from ropepp_lit.data.remote import RemoteFolder
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError
from ropepp_lit.json_files import sealed, unsealed

BUCKET = "tokens"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Prepare a folder with many small chunks."""
    folder = tmp_path_factory.mktemp("remote")
    texts = folder / "texts"
    texts.mkdir()
    for number in range(80):
        (texts / f"{number:02}.txt").write_text(f"text {number} " * (20 + number % 11))
    settings = PrepareSettings(tokenizer="bytes", validation_fraction=0.2, chunk_bytes=1000)
    prepare([str(texts)], settings, out=folder / "shards", show_progress=False)
    return folder / "shards"


@pytest.fixture(scope="module")
def server(shards):
    """Start a local S3 server with the folder at s3://tokens/shards; returns its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client_of(url).create_bucket(Bucket=BUCKET)
    upload(url, shards)
    yield url
    server.stop()


def client_of(url):
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=url, **keys)


def upload(url, folder):
    client = client_of(url)
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"{folder.name}/{path.relative_to(folder)}")


@pytest.fixture(autouse=True)
def credentials(monkeypatch, request):
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    if "server" in request.fixturenames:
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("server"))


def make(source, cache, *, num_workers=0, **settings):
    data = TokenData(
        source=str(source), context_length=64, batch_size=4, num_workers=num_workers, cache_dir=str(cache), **settings
    )
    data.trainer = SimpleNamespace(max_steps=60, accumulate_grad_batches=1, distributed_sampler_kwargs=None)
    data.check()
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_equal_those_from_disk(server, shards, tmp_path, num_workers):
    local = make(shards, tmp_path)
    remote = make(f"s3://{BUCKET}/shards", tmp_path, num_workers=num_workers)
    for get in (TokenData.train_dataloader, lambda data: data.val_dataloader()[0]):
        here, there = (torch.cat([batch.input_ids for batch in get(data)]) for data in (local, remote))
        assert torch.equal(here, there)
    assert remote.identity == local.identity


def test_the_cache_size_is_bounded(server, shards, tmp_path):
    local, remote = make(shards, tmp_path), make(f"s3://{BUCKET}/shards", tmp_path, max_cache_size="5kB")
    here, there = (torch.cat([b.input_ids for b in data.train_dataloader()]) for data in (local, remote))
    assert torch.equal(here, there)
    remote.train_samples._shards[0]._fetching[1].shutdown()
    kept = [path.stat().st_size for path in tmp_path.rglob("chunk-*.bin")]
    total = sum(path.stat().st_size for path in (shards / "train").glob("chunk-*.bin"))
    assert 3000 < sum(kept) <= 5000 < total


def test_packing_equals_that_from_disk_even_with_a_small_cache(server, tmp_path):
    splits = {"train": conversations(60), "validation": conversations(20, seed=1)}
    upload(server, write_marked(tmp_path / "chats", chunk_documents=10, **splits))
    local, remote = make(tmp_path / "chats", tmp_path), make(f"s3://{BUCKET}/chats", tmp_path, max_cache_size="3kB")
    here, there = (torch.cat([b.labels for b in data.train_dataloader()]) for data in (local, remote))
    assert torch.equal(here, there)
    assert remote.identity == local.identity


def test_a_damaged_chunk_is_reported_and_not_cached(server, shards, tmp_path):
    chunk = Manifest.read(shards).splits["train"].chunks[0].filename
    content = bytearray((shards / "train" / chunk).read_bytes())
    content[-5] ^= 4
    client = boto3.client("s3", endpoint_url=server)
    client.put_object(Bucket=BUCKET, Key=f"damaged/train/{chunk}", Body=bytes(content))
    for name in ("manifest.json", "tokenizer.json"):
        client.upload_file(str(shards / name), BUCKET, f"damaged/{name}")
    data = make(f"s3://{BUCKET}/damaged", tmp_path)
    with pytest.raises(UsageError, match=rf"{chunk}: its checksum differs from the manifest.*s3://{BUCKET}/damaged"):
        data.train_samples._shards[0].open_chunk(0)
    assert not list(tmp_path.rglob(chunk))
    with pytest.raises(UsageError, match=rf"s3://{BUCKET}/damaged/train/.*Not Found.*check the URL"):
        data.train_samples._shards[0].open_chunk(1)


@pytest.mark.parametrize("kind", ["split", "chunk"])
def test_a_manifest_cannot_refer_to_files_outside_the_cache(server, shards, tmp_path, kind):
    """Otherwise such files would be written, and deleted if their checksum differed."""
    client = boto3.client("s3", endpoint_url=server)
    victim = tmp_path / "victim.bin"
    values = json.loads((shards / "manifest.json").read_text())
    chunk = values["splits"]["train"]["chunks"][0]
    victim.write_bytes(bytes(4 * (chunk["documents"] + 2) + 2 * chunk["tokens"]))
    if kind == "chunk":
        chunk["filename"] = "../../../../victim.bin"
    else:
        values["splits"]["../../../.."] = values["splits"].pop("train")
        chunk["filename"] = "victim.bin"
    client.put_object(Bucket=BUCKET, Key="hostile/manifest.json", Body=json.dumps(values).encode())
    client.upload_file(str(shards / "tokenizer.json"), BUCKET, "hostile/tokenizer.json")
    before = victim.stat().st_mtime_ns
    with pytest.raises(UsageError, match="is not a file name inside its folder"):
        make(f"s3://{BUCKET}/hostile", tmp_path / "cache")
    assert victim.stat().st_mtime_ns == before
    folder = RemoteFolder(f"s3://{BUCKET}/hostile", tmp_path / "cache", max_bytes=10**9)
    with pytest.raises(UsageError, match="is not a file name inside its folder"):
        folder.fetch_chunk("train/../../../../victim.bin", 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "victim.bin"]


def test_a_complete_cache_can_be_read_only(server, shards, tmp_path, monkeypatch):
    expected = [batch.input_ids for batch in make(f"s3://{BUCKET}/shards", tmp_path).train_dataloader()]

    def refuse(*arguments, **keywords):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("ropepp_lit.data.remote._write", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    found = [batch.input_ids for batch in make(f"s3://{BUCKET}/shards", tmp_path).train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    with pytest.raises(UsageError, match=r"manifest\.json: cannot be written: Read-only file system"):
        make(f"s3://{BUCKET}/shards", tmp_path / "other")


def test_a_cached_chunk_of_an_older_set_is_fetched_again(server, shards, tmp_path):
    data = make(f"s3://{BUCKET}/shards", tmp_path)
    expected = data.train_samples._shards[0].open_chunk(0)[0].tolist()
    (kept,) = tmp_path.rglob("chunk-*.bin")
    kept.write_bytes(bytes(kept.stat().st_size))
    assert make(f"s3://{BUCKET}/shards", tmp_path).train_samples._shards[0].open_chunk(0)[0].tolist() == expected


def test_a_changed_manifest_is_detected(server, shards, tmp_path):
    client = boto3.client("s3", endpoint_url=server)
    values = unsealed(json.loads((shards / "manifest.json").read_text()))
    for name in ("manifest.json", "tokenizer.json"):
        client.upload_file(str(shards / name), BUCKET, f"changed/{name}")
    make(f"s3://{BUCKET}/changed", tmp_path)
    values["fingerprint"] = "other"
    client.put_object(Bucket=BUCKET, Key="changed/manifest.json", Body=json.dumps(sealed(values)).encode())
    assert make(f"s3://{BUCKET}/changed", tmp_path).manifest.fingerprint == "other"


def test_missing_buckets_and_folders(server, tmp_path):
    for url in ("s3://no-such-bucket/shards", f"s3://{BUCKET}/no-such-folder"):
        started = time.monotonic()
        with pytest.raises(UsageError, match=f"{url}/manifest.json: .*Not Found.*check the URL"):
            make(url, tmp_path)
        assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("url", "endpoint", "message"),
    [
        ("s3://", None, "s3://: no bucket; write s3://BUCKET/FOLDER"),
        ("s3:///shards", None, "no bucket"),
        ("s3://two words/shards", None, r"Invalid bucket name .two words.*; check the URL"),
        ("s3://tokens/shards", "no URL", r"Invalid endpoint: no URL; check the URL, the endpoint"),
    ],
)
def test_invalid_urls_and_endpoints(tmp_path, monkeypatch, url, endpoint, message):
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UsageError, match=message):
        make(url, tmp_path)


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_dead_endpoints_fail_in_time(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("ropepp_lit.data.remote.SECONDS_TO_FAIL", 4)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen()  # accepts the connection and never responds
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        started = time.monotonic()
        expected = "Could not connect" if kind == "refused" else "no response within 4 seconds"
        with pytest.raises(UsageError, match=f"s3://{BUCKET}/shards/manifest.json: {expected}"):
            make(f"s3://{BUCKET}/shards", tmp_path)
        assert time.monotonic() - started < 10


def test_google_storage_requires_its_library(tmp_path, monkeypatch):
    monkeypatch.setattr("litdata.streaming.downloader._GOOGLE_STORAGE_AVAILABLE", "")
    with pytest.raises(UsageError, match=r"gs://bucket/shards: gs:// requires google-cloud-storage: pip install"):
        make("gs://bucket/shards", tmp_path)


def test_workers_create_their_own_connections(tmp_path):
    folder = RemoteFolder("s3://bucket/shards/", tmp_path, max_bytes=10**9)
    folder._connect()
    assert folder._downloader[0] == os.getpid()
    assert pickle.loads(pickle.dumps(folder))._downloader is None
    assert folder.url == "s3://bucket/shards"
