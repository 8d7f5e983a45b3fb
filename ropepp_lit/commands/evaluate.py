"""`ropepp-lit evaluate`: evaluation of checkpoints at several context lengths, with a report page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ropepp_lit.arguments import call, command
from ropepp_lit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ropepp_lit.eval.models import Model
    from ropepp_lit.eval.results import Measurement
    from ropepp_lit.eval.texts import Texts


def evaluate(
    *checkpoints: str,
    tasks: str = "perplexity,retrieval",
    lengths: str = "512,1k,2k",
    out: str,
    text: str | None = None,
    text_key: str = "text",
    split: str | None = None,
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
) -> dict[str, Any]:
    """Evaluate checkpoints at several context lengths; writes tables, plots and a report page. Resumable.

    Args:
        checkpoints: .ckpt files, Hugging Face folders or names on the Hugging Face Hub, each as PATH or NAME=PATH;
            those with the same name are runs (seeds) of one model. Differences are relative to the first.
        tasks: Comma-separated tasks: perplexity, longppl (key tokens found by the first checkpoint; longppl:PATH),
            retrieval (or families of it: retrieval:single+multikey), ruler, recall (or numbers of pairs: recall:4+64),
            induction, graphwalks, mrcr, noise (on perplexity and retrieval; noise:retrieval:single), attention,
            answers:FILE (held-out prompts and answers, in the formats of prepare --format chat and completion),
            harness:NAME (a task of lm-eval) and module.Class (a custom task, in a file in the current folder).
        lengths: Comma-separated context lengths in tokens; k means 1,024.
        out: Output folder: index.html, results.json, scores.csv, answers.jsonl (outputs of the models), plots,
            TensorBoard events, and `parts` with the finished units of work. The same command resumes; concurrent
            processes of the same command, such as one per GPU, share the work.
        text: Documents for perplexity, longppl and attention, and essays for ruler: comma-separated files, folders or
            globs, as for prepare, each source reported separately; empty means the documents held out by the run of the
            first checkpoint. They are selected by a hash from the first 10,000 of each source.
        text_key: Key or column of the text in JSON and tables.
        split: Separator of documents in text files, as for prepare; empty means one document per file.
        min_tokens: Skip documents with fewer tokens (of the first model's tokenizer).
        limit: Maximum number of documents per source or held-out set, examples per family, prompts per file of answers,
            and examples per harness task (and length); empty means 50, and all examples of a harness task.
        stride: Tokens between the starts of perplexity windows; empty means windows that do not overlap.
        noise_std: Comma-separated standard deviations of the noise added to attention scores.
        seed: Seed of examples and noise.
        dtype: dtype of weights and computation: float32 or bfloat16.
        trust: `module.Class` of a custom position scheme that a checkpoint uses; it is imported only if named here.
        num_fewshot: Number of examples in the prompts of harness tasks; empty means the default of each task.
        include_path: Folder with custom lm-eval tasks (YAML) for harness:NAME.
        apply_chat_template: Apply the tokenizer's chat template to the prompts of harness tasks.
        max_length: Maximum number of tokens of prompt and answer in harness tasks; empty means the trained context.
            Longer inputs are truncated at their start, and counted in the report.

    Returns:
        Result that --json prints: an object with `out` (the folder), `notices` (a list of texts) and `scores` (a list
        of objects as in results.json, one for each model and measurement).
    """
    given = dict(locals())
    import functools
    from pathlib import Path

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
        raise UsageError(f"out: {out} is neither empty nor an evaluation; name an empty or new folder")

    import torch  # heavy imports follow the checks of the arguments

    from ropepp_lit.eval.harness import Options
    from ropepp_lit.eval.models import load_model
    from ropepp_lit.eval.pieces import Work
    from ropepp_lit.eval.report import folder_names
    from ropepp_lit.eval.results import summarize
    from ropepp_lit.eval.tasks import EvaluationSettings
    from ropepp_lit.eval.texts import notices_of, read_texts, seed_of
    from ropepp_lit.files import write_whole

    torch.set_flush_denormal(True)  # attention weights of distant keys can be near 1e-40, where CPUs are slow
    options_of_harness = Options(
        num_fewshot=num_fewshot, include_path=include_path, apply_chat_template=apply_chat_template,
        max_length=max_length,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device, "trust": trust}
    settings = EvaluationSettings(
        tasks=tuple(word.strip() for word in tasks.split(",") if word.strip()),
        lengths=sizes, limit=limit, stride=stride, noise_std=deviations, seed=seed, options=options_of_harness,
        has_essays=text is not None, checkpoint=checkpoints[0], load=functools.partial(load_model, **options),
    )  # fmt: skip
    models = [load_model(checkpoint, **options, weights=False) for checkpoint in checkpoints]
    _refuse_twice(models)
    texts: Texts = {}
    if settings.needs_text:
        reading = {"text_key": text_key, "split": split}
        texts, lines = read_texts(models[0], text, reading, min_tokens=min_tokens, limit=settings.examples)
        print("\n".join(lines), end="\n" if lines else "")

    def load(number: int) -> Model:
        model = load_model(checkpoints[number], **options)
        if model.fingerprint != models[number].fingerprint:
            raise UsageError(f"{model.path}: was changed after the evaluation began; run the command again")
        return model

    work = Work(models, load=load, settings=settings, sets=texts, folder=folder, dtype=dtype, device=device)
    work.measure()
    runs: list[tuple[str, list[Measurement]]] = []
    descriptions: list[dict[str, Any]] = []
    notices = dict.fromkeys(settings.notices)
    for number, model in enumerate(models):
        if texts:
            notices |= dict.fromkeys(notices_of(model.name, model.entry, models[0].entry, text))
        measurements, seconds = work.results(number)
        runs.append((model.name, measurements))
        descriptions.append({**model.describe(), "seconds": round(seconds, 1)})
    seeds = [seed_of(model.entry) for model in models]
    notices |= dict.fromkeys(_different_runs(descriptions))
    notices |= dict.fromkeys(_same_seeds([name for name, _ in runs], seeds))
    print("".join(f"\nNote: {line}" for line in notices))
    used_settings = {
        "tasks": list(settings.tasks), "lengths": list(sizes), "text": text or "held-out documents of the first run",
        "text_key": text_key, "split": split,
        "documents": sum(map(len, texts.values())), "sets": list(texts),
        "min_tokens": min_tokens, "limit": limit, "stride": stride,
        "noise_std": list(deviations), "seed": seed, "dtype": dtype,
    }  # fmt: skip
    about = [{"task": task.task, "part": task.part, "text": task.about} for task, _ in settings.parsed]
    scores = summarize(runs, seeds=seeds)
    with work.reporting():
        for old in folder.glob("attention-*.png"):
            old.unlink()  # maps of models that this command may not include
        names = list(dict.fromkeys(name for name, _ in runs))
        labels = dict(zip(names, folder_names(names), strict=True))
        for number, model in enumerate(models):
            for unit, image in work.images(number):
                write_whole(folder / f"attention-{labels[model.name]}-{unit.length}.png", image)
        work.write_answers()
        print("".join(_replaced(folder, used_settings, descriptions)), end="")
        _write(folder, _command(given), scores, descriptions, used_settings, list(notices), about)
    print(f"\nEverything is in {out}; read {folder / 'index.html'}")
    return {"out": out, "notices": list(notices), "scores": scores}


def _replaced(folder: Path, settings: dict[str, Any], models: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a notice if the folder's report has contents that the new one lacks; their units of work are kept."""
    from ropepp_lit.json_files import read_json

    if not (folder / "results.json").is_file():
        return
    named = [(model["name"], model["fingerprint"]) for model in models]
    try:
        old = read_json(folder / "results.json")
        gone = [f"the task {task}" for task in old["settings"]["tasks"] if task not in settings["tasks"]]
        gone += [f"{length:,} tokens" for length in old["settings"]["lengths"] if length not in settings["lengths"]]
        gone += [f"{model['name']} ({model['path']})" for model in old["models"]
                 if (model["name"], model["fingerprint"]) not in named]  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError):
        yield f"\nNote: {folder / 'results.json'} was damaged and is replaced."
        return
    if gone:
        yield f"\nNote: the report in {folder} also had {', '.join(gone)}, which this command does not name; it is "
        yield "replaced. All pieces are kept, so a command that names everything shows everything at once."


