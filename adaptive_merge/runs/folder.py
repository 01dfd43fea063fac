"""The run folder: what a run writes there, and what is refused or removed before it does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import SaveConfigCallback
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console

from adaptive_merge.engine.begin import FILE, PARTIAL
from adaptive_merge.errors import InputError
from adaptive_merge.files import observing, save_json, save_text
from adaptive_merge.privacy import scrub
from adaptive_merge.process.locks import locked
from adaptive_merge.runs.checkpoint_io import check_writable
from adaptive_merge.runs.journal import JOURNAL, KNOWN, Journal
from adaptive_merge.runs.shown import footing, gains, table

__all__ = [
    *("RUN_FILES", "START_FILES", "SaveConfig"),
    *("check_name", "claim", "holding", "open_folder", "publish", "undoing"),
]

# A run that was killed before its first checkpoint goes on from these.
START_FILES = (FILE, PARTIAL)
# Where a run writes, whatever it logs with.
RUN_FILES = KNOWN
# Once these are there, so was a checkpoint.
_RESULTS = ("results.json", "coefficients.json")
_LAST = "checkpoints/last.ckpt"
IfExists = Literal["refuse", "resume", "overwrite"]


# One of these, and a run was under way.
_WORTH_KEEPING = ("last.ckpt", "results.json", "coefficients.json")


class SaveConfig(SaveConfigCallback):
    """`config.yaml` belongs to a run, and not what its job asked a scheduler for; validation leaves nothing behind."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not self.already_saved:
            folder = Path(trainer.log_dir)  # asked on all processes, for it is broadcast
            if trainer.is_global_zero:
                kept = Namespace(**{key: value for key, value in vars(self.config).items() if key != "slurm"})
                save_text(folder / self.config_filename, self.parser.dump(_scrubbed(kept), skip_none=False))
            self.already_saved = True


def _scrubbed(value: Any, name: str = "") -> Any:
    """A copy of a configuration without secrets; a value that is a mapping stays one, or it would not be valid."""
    if isinstance(value, Namespace):
        return Namespace(**{key: _scrubbed(part, key) for key, part in vars(value).items()})
    if isinstance(value, Mapping):
        return {key: _scrubbed(part, str(key)) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scrubbed(part, name) for part in value]
    return scrub(value, name)


def check_name(root: str, name: str) -> None:
    """InputError where a run would lie outside the folder of all runs."""
    place = Path(name)
    if place.is_absolute() or ".." in place.parts or not place.parts:
        raise InputError(
            f"--run.name {name!r} names no folder inside {root}; leave out `..` and a leading `/`, and say with "
            "--run.root where runs are kept"
        )


