"""Keys of a recipe that name a class, and checks of class names and null values.

jsonargparse reports an unknown class as a value of the wrong type, without listing the known classes.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace

from ropepp_lit.checkpoint import import_class
from ropepp_lit.data.token_data import TokenData
from ropepp_lit.errors import UsageError, did_you_mean
from ropepp_lit.nn import DecoderConfig, Frequencies, PositionScheme, RoPEPP
from ropepp_lit.train.callbacks import TextSample
from ropepp_lit.train.causal_lm import CausalLM
from ropepp_lit.train.checkpoints import Checkpoints
from ropepp_lit.train.diagnostics import Diagnostics
from ropepp_lit.train.evaluation import Evaluation
from ropepp_lit.train.optimizer import AdamW, OptimizerConfig
from ropepp_lit.train.preference import Preference
from ropepp_lit.train.schedule import Schedule, WarmupStableDecay
from ropepp_lit.train.spikes import LossSpikes
from ropepp_lit.train.watchdog import Watchdog

CLASSES: dict[str, tuple[type, type | None]] = {
    "model.positions": (PositionScheme, RoPEPP),
    "model.frequencies": (Frequencies, Frequencies),
    "model.optimizer": (OptimizerConfig, AdamW),
    "model.schedule": (Schedule, WarmupStableDecay),
    "model.preference": (Preference, None),
}
"""Keys that name a class, with the base class and the default."""


SECTIONS = {
    "trainer": pl.Trainer,
    "model": CausalLM,
    "model.decoder": DecoderConfig,
    "data": TokenData,
    "checkpoints": Checkpoints,
    "sample": TextSample,
    "evaluation": Evaluation,
    "diagnostics": Diagnostics,
    "spikes": LossSpikes,
    "watchdog": Watchdog,
}
"""Sections of a recipe, with the class whose arguments they contain."""


def check_sections(options: Namespace) -> None:
    """Check that each section of a recipe is a mapping, with null only for settings that allow it.

    Args:
        options: Options of `fit`, parsed but not instantiated.

    Raises:
        UsageError: a section is not a mapping, or a setting is null.
    """
    for name, kind in SECTIONS.items():
        section = options.get(name)
        if not isinstance(section, Namespace):
            raise UsageError(f"{name}: {str(section)[:100]!r} must be a mapping of settings")
        check_arguments(kind, vars(section), name)


def check_classes(arguments: list[str]) -> None:
    """Check the class names on a command line and in its recipes.

    Args:
        arguments: Options of `fit`. The parser checks values that are not class names.

    Raises:
        UsageError: a key of :data:`CLASSES` names a class that does not exist, cannot be imported or has another base,
            or a recipe is not valid YAML.
    """
    for key, name in _names(arguments):
        base = CLASSES[key][0]
        if "." in name:
            try:
                import_class(name, base)
            except UsageError as error:
                raise UsageError(f"{key}: {error}") from error
        elif name not in (known := [kind.__name__ for kind in _subclasses(base)]):
            raise UsageError(
                f"{key}: no class {name!r}; choose one of {', '.join(known)}, or give your own class as module.Class"
                f"{did_you_mean(name, known)}"
            )


def check_nulls(options: Any, key: str = "") -> None:
    """Check that arguments of classes are null only if the class allows it; the parser accepts every null.

    Args:
        options: Options of `fit`, parsed but not instantiated.
        key: Their key in the recipe.

    Raises:
        UsageError: an argument is null, and neither its default nor its type is.
    """
    if isinstance(options, list):
        for option in options:
            check_nulls(option, key)
    if not isinstance(options, Namespace | dict):
        return
    if isinstance(class_path := options.get("class_path"), str):
        check_arguments(import_class(class_path, object), dict(options.get("init_args") or {}), key)
    for name, option in vars(options).items() if isinstance(options, Namespace) else options.items():
        check_nulls(option, key if name in ("class_path", "init_args") else f"{key}.{name}" if key else str(name))


def check_arguments(kind: type, arguments: Mapping[str, Any], key: str) -> None:
    """Raise UsageError if an argument of a class is null, and neither its default nor its type is.

    Args:
        kind: The class.
        arguments: Arguments by name.
        key: Key of the class in the recipe.
    """
    for base in kind.__mro__[:-1]:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters
        for name, parameter in parameters.items():
            if name in arguments and arguments[name] is None and not _allows_none(base, parameter):
                raise UsageError(f"{key}.{name}: must not be null; give a value, or leave the key out")
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break  # otherwise the other arguments are passed to the base class


def _allows_none(kind: type, parameter: inspect.Parameter) -> bool:
    if parameter.default is None:
        return True
    try:
        hint = get_type_hints(kind.__init__).get(parameter.name, Any)  # type: ignore[misc]
    except NameError:  # a type imported only under TYPE_CHECKING
        return True
    return hint is Any or type(None) in get_args(hint)


def _names(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Yield keys and the class names given for them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    for key in CLASSES:
        parser.add_argument(f"--{key}", f"--{key}.class_path", dest=key, action="append", default=[])
    try:
        given = vars(parser.parse_known_args(arguments)[0])
    except argparse.ArgumentError:  # an option without a value
        return
    for path in given["config"]:
        recipe = _read(Path(path))
        for key in CLASSES:
            value = recipe
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            yield from _class_name(key, value)
    for key in CLASSES:
        for text in given[key]:
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError:
                continue
            yield from _class_name(key, value)


def _class_name(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the class name of a value, which is the name itself or a mapping with a `class_path`."""
    name = value.get("class_path") if isinstance(value, dict) else value
    if isinstance(name, str | int) and not Path(str(name)).is_file():  # a file contains this part of the recipe
        yield key, str(name)


def _read(path: Path) -> Any:
    """Return the content of a recipe; None if there is no such file, or it is a pipe, which only the parser reads.

    Raises:
        UsageError: the file is not valid YAML.
    """
    if not path.is_file():
        return None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from error


def _subclasses(base: type) -> list[type]:
    """Return a class and its subclasses, of those imported so far, that are not abstract."""
    children: list[type] = base.__subclasses__()
    derived = [kind for child in children for kind in _subclasses(child)]
    return derived if inspect.isabstract(base) else [base, *derived]
