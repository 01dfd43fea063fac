"""`Dashboard`: figures, the table of results and the settings of a run in wandb, TensorBoard and the like."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.utilities import rank_zero_only

from adaptive_merge.callbacks.guard.guard import Guard
from adaptive_merge.callbacks.record.history import History
from adaptive_merge.callbacks.show.sturdy import Sturdy
from adaptive_merge.engine.views import percent
from adaptive_merge.errors import InputError
from adaptive_merge.privacy import scrub

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Dashboard"]

_log = logging.getLogger(__name__)
_VIEWS = ("pretrained", "individual", "initial", "adapted")


class Dashboard(pl.Callback):
    """Log figures every few validations and after the last scoring, to every logger that takes images.

    Scalars reach the loggers by themselves. Nothing is drawn where no logger takes images, and whatever fails here
    leaves one warning and the run alone. Where labels choose the step that is kept, all names begin with `ORACLE/`;
    tasks that were not merged are called so.

    Args:
        every: validations within `fit` between two sets of figures.
    """

    def __init__(self, every: int = 5) -> None:
        if every < 1:
            raise InputError(f"`every` must be at least 1, got {every}")
        self.every = every
        self._validations, self._failed = 0, False
        self._protected: dict[Logger, Sturdy] = {}
        self._scores: dict[str, dict[str, float]] = defaultdict(dict)

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the resolved configuration of the run folder, without secrets."""
        self._validations = 0
        self._scores.clear()
        path = Path(trainer.logger.log_dir or "") / "config.yaml" if _has_folder(trainer.logger) else None
        if path is None or not path.is_file():
            return
        settings = scrub(yaml.safe_load(path.read_text()))
        for logger in _image_loggers(trainer):
            self._attempt(logger, lambda logger=logger: logger.log_hyperparams(settings))

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Within `fit` every few times; in the scoring passes after the last of the four views."""
        if trainer.sanity_checking:
            return
        self._collect(trainer, pl_module)
        if trainer.state.fn == "validate":
            if pl_module.view == _VIEWS[-1]:
                self._publish(trainer, self._final(trainer, pl_module), self._table(pl_module))
            return
        self._validations += 1
        if self._validations % self.every == 0:
            self._publish(trainer, self._running(trainer, pl_module), None)

    def _collect(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for task in module.scored_tasks:
            value = trainer.callback_metrics.get(f"{module.view}/{task}/{module.measure}")
            if value is not None:
                name = f"unseen: {task}" if task in module.unseen else task
                self._scores[name][module.view] = float(value)

    def _running(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[tuple[str, Figure]]:
        from adaptive_merge.report.coefficient_figures import coefficient_heatmap, coefficient_trajectories

        shown, groups = module.coefficients.display(), module.coefficients.groups
        if shown is None:
            return
        yield "coefficients", coefficient_heatmap(module.tasks, groups, shown.detach().float().cpu().numpy())
        history = next((callback for callback in trainer.callbacks if isinstance(callback, History)), None)
        if history is not None and len(history.steps) > 1:
            samples = [value.float().cpu().numpy() for value in history.coefficients]
            yield "trajectories", coefficient_trajectories(module.tasks, history.steps, samples)

    def _final(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[tuple[str, Figure]]:
        from adaptive_merge.report.figures import accuracy_bars, gap_recovered

        yield from self._running(trainer, module)
        if scores := self._complete():
            yield module.measure, accuracy_bars(scores, module.measure)
            yield "gap", gap_recovered(scores)

    def _complete(self) -> dict[str, dict[str, float]]:
        return {task: row for task, row in self._scores.items() if all(view in row for view in _VIEWS)}

    def _table(self, module: pl.LightningModule) -> list[list[Any]]:
        return [[task, *(row[view] for view in _VIEWS)] for task, row in self._complete().items()]

    def _publish(
        self, trainer: pl.Trainer, figures: Iterator[tuple[str, Figure]], table: list[list[Any]] | None
    ) -> None:
        loggers = _image_loggers(trainer)
        if not loggers or self._failed:
            return
        try:
            from adaptive_merge.report.style import to_array

            images = {name: to_array(figure) for name, figure in figures}
        except Exception as error:  # a figure must not end hours of adaptation
            self._failed = True
            _log.warning("figures for the dashboard could not be drawn and are left out: %r", error)
            return
        step, prefix = trainer.global_step, "ORACLE/" if _by_labels(trainer) else ""
        for logger in loggers:
            self._attempt(logger, lambda logger=logger: _send(_inner(logger), images, table, step, prefix))

    def _attempt(self, logger: Logger, action: Any) -> None:
        """A bare logger that fails is protected from here on, so that it is asked no more."""
        sturdy = logger if isinstance(logger, Sturdy) else self._protected.setdefault(logger, Sturdy(logger))
        sturdy.attempt(action)


def _by_labels(trainer: pl.Trainer) -> bool:
    return any(isinstance(callback, Guard) and callback.select == "oracle" for callback in trainer.callbacks)


def _send(logger: Logger, images: Mapping[str, Any], table: list[list[Any]] | None, step: int, prefix: str) -> None:
    columns = ["task", *_VIEWS]
    for name, image in images.items():
        if hasattr(logger, "log_image"):
            logger.log_image(f"{prefix}figures/{name}", [image], step=step)
        else:
            logger.experiment.add_image(f"{prefix}figures/{name}", image, step, dataformats="HWC")
    if table and hasattr(logger, "log_table"):
        logger.log_table(f"{prefix}results", columns=columns, data=table, step=step)
    elif table and hasattr(logger.experiment, "add_text"):
        logger.experiment.add_text(f"{prefix}results", _markdown(columns, table), step)
    logger.save()


def _markdown(columns: list[str], table: list[list[Any]]) -> str:
    """A table whose names cannot end a cell or open a tag."""
    rows = [[_escape(str(row[0])), *(f"{percent(value):.1f} %" for value in row[1:])] for row in table]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *rows])


def _escape(name: str) -> str:
    text = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(text.split()).replace("|", "&#124;").replace("`", "&#96;")


def _image_loggers(trainer: pl.Trainer) -> list[Logger]:
    return [
        logger
        for logger in trainer.loggers
        if not isinstance(_inner(logger), CSVLogger)
        and not getattr(logger, "dead", False)
        and (hasattr(_inner(logger), "log_image") or hasattr(logger.experiment, "add_image"))
    ]


def _inner(logger: Logger) -> Logger:
    return logger.inner if isinstance(logger, Sturdy) else logger


def _has_folder(logger: Logger | None) -> bool:
    return getattr(logger, "log_dir", None) is not None