def _refuse_twice(models: list[Model]) -> None:
    known: dict[tuple[str, str], Model] = {}
    for model in models:
        first = known.setdefault((model.name, model.fingerprint), model)
        if first is not model:
            pair = f"{first.path} and {model.path}"
            raise UsageError(f"checkpoints: {pair} are the same run of {model.name}; name it once")


def _same_seeds(names: list[str], seeds: list[Any]) -> Iterator[str]:
    """Yield a line for each model with multiple runs of the same seed, which are not independent."""
    pairs = [pair for pair in zip(names, seeds, strict=True) if pair[1] is not None]
    for name, seed in dict.fromkeys(pair for pair in pairs if pairs.count(pair) > 1):
        count = pairs.count((name, seed))
        yield f"{count} runs of {name} have the seed {seed[0]}; intervals take them for independent."


def _different_runs(descriptions: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each name shared by models of different architectures, which count as runs of one model."""
    fields = ("positions", "parameters", "layers", "attention_heads", "key_value_heads")
    for name in dict.fromkeys(described["name"] for described in descriptions):
        same = [described for described in descriptions if described["name"] == name]
        if len({tuple(described[field] for field in fields) for described in same}) > 1:
            paths = " and ".join(described["path"] for described in same)
            yield f"{paths} are runs of {name} by their name, but differ in architecture; tell them apart by NAME=PATH."


def _command(given: dict[str, Any]) -> str:
    """Return the command line of a call, without options that have their default."""
    import inspect

    defaults = {name: parameter.default for name, parameter in inspect.signature(evaluate).parameters.items()}
    checkpoints = given.pop("checkpoints")
    options = {name: value for name, value in given.items() if value != defaults[name]}
    return command("ropepp-lit", "evaluate", *checkpoints, **options)


def _write(
    folder: Path,
    command_line: str,
    scores: list[dict[str, Any]],
    models: list[dict[str, Any]],
    settings: dict[str, Any],
    notices: list[str],
    about: list[dict[str, str]],
) -> None:
    """Write results.json, scores.csv, plots, TensorBoard events and the page."""
    import datetime
    import os
    import platform
    from importlib.metadata import version

    import torch

    from ropepp_lit.eval.report import write_report

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    packages = ("ropepp-lit", "torch", "tokenizers", "transformers")
    write_report(
        {
            "format_version": 1,
            "command": command_line,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "machine": {"device": device, "cores": os.cpu_count(), "cpu": platform.processor() or platform.machine()},
            "settings": settings,
            "models": models,
            "notices": notices,
            "about": about,
            "scores": scores,
        },
        folder,
    )


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    call(evaluate, arguments, flags=("json", "quiet"))
