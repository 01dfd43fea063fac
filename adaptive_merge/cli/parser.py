"""The parser of the small commands: options in full, and a mistake is one message that names the nearest."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from rich.console import Console

from adaptive_merge.errors import InputError, did_you_mean, printable

__all__ = ["Parser", "near_option", "write"]


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are `InputError`s."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """One message in place of argparse's usage and exit."""
        hint = near_option(message, self._option_string_actions)
        raise InputError(f"{self.prog.removeprefix('adaptive-merge ')}: {message}{hint}; see {self.prog} --help")


def near_option(message: str, options: Any) -> str:
    """What to add to a parser's message where it names an option that is none of `options`."""
    unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
    return did_you_mean(unknown[1], options) if unknown else ""


def write(text: str) -> None:
    """Print a line as it is: nothing in it is markup, nothing is wrapped, nothing steers the terminal."""
    Console().print(printable(text), markup=False, highlight=False, soft_wrap=True)
