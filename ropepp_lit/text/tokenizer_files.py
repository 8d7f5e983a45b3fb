"""Tokenizers in the files of Hugging Face: read as transformers reads them; no code of a folder runs."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, processors

from ropepp_lit.errors import UsageError
from ropepp_lit.files import read_text, refuse_pointer
from ropepp_lit.json_files import read_json

TOKENIZER, SETTINGS, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
CONFIG, GENERATION, TEMPLATE = "config.json", "generation_config.json", "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates that are not the default one, as NAME.jinja."""

VOCABULARIES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
"""Files from which transformers makes a tokenizer where there is no tokenizer.json."""

FILES = (TOKENIZER, SETTINGS, SPECIAL_TOKENS, CONFIG, GENERATION, TEMPLATE, *VOCABULARIES)
"""Every file of a folder that a tokenizer depends on."""

PROBE = "a fox: def f(x):\n    return 漢字 + 4096  # naïve"


MOST_TOKENS = 2**24
"""No vocabulary has as many."""


class Loaded(NamedTuple):
    """A tokenizer, and what the files beside it say."""

    tokenizer: Tokenizer
    bos_token_id: int | None
    eos_token_id: int | None
    settings: dict[str, Any] | None
    """tokenizer_config.json, with special_tokens_map.json and the files of chat templates merged into it."""
    generation_config: str | None
    """generation_config.json."""


def load(path: Path) -> Loaded | None:
    """The tokenizer of a folder in Hugging Face's format, or of a tokenizer.json; a file is read with its neighbours.

    Args:
        path: A folder, or a file.

    Returns:
        The tokenizer; None where the folder has no file of one, or there is no such path.

    Raises:
        UsageError: a file is damaged, a git-lfs pointer, or not a tokenizer that can be read.
    """
    folder, file = (path, path / TOKENIZER) if path.is_dir() else (path.parent, path)
    if path.is_dir() and not any((folder / name).is_file() for name in (TOKENIZER, *VOCABULARIES)):
        return None
    if not path.exists():
        return None
    for name in {file.name, *FILES}:
        refuse_pointer(folder / name)
    settings = _read_settings(folder)
    generation = _read_json(folder / GENERATION)
    tokenizer, names = _read(folder, file, settings)
    bos, eos = (tokenizer.token_to_id(name) if name is not None else None for name in names)
    return Loaded(
        tokenizer,
        bos,
        _eos_of_config(folder, tokenizer) if eos is None else eos,
        settings,
        None if generation is None else json.dumps(generation),
    )


def fetch(name: str) -> Path:
    """A tokenizer's files from the Hugging Face Hub, or from its cache on this machine.

    Raises:
        UsageError: they are neither there nor here.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, f"{MORE_TEMPLATES}/*.jinja"]))
    except Exception as error:  # httpx's, and the Hub's own
        raise UsageError(
            f"tokenizer: {name}: neither here nor to be had from the Hugging Face Hub ({type(error).__name__}); "
            "check the name and the connection"
        ) from error


def exact(tokenizer: Tokenizer) -> Tokenizer:
    """Switch off truncation and padding, which tools for fine-tuning save in tokenizer.json, and BPE dropout."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):  # of BPE: merges are left out at random, anew in each call
        tokenizer.model.dropout = None
    return tokenizer


@contextmanager
def encoding_errors() -> Iterator[None]:
    """Report a text that the tokenizer cannot encode in one line.

    Raises:
        UsageError: instead of the tokenizer's error, such as that of a vocabulary without a token for unknown words.
    """
    try:
        yield
    except TypeError as error:  # half of a surrogate pair: a byte of a command line, or an escape in JSON
        raise UsageError("a text is not UTF-8; correct it") from error
    except BaseException as error:
        if not _is_of_tokenizers(error):
            raise
        raise UsageError(f"tokenizer: it cannot encode a text ({_line(error)}); name another tokenizer") from error


def parse(text: str, name: object) -> Tokenizer:
    """The tokenizer of a tokenizer.json's content, made :func:`exact`.

    Args:
        text: The content.
        name: What messages call it.

    Raises:
        UsageError: it is not one.
    """
    try:
        tokenizer = exact(Tokenizer.from_str(text))
    except BaseException as error:
        if not _is_of_tokenizers(error):
            raise
        raise UsageError(f"tokenizer: {name}: not a tokenizer ({_line(error)})") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= MOST_TOKENS:  # writing it would take a line for each number below
        raise UsageError(f"tokenizer: {name}: not a tokenizer (a token has the id {largest:,})")
    return tokenizer


def _is_of_tokenizers(error: BaseException) -> bool:
    """Whether the library tokenizers may have raised an error: a bare Exception, or a panic, a BaseException."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def added_around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids that the tokenizer's post-processor puts before and behind a text."""
    with encoding_errors():
        body = tokenizer.encode("a", add_special_tokens=False).ids
        whole = tokenizer.encode("a", add_special_tokens=True)
    before = next((place for place, added in enumerate(whole.special_tokens_mask) if not added), len(whole.ids))
    for start in (before, *range(len(whole.ids) - len(body) + 1)):
        if whole.ids[start : start + len(body)] == body:
            return tuple(whole.ids[:start]), tuple(whole.ids[start + len(body) :])
    raise UsageError("tokenizer: its post_processor changes the tokens of a text, which is not supported")


