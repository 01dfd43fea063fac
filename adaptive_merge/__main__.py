"""`adaptive-merge` and `python -m adaptive_merge`: errors become one message and an exit code."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from adaptive_merge import __version__
from adaptive_merge.cli.door import REPORT, message_of
from adaptive_merge.cli.table import command, overview
from adaptive_merge.errors import EXIT_USAGE, InputError, printable, shorten
from adaptive_merge.process.signals import EXIT_INTERRUPTED, Preempted, Signals

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 the user has to mend something.

    A fault of this program is raised as it is, with a note that asks for a report.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in (["--version"], ["-h"], ["--help"]):
        sys.stdout.write(f"adaptive-merge {__version__}\n" if arguments[0] == "--version" else overview())
        return 0
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        with _listening(arguments):
            _run(arguments)
    except Preempted as stopped:
        if not stopped.announced:  # while the program was being loaded, or had ended
            sys.stderr.write(f"adaptive-merge: told to stop while no run was under way (exit code {stopped.code})\n")
        raise
    except KeyboardInterrupt:
        sys.stderr.write("adaptive-merge: interrupted\n")
        return EXIT_INTERRUPTED
    except Exception as error:
        if debug:
            raise
        message = message_of(error)
        if message is None:
            error.add_note(REPORT)
            raise
        sys.stderr.write(f"adaptive-merge: {shorten(printable(message))}\n")
        return getattr(error, "exit_code", EXIT_USAGE)
    return 0


def _listening(arguments: list[str]) -> AbstractContextManager[Any]:
    """A run answers signals from here on, before the seconds that its imports take; other commands just end."""
    return Signals() if arguments[:1] in (["fit"], ["validate"]) else nullcontext()


def _run(arguments: list[str]) -> None:
    from adaptive_merge.cli.allowlist import restrict_imports  # here, because --help does not wait for jsonargparse

    arguments = restrict_imports(arguments)
    if not arguments:
        raise InputError("name a command; adaptive-merge --help lists them")
    if arguments[0].startswith("-"):  # Lightning takes options before `fit` and `validate` as well
        from adaptive_merge.cli.fit import run

        return run(arguments)
    return command(arguments[0])(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
