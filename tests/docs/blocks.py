"""The fenced blocks of the documentation, run as they stand: one page, one clean folder, from top to bottom.

Shell blocks go through bash statement by statement; what is a program of ours is noted by a function of its name and
then called in this process. YAML is run as a configuration, parsed where it is a part of one, or saved under the name
in its first line; Python shares its names over a page. `text` is what a program prints. A comment above a fence says
what is not run:

    <!-- block: parsed, REASON -->    commands and options are parsed by their own parsers, and end there
    <!-- block: fragment, REASON -->  YAML inside of a configuration, or Python inside of a class: its syntax alone
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from adaptive_merge.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(
    r"(?:<!-- block: (?P<mark>\w+), (?P<reason>[^>]+) -->\n+)?^ *```(?P<language>\w*)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
SHELL, SHOWN = ("", "bash", "sh"), ("text", "bibtex")
# Programs that a block may name; the functions note folder, path and arguments, and run nothing.
PROGRAMS = ("adaptive-merge", "python", "bash", "sbatch", "source", "pip", "pytest", "mkdocs")
NOTE = "".join(
    f'{name}() {{ printf "%s\\0" "$PYTHONPATH" {name} "$@" >> "$NOTES"; printf "\\1" >> "$NOTES"; }}\n'
    for name in PROGRAMS
)


class Parsed(BaseException):  # so that no handler of errors takes it for one
    """A command line was understood, and was not to go on."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, what it is, and what its mark says."""

    page: Path
    line: int
    language: str
    code: str
    mark: str | None

    @property
    def kind(self) -> str:
        """What is done with it: `executed`, `parsed`, `fragment` or `shown`."""
        if self.language == "yaml" and not named(self.code) and not whole(self.code):
            return self.mark or "parsed"
        return self.mark or ("shown" if self.language in SHOWN else "executed")


def blocks(page: Path) -> list[Block]:
    """The blocks of a page in their order; a fence that is never closed is an error."""
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)), f"{page}: a fence is not closed"
    marks = sum(bool(one["mark"]) for one in found)
    assert len(re.findall("<!-- block:", text)) == marks, f"{page}: a mark of no block"
    return [
        Block(page, text[: one.start("language")].count("\n") + 1, one["language"], one["code"], one["mark"])
        for one in found
    ]


