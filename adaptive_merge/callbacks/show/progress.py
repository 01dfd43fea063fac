"""`Progress`: a live bar on a terminal, a few plain lines in a log file."""

from __future__ import annotations

import math
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from adaptive_merge.callbacks.record.rate import Rate, count_images
from adaptive_merge.engine.views import percent
from adaptive_merge.errors import InputError

__all__ = ["Progress"]

_VIEW_WORDS = {
    "pretrained": "pre-trained model",
    "individual": "individual experts",
    "anchor": "static merge",
    "initial": "merge before adaptation",
    "adapted": "adapted merge",
}


class Progress(ProgressBar):
    """Show loss, normalised entropy, images a second and the time left while a run adapts; a short bar while it scores.

    Where the output is no terminal, lines are plain and few: `lines` over the whole run, however long. Metrics are
    read from the device only when something is shown.

    Args:
        lines: plain lines of an adaptation, when the output is not a terminal.
        refresh: seconds between updates of the live bar.
        console: where to write, for tests.
    """

    def __init__(self, lines: int = 25, refresh: float = 0.5, console: Console | None = None) -> None:
        super().__init__()
        if lines < 1 or refresh <= 0:
            raise InputError(f"`lines` must be at least 1 and `refresh` above 0, got {lines} and {refresh}")
        self.lines, self.refresh = lines, refresh
        self._console, self._enabled = console, True
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing, as on all ranks but one."""
        self._enabled = False
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Write above the bar."""
        if self._enabled:
            self.console.print(*args, **kwargs)

    @property
    def console(self) -> Console:
        """Made late, so that it is the output of now."""
        if self._console is None:
            self._console = Console()
        return self._console

    def on_start_progress(self, trainer: pl.Trainer, done: int, total: int) -> None:
        """A start has solved so many of its blocks."""
        if not self._enabled:
            return
        if done <= 1 or self._bar is None:
            self._began = time.monotonic() if done <= 1 else self._began
            self._open("solving the start", total, done)
        left = (
            f"{_clock((time.monotonic() - self._began) / max(done - 1, 1) * (total - done))} left" if done > 1 else ""
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, words=left)
        elif done == total or done % max(1, total // 5) == 0:
            self._say(f"start: block {done}/{total}  {left}")
        if done == total:
            self._close()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting."""
        self._total = trainer.max_steps if trainer.max_steps > 0 else None
        self._first, self._began, self._shown, self._last = trainer.global_step, time.monotonic(), 0.0, -1
        self._every = max(1, math.ceil((self._total or 10_000) / self.lines))
        self._rate, self._speed = Rate(), float("nan")
        self._open("adapting", self._total, trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show what is due."""
        self._rate.add(count_images(batch) * trainer.world_size)
        if not self._enabled:
            return
        step, now = trainer.global_step, time.monotonic()
        if self._bar is not None and now - self._shown >= self.refresh:
            self._shown = now
            self._bar.update(self._task, completed=step, words=self._words(trainer, step))
        elif not self.console.is_terminal and step != self._last and (step % self._every == 0 or step == self._total):
            self._last = step
            self._say(f"step {step}{f'/{self._total}' if self._total else ''}  {self._words(trainer, step)}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last numbers stay on the screen."""
        if self._bar is not None and self._enabled:
            self._bar.update(self._task, completed=trainer.global_step, words=self._words(trainer, trainer.global_step))
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A bar of its own for a scoring pass; validation within the adaptation is silent."""
        if trainer.state.fn == "fit":
            self._rate.pause()
        elif self._enabled:
            words = _VIEW_WORDS.get(getattr(pl_module, "view", ""), "model")
            self._open(f"scoring the {words}", sum(_counts(trainer.num_val_batches)), 0, passing=True)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """One batch further."""
        if trainer.state.fn != "fit" and self._bar is not None:
            self._bar.advance(self._task)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One plain line for a log file, nothing on a terminal."""
        if trainer.state.fn == "fit":
            self._rate.resume()
            return
        self._close()
        view = getattr(pl_module, "view", "adapted")
        measure = getattr(pl_module, "measure", "accuracy")
        value = trainer.callback_metrics.get(f"{view}/{measure}")
        if self._enabled and not self.console.is_terminal and value is not None:
            words = "" if measure == "accuracy" else f" {measure}"
            self._say(f"scored the {_VIEW_WORDS.get(view, view)}: {percent(float(value)):.1f} %{words}")

    def _words(self, trainer: pl.Trainer, step: int) -> str:
        """Loss, entropy, images a second, time left."""
        metrics = trainer.progress_bar_metrics
        if math.isfinite(speed := self._rate.read()):
            # Half of the old value: the number is readable, and follows a change within a few looks.
            self._speed = speed if math.isnan(self._speed) else 0.5 * (self._speed + speed)
        named = (("loss", "train/loss"), ("entropy", "train/entropy"))
        words = [f"{name} {metrics[key]:.3f}" for name, key in named if isinstance(metrics.get(key), (int, float))]
        if math.isfinite(self._speed):
            words.append(f"{self._speed:,.0f} images/s" if self._speed >= 10 else f"{self._speed:.1f} images/s")
        done = step - self._first
        if self._total and done > 0:
            left = (time.monotonic() - self._began) / done * (self._total - step)
            words.append(
                f"{_clock(left)} left" if step < self._total else f"took {_clock(time.monotonic() - self._began)}"
            )
        return "  ".join(words)

    def _open(self, name: str, total: int | None, completed: int, passing: bool = False) -> None:
        self._close()
        if not self._enabled or not self.console.is_terminal:
            return
        words = TextColumn("[dim]{task.fields[words]}", markup=True)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(24),
            TextColumn("{task.completed}/{task.total}"),
        )
        self._bar = Bar(
            *columns,
            *((TimeElapsedColumn(),) if passing else (words,)),
            console=self.console,
            transient=passing,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(name, total=total, completed=completed, words="")
        self._bar.start()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _counts(batches: Any) -> list[int]:
    values = batches if isinstance(batches, list) else [batches]
    return [int(value) for value in values if math.isfinite(value)]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
