"""`am.fit`: a whole run from a script or a notebook, as `adaptive-merge fit` makes one."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytorch_lightning as pl
from jsonargparse import Namespace

from adaptive_merge.callbacks import watchers
from adaptive_merge.callbacks.guard.guard import Select
from adaptive_merge.cli.grid import arguments_of
from adaptive_merge.cli.session import TRAINER_DEFAULTS, GuardMode, Session, quiet
from adaptive_merge.cli.stopped import answering
from adaptive_merge.cli.trainer import check_trainer
from adaptive_merge.data.stream import TaskStream
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import AdaptiveMergeError, InputError
from adaptive_merge.limits import check_names
from adaptive_merge.process.signals import EXIT_INTERRUPTED, Preempted
from adaptive_merge.runs.folder import IfExists
from adaptive_merge.suites.base import Suite

__all__ = ["fit"]

_OPTION: Final = re.compile(r"--(\w+)\.([\w.]+)")
_ANSWERED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_FOLDER: Final = ("root", "name")  # of `--run`, which `folder` says at once


def fit(
    method: AdaptiveMerge | str,
    stream: TaskStream | None = None,
    folder: str | Path | None = None,
    *,
    if_exists: IfExists = "refuse",
    guard: GuardMode = "stop",
    select: Select = "last",
    report: bool = True,
    suite: Suite | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Adapt a module, score it, and leave a run folder; the content of its `results.json`.

    The run is that of `adaptive-merge fit`: lock and journal, metrics.csv, checkpoints/last.ckpt, results.json,
    coefficients.json, images.safetensors, report.html, the guard, the safeguards and the printed table. Only
    config.yaml is left out: it is a promise that the file alone builds the run again, and a module's parts may be any
    Python objects. What the run was is in its checkpoint, in plain words (`adaptive-merge inspect`), and
    `am.load_checkpoint` brings what it learned back into a module of the same parts.

    The module has learned when this returns, and predicts at once: `module(task, images)`. torch's, numpy's and
    Python's generators are seeded by the stream's seed. In a notebook a run takes one device. Ctrl-C, or the stop
    button, saves the end of the step and raises KeyboardInterrupt; a second one ends the process.

    Args:
        method: a module that has learned nothing yet; or the name of a recipe, or a configuration file, of which the
            command line makes a run with a config.yaml, to be read by `am.load_run`.
        stream: its images; none with a name.
        folder: of the run; with a name, the default is `runs/` and the recipe.
        if_exists: what to do with a folder that holds a run: nothing, go on from its last checkpoint to the same bits
            as a run that was never interrupted, or replace it.
        guard: what to do where the merge collapses: restore the best state and end, warn, or do not look.
        select: the step to keep, see `Guard`.
        report: write report.html.
        suite: that the module was made of, whose notes the results keep; a known backdoor of it is measured.
        settings: of a `pl.Trainer`, such as `max_steps=300` and `callbacks=[...]`; with a name, options of the
            command line without their dashes: `**{"data.images_per_task": 8, "trainer.max_steps": 300}`.

    Raises:
        InputError: a run is there already, or an argument cannot be used; nothing is changed then.
        RunStopped: the guard ended the run. The folder is complete, and the module is what was kept.
    """
    options = {"if_exists": if_exists, "guard": guard, "select": select, "report": report}
    with _interruptible(), _in_words(isinstance(method, str)):
        if isinstance(method, str):
            if stream is not None or suite is not None:
                raise InputError(f"the recipe {method!r} has images of its own: leave `stream` and `suite` out")
            return _by_name(method, folder, options, settings)
        if stream is None or folder is None:
            raise InputError("give the `stream` of images to adapt on, and a `folder` for the run")
        _check(method, stream, options, settings)
        with answering() as place, ExitStack() as held:
            session = Session(Path(folder), if_exists, held, time.perf_counter())
            place.folder = session.folder
            try:
                pl.seed_everything(stream.seed, workers=True, verbose=False)
                trainer = _trainer(session, method, guard, select, settings)
                place.launcher = trainer.strategy.launcher
                session.begin(trainer, method, stream, Namespace(**settings))
                trainer.fit(method, datamodule=stream, ckpt_path=session.checkpoint, weights_only=True)
                known = {"notes": suite.notes, "trigger": suite.trigger} if suite else {}
                return session.finish(trainer, method, stream, report=report, **known)
            except Exception:
                session.undo()
                raise


