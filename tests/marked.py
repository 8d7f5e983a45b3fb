"""Token shards of conversations for the byte tokenizer with marked trained tokens, written without `prepare`."""

import itertools

import numpy as np

from ropepp_lit.data.manifest import TOKENIZER, Chunk, Manifest, TokenSet
from ropepp_lit.data.segment_writer import write_index
from ropepp_lit.data.trained_tokens import join_pair, mark
from ropepp_lit.files import checksum
from ropepp_lit.text.identity import tokenizer_digest
from ropepp_lit.text.tokenizer import byte_tokenizer

END = 0
"""Token that ends an assistant's turn; also the token that pads rows."""


def conversations(count, *, longest=60, seed=0):
    """Generate token ids of conversations with masks of the trained tokens: answers and their end tokens."""
    rng = np.random.default_rng(seed)
    generated = []
    for number in range(count):
        ids, trained = [1], [False]
        for _ in range(int(rng.integers(1, 4))):
            question, answer = (int(rng.integers(1, longest // part)) for part in (4, 8))
            ids += [*rng.integers(2, 258, question + answer).tolist(), END]
            trained += [False] * question + [True] * (answer + 1)
        ids[1] = 2 + number % 256
        generated.append((np.array(ids), np.array(trained)))
    return generated


def answer_pairs(count, *, longest=40, seed=0):
    """Generate pairs of a chosen and a rejected answer to one prompt, each in the form of :func:`conversations`."""
    rng = np.random.default_rng(seed)
    generated = []
    for number in range(count):
        prompt = [1, 2 + number % 256, *rng.integers(2, 258, int(rng.integers(0, longest // 4))).tolist()]
        pair = []
        for _ in range(2):
            answer = [*rng.integers(2, 258, int(rng.integers(1, longest // 3))).tolist(), END]
            pair.append((np.array(prompt + answer), np.arange(len(prompt + answer)) >= len(prompt)))
        generated.append(tuple(pair))
    return generated


def write_marked(folder, *, chunk_documents=40, template="{{ messages }}", **splits):
    """Write a folder of token shards and return it. `splits` are conversations or pairs by the split's name."""
    holds_pairs = isinstance(next(iter(splits.values()))[0][0], tuple)
    tokenizer, sets = byte_tokenizer(), {}
    for split, documents in splits.items():
        (folder / split).mkdir(parents=True)
        sets[split] = tokens = TokenSet()
        for first in range(0, len(documents), chunk_documents):
            some = documents[first : first + chunk_documents]
            stored = [join_pair(*(mark(*answer) for answer in one)) if holds_pairs else mark(*one) for one in some]
            path = folder / split / f"chunk-000000-{first:04}.bin"
            header = 4 * (len(stored) + 2)
            offsets = header + 4 * np.cumsum([0, *map(len, stored)])
            path.write_bytes(b"".join(x.tobytes() for x in (np.uint32([len(stored)]), np.uint32(offsets), *stored)))
            chunk = Chunk(
                filename=path.name, documents=len(stored), tokens=sum(map(len, stored)), sha256=checksum(path)
            )
            tokens.chunks.append(chunk)
        for one in documents:
            ids, trained = map(np.concatenate, zip(*one, strict=True)) if holds_pairs else one
            tokens.add(tokens=len(ids), num_bytes=len(ids), gzip_bytes=0, max_token_id=int(ids.max()))
            tokens.trained_tokens += int(trained.sum())
        write_index(folder / split, tokens, {})
    (folder / TOKENIZER).write_text(tokenizer.json)
    Manifest(
        format_version=1, fingerprint=folder.name, sources=[], vocab_size=258, bos_token_id=0, eos_token_id=1,
        opening=[0], dtype="int32", skipped={}, examples=[], splits=sets, marks_trained_tokens=True,
        holds_pairs=holds_pairs,
        tokenizer_digest=tokenizer_digest(tokenizer.json), chat_template=template, end_of_turn=[END],
    ).write(folder)  # fmt: skip
    return folder


def trained_pairs(ids, trained, length=None):
    """Return a conversation's inputs, and its trained tokens as (position, id), to compare it with a batch."""
    ids, trained = ids[:length].tolist(), trained[:length].tolist()
    pairs = [(position, ids[position]) for position in range(1, len(ids)) if trained[position]]
    return (tuple(ids[: pairs[-1][0]]), tuple(pairs)) if pairs else None


def found_pairs(batch):
    """Yield the same values for each document of a batch that has labels."""
    inputs, labels = batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist()
    bounds = batch.documents.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        pairs = [(i - start + 1, labels[i]) for i in range(start, end) if labels[i] != -100]
        if pairs:
            yield tuple(inputs[start : start + pairs[-1][0]]), tuple(pairs)
