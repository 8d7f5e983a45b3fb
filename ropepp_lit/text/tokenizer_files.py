"""Load Hugging Face tokenizer files as transformers does, without running code from their folder."""

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
"""Folder of the chat templates other than the default one, as NAME.jinja."""

VOCABULARIES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
"""Files from which transformers builds a tokenizer if there is no tokenizer.json."""

FILES = (TOKENIZER, SETTINGS, SPECIAL_TOKENS, CONFIG, GENERATION, TEMPLATE, *VOCABULARIES)
"""All files of a folder that a tokenizer depends on."""

PROBE = "a fox: def f(x):\n    return 漢字 + 4096  # naïve"
"""Text for comparing tokenizers."""

MAX_TOKENS = 2**24
"""Upper bound of plausible token ids."""


class LoadedTokenizer(NamedTuple):
    """A tokenizer, and the values of the files next to it."""

    tokenizer: Tokenizer
    bos_token_id: int | None
    eos_token_id: int | None
    settings: dict[str, Any] | None
    """Values of tokenizer_config.json merged with special_tokens_map.json and the chat template files."""
    generation_config: str | None
    """Content of generation_config.json (JSON)."""


def load(path: Path) -> LoadedTokenizer | None:
    """Load the tokenizer of a folder in Hugging Face's format, or of a tokenizer.json and the files next to it.

    Args:
        path: Folder or file.

    Returns:
        The tokenizer; None if the folder has no tokenizer files, or the path does not exist.

    Raises:
        UsageError: A file is damaged, a git-lfs pointer, or not a readable tokenizer.
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
    return LoadedTokenizer(
        tokenizer,
        bos,
        _eos_of_config(folder, tokenizer) if eos is None else eos,
        settings,
        None if generation is None else json.dumps(generation),
    )


def fetch(name: str) -> Path:
    """Fetch a tokenizer's files from the Hugging Face Hub, or from its local cache, and return their folder.

    Raises:
        UsageError: The files are in neither.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, f"{MORE_TEMPLATES}/*.jinja"]))
    except Exception as error:  # errors of httpx and huggingface_hub
        raise UsageError(
            f"tokenizer: {name}: not found locally or on the Hugging Face Hub ({type(error).__name__}); "
            "check the name and the connection"
        ) from error


def make_deterministic(tokenizer: Tokenizer) -> Tokenizer:
    """Disable truncation and padding, which fine-tuning tools save in tokenizer.json, and BPE dropout."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):  # BPE dropout: each call skips random merges
        tokenizer.model.dropout = None
    return tokenizer


@contextmanager
def encoding_errors() -> Iterator[None]:
    """Convert errors of encoding to UsageError.

    Raises:
        UsageError: The tokenizer cannot encode a text, for example because it has no token for unknown words.
    """
    try:
        yield
    except TypeError as error:  # a lone surrogate: a byte of a command line, or an escape in JSON
        raise UsageError("a text is not UTF-8; correct it") from error
    except BaseException as error:
        if not _is_tokenizer_error(error):
            raise
        raise UsageError(f"tokenizer: it cannot encode a text ({_line(error)}); use another tokenizer") from error


def parse(text: str, name: object) -> Tokenizer:
    """Parse the content of a tokenizer.json, and apply :func:`make_deterministic`.

    Args:
        text: Content of the file.
        name: Name of the file in messages.

    Raises:
        UsageError: The content is not a tokenizer.
    """
    try:
        tokenizer = make_deterministic(Tokenizer.from_str(text))
    except BaseException as error:
        if not _is_tokenizer_error(error):
            raise
        raise UsageError(f"tokenizer: {name}: not a tokenizer ({_line(error)})") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= MAX_TOKENS:  # writing it would take one line per smaller id
        raise UsageError(f"tokenizer: {name}: not a tokenizer (a token has the id {largest:,})")
    return tokenizer


def _is_tokenizer_error(error: BaseException) -> bool:
    """Return whether an error can come from the library tokenizers: an Exception, or a panic (a BaseException)."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def added_around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids that the tokenizer's post-processor adds before and after a text."""
    with encoding_errors():
        body = tokenizer.encode("a", add_special_tokens=False).ids
        full = tokenizer.encode("a", add_special_tokens=True)
    before = next((index for index, is_added in enumerate(full.special_tokens_mask) if not is_added), len(full.ids))
    for start in (before, *range(len(full.ids) - len(body) + 1)):
        if full.ids[start : start + len(body)] == body:
            return tuple(full.ids[:start]), tuple(full.ids[start + len(body) :])
    raise UsageError("tokenizer: its post_processor changes the tokens of a text, which is not supported")


def processor_around(
    tokenizer: Tokenizer, opening: Sequence[int], closing: Sequence[int] = ()
) -> processors.PostProcessor:
    """Create a post-processor that adds tokens before and after every text."""
    before, after = ([tokenizer.id_to_token(token) for token in ids] for ids in (opening, closing))
    single = [*before, "$A", *after]
    return processors.TemplateProcessing(
        single=single,
        pair=[*single, *before, "$B:1", *after],
        special_tokens=[(tokenizer.id_to_token(token), token) for token in {*opening, *closing}],
    )


