"""`adaptive-merge` and `python -m adaptive_merge`: errors become one message and an exit code."""

from __future__ import annotations

import sys

from adaptive_merge import __version__
from adaptive_merge.errors import EXIT_USAGE, AdaptiveMergeError

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 the user has to mend something."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        sys.stdout.write(f"adaptive-merge {__version__}\n")
        return 0
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    # Only now: torch and Lightning take seconds to import.
    from adaptive_merge.cli.fit import run

    try:
        run(arguments)
    except AdaptiveMergeError as error:
        if debug:
            raise
        sys.stderr.write(f"adaptive-merge: {error}\n")
        return getattr(error, "exit_code", EXIT_USAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
