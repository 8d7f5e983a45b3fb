"""Documents: commands parse, links and anchors resolve, named files and functions exist."""

import functools
import importlib
import inspect
import itertools
import re
import shlex
from pathlib import Path

import pytest

from ropepp_lit.arguments import call
from ropepp_lit.cli import SUBCOMMANDS
from ropepp_lit.commands import doctor
from ropepp_lit.errors import UsageError
from ropepp_lit.train.plan import _parser as plan_parser

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for pattern in ("README.md", "recipes/**/*.md", "ropepp_lit/**/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

OUTPUTS = ("runs/", "checkpoints/", "found/", "shards/", "tensorboard/", "DIR/")
"""Prefixes of paths in backticks that a command writes, or that stand for a user's files."""

MODULES = {name: module for name, (_, module) in SUBCOMMANDS.items() if module.startswith("ropepp_lit.commands.")}
"""Modules of the subcommands whose options are a function's arguments."""


def fences(text):
    """Yield language and content of each fenced code block."""
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        yield match[2], match[3]


def prose(text):
    """Return the text without fenced code blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)


def code_spans(text):
    """Return the inline code of a document, with line breaks as spaces."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(text))]


def anchors(path):
    """Return the anchors that GitHub gives to the headings of a document."""
    found = set()
    for heading in re.findall(r"^#+ (.*)", prose(path.read_text(encoding="utf-8")), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = next(n for n in itertools.count() if (f"{anchor}-{n}" if n else anchor) not in found)
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def expand(block):
    """Yield the lines of a shell script, continuation lines joined and variables replaced.

    A variable has the value of its assignment, or the first value of its loop, or 1.
    """
    values = {}
    for line in re.sub(r"\\\n\s*", " ", block).split("\n"):
        for name, value in re.findall(r"(?:^|\s)([A-Z][A-Z_]*)=(\S+)", line):
            values.setdefault(name, value)
        if loop := re.match(r"\s*for (\w+) in (\S+)", line):
            values[loop[1]] = loop[2]
        line = re.sub(r"\$\(\([^)]*\)+\)", "1", line)
        yield re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], "1"), line)


