"""`adaptive-merge tune`: `fit` over a grid of settings, and the best of it by a criterion that needs no labels."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from adaptive_merge.callbacks.safe.ranks import RunStopped
from adaptive_merge.cli.allowlist import VARIABLE, open_packages
from adaptive_merge.cli.grid import Grid, Trial, arguments_of, parse_grid, plan
from adaptive_merge.cli.parser import Parser, write
from adaptive_merge.engine.scoring import CRITERIA
from adaptive_merge.errors import InputError
from adaptive_merge.files import save_json
from adaptive_merge.privacy import scrub
from adaptive_merge.process.signals import EXIT_INTERRUPTED, EXIT_REQUEUE, EXIT_TERMINATED
from adaptive_merge.runs.array import last_words
from adaptive_merge.runs.ranking import BY, Candidate, check_by, conclusion, marked, rank, table
from adaptive_merge.runs.reading import read_run

__all__ = ["tune"]

SCHEMA: Final = 1


def tune(arguments: list[str]) -> None:
    """Run `fit` for each combination of values and rank the runs without labels; what is not named here goes to `fit`.

    A grid can be started again: finished runs are kept, an interrupted one goes on, and a folder that holds a run of
    other settings is refused (unless --run.if_exists overwrite, which runs all anew).
    """
    parser = Parser("adaptive-merge tune", description=tune.__doc__)
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="a setting of fit and its values, as in YAML; may be repeated, all combinations are run",
    )
    parser.add_argument("--by", default=BY[0], help=f"{', '.join(CRITERIA)} or, with labels, oracle")
    parser.add_argument("--select", help="short for --run.select: the step that each run keeps")
    options, rest = parser.parse_known_args(arguments)
    check_by(options.by)
    _check_alone()
    rest += [f"--run.select={options.select}"] if options.select else []
    grid = parse_grid(options.vary)
    folder, trials = plan(grid, rest)
    candidates = [_candidate(trial, f"{number}/{len(trials)}") for number, trial in enumerate(trials, 1)]
    ranked = rank(candidates, options.by)
    save_json(folder / "tune.json", scrub(_record(ranked, options.by, grid)))
    Console().print(table(ranked, options.by))
    write(conclusion(ranked, options.by))
    best = next(trial for trial in trials if trial.folder == ranked[0].folder)
    again = [*rest, *arguments_of(best.values), f"--run.name={folder.name}-best"]
    write(f"its merge as a file: adaptive-merge merge {shlex.quote(str(best.folder))}")
    write(f"to run with its values: adaptive-merge fit {shlex.join(again)}")


def _candidate(trial: Trial, place: str) -> Candidate:
    """Run the trial, unless it is finished."""
    log = trial.folder / "fit.log"
    problem = ""
    if trial.pending:
        write(f"{place} {trial.name}: running, see {log}")
        began = time.perf_counter()
        code = _fit(trial.arguments, log)
        if code in (EXIT_REQUEUE, EXIT_TERMINATED, EXIT_INTERRUPTED):
            raise SystemExit(code)  # told to stop: the run has saved its state, and the same command goes on from it
        if code not in (0, RunStopped.exit_code) or not (trial.folder / "results.json").is_file():
            problem = f"failed with exit code {code}: {last_words(log.read_text(errors='replace'))}"
        write(f"{place} {trial.name}: {problem or f'done in {time.perf_counter() - began:.0f} s'}")
    else:
        write(f"{place} {trial.name}: finished before")
    run = None if problem else read_run(trial.folder)
    return Candidate(trial.name, trial.folder, trial.values, run, problem)


def _fit(arguments: Sequence[str], log: Path) -> int:
    """`fit` in a process of its own: it may start others, and leaves this one's memory and settings alone.

    What it says goes to a file, for it ends with accuracies, which nobody should see before the choice is made.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | _imports(open_packages())
    command = [sys.executable, "-m", "adaptive_merge", "fit", *arguments]
    with (
        log.open("w") as file,
        _passing_on() as (listen, told),
        subprocess.Popen(command, stdout=file, stderr=file, env=environment) as child,
    ):
        listen(child)
        code = child.wait()
    # One that was told before it listened just ends; the grid ends all the same.
    return EXIT_TERMINATED if told and code != EXIT_REQUEUE else code


def _imports(opened: Sequence[str]) -> dict[str, str]:
    """Variables by which the child, and what it starts, import what this process does: not from the working directory.

    `python -m` would put it first, and a `yaml.py` in it would be taken for the library.
    """
    package = str(Path(__file__).resolve().parents[2])
    others = [path for path in sys.path[0 if sys.flags.safe_path else 1 :] if path]
    found = [] if any(Path(path).resolve() == Path(package) for path in others) else [package]
    found += [path for path in [os.environ.get("PYTHONPATH", "")] if path]
    variables = {"PYTHONSAFEPATH": "1"} | ({VARIABLE: ",".join(opened)} if opened else {})
    return variables | ({"PYTHONPATH": os.pathsep.join(found)} if found else {})


@contextmanager
def _passing_on() -> Iterator[tuple[Callable[[subprocess.Popen[bytes]], None], list[int]]]:
    """What asks this process to stop asks the child, which saves its state first.

    Gives a function to call with the child once it runs, and the signals that came: those before it are passed on
    then, so that no moment is left in which this process would end and leave a child behind.
    """
    before, told, children = {}, [], []

    def pass_on(number: int, _: Any) -> None:
        told.append(number)
        for child in children:
            child.send_signal(number)

    def listen(child: subprocess.Popen[bytes]) -> None:
        children.append(child)
        for number in tuple(told):
            child.send_signal(number)

    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
        with suppress(ValueError, AttributeError):  # not the main thread, where somebody else answers; Windows
            number = getattr(signal, name)
            before[number] = signal.signal(number, pass_on)
    try:
        yield listen, told
    except KeyboardInterrupt:
        for child in children:
            child.terminate()  # it saves first; the terminal may have interrupted it as well, or may not
            child.wait()
        raise SystemExit(EXIT_INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _record(ranked: Sequence[Candidate], by: str, grid: Grid) -> dict[str, Any]:
    """The content of `tune.json`, best run first; without accuracies, unless they were asked for."""
    runs = [
        {
            "folder": one.folder.name,
            "values": one.values,
            "criterion": one.criterion(by),
            "criteria": {name: one.criterion(name) for name in CRITERIA},
            "state": "failed" if one.run is None else "collapsed" if one.collapsed else "finished",
            "message": one.problem,
        }
        for one in ranked
    ]
    winner = None
    if runs[0]["criterion"] is not None:
        winner = {name: runs[0][name] for name in ("folder", "values")}
    return {"schema": SCHEMA, "by": by, "labels": marked(ranked, by), "grid": grid, "winner": winner, "runs": runs}


def _check_alone() -> None:
    for variable in ("WORLD_SIZE", "SLURM_NTASKS"):
        if os.environ.get(variable, "1") not in ("", "1"):
            raise InputError(
                f"tune is one process that starts a fit after the other, but {variable}={os.environ[variable]}: start "
                "it without torchrun and with one SLURM task; --trainer.devices N gives each fit N processes"
            )
