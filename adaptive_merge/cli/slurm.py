"""`slurm:` in a configuration, and the batch script that `adaptive-merge submit` makes of it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final

from adaptive_merge.cli.allowlist import VARIABLE, open_packages
from adaptive_merge.errors import InputError
from adaptive_merge.privacy import scrub
from adaptive_merge.process.signals import BY_SCRIPT, EXIT_REQUEUE, INTERACTIVE
from adaptive_merge.runs.array import STARTED

__all__ = ["HEADER", "Slurm", "batch_script"]

HEADER: Final = "# Written by adaptive-merge submit."
# Settings that are options of sbatch under these names.
_OPTIONS: Final = {
    **{name: name for name in ("account", "partition", "qos", "nodes", "mem", "time", "constraint")},
    "cpus": "cpus-per-task",
}
# What requeueing and the processes' places depend on.
_OURS: Final = (
    *("array", "chdir", "error", "gpus-per-task", "job-name", "ntasks", "open-mode", "output", "requeue", "signal"),
)


@dataclass
class Slurm:
    """What a job asks SLURM for, see `adaptive-merge submit`; `fit` takes these settings and leaves them alone.

    Args:
        account: that pays.
        partition: to run in.
        qos: quality of service.
        nodes: machines; all of them have to see the run folder.
        gpus: of each node, a process each; 0: one process a node, on its processors.
        cpus: for each process.
        mem: memory of each node, such as `64G`.
        time: until the job is stopped, such as `"4:00:00"`, quoted in YAML; a run that is not done by then saves, goes
            back into the queue and goes on.
        warning: seconds before that at which it is told to save.
        constraint: on nodes, such as `a100|h100`.
        container: words between `srun` and the command: `apptainer exec --nv merge.sif`, or options of srun such as
            `--container-image=merge.sqsh`.
        modules: loaded first.
        environment: variable → value. Secrets are better kept in the environment that `submit` is started from.
        lines: of bash before the command, such as `source ~/merge/bin/activate`.
        limit: cells of an array that run at a time; default: all.
        options: other options of sbatch → value, or true: `{reservation: spring, exclusive: true}`.

    Raises:
        InputError: a value that sbatch would not read as one word, a secret, or an option that is not the user's.
    """

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    nodes: int = 1
    gpus: int = 1
    cpus: int = 8
    mem: str | None = None
    time: str = "4:00:00"
    warning: int = 180
    constraint: str | None = None
    container: str | None = None
    modules: list[str] = field(default_factory=list)
    environment: dict[str, str | int | float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    limit: int | None = None
    options: dict[str, str | int | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in {"nodes": 1, "gpus": 0, "cpus": 1, "warning": 1, "limit": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--slurm.{name} {value}: give at least {least}")
        for name in self.options:
            if name in _OURS or name in ("gpus-per-node", "ntasks-per-node", *_OPTIONS, *_OPTIONS.values()):
                own = next((key for key in self._keys() if name in (key, _OPTIONS.get(key))), None)
                hint = f"use --slurm.{own}" if own else "resuming and the places of processes depend on it"
                raise InputError(f"--slurm.options {name}: not to be set here; {hint}")
        for name, value in self.environment.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise InputError(f"--slurm.environment {name}: not the name of a variable")
            if scrub(value, name) != value:
                raise InputError(
                    f"--slurm.environment {name}: a secret would be written into the script; export it where you start "
                    "`submit`, for sbatch hands the environment on"
                )

    @property
    def processes(self) -> int:
        """Processes of each node."""
        return max(1, self.gpus)

    def directives(self) -> Iterator[str]:
        """Options of sbatch, as `name=value` or `name`."""
        for key, name in _OPTIONS.items():
            if (value := getattr(self, key)) is not None:
                yield f"{name}={_word(value, key)}"
        yield f"ntasks-per-node={self.processes}"
        if self.gpus:
            yield f"gpus-per-node={self.gpus}"
        for name, value in self.options.items():
            if value is not False:
                yield _word(name, "options") + ("" if value is True else f"={_word(value, 'options')}")
        # Without `B:`, which would tell the shell alone.
        yield from (f"signal=SIGUSR1@{self.warning}", "requeue", "open-mode=append")

    @classmethod
    def _keys(cls) -> list[str]:
        return [one.name for one in fields(cls)]


def batch_script(
    slurm: Slurm, folder: Path, arguments: Mapping[int, Sequence[str]], pending: Sequence[int] | None = None
) -> str:
    """A script for sbatch that runs `adaptive-merge fit`, resumes, and puts itself back into the queue.

    Args:
        slurm: what to ask for.
        folder: of the array or the run; what the job says goes there.
        arguments: number of a cell → arguments of `fit`; one alone is a job, not an array.
        pending: the cells to start; None for one job.

    Raises:
        InputError: a value cannot be written into a script.
    """
    array = pending is not None
    name = folder.name
    if name in INTERACTIVE:
        raise InputError(f"--run.name {name}: a job of this name would not be run as one of SLURM's; choose another")
    output = folder / ("slurm-%A_%a.out" if array else "slurm-%j.out")
    places = [f"chdir={_word(os.getcwd(), 'here')}", f"output={_word(str(output), 'root')}"]
    directives = [f"job-name={_word(name, 'name')}", *slurm.directives(), *places]
    if array:
        directives.append(f"array={_ranges(pending)}{f'%{slurm.limit}' if slurm.limit else ''}")
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH --{one}" for one in directives),
        HEADER,
        # What the user sources is not at hand where the script is checked, and a `$` in a value is one.
        "# shellcheck disable=SC1090,SC1091,SC2016",
        "set -eo pipefail",
        *(f"module load {shlex.quote(_line(one))}" for one in slurm.modules),
        *(f"export {key}={shlex.quote(_line(str(value)))}" for key, value in slurm.environment.items()),
        *(_line(one) for one in slurm.lines),
        'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"',
        'export SRUN_CPUS_PER_TASK="$OMP_NUM_THREADS"',  # srun does not look at what the job was given
        *([f"export {VARIABLE}={shlex.quote(','.join(packages))}"] if (packages := open_packages()) else []),
        *_choose(arguments, array),
        f'printf "{STARTED}\\n" "$(hostname)" "${{SLURM_RESTART_COUNT:-0}}" "$run"',
        *_run(slurm.container, "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" if array else "$SLURM_JOB_ID"),
    ]
    return "\n".join(lines) + "\n"


def _choose(arguments: Mapping[int, Sequence[str]], array: bool) -> Iterator[str]:
    """Lines that set what `fit` is given."""
    if not array:
        yield _set(arguments[0])
        return
    yield 'case "$SLURM_ARRAY_TASK_ID" in'
    yield from (f"  {number}) {_set(own)} ;;" for number, own in arguments.items())
    yield "  *) echo \"there is no cell '$SLURM_ARRAY_TASK_ID' in this array\" >&2 && exit 2 ;;"
    yield "esac"


def _set(arguments: Sequence[str]) -> str:
    name = next((one.partition("=")[2] for one in arguments if one.startswith("--run.name=")), "")
    return f"run={shlex.quote(name)}; set -- {shlex.join(map(_line, arguments))}"


def _run(container: str | None, job: str) -> Iterator[str]:
    # In a container the code of srun has to be the run's, so processes that leave are not killed by the first one.
    srun = "srun --kill-on-bad-exit=0 --wait=60" if container else "srun --kill-on-bad-exit=1"
    words = [srun, *([_line(container)] if container else []), 'adaptive-merge fit "$@"']
    own = '--trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.num_nodes "$SLURM_NNODES"'
    if not container:
        yield f"exec {' '.join(words)} \\\n  {own}"
        return
    # There is no scontrol in most containers: the run leaves with its exit code, and the script asks for the queue.
    yield f"export {BY_SCRIPT}=1"
    yield "code=0"
    yield f"{' '.join(words)} \\\n  {own} || code=$?"
    yield f'if [ "$code" -eq {EXIT_REQUEUE} ]; then'
    yield f'  scontrol requeue "{job}"'
    yield "fi"
    yield 'exit "$code"'


def _ranges(numbers: Sequence[int]) -> str:
    """`0-2,5` of 0, 1, 2, 5."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ",".join("-".join(map(str, part)) for part in found)


def _word(value: object, name: str) -> str:
    if not re.fullmatch(r"[^\s\"'\\#]+", str(value)):
        where = f"--run.{name}" if name in ("name", "root") else "the folder" if name == "here" else f"--slurm.{name}"
        raise InputError(f"{where} {value!r}: sbatch takes no spaces, quotes, backslashes or # there; choose another")
    return str(value)


def _line(text: str) -> str:
    if "\n" in text or "\r" in text or "\0" in text:
        raise InputError(f"{text!r:.60}: a line end would break the script in two; leave it out")
    return text
