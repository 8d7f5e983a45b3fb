"""Command lines from functions: the signature defines the arguments, the docstring the help."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from pydoc import locate
from typing import Any, Literal, NoReturn

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from ropepp_lit.errors import DISK_ERRORS, EXIT_CODES, UsageError, did_you_mean
from ropepp_lit.files import local_path, nearest_file, system_error
from ropepp_lit.terminal import output

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
    """Mixin for parsers: a mistake becomes a UsageError with the nearest option or choice; exit codes in the help."""

    def format_help(self, *args: Any) -> str:
        """Append the exit codes, which are the same for all subcommands."""
        return f"{super().format_help(*args)}\n{EXIT_CODES}"  # type: ignore[misc]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UsageError with a message of one line."""
        if not self.exit_on_error:  # type: ignore[attr-defined]
            super().error(message, ex)  # type: ignore[misc]
        raise UsageError(_condensed(message) + _suggestion(self, message)) from ex


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


_UNKNOWN = re.compile(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'")
_UNKNOWN_OF_CLASS = re.compile(r"class_path '([\w.]+)': Option '(\w+)' is not accepted")
_NO_FILE = re.compile(r"File does not exist: '(.*)'")


def _suggestion(parser: Any, message: str) -> str:
    """Name the option, choice or file nearest to the rejected one, as the end of a parser's message."""
    message = " ".join(_condensed(message).split())
    if found := _UNKNOWN_OF_CLASS.search(message):
        with suppress(TypeError, ValueError):  # a class without a signature
            return did_you_mean(found[2], inspect.signature(locate(found[1])).parameters)  # type: ignore[arg-type]
    if found := _UNKNOWN.search(message):
        return did_you_mean(found[1] or found[2], _option_names(parser))
    if found := _NO_FILE.search(message):
        return nearest_file(Path(found[1]))
    choices = [
        choice for literal in re.findall(r"Literal\[(.*?)\]", message) for choice in re.findall(r"'(.*?)'", literal)
    ]
    found = re.search(r"Got value: (\S+)$", message)
    return did_you_mean(found[1], choices) if found else ""


def _option_names(parser: Any) -> set[str]:
    """Return the names of the options of a parser and its subcommands, without dashes."""
    names = {name.lstrip("-") for action in parser._actions for name in action.option_strings}
    subcommands = getattr(parser, "_subcommands_action", None)
    for subparser in subcommands._name_parser_map.values() if subcommands else ():
        names |= _option_names(subparser)
    return names


class _Parser(OneLineErrors, ArgumentParser):
    pass


_FLAGS = {
    "json": "Print the result as one line of JSON to stdout, and everything else to stderr.",
    "quiet": "Print errors and warnings only, and draw no progress bars.",
}
"""Options of several subcommands, by name, and their help."""


def call(
    function: Callable[..., Any], arguments: list[str], *, flags: tuple[Literal["json", "quiet"], ...] = ()
) -> None:
    """Parse a command line by a function's signature, and call the function.

    Args:
        function: Arguments without a default are positional, the others are options; `*names` takes any number of
            words. An argument before `*` that has a default is an optional positional.
        arguments: The subcommand's name and its options.
        flags: Options of :data:`_FLAGS` that the subcommand has too. With `json`, the function returns the result.

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
    for name in flags:
        parser.add_argument(f"--{name}", action="store_true", help=_FLAGS[name])
    values: dict[str, Any] = parser.parse_args(arguments[1:]).as_dict()
    as_json, quiet = (values.pop(name, False) for name in ("json", "quiet"))
    words = [word for name in many for word in values.pop(name)]
    check_given(arguments[1:], values)
    for name in ("out", "gguf", "adapter", "cache_dir"):
        if values.get(name) is not None:
            values[name] = local_path(name, values[name])
    try:
        with output(as_json=as_json, quiet=quiet) as print_result:
            print_result(function(*words, **values))
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
