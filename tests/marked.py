"""Sets of conversations of the byte tokenizer that mark which tokens are trained, written without `prepare`."""

import itertools

import numpy as np

from ropepp_lit.data.part_writer import write_index
from ropepp_lit.data.shards import TOKENIZER, Chunk, Manifest, TokenSet
from ropepp_lit.data.trained_tokens import mark
from ropepp_lit.files import checksum
from ropepp_lit.text.identity import tokenizer_digest
from ropepp_lit.text.tokenizer import byte_tokenizer

END = 0
"""Ends a turn of the assistant; also the token that stands where rows are padded."""


def conversations(count, *, longest=60, seed=0):
    """Token ids of conversations, and which of them are trained: questions are not, answers and what ends them are."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        ids, trained = [1], [False]
        for _ in range(int(rng.integers(1, 4))):
            question, answer = (int(rng.integers(1, longest // part)) for part in (4, 8))
            ids += [*rng.integers(2, 258, question + answer).tolist(), END]
            trained += [False] * question + [True] * (answer + 1)
        ids[1] = 2 + number % 256
        made.append((np.array(ids), np.array(trained)))
    return made


def write_marked(folder, *, chunk_documents=40, template="{{ messages }}", **splits):
    """Writes a folder of token shards; returns it. `splits` are conversations by the split's name."""
    tokenizer, sets = byte_tokenizer(), {}
    for split, documents in splits.items():
        (folder / split).mkdir(parents=True)
        sets[split] = tokens = TokenSet()
        for first in range(0, len(documents), chunk_documents):
            stored = [mark(ids, trained) for ids, trained in documents[first : first + chunk_documents]]
            path = folder / split / f"chunk-000000-{first:04}.bin"
            header = 4 * (len(stored) + 2)
            offsets = header + 4 * np.cumsum([0, *map(len, stored)])
            path.write_bytes(b"".join(x.tobytes() for x in (np.uint32([len(stored)]), np.uint32(offsets), *stored)))
            chunk = Chunk(
                filename=path.name, documents=len(stored), tokens=sum(map(len, stored)), sha256=checksum(path)
            )
            tokens.chunks.append(chunk)
        for ids, trained in documents:
            tokens.add(tokens=len(ids), num_bytes=len(ids), gzip_bytes=0, max_token_id=int(ids.max()))
            tokens.trained_tokens += int(trained.sum())
        write_index(folder / split, tokens, {})
    (folder / TOKENIZER).write_text(tokenizer.json)
    Manifest(
        format_version=1, fingerprint=folder.name, sources=[], vocab_size=258, bos_token_id=0, eos_token_id=1,
        opening=[0], dtype="int32", skipped={}, examples=[], splits=sets, marks_trained_tokens=True,
        tokenizer_digest=tokenizer_digest(tokenizer.json), chat_template=template, end_of_turn=[END],
    ).write(folder)  # fmt: skip
    return folder


def trained_pairs(ids, trained, places=None):
    """What a conversation is known by in a batch: what it reads, and each trained token with the one before it."""
    ids, trained = ids[:places].tolist(), trained[:places].tolist()
    pairs = [(place, ids[place]) for place in range(1, len(ids)) if trained[place]]
    return (tuple(ids[: pairs[-1][0]]), tuple(pairs)) if pairs else None


def found_pairs(batch):
    """The same of each document of a batch that has labels."""
    inputs, labels = batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist()
    bounds = batch.documents.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        pairs = [(place - start + 1, labels[place]) for place in range(start, end) if labels[place] != -100]
        if pairs:
            yield tuple(inputs[start : start + pairs[-1][0]]), tuple(pairs)
