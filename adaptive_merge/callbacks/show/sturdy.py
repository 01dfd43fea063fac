"""`Sturdy`: any Lightning logger, made unable to stop a training run, and quiet about secrets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from pytorch_lightning.loggers.logger import DummyExperiment, Logger
from pytorch_lightning.utilities import rank_zero_only

from adaptive_merge.privacy import scrub

__all__ = ["Sturdy"]

_log = logging.getLogger(__name__)


class Sturdy(Logger):
    """Hand everything on to a logger until it fails; then warn once and drop what follows.

    A dashboard that cannot be reached, a wrong key or a full disk cost the dashboard, not the run.

    Args:
        logger: the logger to protect.
        prepare: called before the logger's experiment is first opened.
    """

    def __init__(self, logger: Logger, prepare: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.inner = logger
        self.dead = False
        self._prepare = prepare

    @property
    def name(self) -> str | None:
        """The inner logger's name."""
        return self.attempt(lambda: self.inner.name)

    @property
    def version(self) -> int | str | None:
        """The inner logger's version."""
        return self.attempt(lambda: self.inner.version)

    @property
    def save_dir(self) -> str | None:
        """Where the inner logger writes."""
        return self.attempt(lambda: self.inner.save_dir)

    @property
    def log_dir(self) -> str | None:
        """Where the inner logger writes this run."""
        return self.attempt(lambda: getattr(self.inner, "log_dir", None))

    @property
    def experiment(self) -> Any:
        """The inner logger's experiment; a dummy that takes every call where that one cannot be opened."""
        if self._prepare is not None and rank_zero_only.rank == 0:
            prepare, self._prepare = self._prepare, None
            self.attempt(prepare)
        experiment = self.attempt(lambda: self.inner.experiment)
        return DummyExperiment() if experiment is None else experiment

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Scalars of a step."""
        self.attempt(lambda: self.inner.log_metrics(metrics, step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Settings, without secrets."""
        settings = scrub(params if isinstance(params, dict) else vars(params))
        self.attempt(lambda: self.inner.log_hyperparams(settings, *args, **kwargs))

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        """The model's graph."""
        self.attempt(lambda: self.inner.log_graph(*args, **kwargs))

    def save(self) -> None:
        """Write what is buffered."""
        self.attempt(lambda: self.inner.save())

    def finalize(self, status: str) -> None:
        """The end of a stage."""
        self.attempt(lambda: self.inner.finalize(status))

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """A checkpoint was written."""
        self.attempt(lambda: self.inner.after_save_checkpoint(checkpoint_callback))

    def attempt(self, action: Callable[[], Any]) -> Any:
        """The result of an action on the inner logger, or None once it has failed."""
        if self.dead:
            return None
        try:
            return action()
        except Exception as error:  # whatever a third party raises
            self.dead = True
            kind = type(self.inner).__name__
            _log.warning("%s failed and is left out from here on; the run goes on: %r", kind, scrub(str(error)))
            return None