def stop_ids(tokenizer: Tokenizer, generation_config: str | None) -> frozenset[int]:
    """Return the ids in generation_config.json's `eos_token_id` that are in the tokenizer's vocabulary."""
    value = json.loads(generation_config).get("eos_token_id") if generation_config else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    ids = [token for token in ids if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**32]
    return frozenset(token for token in ids if tokenizer.id_to_token(token) is not None)


def _read(folder: Path, file: Path, settings: dict[str, Any] | None) -> tuple[Tokenizer, tuple[str | None, str | None]]:
    """Read the tokenizer, and its BOS and EOS tokens, as transformers reads the folder."""
    alone = _read_file(file) if file.is_file() else None
    if alone is not None and settings is None and not (folder / CONFIG).is_file():
        return alone, (None, None)
    if alone is not None and file.name != TOKENIZER:
        return alone, _names(settings)
    from transformers import AutoTokenizer

    try:
        with _no_warnings_of_config():
            loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer = make_deterministic(Tokenizer.from_str(loaded.backend_tokenizer.to_str()))
    except BaseException as error:  # the tokenizer's class can raise anything
        if not _is_tokenizer_error(error):
            raise
        if alone is not None:
            _notice(f"{folder}: transformers cannot load this tokenizer ({_line(error)}); only {TOKENIZER} is used")
            return alone, _names(settings)
        raise UsageError(f"tokenizer: {folder}: {_line(error)}") from error
    if alone is not None:
        with encoding_errors():
            ids, others = (each.encode(PROBE, add_special_tokens=False).ids for each in (alone, tokenizer))
        if ids != others:
            name = type(loaded).__name__
            _notice(f"{folder}: transformers' {name} splits text differently from {TOKENIZER}; the former is used")
    return tokenizer, (loaded.bos_token, loaded.eos_token)


@contextmanager
def _no_warnings_of_config() -> Iterator[None]:
    """Suppress transformers' warnings about config.json; a tokenizer only requires its model type."""
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
    """Write tokenizer_config.json, and its chat templates as separate files, as transformers does.

    Templates are written byte for byte, including line ends. If a name is not a valid file name, all templates stay in
    the JSON, where transformers reads them too.

    Args:
        folder: Folder of the tokenizer.
        settings: See :class:`LoadedTokenizer`.
    """
    templates = _templates_by_name(settings.get("chat_template"))
    if templates and all(re.fullmatch(r"\w[\w.-]*", name) for name in templates):
        settings = {key: value for key, value in settings.items() if key != "chat_template"}
        for name, text in templates.items():
            path = folder / TEMPLATE if name == "default" else folder / MORE_TEMPLATES / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode())
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _templates_by_name(value: Any) -> dict[str, str]:
    """Return the chat templates of tokenizer_config.json by name; empty if there are none or they are malformed."""
    if isinstance(value, str):
        return {"default": value}
    try:
        return {str(item["name"]): str(item["template"]) for item in value or []}
    except (TypeError, KeyError):
        return {}


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """Read tokenizer_config.json, with defaults from special_tokens_map.json. Chat template files take precedence."""
    special, settings = (_read_json(folder / name) for name in (SPECIAL_TOKENS, SETTINGS))
    files = {"default": folder / TEMPLATE} if (folder / TEMPLATE).is_file() else {}
    more = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    files |= {path.stem: path for path in more if path.is_file()}
    templates = {name: _read_exactly(path) for name, path in files.items()}
    if special is None and settings is None and not templates:
        return None
    merged = {**(special or {}), **{key: value for key, value in (settings or {}).items() if value is not None}}
    merged = {**dict.fromkeys(settings or {}), **merged}
    if templates.keys() == {"default"}:
        merged["chat_template"] = templates["default"]
    elif templates:
        merged["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return merged


def _read_exactly(path: Path) -> str:
    """Read a text file without converting line ends.

    Raises:
        UsageError: The file is not UTF-8.
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
    """Return the BOS and EOS tokens of tokenizer_config.json."""
    settings = settings or {}
    return content_of(settings.get("bos_token")), content_of(settings.get("eos_token"))


def content_of(token: Any) -> str | None:
    """Return a token of tokenizer_config.json, a string or an object with `content`; None for other values."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _eos_of_config(folder: Path, tokenizer: Tokenizer) -> int | None:
    """Return config.json's EOS id if it is a special token of the tokenizer; the file can have ids that are not."""
    ids: Any = (_read_json(folder / CONFIG) or {}).get("eos_token_id")
    token_id: Any = ids[0] if isinstance(ids, list) and ids else ids
    added = tokenizer.get_added_tokens_decoder().get(token_id) if isinstance(token_id, int) else None
    return token_id if added is not None and added.special else None


def _notice(text: str) -> None:
    print(f"Notice: {text}", file=sys.stderr)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