class Page:
    """Runs the blocks of one page in the working directory, which is clean."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[str, object] = {"__name__": "page"}
        self.monkeypatch = monkeypatch

    def run(self, block: Block) -> None:
        """One block, by its language and mark; what goes wrong names page and line."""
        if block.kind == "shown":
            return
        run: Callable[[Block], None] = {"python": self.python, "yaml": self.yaml}.get(block.language, self.shell)
        assert run != self.shell or block.language in SHELL, f"{place(block)}: what is {block.language}?"
        try:
            run(block)
        except BaseException as error:
            error.add_note(f"in the block at {place(block)}")
            raise

    def python(self, block: Block) -> None:
        code = compile(block.code, place(block), "exec")
        if name := named(block.code):
            Path(name).write_text(block.code)
        elif block.kind == "executed":
            exec(code, self.names)

    def yaml(self, block: Block) -> None:
        assert isinstance(yaml.safe_load(block.code), dict)
        if name := named(block.code):
            Path(name).write_text(block.code)
        elif block.kind == "executed":
            called(["fit", "--config", block.code, "--run.name", f"block-{block.line}"])
        elif block.kind == "parsed":
            understood(["fit", "--config", "adamerging", "--config", block.code])

    def shell(self, block: Block) -> None:
        for statement in statements(block.code):
            for path, program, *arguments in noted(statement):
                with self.monkeypatch.context() as patch:
                    for folder in filter(None, path.split(os.pathsep)):
                        patch.syspath_prepend(str(Path(folder).resolve()))
                    (parse if block.kind == "parsed" else execute)(program, arguments)


def place(block: Block) -> str:
    return f"{block.page.relative_to(ROOT)}:{block.line}"


def named(code: str) -> str | None:
    """The file that a block is, if its first line is a comment with its name."""
    name = re.match(r"# (\w+\.(?:py|yaml))$", code.partition("\n")[0])
    return name[1] if name else None


def whole(code: str) -> bool:
    """Whether a configuration is a method and says how long it runs, rather than a setting to be laid over one."""
    settings = yaml.safe_load(code)
    return "coefficients" in settings.get("model", {}) and "trainer" in settings


def statements(code: str) -> Iterator[str]:
    """What bash would run one after the other: lines, joined where one goes on, and loops whole."""
    pending = ""
    for line in code.splitlines():
        pending += line + "\n"
        if pending.strip() and complete(pending):
            yield pending
            pending = ""
    assert not pending.strip(), f"not complete: {pending}"


def complete(text: str) -> bool:
    check = subprocess.run(["bash", "-n", "-c", text], capture_output=True)
    return check.returncode == 0 and not text.endswith("\\\n")


def noted(statement: str) -> list[list[str]]:
    """What a statement calls, as [PYTHONPATH, program, arguments ...]; what it exports stays."""
    notes, variables = Path(".notes").resolve(), Path(".variables").resolve()
    script = f'set -eu; PYTHONPATH=\nNOTES="{notes}"\n{NOTE}\n{statement}\nenv -0 > "{variables}"'
    notes.write_text("")
    subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
    kept = [one.partition("=") for one in variables.read_text().split("\0") if one]
    os.environ.update({name: value for name, _, value in kept if name.startswith("CLIP_")})
    calls = [call.split("\0")[:-1] for call in notes.read_text().split("\1")[:-1]]
    notes.unlink(), variables.unlink()
    return calls


def execute(program: str, arguments: list[str]) -> None:
    """Run what a block calls, in this process."""
    if program == "adaptive-merge":
        called(arguments)
    elif program == "bash" and arguments[0] == "scripts/demo.sh":
        lines = (ROOT / arguments[0]).read_text().replace("\\\n", "").splitlines()
        command = next(line for line in lines if line.startswith(".venv/bin/adaptive-merge"))
        called([*shlex.split(command.replace('"$@"', ""))[1:], *arguments[1:]])
    else:
        raise AssertionError(f"{program} {shlex.join(arguments)}: mark the block as parsed, with the reason")


def called(arguments: list[str]) -> None:
    """The command line, which has to end well. A configuration that is printed ends by an exit of its own."""
    try:
        assert main(arguments) == 0, shlex.join(arguments)
    except SystemExit as end:
        assert end.code in (0, None), shlex.join(arguments)


def parse(program: str, arguments: list[str]) -> None:
    """What is not run has to be there, and its arguments are understood by its own parser."""
    if program == "adaptive-merge":
        understood(arguments)
    elif program in ("bash", "sbatch"):
        script = next(one for one in arguments if one.endswith(".sh"))
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
        if "--config" in arguments:
            understood(["fit", *arguments[arguments.index(script) + 1 :]])
    elif program == "python" and arguments[0] != "-m":
        with parsing(), pytest.raises(Parsed):
            sys.argv = arguments
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert arguments[0] == "install"
        assert {name for one in arguments for name in re.findall(r"\w+", one.partition("[")[2])} <= set(extras)
    elif program == "pytest":
        assert all((ROOT / one).exists() for one in arguments if one.startswith("tests/"))


def understood(arguments: list[str]) -> None:
    if arguments[0] in ("fit", "validate"):
        return called([*arguments, "--print_config"])
    with parsing(), suppress(Parsed):
        called(arguments)
    return None


@contextmanager
def parsing() -> Iterator[None]:
    """Parsers end the program once they have understood their arguments."""

    def whole(self, *args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parser, "parse_known_args", known)
            strict(self, *args, **kwargs)
        raise Parsed

    def part(self, *args, **kwargs):
        known(self, *args, **kwargs)
        raise Parsed

    parser, argv = argparse.ArgumentParser, sys.argv
    strict, known = parser.parse_args, parser.parse_known_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parser, "parse_args", whole)
        patch.setattr(parser, "parse_known_args", part)
        try:
            yield
        finally:
            sys.argv = argv
