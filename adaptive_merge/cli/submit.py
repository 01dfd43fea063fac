"""`adaptive-merge submit`: `fit`, or an array of them, as a job of SLURM; what became of each cell."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adaptive_merge.cli.grid import Trial, parse_grid, plan, without
from adaptive_merge.cli.parser import Parser, write
from adaptive_merge.cli.slurm import HEADER, Slurm, batch_script
from adaptive_merge.errors import InputError, printable
from adaptive_merge.files import save_text
from adaptive_merge.privacy import scrub
from adaptive_merge.process.locks import holder
from adaptive_merge.runs.array import STATES, read_array, save_array

__all__ = ["submit"]

_SCRIPT = "submit.sh"


def submit(arguments: list[str]) -> None:
    """Hand `fit` to SLURM, with what the `slurm:` section of its configuration, or --slurm.*, asks for.

    With --recipes, --seeds or --vary it is an array, a run folder a cell. What is not named here goes to `fit`. The
    same command again starts the cells that are not finished and not running.
    """
    parser = Parser("adaptive-merge submit", description=submit.__doc__)
    parser.add_argument("--recipes", metavar="A,B,...", help="short for --vary config=A,B,...")
    parser.add_argument("--seeds", metavar="A,B,...", help="short for --vary seed_everything=A,B,...")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="a setting of fit and its values, as in YAML; may be repeated, all combinations are cells",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script; nothing is written or submitted")
    parser.add_argument("--status", metavar="FOLDER", help="only list the cells of an array and how far each is")
    options, rest = parser.parse_known_args(arguments)
    if options.status:
        if rest or options.vary or options.recipes or options.seeds or options.dry_run:
            raise InputError(f"--status {options.status}: give nothing else with it")
        _show(Path(options.status))
        return
    short = {"config": options.recipes, "seed_everything": options.seeds}
    varied = [*(f"{key}={values}" for key, values in short.items() if values), *options.vary]
    _submit(varied, rest, options.dry_run)


def _submit(varied: Sequence[str], rest: Sequence[str], dry: bool) -> None:
    _check_secrets(rest)
    grid = parse_grid(varied, ranked=False)
    folder, trials = plan(grid, rest, "array")
    asked = trials[0].settings["slurm"]
    if other := next((trial.name for trial in trials if trial.settings["slurm"] != asked), None):
        raise InputError(
            f"slurm: {other} asks for something else than {trials[0].name}, and an array is one job; submit them "
            "apart, or give --slurm.KEY for all"
        )
    if any("--run.if_exists=overwrite" in trial.arguments for trial in trials):
        raise InputError("--run.if_exists overwrite: each start of the job would begin anew; remove the folder instead")
    waiting = [number for number, trial in enumerate(trials) if trial.pending and not holder(trial.folder / ".lock")]
    if not waiting:
        write(f"nothing to submit: of {len(trials)}, all are finished or running in {folder}")
        return
    cells = {number: without(trial.arguments, ["slurm"]) for number, trial in enumerate(trials)}
    text = batch_script(Slurm(**asked), folder, cells, waiting if grid else None)
    if dry:
        sys.stdout.write(text)
        return
    script = _written(folder, text, trials)
    job = _sbatch(script)
    write(f"job {job}: {len(waiting)} of {len(trials)} to run; {script} says what it does")
    write(f"how far it is: adaptive-merge submit --status {shlex.quote(str(folder))}")


def _written(folder: Path, text: str, trials: Sequence[Trial]) -> Path:
    script = folder / _SCRIPT
    if script.exists() and HEADER not in script.read_text(errors="replace"):
        raise InputError(f"{script} was not written by this program; move it elsewhere, or choose another --run.name")
    folder.mkdir(parents=True, exist_ok=True)  # SLURM makes no folder for what a job says
    save_array(folder, [(trial.name or folder.name, str(trial.folder.relative_to(folder))) for trial in trials])
    save_text(script, text)
    return script


def _sbatch(script: Path) -> str:
    """The number of the submitted job."""
    command = shutil.which("sbatch")
    if command is None:
        raise InputError(f"there is no sbatch on this machine; submit {script} from one that has it, in this folder")
    ended = subprocess.run([command, "--parsable", str(script)], capture_output=True, text=True)
    if ended.returncode:
        raise InputError(f"sbatch {script} ended with {ended.returncode}: {ended.stderr.strip()}")
    return ended.stdout.strip().partition(";")[0]  # `;` and the cluster's name may follow


def _check_secrets(arguments: Sequence[str]) -> None:
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        option, equals, value = argument.partition("=")
        value = value if equals else following
        if scrub(argument) != argument or (option.startswith("--") and scrub(value, option) != value):
            raise InputError(
                f"{option}: a secret would be written into the script; export it where you start `submit`, for sbatch "
                "hands the environment on"
            )


def _show(folder: Path) -> None:
    """A line for each cell, the number in each state, and how to start what is left."""
    cells = read_array(folder)
    view = Table("", "cell", "state", "", box=None)
    for cell in cells:
        view.add_row(str(cell.number), *(escape(printable(text)) for text in (cell.name, cell.state, cell.note)))
    Console().print(view)
    count = Counter(cell.state for cell in cells)
    write(f"{len(cells)} cells: " + ", ".join(f"{count[state]} {state}" for state in STATES if count[state]))
    left = [cell.number for cell in cells if cell.state in ("failed", "missing")]
    if left:
        script = folder / _SCRIPT
        limit = re.search(r"^#SBATCH --array=\S*?(%\d+)$", script.read_text(errors="replace"), re.MULTILINE)
        array = f"--array={','.join(map(str, left))}{limit[1] if limit else ''} " if len(cells) > 1 else ""
        write(f"to start what failed or is missing: sbatch {array}{shlex.quote(str(script))}")
