import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ropepp_lit.checkpoint import describe_architecture, make_checkpoint, write_checkpoint
from ropepp_lit.eval.report import write_report
from ropepp_lit.eval.results import Measurement, summarize
from ropepp_lit.nn import Decoder, DecoderConfig, Frequencies, RoPE, RoPEPP
from ropepp_lit.text.tokenizer import byte_tokenizer

SCHEMES = {"rope": RoPE(), "eh": RoPEPP(variant="eh"), "ec": RoPEPP(variant="ec")}


@pytest.fixture(scope="session")
def small_checkpoints(tmp_path_factory):
    """Paths of checkpoints of random models with byte tokenizers, by variant."""
    folder, paths = tmp_path_factory.mktemp("models"), {}
    tokenizer = byte_tokenizer()
    config = DecoderConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    for name, scheme in SCHEMES.items():
        torch.manual_seed(0)
        decoder = Decoder(config, scheme, Frequencies())
        paths[name] = folder / f"{name}.ckpt"
        write_checkpoint(
            paths[name],
            make_checkpoint(
                decoder.state_dict(),
                architecture=describe_architecture(config, scheme, Frequencies()),
                context_length=64,
                tokenizer=tokenizer.tokenizer.to_str(),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            ),
        )
    return paths


@pytest.fixture(scope="session")
def documents():
    """Texts of different lengths, one with a single character, one with non-ASCII letters."""
    return ["x", "A short text.", "Größe über alles: ä, ö, ü. " * 5, " ".join(str(n * n) for n in range(150))]


LENGTHS = (256, 512, 1024, 2048)
FAMILIES = ("single", "multikey", "multivalue", "multiquery", "tracking", "common_words", "frequent_words")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MODELS = ("RoPE", "RoPE++ EH", "RoPE++ EC")