def processor_around(
    tokenizer: Tokenizer, opening: Sequence[int], closing: Sequence[int] = ()
) -> processors.PostProcessor:
    """A post-processor that puts tokens before and behind every text."""
    before, behind = ([tokenizer.id_to_token(token) for token in ids] for ids in (opening, closing))
    single = [*before, "$A", *behind]
    return processors.TemplateProcessing(
        single=single,
        pair=[*single, *before, "$B:1", *behind],
        special_tokens=[(tokenizer.id_to_token(token), token) for token in {*opening, *closing}],
    )


def stop_ids(tokenizer: Tokenizer, generation_config: str | None) -> frozenset[int]:
    """The ids of generation_config.json's `eos_token_id` that the tokenizer has."""
    found = json.loads(generation_config).get("eos_token_id") if generation_config else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    ids = [token for token in ids if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**32]
    return frozenset(token for token in ids if tokenizer.id_to_token(token) is not None)


def _read(folder: Path, file: Path, settings: dict[str, Any] | None) -> tuple[Tokenizer, tuple[str | None, str | None]]:
    """The tokenizer, and the names of its special tokens: as transformers reads the folder."""
    alone = _read_file(file) if file.is_file() else None
    if alone is not None and settings is None and not (folder / CONFIG).is_file():
        return alone, (None, None)
    if alone is not None and file.name != TOKENIZER:
        return alone, _names(settings)
    from transformers import AutoTokenizer

    try:
        with _no_warnings_of_config():
            loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer = exact(Tokenizer.from_str(loaded.backend_tokenizer.to_str()))
    except BaseException as error:  # whatever the tokenizer's class raises
        if not _is_of_tokenizers(error):
            raise
        if alone is not None:
            _notice(f"{folder}: transformers cannot load this tokenizer ({_line(error)}); {TOKENIZER} is used alone")
            return alone, _names(settings)
        raise UsageError(f"tokenizer: {folder}: {_line(error)}") from error
    if alone is not None:
        with encoding_errors():
            ids, others = (found.encode(PROBE, add_special_tokens=False).ids for found in (alone, tokenizer))
        if ids != others:
            kind = type(loaded).__name__
            _notice(f"{folder}: transformers' {kind} splits text in another way than {TOKENIZER}; it is used as there")
    return tokenizer, (loaded.bos_token, loaded.eos_token)


@contextmanager
def _no_warnings_of_config() -> Iterator[None]:
    """Keep transformers from warnings of config.json, of which a tokenizer needs the model's type alone."""
    logger = logging.getLogger("transformers.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        logger.setLevel(level)


def _read_file(path: Path) -> Tokenizer:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"tokenizer: {path}: not a tokenizer ({_line(error)})") from error
    return parse(text, path)


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write tokenizer_config.json, and its chat templates as files of their own, as transformers does.

    A template keeps its bytes, line ends included. Templates with names that no file can have stay in the JSON, where
    transformers reads them too.

    Args:
        folder: Of the tokenizer.
        settings: See :class:`Loaded`.
    """
    templates = _by_name(settings.get("chat_template"))
    if templates and all(re.fullmatch(r"\w[\w.-]*", name) for name in templates):
        settings = {key: value for key, value in settings.items() if key != "chat_template"}
        for name, text in templates.items():
            path = folder / TEMPLATE if name == "default" else folder / MORE_TEMPLATES / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode())
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _by_name(found: Any) -> dict[str, str]:
    """Chat templates of tokenizer_config.json by name; empty where there is none that can be read."""
    if isinstance(found, str):
        return {"default": found}
    try:
        return {str(item["name"]): str(item["template"]) for item in found or []}
    except (TypeError, KeyError):
        return {}


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """tokenizer_config.json; what it does not name, special_tokens_map.json does. Files of chat templates win."""
    found = [_read_json(folder / name) for name in (SPECIAL_TOKENS, SETTINGS)]
    files = {"default": folder / TEMPLATE} if (folder / TEMPLATE).is_file() else {}
    more = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    files |= {path.stem: path for path in more if path.is_file()}
    templates = {name: _read_exactly(path) for name, path in files.items()}
    if found == [None, None] and not templates:
        return None
    special, settings = found
    merged = {**(special or {}), **{key: value for key, value in (settings or {}).items() if value is not None}}
    merged = {**dict.fromkeys(settings or {}), **merged}
    if templates.keys() == {"default"}:
        merged["chat_template"] = templates["default"]
    elif templates:
        merged["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return merged


def _read_exactly(path: Path) -> str:
    """The text of a file with its line ends as they are.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not JSON ({_line(error)})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: not a JSON object")
    return values


def _names(settings: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """BOS and EOS by name."""
    settings = settings or {}
    return content_of(settings.get("bos_token")), content_of(settings.get("eos_token"))


def content_of(token: Any) -> str | None:
    """A token of tokenizer_config.json, where it is text or a description; None where it is neither."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _eos_of_config(folder: Path, tokenizer: Tokenizer) -> int | None:
    """config.json's id, where the tokenizer has that token and it is special: the file names ids whatever there is."""
    named: Any = (_read_json(folder / CONFIG) or {}).get("eos_token_id")
    found: Any = named[0] if isinstance(named, list) and named else named
    added = tokenizer.get_added_tokens_decoder().get(found) if isinstance(found, int) else None
    return found if added is not None and added.special else None


def _notice(text: str) -> None:
    print(f"Notice: {text}", file=sys.stderr)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