def commands(line):
    """Yield the arguments of each call of ropepp-lit in a line of shell code."""
    for match in re.finditer(r"(?:^|[\s'(&])(?:ropepp-lit|-m ropepp_lit) ", line):
        lexer = shlex.shlex(line[match.end() :], posix=True, punctuation_chars="|;&<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = []
        try:
            for word in lexer:
                if set(word) <= set("|;&<>"):
                    break
                words.append(word)
        except ValueError:  # a quote that was opened before the command, as in sbatch --wrap '…'
            words = line[match.end() :].partition("'")[0].split()
        yield [word for word in words if word not in ("…", "...")]


def commands_of(path):
    """Return the calls of ropepp-lit in the shell scripts and in the inline code of a document."""
    text = path.read_text(encoding="utf-8")
    scripts = [line for language, block in fences(text) if language == "bash" for line in expand(block)]
    spans = [span for span in code_spans(text) if re.match(r"(tools/run )?ropepp-lit \w", span)]
    found = {tuple(words) for line in (*scripts, *spans) for words in commands(line) if words}
    return [*sorted(found)]


def with_recipes(words):
    """Return options of `fit` in which recipes that are not in the repository are left out, or the quickstart's."""
    options, is_first = [], True
    words = iter(words)
    for word in words:
        if word != "--config":
            options.append(word)
            continue
        path = ROOT / next(words)
        if path.is_file() or is_first:
            options += [word, str(path if path.is_file() else ROOT / "recipes" / "quickstart.yaml")]
        is_first = False
    return options


@pytest.fixture(scope="module")
def parse_recipe():
    """A function that parses options of `fit` or `validate` without creating anything."""
    from ropepp_lit.train.cli import RecipeCLI

    class ParsingCLI(RecipeCLI):
        def instantiate_classes(self):
            pass

        def _run_subcommand(self, subcommand):
            pass

    cli = ParsingCLI(["fit", "--config", str(ROOT / "recipes" / "quickstart.yaml")])

    def parse(words):
        cli.parse_arguments(cli.parser, words)
        return cli.config

    return parse


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """A folder with the files that the documents show as the user's own."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("positions", "evaluation"):
        text = (ROOT / "recipes" / f"{name}.md").read_text(encoding="utf-8")
        for language, block in fences(text):
            if language == "python" and (match := re.match(r"# (\w+\.py), ", block)):
                (folder / match[1]).write_text(block)
    return folder


def doing_nothing(function):
    """Return a function with the same signature and docstring that does nothing."""
    return functools.wraps(function)(lambda *words, **options: None)


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name, parse_recipe, examples, monkeypatch):
    monkeypatch.chdir(examples)
    monkeypatch.syspath_prepend(examples)
    for module in set(MODULES.values()) - {doctor.__name__}:
        monkeypatch.setattr(
            f"{module}.call", lambda function, words, **flags: call(doing_nothing(function), words, **flags)
        )
    monkeypatch.setattr(doctor, "doctor", lambda **options: None)  # its parser is argparse's
    wrong = []
    for words in commands_of(ROOT / name):
        try:
            if words[0] not in SUBCOMMANDS:
                raise UsageError("no such subcommand")
            if len(words) == 1 or "--help" in words:
                continue
            if words[0] in MODULES:
                module = importlib.import_module(MODULES[words[0]])
                if hasattr(module, "call"):
                    module.main(list(words))
                else:  # a parser of its own
                    wrong += [word for word in words[1:] if f'"{word}"' not in inspect.getsource(module)]
            elif words[0] == "plan":
                parse_recipe(["fit", *with_recipes(plan_parser().parse_known_args(words[1:])[1])])
            else:
                parse_recipe([words[0], *with_recipes(words[1:])])
        except UsageError as error:
            wrong.append(f"{shlex.join(words)}: {error}")
        except SystemExit as error:
            wrong += [shlex.join(words)] if error.code else []
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_fragments_of_recipes_parse(name, parse_recipe, tmp_path):
    quickstart = ROOT / "recipes" / "quickstart.yaml"
    for language, block in fences((ROOT / name).read_text(encoding="utf-8")):
        if language == "yaml":
            (tmp_path / "fragment.yaml").write_text(block)
            parse_recipe(["fit", "--config", str(quickstart), "--config", str(tmp_path / "fragment.yaml")])


@pytest.mark.parametrize("name", NAMES)
def test_tools_and_their_options_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = [line for language, block in fences(text) if language == "bash" for line in expand(block)]
    wrong = []
    for line in (*lines, *code_spans(text)):
        for path, options in re.findall(r"python (tools/\w+\.py)([^|;&#`]*)", line):
            source = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else ""
            wrong += [] if source else [path]
            wrong += [
                f"{path} --{option}" for option in re.findall(r" --(\w+)", options) if not re.search(option, source)
            ]
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name):
    path = ROOT / name
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(path.read_text(encoding="utf-8")))):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = path if not file else (path.parent / file).resolve()
        if not linked.is_relative_to(ROOT) or not linked.exists() or (anchor and anchor not in anchors(linked)):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_named_files_exist(name):
    path = ROOT / name
    wrong = []
    for span in code_spans(path.read_text(encoding="utf-8")):
        for word in span.split():
            is_path = re.fullmatch(r"\.?[\w-]+/[\w./-]*", word) and (
                word.endswith("/") or re.search(r"\.(py|c|md|yaml|yml|in|txt|png|html|jinja|json|jsonl|ckpt)$", word)
            )
            if is_path and not word.startswith(OUTPUTS) and not any((at / word).exists() for at in (ROOT, path.parent)):
                wrong.append(word)
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_lines_are_short(name):
    lines = prose((ROOT / name).read_text(encoding="utf-8")).split("\n")
    assert not [line for line in lines if len(line) > 120 and not line.startswith(("|", "!["))]


def test_names_in_the_code_map_exist():
    page = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.partition("## Where is it decided")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| .*\? \| `ropepp_lit/(.*)\.py` \| (.*) \|$", section, re.MULTILINE)
    assert len(rows) == 10
    for module, names in rows:
        found = importlib.import_module(f"ropepp_lit.{module.replace('/', '.')}")
        for name in re.findall(r"`([\w.]+)`", names):
            assert functools.reduce(getattr, name.split("."), found)


def test_workflows_pin_their_actions():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        uses = re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))
        assert uses
        assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", use) for use in uses)


def test_every_page_is_linked_from_the_index():
    index = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "recipes").glob("*.md"):
        assert path.name == "README.md" or f"]({path.name})" in index


OTHER_OPTIONS = "help require-hashes index-url hypothesis-profile signal max_restarts model base".split()
OTHER_OPTIONS += "learning_rate seeds schemes megabytes zst".split()
"""Options in inline code that belong to other programs, or to scripts in tools/ that the sentence names."""


def test_options_exist(parse_recipe, monkeypatch):
    """Every option in inline code is one of a subcommand; options of `fit` are parsed with their values."""
    known = {
        *OTHER_OPTIONS,
        *(option.lstrip("-") for action in plan_parser()._actions for option in action.option_strings),
    }

    def note(function, words, flags=()):
        known.update(inspect.signature(function).parameters, flags)

    for name, module in MODULES.items():
        if module == doctor.__name__:
            continue
        monkeypatch.setattr(f"{module}.call", note)
        importlib.import_module(module).main([name])
    spans = {span for path in DOCUMENTS for span in code_spans(path.read_text(encoding="utf-8"))}
    quickstart = str(ROOT / "recipes" / "quickstart.yaml")
    keys = {
        key.replace(".init_args", "").replace(".class_path", "")
        for key in parse_recipe(["fit", "--config", quickstart]).fit.keys()  # noqa: SIM118 - a Namespace does not iterate over nested keys
    }
    wrong = []
    for span in sorted(span for span in spans if span.startswith("--")):
        names = {name.partition("=")[0] for name in re.findall(r"(?<!\S)--(\S+)", span)}
        if names <= known or (" " not in span and names <= keys):
            continue
        words = ["1" if word == "N" else word for word in shlex.split(span) if word != "…"]
        strategy = ["--trainer.strategy", "FSDP2Strategy"] if "trainer.strategy." in span else []
        try:
            parse_recipe(["fit", *with_recipes(["--config", quickstart, *strategy, *words])])
        except UsageError as error:
            wrong.append(f"{span}: {error}")
    assert not wrong
