"""Command lines from functions: the signature defines the arguments, the docstring the help."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from ropepp_lit.errors import DISK_ERRORS, UsageError
from ropepp_lit.files import local_path, system_error

_read_yaml = get_loader("yaml")


def _read_value(text: str, path: object = None) -> Any:
    """Parse a recipe, or a single value: a value that YAML parses as null, such as `~` or `# a`, is a string.

    The parser has already handled `null`. In a recipe, values that YAML parses as null are null.

    Args:
        text: The recipe or value.
        path: Path of a recipe; the parser does not pass it for a value.
    """
    value = _read_yaml(text)
    return text if value is None and path is None else value


set_loader("yaml", _read_value, exceptions=(yaml.YAMLError,))


class OneLineErrors:
    """Mixin for parsers that raises UsageError instead of printing the usage and exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UsageError with a message of one line."""
        if not self.exit_on_error:  # type: ignore[attr-defined]
            super().error(message, ex)  # type: ignore[misc]
        raise UsageError(_condensed(message)) from ex


_UNION = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes: .*?\s+Errors:\s+- (.*?)\s+"
    r"Given value type: \S+ \S+\s+Given value: (?:Namespace.*|NestedArg\(key='(\S+)', val=(.*)\)|(.*))",
    re.DOTALL,
)


def _condensed(message: str) -> str:
    """Shorten the parser's message about an optional value to the errors that matter."""
    while match := _UNION.search(message):
        errors = [" ".join(error.split()) for error in re.split(r"\n\s*- ", match[1])]
        errors = [error for error in errors if not re.fullmatch("Expected (a )?<class 'NoneType'>", error)]
        message = f"{message[: match.start()]}{'; or: '.join(errors)}"
        given = match[4] if match[2] is None else f"{match[2]} {match[3]}"
        if given is not None and not re.search("Got value|is not accepted", message):
            message += f". Got value: {given}"
    return message


class _Parser(OneLineErrors, ArgumentParser):
    pass


def call(function: Callable[..., None], arguments: list[str]) -> None:
    """Parse a command line by a function's signature, and call the function.

    Args:
        function: Arguments without a default are positional, the others are options; `*names` takes any number of
            words. An argument before `*` that has a default is an optional positional.
        arguments: The subcommand's name and its options.

    Raises:
        UsageError: an argument is missing, unknown or of the wrong type; `out`, `gguf`, `adapter` or `cache_dir` is a
            URL; the disk is full.
    """
    parser = _Parser(prog=f"ropepp-lit {arguments[0]}", description=(function.__doc__ or "").split("\n")[0])
    parameters = inspect.signature(function).parameters.values()
    many = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
    optional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty]
    documented = {p.arg_name: p.description for p in docstring_parser.parse(function.__doc__ or "").params}
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=set(optional))
    for name in optional:
        parser.add_argument(name, nargs="?", type=str, help=documented[name])
    for name in many:
        parser.add_argument(name, nargs="*", type=str, help=documented[name])
    values: dict[str, Any] = parser.parse_args(arguments[1:]).as_dict()
    words = [word for name in many for word in values.pop(name)]
    check_given(arguments[1:], values)
    for name in ("out", "gguf", "adapter", "cache_dir"):
        if values.get(name) is not None:
            values[name] = local_path(name, values[name])
    try:
        function(*words, **values)
    except UsageError:
        raise
    except Exception as error:
        refusal = system_error(error)
        remedy = None if refusal is None else DISK_ERRORS.get(refusal.errno or 0)
        if refusal is None or remedy is None:
            raise
        where = refusal.filename or values.get("out") or values.get("gguf") or "the disk"
        raise UsageError(
            f"{where}: cannot be written: {refusal.strerror}; {remedy} and run the command again"
        ) from error


def check_given(arguments: list[str], values: Any) -> None:
    """Refuse a value that the parser reads as null, such as `~` for a number.

    Args:
        arguments: The command line.
        values: The parsed values, a mapping or namespace.

    Raises:
        UsageError: an option is null, and its value on the command line is not `null`.
    """
    given = list(_given(arguments))
    for index, (name, text) in enumerate(given):
        later = {other for other, _ in given[index + 1 :]}
        is_overridden = "config" in later or any(f"{name}.".startswith(f"{other}.") for other in later)
        if text != "null" and not is_overridden and values.get(name, text) is None:
            raise UsageError(f"{name}: {text!r} is not a valid value; write null for none")


def _given(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Yield names and values of the options of a command line."""
    for index, word in enumerate(arguments):
        name, equals, text = word.removeprefix("--").partition("=")
        if word.startswith("--") and equals:
            yield name, text
        elif word.startswith("--") and index + 1 < len(arguments):
            yield name, arguments[index + 1]


def command(*words: object, **options: object) -> str:
    """Return a command line, quoted for a shell.

    Args:
        words: Positional arguments.
        options: Written as `--name value`, or as `--name=value` if the value would look like an option.
    """
    parts = []
    for word in map(str, words):
        parts.append(f"./{word}" if word.startswith("-") else word)
    for name, value in options.items():
        name, text = f"--{name.replace('__', '.')}", str(value)
        parts += [f"{name}={text}"] if text.startswith("-") else [name, text]
    return shlex.join(parts)