def _by_name(
    name: str, folder: str | Path | None, options: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    from adaptive_merge.cli.fit import run  # here, because LightningCLI takes seconds, and a module needs none

    place = {} if folder is None else {"run.root": str(Path(folder).parent), "run.name": Path(folder).name}
    values = {**settings, **place, **{f"run.{key}": value for key, value in options.items()}}
    return run(["fit", "--config", name, *arguments_of(json.loads(json.dumps(values, default=str)))])


def _check(module: Any, stream: Any, options: Mapping[str, Any], settings: dict[str, Any]) -> None:
    """Refuse what is no module, stream, option or setting; say of settings what they are by default."""
    if not isinstance(module, AdaptiveMerge) or not isinstance(stream, TaskStream):
        kinds = f"{type(module).__name__} and {type(stream).__name__}"
        raise InputError(f"am.fit takes an am.AdaptiveMerge, or a recipe's name, and an am.TaskStream; got {kinds}")
    for name, known in (("if_exists", ("refuse", "resume", "overwrite")), ("guard", ("stop", "warn", "off"))):
        if options[name] not in known:
            raise InputError(f"unknown {name} {options[name]!r}; choose {', '.join(map(repr, known))}")
    settings |= {"max_steps": -1} | TRAINER_DEFAULTS | settings
    # In a notebook, where other processes would be copies of this one.
    if hasattr(sys, "ps1") and settings.setdefault("devices", 1) not in (1, "1"):
        raise InputError(f"devices={settings['devices']!r}: a run in a notebook takes one; start a script for more")
    check_trainer(Namespace(**settings))


def _trainer(
    session: Session, module: AdaptiveMerge, guard: GuardMode, select: Select, settings: Mapping[str, Any]
) -> pl.Trainer:
    """The trainer of a run; module and folder have not met yet."""
    check_names(session.folder.parts[1:], "folder of a run", "--run.name")
    if not session.claim() and (module.global_step or module.begun is not None):
        raise InputError(
            "this module has learned already, and the run's results would say that it starts from there; make a new "
            "one, or go on with --run.if_exists resume in the folder that it was fitted in"
        )
    quiet()
    callbacks = settings.get("callbacks") or []
    given: Sequence[pl.Callback] = callbacks if isinstance(callbacks, list) else [callbacks]
    bar = settings.get("enable_progress_bar") is not False
    own = {"logger": session.loggers(settings.get("logger")), "callbacks": watchers(given, progress=bar)}
    trainer = pl.Trainer(**{"default_root_dir": str(session.folder), **settings, **own})
    session.equip(trainer, guard, select)
    return trainer


@contextmanager
def _in_words(dotted: bool) -> Iterator[None]:
    """Messages name the arguments of `fit` where they would name options of the command line.

    Args:
        dotted: whether options are given by their dotted names.
    """

    def name(option: re.Match[str]) -> str:
        if option[1] == "run":
            return "folder" if option[2] in _FOLDER else option[2]
        return f"{option[1]}.{option[2]}" if dotted else option[2]

    try:
        yield
    except AdaptiveMergeError as error:
        error.args = (_OPTION.sub(name, str(error)),)
        raise


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C leaves as Python has it, with the signals as they were, for this process may go on."""
    before = {number: signal.getsignal(number) for number in _ANSWERED}
    try:
        yield
    except Preempted as stopped:
        if stopped.code != EXIT_INTERRUPTED:
            raise
        for number, handler in before.items():
            with suppress(ValueError):  # not the main thread, where nobody answered
                signal.signal(number, handler or signal.SIG_DFL)
        raise KeyboardInterrupt from stopped
