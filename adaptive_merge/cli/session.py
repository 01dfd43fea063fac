"""One run in its folder, from the lock to the report: what `adaptive-merge fit` and `am.fit` have in common."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Literal

import pytorch_lightning as pl
from jsonargparse import Namespace
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger

from adaptive_merge import upstream
from adaptive_merge.callbacks import Guard, Ledger, protect
from adaptive_merge.callbacks.guard.guard import Select, check_oracle
from adaptive_merge.callbacks.safe.preemption import Preemption
from adaptive_merge.callbacks.safe.ranks import RunStopped
from adaptive_merge.callbacks.safe.safeguards import safeguards
from adaptive_merge.cli.trainer import check_end
from adaptive_merge.coefficients.files import save_coefficients
from adaptive_merge.data.stream import TaskStream
from adaptive_merge.data.trigger import Trigger
from adaptive_merge.engine import identity
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import InputError
from adaptive_merge.runs.backdoor import attack_success
from adaptive_merge.runs.checkpoint import read_checkpoint
from adaptive_merge.runs.checkpoint_io import AtomicCheckpointIO
from adaptive_merge.runs.folder import IfExists, claim, holding, open_folder, publish, undoing
from adaptive_merge.runs.log import RunLog
from adaptive_merge.runs.results import evaluate, summary

__all__ = ["TRAINER_DEFAULTS", "GuardMode", "Session", "quiet"]

TRAINER_DEFAULTS: Final[dict[str, Any]] = {
    # One endless epoch of steps: `max_steps` says where it ends; validation comes every `val_check_interval` steps.
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
CHECKPOINT_EVERY: Final = 50
GuardMode = Literal["stop", "warn", "off"]


class Session:
    """A run in its folder: `claim`, then `loggers` and `equip` for the trainer, `begin`, `trainer.fit`, `finish`.

    Args:
        folder: of the run; it is locked from here on.
        if_exists: what to do with a run that is there.
        held: lets go of the folder when it closes.
        started: `time.perf_counter()` when the run began to load.

    Raises:
        LockedError: another run is under way there.
        StorageError: nothing can be written there.
    """

    def __init__(self, folder: Path, if_exists: IfExists, held: ExitStack, started: float) -> None:
        self.folder, self.if_exists, self.started = folder, if_exists, started
        self.checkpoint: str | None = None
        self.resumed_at, self.loaded = 0, started
        self.undo = undoing(folder)
        self.journal = held.enter_context(holding(folder))

    def claim(self, checkpoint: str | None = None) -> str | None:
        """The checkpoint that the run goes on from, if any; nothing is changed, and what is in the way is an error.

        Args:
            checkpoint: one that the user has named.
        """
        self.checkpoint = claim(self.journal, self.if_exists, checkpoint)
        self.resumed_at = read_checkpoint(self.checkpoint)["global_step"] if self.checkpoint else 0
        return self.checkpoint

    def loggers(self, given: Any) -> list[Logger]:
        """The CSV log, which is always on, and the loggers that the user gave: one, several, or a bool."""
        others = given if isinstance(given, list) else [given] if given not in (None, True, False) else []
        again = self.if_exists == "resume" or self.resumed_at > 0
        protected = [protect(logger, self.folder, again) for logger in others]
        return [RunLog(self.folder, self.resumed_at), *protected]

    def equip(self, trainer: pl.Trainer, guard: GuardMode, select: Select) -> None:
        """Give a trainer the guard, the ledger, the safeguards, and a last checkpoint that is always whole."""
        last = ModelCheckpoint(
            self.folder / "checkpoints", "last", every_n_train_steps=CHECKPOINT_EVERY, enable_version_counter=False
        )
        given = trainer.callbacks
        # Guard and ledger first: what the one restores and the other notes is what safeguards compare and save.
        ours = [*_guards(given, guard, select), Ledger(str(self.folder)), *safeguards(self.folder, given)]
        trainer.callbacks.extend([*ours, last])
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        upstream.leave_signals(trainer)

    def begin(self, trainer: pl.Trainer, module: AdaptiveMerge, stream: TaskStream, settings: Namespace) -> None:
        """Refuse what cannot run, before anything is written; then open the folder.

        Args:
            trainer: equipped.
            module: as it starts.
            stream: of the run.
            settings: what the trainer was made with.
        """
        if trainer.max_steps != 0:
            module.check_learns()
        if self.checkpoint:  # before the run's config.yaml is replaced by one that does not fit its checkpoint
            identity.check(read_checkpoint(self.checkpoint), module.method, identity.of_data(stream))
        _ = stream.draws, stream.scored  # a protocol may not fit the data
        check_end(settings, endless=not stream.draws.end)
        if any(isinstance(one, Guard) and one.select == "oracle" for one in trainer.callbacks):
            check_oracle(trainer, stream, endless=True)
        # Only now that nothing more can be wrong.
        open_folder(self.journal, self.if_exists, self.checkpoint)
        module.start_folder = self.folder
        self.loaded = time.perf_counter()

    def finish(
        self,
        trainer: pl.Trainer,
        module: AdaptiveMerge,
        stream: TaskStream,
        *,
        notes: Mapping[str, Sequence[str]] | None = None,
        trigger: Trigger | None = None,
        report: bool = True,
    ) -> dict[str, Any]:
        """After `trainer.fit`: keep what was learned, score the views, write `results.json`, print the table.

        Args:
            trainer: that has run.
            module: as it is now.
            stream: of the run.
            notes: checkpoint → what its reader had to say about it.
            trigger: of a backdoor that one of the experts is known to have.
            report: write `report.html`.

        Returns:
            The content of `results.json`.

        Raises:
            RunStopped: the guard ended the run; all of it is written all the same.
        """
        adapted = time.perf_counter()
        self._keep(trainer, module)
        evaluation = evaluate(trainer, module, stream)
        seconds = {
            "load": self.loaded - self.started,
            "adapt": adapted - self.loaded,
            "evaluate": time.perf_counter() - adapted,
        }
        ledger, guard = (next((one for one in trainer.callbacks if isinstance(one, k)), None) for k in (Ledger, Guard))
        record = guard.record() if guard else None
        run = {"steps": trainer.global_step, "seconds": seconds, "guard": record, "notes": notes}
        results = summary(module, evaluation, stream, ledger.read(), **run)
        if trigger:
            results["backdoor"] = attack_success(module, stream, trigger)
        publish(results, self.folder)
        if trainer.is_global_zero and report:
            from adaptive_merge.report.html import report_run  # here, because matplotlib takes a second to import

            report_run(self.folder)
        if guard and guard.stopped:
            raise _stopped(record["stopped"])
        return results

    def _keep(self, trainer: pl.Trainer, module: AdaptiveMerge) -> None:
        trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt", weights_only=False)
        for callback in trainer.callbacks:
            if isinstance(callback, Preemption):
                callback.settle(trainer)
        if (table := module.coefficients.table()) and trainer.is_global_zero:
            save_coefficients(self.folder / "coefficients.json", table)


def quiet() -> None:
    """Lightning's hints that do not apply here: loaders are deliberate, and tips are not for logs."""
    for message in (
        ".*does not have many workers.*",
        ".*LightningCLI's args parameter.*",
        ".*isinstance.treespec.*",
        ".*you have set.*max_epochs.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*configure_optimizers. returned .None.*",  # a static recipe, which says so itself
        ".*sync_dist=True.*",  # metrics are of the whole batch already: the engine averages what it logs
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)


def _guards(given: Sequence[pl.Callback], guard: GuardMode, select: Select) -> list[Guard]:
    """The guard that was asked for; none where the user's callbacks hold one."""
    if any(isinstance(one, Guard) for one in given):
        return []
    if guard == "off":
        if select != "last":
            raise InputError(f"--run.select {select} needs the guard, which is off; set --run.guard warn")
        return []
    return [Guard(select=select, on_collapse=guard)]


def _stopped(end: Mapping[str, Any]) -> RunStopped:
    return RunStopped(
        f"the merge collapsed, and the run was stopped at step {end['step']} ({end['reason']}); what it "
        f"learned up to step {end['restored_step']} is kept and scored. Lower --model.lr, or bound the "
        "coefficients"
    )
