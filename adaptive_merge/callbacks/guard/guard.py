"""`Guard`: sees a collapse without labels, ends the run and gives back the best state; chooses the step to keep."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from adaptive_merge.callbacks.guard.collapse import Alarm, Range, Signals, judge, mean_change
from adaptive_merge.callbacks.guard.watch import Watch
from adaptive_merge.callbacks.safe.ranks import Ranks
from adaptive_merge.engine.scoring import CRITERIA
from adaptive_merge.errors import InputError
from adaptive_merge.runs.results import MOST_WARNINGS

__all__ = ["Guard", "Select", "check_oracle"]

Select = Literal["last", "agreement", "js", "entropy", "oracle"]

SHARE = 0.025  # of a run's forward passes; with the first look, which runs more of them, less than 3 %
FLOOR = 25  # steps between looks, at least
SOON = 5  # steps to the next look where the run may have to end
LOOKS_IN_A_ROW = 3  # that show a collapse in a row that end a run
_STATE = ("best", "warnings", "stopped", "kept_step", "next", "last", "checks", "in_a_row")
_log = logging.getLogger(__name__)


class Guard(pl.Callback):
    """Look at a few unlabelled images of every task now and then; stop a collapse and restore the best state.

    The images are those that the stream's `watched` names; labels are never read, except by `select="oracle"`. What
    the model says is compared with the tasks' own experts, and with the model that the run started with on the same
    images; `signals.judge` says what counts as a collapse. Three such looks in a row end the run: it goes back to
    the state of the highest agreement, the start included and collapsed ones excluded, and ends normally, so that it
    is scored like any other.

    With a data module that has no `watched`, only coefficients without bounds are watched, and nothing is stopped.

    Args:
        every: steps between looks; default: so many that looking costs at most 3 % of the run, at least 25.
        images: images of each task to look at.
        select: the state that is kept at the end: the last one or, of those that were looked at, start and end
            included and collapsed ones excluded, the one that agrees most with the experts, has the smallest JS
            divergence to them, or the smallest entropy. `"oracle"` keeps the one of the best validated accuracy,
            and so uses labels.
        on_collapse: `"warn"` lets a collapsed run go on.
    """

    def __init__(
        self,
        every: int | None = None,
        images: int = 32,
        select: Select = "last",
        on_collapse: Literal["stop", "warn"] = "stop",
    ) -> None:
        if (every is not None and every < 1) or images < 1:
            raise InputError(f"the guard looks every {every} steps at {images} images of a task; give at least 1 each")
        if select not in ("last", *CRITERIA, "oracle"):
            raise InputError(f"unknown select {select!r}; choose 'last', 'agreement', 'js', 'entropy' or 'oracle'")
        if on_collapse not in ("stop", "warn"):
            raise InputError(f"unknown on_collapse {on_collapse!r}; choose 'stop' or 'warn'")
        self.every, self.images, self.select, self.on_collapse = every, images, select, on_collapse
        self._ranks = Ranks()
        self._reset()

    @property
    def stopped(self) -> bool:
        """Whether a collapse ended the run."""
        return self._stopped is not None

    def record(self) -> dict[str, Any]:
        """What the guard saw and did, for `results.json`."""
        return {
            "select": self.select,
            "kept_step": self._kept_step,
            "checks": self._checks,
            "warnings": list(self._warnings),
            "stopped": self._stopped,
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the state that all starts from; a run that a collapse has ended stays ended."""
        self._ranks.connect(trainer)
        self._watch = Watch(pl_module, self._ranks, self.images)
        self._interval = self._wanted_interval(trainer, pl_module)
        if self.select == "oracle":
            check_oracle(trainer, trainer.datamodule)
        if not hasattr(trainer.datamodule, "watched"):
            self._cannot_look(trainer)
        if trainer.global_step == 0 or not self._best:
            self._reset()
            self._next = trainer.global_step + self._interval
        self._kept_step = None
        if self.on_collapse == "warn":
            self._stopped, self._in_a_row = None, 0  # of a run that goes on all the same
        # Scores are measured from the start; a later state without one gives way to whatever is looked at next.
        first = (-math.inf if trainer.global_step else 0.0, trainer.global_step, _snapshot(pl_module))
        for name in {"agreement", self.select}.intersection(CRITERIA):
            self._best.setdefault(name, first)
        if self._stopped and self.on_collapse == "stop":
            trainer.should_stop = True
        # A checkpoint may be older than the look at its own step.
        self._look_if_due(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Look where it is time, and at the last step."""
        self._look_if_due(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With labels, where the user asked for it: note the accuracy of this state."""
        if self.select == "oracle" and trainer.state.fn == "fit" and not (trainer.sanity_checking or self._stopped):
            self._note("oracle", float(trainer.callback_metrics["adapted/accuracy"]), trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the chosen state; a run that ended before its last step is looked at once more."""
        if self.select in CRITERIA and not self._stopped and self._last != trainer.global_step:
            self._look(trainer, pl_module)
        self._keep(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that is resumed after its last step trains no more, but its state has to be chosen all the same."""
        if self._kept_step is None:
            self._keep(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to decide as the uninterrupted one would."""
        return {name: getattr(self, f"_{name}") for name in _STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a resumed run."""
        for name in _STATE:
            setattr(self, f"_{name}", state_dict[name])

    def _reset(self) -> None:
        # Criterion → score, step and learned values of the best state so far.
        self._best: dict[str, tuple[float, int, list[Tensor]]] = {}
        self._warnings: list[dict[str, Any]] = []
        self._stopped: dict[str, Any] | None = None
        self._kept_step: int | None = None
        self._next = self._last = self._checks = self._in_a_row = 0

    def _cannot_look(self, trainer: pl.Trainer) -> None:
        if self.select in CRITERIA:
            raise InputError(
                f"select={self.select!r} looks at images that the data module's `watched` names, and this one has "
                "none; use a TaskStream, or select='last'"
            )
        if trainer.is_global_zero:
            _log.warning("the data module has no `watched`: the guard sees nothing but the range of free coefficients")

    def _wanted_interval(self, trainer: pl.Trainer, module: pl.LightningModule) -> int:
        """Counted in forward passes of one image; the same on every process and after every resume."""
        stream = trainer.datamodule
        if self.every or not hasattr(stream, "watched"):
            return self.every or FLOOR
        tasks = len(module.tasks)
        look = tasks * self.images
        if stream.protocol.one_pass:  # other images each time, for the start and the experts as well
            look *= 3
        at_once = 1 if stream.schedule == "shuffled" else tasks
        step = 3 * stream.images_per_task * at_once * trainer.accumulate_grad_batches  # a backward is two forwards
        return max(FLOOR, math.ceil(look / (SHARE * step)))

    def _look_if_due(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step == self._last or self._stopped or (step < self._next and step != trainer.max_steps):
            return
        now = self._look(trainer, module)
        for logger in trainer.loggers if now else ():
            # `self.log` would repeat the values at every step until the next look. Lightning's rows count from 0.
            logger.log_metrics(_metrics(now), step - 1)

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Signals]:
        now, start = self._watch.compare(trainer, module)
        self._last, self._checks = trainer.global_step, self._checks + bool(now)
        alarms = judge(now, start, *_ranges(module))
        critical = [alarm for alarm in alarms if alarm.stop]
        # One collapsed task may hide in a good mean: such a state is never the best one.
        for name in self._best.keys() & CRITERIA.keys() if now and not critical else ():
            better = mean_change(now, start, name) * CRITERIA[name]
            self._note(name, better, trainer, module)
        self._in_a_row = self._in_a_row + 1 if critical else 0
        self._tell(alarms, trainer)
        soon = 0 < self._in_a_row < LOOKS_IN_A_ROW
        self._next = trainer.global_step + (min(SOON, self._interval) if soon else self._interval)
        if self._in_a_row == LOOKS_IN_A_ROW and self.on_collapse == "stop":
            self._stop(critical[0], trainer, module)
        return now

    def _keep(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        seen = self._checks or self.select == "oracle"  # where nothing was looked at, nothing can be chosen
        if self._stopped:
            self._kept_step = self._stopped["restored_step"]
        elif self.select in self._best and seen:
            self._kept_step = self._restore(self.select, module)
        else:
            self._kept_step = trainer.global_step

    def _note(self, name: str, score: float, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if name not in self._best or score > self._best[name][0]:
            self._best[name] = (score, trainer.global_step, _snapshot(module))

    def _tell(self, alarms: list[Alarm], trainer: pl.Trainer) -> None:
        known = {(warning["signal"], warning["task"]) for warning in self._warnings}
        for alarm in alarms:
            entry = {"step": trainer.global_step, "task": alarm.task, "signal": alarm.signal, "value": alarm.value}
            if len(self._warnings) < MOST_WARNINGS:
                self._warnings.append(entry)
            if (alarm.signal, alarm.task) not in known and trainer.is_global_zero:
                _log.warning("step %d: %s", trainer.global_step, alarm)

    def _stop(self, alarm: Alarm, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        back = self._restore("agreement", module)
        self._stopped = {"step": trainer.global_step, "reason": str(alarm), "restored_step": back}
        trainer.should_stop = True
        if trainer.is_global_zero:
            _log.warning(
                "stopped at step %d: the model collapses (%s). It is set back to step %d, where it agreed best with "
                "the experts; lower --model.lr, or bound the coefficients",
                *(trainer.global_step, alarm, back),
            )

    @torch.no_grad()
    def _restore(self, name: str, module: pl.LightningModule) -> int:
        _, step, state = self._best[name]
        for parameter, value in zip(module.learned, state):
            parameter.copy_(value)
        return step


def _snapshot(module: pl.LightningModule) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.learned]


def _ranges(module: pl.LightningModule) -> tuple[Range | None, Range | None]:
    """The coefficients' range now and at the start, None where it is bounded or there is nothing to show."""
    start, now = module.views.start, module.coefficients.display()
    if start is None or not module.coefficients.free:
        return None, None
    return _range(now.detach()), _range(start)


def _range(values: Tensor) -> Range:
    return float(values.min()), float(values.max())


def _metrics(now: dict[str, Signals]) -> dict[str, float]:
    """`train/<task>/<signal>`, then the means over tasks."""
    names = ("agreement", "js", "marginal", "norm")
    single = {f"train/{task}/{name}": getattr(ours, name) for task, ours in now.items() for name in names}
    means = {name: sum(getattr(ours, name) for ours in now.values()) / len(now) for name in names}
    return single | {f"train/{name}": value for name, value in means.items()}


def check_oracle(trainer: pl.Trainer, datamodule: Any, endless: bool = False) -> None:
    """InputError where `select="oracle"` would find no validation with labels within the run.

    Args:
        trainer: about to fit.
        datamodule: the data of the run, or None.
        endless: whether it is asked before the loaders are there, and they have no end.
    """
    if getattr(getattr(datamodule, "protocol", None), "one_pass", False):
        raise InputError("select='oracle' cannot choose a step of a single pass: each image's first prediction counts")
    images = getattr(datamodule, "images", {})
    for task in (task for task in images if images[task].labels is None):
        raise InputError(
            f"select='oracle' chooses by labels, and the images of task {task!r} have none; choose another"
        )
    every = trainer.val_check_interval if endless else trainer.val_check_batch
    every = math.inf if endless and isinstance(every, float) else every  # a share of a pass without end
    # Neither None nor a time says a number of steps.
    counted = isinstance(every, int | float)
    within = not counted or not 0 <= trainer.max_steps * trainer.accumulate_grad_batches < every
    if not within or not (endless or trainer.enable_validation):
        raise InputError(
            "select='oracle' keeps the step of the best validation, but this run has none; set "
            "--trainer.val_check_interval to some steps of its max_steps"
        )
