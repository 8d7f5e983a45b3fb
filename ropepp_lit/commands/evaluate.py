"""`ropepp-lit evaluate`: checkpoints are measured at length, and a page says what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ropepp_lit.arguments import call

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ropepp_lit.eval.models import Model
    from ropepp_lit.eval.results import Measurement
    from ropepp_lit.eval.tasks import Settings
    from ropepp_lit.text.sources import Record


def evaluate(
    *checkpoints: str,
    tasks: str = "perplexity,retrieval",
    lengths: str = "512,1k,2k",
    out: str,
    text: str | None = None,
    min_tokens: int = 0,
    limit: int | None = None,
    stride: int | None = None,
    noise_std: str = "0,0.5,1,2",
    seed: int = 0,
    dtype: str = "float32",
    trust: str | None = None,
    num_fewshot: int | None = None,
    include_path: str | None = None,
    apply_chat_template: bool = False,
    max_length: int | None = None,
) -> None:
    """Measure checkpoints at several lengths: tables, plots and a page to read. Stopped, the same command goes on.

    Args:
        checkpoints: .ckpt files, Hugging Face folders or names on the Hugging Face Hub, each PATH or NAME=PATH; those
            of one name are runs (seeds) of one model. Differences are to the first.
        tasks: Of perplexity, retrieval (or some families: retrieval:single+multikey), noise (on perplexity and
            retrieval; noise:retrieval:single), attention and harness:NAME (a task of lm-eval), with commas.
        lengths: Tokens of the context, with commas; k is 1,024.
        out: The folder that is written: index.html, results.json, scores.csv, plots, TensorBoard's events.
        text: Documents for perplexity and attention: files, folders, globs, with commas, as for prepare; empty means
            the documents that the first checkpoint's run held out.
        min_tokens: Leave out documents of fewer tokens (of the first model).
        limit: Documents, examples of each family, and examples of each harness task (and length); empty means 50, and
            all examples of a harness task.
        stride: Tokens from one window of perplexity to the next; empty means that windows don't overlap.
        noise_std: Standard deviations of the noise on scores, with commas.
        seed: Of examples and noise.
        dtype: float32 or bfloat16, of weights and arithmetic.
        trust: `module.Class` of a position scheme of your own that a checkpoint was made with and may be imported.
        num_fewshot: Examples in the prompts of harness tasks; empty means each task's own number.
        include_path: A folder with lm-eval tasks (YAML) of your own for harness:NAME.
        apply_chat_template: Put the prompts of harness tasks into the tokenizer's chat template.
        max_length: Tokens of prompt and answer that harness tasks read at most; empty means the trained context. What
            is longer loses its beginning, and is reported.
    """
    from pathlib import Path

    from ropepp_lit.errors import UsageError
    from ropepp_lit.sizes import parse_tokens

    if not checkpoints:
        raise UsageError("checkpoints: name at least one .ckpt file or Hugging Face folder")
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"dtype: {dtype!r} must be float32 or bfloat16")
    try:
        deviations = tuple(float(word) for word in noise_std.split(","))
    except ValueError as error:
        raise UsageError(f"noise_std: {noise_std!r} must be numbers with commas, such as 0,0.5,1") from error
    sizes = tuple(parse_tokens("lengths", lengths))
    folder = Path(out)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "parts").is_dir()):
        raise UsageError(f"out: {out} holds something else than an evaluation; name an empty or a new folder")

    import torch  # heavy imports wait until the arguments are known to be right

    from ropepp_lit.eval.harness import Options
    from ropepp_lit.eval.models import load_model
    from ropepp_lit.eval.tasks import Settings

    torch.set_flush_denormal(True)  # far keys may get weights near 1e-40, on which CPUs are slow
    options_of_harness = Options(
        num_fewshot=num_fewshot, include_path=include_path, apply_chat_template=apply_chat_template,
        max_length=max_length,
    )  # fmt: skip
    settings = Settings(
        tasks=tuple(word.strip() for word in tasks.split(",") if word.strip()),
        lengths=sizes, limit=limit, stride=stride, noise_std=deviations, seed=seed, options=options_of_harness,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device, "trust": trust}
    first = load_model(checkpoints[0], **options)
    texts = _read_texts(first, text, min_tokens, settings.examples) if settings.needs_text else []
    for old in folder.glob("attention-*.png"):
        old.unlink()  # maps of models that may not be asked for now; theirs are kept in parts
    runs, descriptions = [], []
    for number, checkpoint in enumerate(checkpoints):
        model = first if number == 0 else load_model(checkpoint, **options)
        measurements, seconds = _measure(model, settings, texts, folder, dtype)
        runs.append((model.name, measurements))
        descriptions.append({**model.describe(), "seconds": round(seconds, 1)})
    said = {
        "tasks": list(settings.tasks), "lengths": list(sizes), "text": text or "held-out documents of the first run",
        "documents": len(texts), "min_tokens": min_tokens, "limit": limit, "stride": stride,
        "noise_std": list(deviations), "seed": seed, "dtype": dtype,
    }  # fmt: skip
    _write(folder, runs, descriptions, said)
    print(f"\nEverything is in {out}; read {folder / 'index.html'}")


def _read_texts(model: Model, text: str | None, min_tokens: int, limit: int) -> list[str]:
    """Documents given as sources, or held out by the run that made the checkpoint."""
    from ropepp_lit.data.held_out import data_of_run
    from ropepp_lit.errors import UsageError
    from ropepp_lit.text.sources import Reader, find_files

    documents: Iterable[str]
    if text is not None:
        documents = (_text_of(record) for _, record in Reader(find_files(text.split(","), key="text")))
    else:
        data = data_of_run(model.path, model.entry)
        for line in data.notices:
            print(line)
        documents = data.held_out_texts(limit, min_tokens=min_tokens)
    chosen: list[str] = []
    for document in documents:
        if document.strip() and len(model.encode(document)) >= min_tokens:
            chosen.append(document)
        if len(chosen) == limit:
            break
    if not chosen:
        said = f" of {min_tokens:,} tokens or more" if min_tokens else ""
        raise UsageError(f"text: {text or 'the held-out text'} holds no document{said}")
    return chosen


def _text_of(record: Record) -> str:
    from ropepp_lit.errors import UsageError

    if record.text is None:
        raise UsageError(f"text: {record.where}: {record.problem}; mend it, or leave it out")
    return record.text


def _measure(
    model: Model, settings: Settings, texts: list[str], folder: Path, dtype: str
) -> tuple[list[Measurement], float]:
    """All measurements of a model, taking up what an earlier run of the command has kept; and seconds of the others."""
    import hashlib
    import json
    import re
    import shutil
    import time

    from tqdm import tqdm

    from ropepp_lit.eval import probes
    from ropepp_lit.eval.results import Measurement
    from ropepp_lit.eval.tasks import averages, check, measure, work_of
    from ropepp_lit.files import write_whole

    texts_digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    num_tokens = [len(model.tokenizer.encode_whole(text)) for text in texts]
    units = settings.units(model)
    check(model, units, settings, num_tokens)
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    found: list[Measurement] = []
    seconds = 0.0
    work = {unit: work_of(unit, settings, num_tokens) for unit in units}
    with tqdm(total=sum(work.values()), unit=" tokens", unit_scale=True, desc=model.name) as bar:
        for unit in units:
            bar.set_postfix_str(str(unit))
            key = {
                "model": model.fingerprint, "unit": list(unit), "stride": settings.stride,
                "seed": settings.seed, "dtype": dtype, "lengths": settings.lengths if unit.task == "harness" else None,
                "limit": settings.limit if unit.task == "harness" else settings.examples,
                "harness": settings.options.identity() if unit.task == "harness" else None,
                "texts": texts_digest if unit.task in ("perplexity", "attention") else None,
            }  # fmt: skip
            part = folder / "parts" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
            before = bar.n
            if part.is_file():
                kept = json.loads(part.read_text(encoding="utf-8"))
            else:
                started = time.monotonic()
                measured, maps = measure(model, unit, settings, texts, progress=bar.update)
                kept = {
                    "key": key,
                    "seconds": time.monotonic() - started,
                    "measurements": [item.to_dict() for item in measured],
                }
                if maps is not None:
                    title = f"{model.name}, {unit.length:,} tokens"
                    figure = probes.draw_maps(maps, probes.groups_of(model), title)
                    figure.savefig(part.with_suffix(".png"), dpi=110)
                write_whole(part, json.dumps(kept))
            if part.with_suffix(".png").is_file():
                name = re.sub(r"\W+", "-", f"attention-{model.name}-{unit.length}").lower()
                shutil.copy(part.with_suffix(".png"), folder / f"{name}.png")
            bar.update(before + work[unit] - bar.n)
            seconds += kept["seconds"]
            found += [Measurement(**values) for values in kept["measurements"]]
    return [*found, *averages(found)], seconds


def _write(
    folder: Path,
    runs: list[tuple[str, list[Measurement]]],
    models: list[dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    """Write results.json, scores.csv, plots, TensorBoard's events and the page."""
    import datetime
    import os
    import platform
    import shlex
    import sys
    from importlib.metadata import version

    import torch

    from ropepp_lit.eval.report import write_report
    from ropepp_lit.eval.results import summarize

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    packages = ("ropepp-lit", "torch", "tokenizers", "transformers")
    write_report(
        {
            "format_version": 1,
            "command": shlex.join(["ropepp-lit", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "machine": {"device": device, "cores": os.cpu_count(), "cpu": platform.processor() or platform.machine()},
            "settings": settings,
            "models": models,
            "scores": summarize(runs),
        },
        folder,
    )


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    call(evaluate, arguments)
