"""The run folder: what a run writes there, and what is refused or removed before it does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.cli import SaveConfigCallback
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console

from adaptive_merge.engine.begin import FILE, PARTIAL
from adaptive_merge.errors import InputError
from adaptive_merge.files import save_json
from adaptive_merge.privacy import scrub
from adaptive_merge.runs.results import footing, table

__all__ = ["RUN_FILES", "START_FILES", "SaveConfig", "publish", "refuse_run", "remove_run", "undoing"]

# A run that was killed before its first checkpoint goes on from these.
START_FILES = (FILE, PARTIAL)
# What a run writes, and what `overwrite` removes.
RUN_FILES = (
    *("config.yaml", "metrics.csv", "results.json", "coefficients.json", "report.html", "wandb.json"),
    *("history.safetensors", "diagnostics.safetensors", "images.safetensors", "checkpoints"),
    *START_FILES,
)


# One of these, and a run was under way.
_WORTH_KEEPING = ("last.ckpt", "results.json", "coefficients.json")


class SaveConfig(SaveConfigCallback):
    """`config.yaml` belongs to a run; validation leaves nothing behind."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.config = _scrubbed(self.config)
            super().setup(trainer, pl_module, stage)


def _scrubbed(value: Any, name: str = "") -> Any:
    """A copy of a configuration without secrets; a value that is a mapping stays one, or it would not be valid."""
    if isinstance(value, Namespace):
        return Namespace(**{key: _scrubbed(part, key) for key, part in vars(value).items()})
    if isinstance(value, Mapping):
        return {key: _scrubbed(part, str(key)) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scrubbed(part, name) for part in value]
    return scrub(value, name)


@rank_zero_only
def refuse_run(folder: Path) -> None:
    """InputError where the folder holds a run; the configuration alone, of one that never began, is none."""
    if any((folder / name).exists() for name in RUN_FILES if name != "config.yaml"):
        raise InputError(
            f"{folder} already holds a run; choose another --run.name, or --run.if_exists resume or overwrite"
        )


@rank_zero_only
def remove_run(folder: Path, keep: Sequence[str] = ()) -> None:
    """Remove what a run wrote, and nothing else; files named in `keep` stay."""
    for path in (folder / name for name in RUN_FILES if name not in keep):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


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
    """Write `results.json` and print the table."""
    save_json(folder / "results.json", results)
    console = Console()
    console.print(table(results))
    seconds = results["seconds"]
    console.print(
        f"{footing(results)}\n"
        f"{results['steps']} steps in {seconds['adapt']:.0f} s, scored in {seconds['evaluate']:.0f} s; "
        f"{results['trainable_parameters']:,} numbers learned; the run is in {folder}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