@contextmanager
def holding(folder: Path) -> Iterator[Journal]:
    """Lock the run folder while the block runs, and give its journal; only the first process of a run locks and writes.

    Raises:
        LockedError: another run is under way there.
        StorageError: nothing can be written there.
    """
    if rank_zero_only.rank != 0:
        yield Journal(folder)
        return
    check_writable(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with _tidied(folder, made), locked(folder / ".lock", f"run folder {folder}"):
        journal = Journal(folder)
        with observing(journal.note):
            yield journal


@contextmanager
def _tidied(folder: Path, made: Sequence[Path]) -> Iterator[None]:
    """Nothing stays of a run that did not begin."""
    try:
        yield
    finally:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [JOURNAL] and made:
                (folder / JOURNAL).unlink()
            for path in made:
                path.rmdir()


def claim(journal: Journal, if_exists: IfExists, checkpoint: str | None = None) -> str | None:
    """Look at what is in the folder; the checkpoint to go on from, if any. Nothing is changed.

    Args:
        journal: of the run folder.
        if_exists: what the user wants of a run that is there.
        checkpoint: one that the user has named, which stands for itself where it is this run's own.

    Raises:
        InputError: a run is there and is not to be touched; a file is in the way that no run wrote.
    """
    latest = _latest(journal) if if_exists == "resume" else None
    if rank_zero_only.rank == 0:
        _check_foreign(journal)
        if if_exists == "resume" and not latest:
            _check_unfinished(journal)
        elif if_exists == "refuse" and not _lies_in(checkpoint, journal.folder):
            _refuse(journal)
    return str(latest) if latest else checkpoint


@rank_zero_only
def open_folder(journal: Journal, if_exists: IfExists, checkpoint: str | None) -> None:
    """What an earlier run wrote goes where this one starts at its first step, and nothing else; then begin the journal.

    Args:
        journal: of the run folder.
        if_exists: what the user wants of a run that is there.
        checkpoint: that the run goes on from.
    """
    resumes = if_exists == "resume"
    if if_exists != "refuse" and not checkpoint:
        if resumes and journal.files:
            kept = [path.name for path in journal.files if path.name in START_FILES]
            tail = f" with what is solved of its start ({kept[0]})" if kept else ", for nothing was saved"
            sys.stderr.write(f"{journal.folder}: no checkpoint to go on from; the run begins anew{tail}\n")
        journal.remove(START_FILES if resumes else ())
    journal.begin()


def _latest(journal: Journal) -> Path | None:
    """`last.ckpt`; before there is one, what a disk that filled up meanwhile has left of the first saving."""
    last = journal.folder / _LAST
    if last.is_file() or any((journal.folder / name).is_file() for name in _RESULTS):
        return last if last.is_file() else None
    saved = [path for path in journal.files if path.parent == last.parent and path.suffix == ".ckpt"]
    return max(saved, key=lambda path: path.stat().st_mtime_ns, default=None)


def _check_foreign(journal: Journal) -> None:
    if others := journal.foreign:
        raise InputError(
            f"{others[0]} is in the way, and no run of this program wrote it; move it elsewhere, or choose another "
            "--run.name"
        )
    if leftovers := sorted(journal.folder.glob("hpc_ckpt_*.ckpt")):
        raise InputError(
            f"{leftovers[0]} was left by another program's requeueing, and Lightning would take it for this run's "
            "checkpoint; move it elsewhere"
        )


def _check_unfinished(journal: Journal) -> None:
    names = {path.relative_to(journal.folder).as_posix() for path in journal.files}
    if kept := sorted(names.intersection(_RESULTS)):
        raise InputError(
            f"{journal.folder} holds {kept[0]} of a run but no checkpoint to go on from ({_LAST}); choose another "
            "--run.name, name a checkpoint with --ckpt_path, or replace the run with --run.if_exists overwrite"
        )


def _refuse(journal: Journal) -> None:
    if any(path.name not in ("config.yaml", JOURNAL) for path in journal.files):
        raise InputError(
            f"{journal.folder} already holds a run; choose another --run.name, or --run.if_exists resume or overwrite"
        )


def _lies_in(path: str | None, folder: Path) -> bool:
    return path is not None and folder.resolve() in Path(path).resolve().parents


def undoing(folder: Path) -> Callable[[], None]:
    """A function that takes back what is written in `folder` from now on, unless a run could go on from it."""
    there = set(folder.rglob("*"))
    made = [path for path in (folder, *folder.parents) if not path.exists()]

    @rank_zero_only
    def undo() -> None:
        new = sorted(set(folder.rglob("*")) - there, reverse=True)  # what is in a folder before the folder
        if any(path.name in (*_WORTH_KEEPING, *START_FILES) for path in new):
            return
        for path in new:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    return undo


@rank_zero_only
def publish(results: dict[str, Any], folder: Path) -> None:
    """Write `results.json`, and print what was gained by what and the table."""
    save_json(folder / "results.json", results)
    console = Console()
    if line := gains(results):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(table(results))
    seconds = results["seconds"]
    console.print(
        f"{footing(results)}\n"
        f"{results['steps']} steps in {seconds['adapt']:.0f} s, scored in {seconds['evaluate']:.0f} s; "
        f"{results['trainable_parameters']:,} trainable parameters; the run is in {folder}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