def measurements(model, run, *, tasks, documents=24):
    """Yield plausible measurements of a run; the models differ little at 256 tokens and much beyond."""
    noise = np.random.default_rng(100 * model + run)
    texts = np.random.default_rng(7)  # the same documents for every model
    hard = texts.normal(0, 0.25, documents)
    slope, skill = (0.16, 0.11, 0.1)[model % 3] + 0.01 * (model // 3), (0.5, 0.55, 0.68)[model % 3]
    seed = noise.normal(0, 0.015)

    def loss(length, extra=0.0):
        return 4.25 + seed + slope * np.log2(length / 256) + extra + hard + noise.normal(0, 0.03, documents)

    def perplexity(length, *, extra=0.0, **key):
        losses = length * loss(length, extra)
        for metric, per in (("loss", length), ("perplexity", length), ("bits_per_byte", 3.1 * length)):
            yield Measurement(
                task="perplexity", metric=metric, length=length, **key,
                numerators=losses.tolist(), denominators=[float(per)] * documents,
            )  # fmt: skip

    def hits(length, *, lost=0.0, depth=None):
        odds = skill - 0.16 * np.log2(length / 256) - lost + (0 if depth is None else 0.5 * (depth - 0.5) ** 2)
        luck = np.random.default_rng([length, int(100 * (depth or 0))]).uniform(size=documents)
        return (luck + noise.normal(0, 0.05, documents) < np.clip(odds, 0.02, 0.99)).astype(float).tolist()

    def retrieval(length, **key):
        return Measurement(
            task="retrieval", metric="score", length=length, denominators=[1.0] * documents,
            **{"part": "all", "numerators": hits(length)} | key,
        )  # fmt: skip

    if "harness" in tasks:
        yield from harness(model)
    heads = ("real", "imaginary")[: 1 if model == 0 else 2]
    for length in LENGTHS if "perplexity" in tasks else ():
        yield from perplexity(length)
        for position in range(0, length, 64):
            extra = 1.5 / (1 + position / 8) - 0.1
            yield Measurement(
                task="perplexity", metric="loss", length=length, position=position,
                numerators=(64 * loss(max(256, position), extra)).tolist(), denominators=[64.0] * documents,
            )  # fmt: skip
    for length in LENGTHS if "retrieval" in tasks else ():
        yield retrieval(length)
        for place, family in enumerate(FAMILIES):
            yield retrieval(length, part=family, numerators=hits(length, lost=0.04 * place - 0.1))
        for depth in DEPTHS:
            for part in ("single", "multikey"):
                lost = 0.3 * (part == "multikey")
                yield retrieval(length, part=part, depth=depth, numerators=hits(length, depth=depth, lost=lost))
    for kind in heads if "noise" in tasks else ():
        for std in (0.0, 0.5, 1.0, 2.0):
            cost = std * (0.5 if kind == "imaginary" else 0.25)
            key = {"heads": kind, "noise_std": std}
            yield from perplexity(1024, extra=cost, **key)
            yield retrieval(512, numerators=hits(512, lost=cost / 2), **key)
    for kind in heads if "attention" in tasks else ():
        ranges = [0, *(2**power for power in range(10))]
        shares = np.exp(-np.arange(11) / (2.5 if kind == "real" else 8)) + noise.uniform(0, 0.02, 11)
        for position, share in zip(ranges, shares / shares.sum(), strict=True):
            yield Measurement(
                task="attention", metric="attention", length=1024, position=position, heads=kind,
                numerators=(share + noise.normal(0, 0.01, documents)).tolist(), denominators=[1.0] * documents,
            )  # fmt: skip


def harness(place):
    """Yield measurements of lm-eval tasks: one with two filters, one with a metric for which lower is better."""
    draw = np.random.default_rng(place)
    for task, metric, rate, higher in (
        ("gsm8k", "exact_match,strict-match", 0.0, True), ("gsm8k", "exact_match,flexible-extract", 0.4, True),
        ("piqa", "acc", 0.6 + 0.01 * place, True), ("speech", "wer", 0.3, False),
    ):  # fmt: skip
        values = (draw.uniform(size=80) < rate).astype(float) if higher else draw.uniform(0, 2 * rate, 80)
        _, _, answer = metric.partition(",")
        yield Measurement(
            task="harness", part=task, metric=metric, numerators=values.tolist(), denominators=[1.0] * 80,
            aggregation="mean", higher_is_better=higher,
            details={"lm-eval": "0.4.12", "filter": answer or "none", "shots": 5, "task_version": 3, "of": 1319},
        )  # fmt: skip


TASKS = ("perplexity", "retrieval", "noise", "attention", "harness")


def make_results(*, names=MODELS, tasks=TASKS, runs=2):
    """Return results as `evaluate` passes them to `write_report`."""
    entries = [(name, measurements(place, run, tasks=tasks)) for place, name in enumerate(names) for run in range(runs)]
    scores = summarize(entries, seeds=[run for _ in names for run in range(runs)])
    return {
        "format_version": 1,
        "command": "ropepp-lit evaluate runs/rope/checkpoints/last.ckpt runs/ec/checkpoints/last.ckpt --out runs/page",
        "date": "2026-11-24T15:00:00+00:00",
        "versions": {"ropepp-lit": "0.1.0", "python": "3.12.3", "torch": "2.14.1", "numpy": "2.4.6"},
        "machine": {"device": "cpu", "cores": 2, "cpu": "x86_64"},
        "settings": {"tasks": list(tasks), "lengths": list(LENGTHS), "limit": 24, "seed": 0, "text": "builtin"},
        "notices": [],
        "models": [
            {
                "name": name, "path": f"runs/{place}-{run}/checkpoints/last.ckpt",
                "fingerprint": "sha256:" + hashlib.sha256(repr((name, run)).encode()).hexdigest(),
                "positions": f"{name}, base 10000", "parameters": 5310720, "context_length": 256, "tokens_seen": 819200,
                "kv_cache_bytes_per_token": 1024 if place == 1 else 2048, "seconds": 12.3,
            }
            for place, name in enumerate(names) for run in range(runs)
        ],
        "scores": scores,
    }  # fmt: skip


def answers():
    """Yield lines of answers.jsonl, of two runs per model; examples 3 to 5 of `single` are wrong at 1,024 tokens."""
    for place, name in enumerate(MODELS):
        for run, length in itertools.product(range(2), (256, 1024, 2048)):
            for number in range(8):
                is_right = length == 256 or (length == 1024 and number not in (3, 4, 5) and run == 0)
                yield {
                    "model": name, "path": f"runs/{place}-{run}/checkpoints/last.ckpt", "task": "retrieval",
                    "part": "single", "length": length, "heads": "", "noise_std": None, "depth": 0.5, "number": number,
                    "prompt": f"{'far ' * 100}<b>key {number}</b>\n &amp; its value:", "expected": f"{number}0.",
                    "written": f" {number}0." if is_right else "<script>alert(1)</script>", "score": float(is_right),
                }  # fmt: skip


@pytest.fixture(scope="session")
def make():
    return make_results


@pytest.fixture(scope="session")
def results():
    return make_results()


@pytest.fixture(scope="session")
def folder(results, tmp_path_factory):
    """Folder of a report of all tasks, which also has an attention map."""
    folder = tmp_path_factory.mktemp("report")
    figure = Figure(figsize=(3, 3))
    figure.subplots().imshow(np.tril(np.ones((16, 16))))
    figure.savefig(folder / "attention-RoPE-layer-0.png")
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers()))
    write_report(results, folder)
    return folder
