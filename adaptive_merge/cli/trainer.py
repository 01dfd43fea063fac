"""Settings that Lightning's trainer refuses, or takes although they cannot work here, and what to say instead."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from typing import Any, Final

from jsonargparse import Namespace

from adaptive_merge.cli.door import message_of, origin
from adaptive_merge.cli.hints import explain
from adaptive_merge.errors import AdaptiveMergeError, InputError

__all__ = ["check_end", "check_trainer", "refusal", "restoring"]

_HALF: Final = "the merge and its gradients need float32; choose 32-true, or bf16-mixed or 16-mixed for a faster tower"
# Option → whether a value is refused, and what is to be done instead.
_REFUSED: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "precision": (
        lambda value: (str(value).endswith("-true") and value != "32-true") or str(value) in ("64", "bf16-true"),
        _HALF,
    ),
    "strategy": (
        lambda value: isinstance(value, str) and value.endswith(("spawn", "fork", "notebook")),
        "processes are started anew, not copied; choose ddp",
    ),
    "val_check_interval": (
        lambda value: isinstance(value, float) or (isinstance(value, int) and value < 1),
        "a stream has no end to take a fraction of; give a whole number of steps, at least 1",
    ),
    "limit_train_batches": (
        lambda value: isinstance(value, float) and value != 1.0,
        "a stream has no end to take a fraction of; give --trainer.max_steps",
    ),
    "overfit_batches": (
        lambda value: bool(value),
        "each step draws its images anew; choose fewer with --data.protocol Holdout",
    ),
    "accumulate_grad_batches": (lambda value: value < 1, "give a whole number, at least 1"),
    "check_val_every_n_epoch": (
        lambda value: value is not None,
        "a stream is one epoch; give --trainer.val_check_interval in steps",
    ),
    "gradient_clip_val": (lambda value: value is not None and not 0 <= value < float("inf"), "give a number from 0"),
    "log_every_n_steps": (lambda value: value is not None and value < 1, "give a whole number, at least 1"),
    "barebones": (lambda value: bool(value), "a run keeps its log and its last checkpoint; leave the option out"),
    "num_sanity_val_steps": (lambda value: value is not None and value < 0, "give a number from 0"),
}


def check_trainer(trainer: Namespace) -> None:
    """InputError for the first setting that cannot work here.

    Args:
        trainer: as parsed; what a script leaves out is Lightning's default.
    """
    for name, (is_wrong, remedy) in _REFUSED.items():
        value = trainer.get(name)
        if name in trainer and is_wrong(value):
            raise InputError(f"--trainer.{name} {value}: {remedy}")


def check_end(trainer: Namespace, endless: bool) -> None:
    """InputError where nothing would end a run.

    Args:
        trainer: as parsed; a time limit and callbacks that stop early do end it.
        endless: whether the stream goes on as long as it is asked.
    """
    callbacks = trainer.get("callbacks")
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    stops = any("EarlyStopping" in (name := str(one)) or "Timer" in name for one in callbacks)
    unbounded = trainer.get("max_steps") == -1 and trainer.get("max_epochs") in (-1, None)
    if unbounded and endless and not (trainer.get("max_time") or trainer.get("fast_dev_run") or stops):
        raise InputError(
            "--trainer.max_steps: nothing ends this run; give a number of steps (trainer: {max_steps: 300} in a "
            "configuration), or a --trainer.max_time"
        )


def refusal(error: Exception, settings: Namespace) -> str | None:
    """What to say of an error that was raised while the parts of a configuration were built; None: our own fault.

    Args:
        settings: of the subcommand, which tell whose argument it is.
    """
    cause = error.__cause__
    if origin(error) == "jsonargparse" and isinstance(cause, Exception) and origin(cause) != "jsonargparse":
        error = cause
    if origin(error) == "jsonargparse" and not isinstance(cause, AdaptiveMergeError):
        return explain(error, (), _holder(str(error), settings))
    message = message_of(error)
    if message is None or origin(error) not in ("pytorch_lightning", "lightning_fabric"):
        return message
    return f"{_named(str(error), settings.trainer)}{message}"


def restoring(error: Exception) -> bool:
    """Whether others raised it while the trainer took over what a checkpoint holds."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = any(code.co_name.startswith(("restore", "_restore", "resume")) for code in frames)
    return inside and not isinstance(error, (AdaptiveMergeError, OSError, MemoryError))


def _holder(text: str, settings: Namespace) -> str:
    """The setting whose class a message is about."""
    path = re.search(r"class_path '([^']+)'", text)
    keys = [key for key, value in settings.items() if path and value == path[1] and key.endswith(".class_path")]
    return keys[0].removesuffix(".class_path") if keys else ""


def _named(text: str, trainer: Namespace) -> str:
    """The options of the trainer that a message is about: those that it names, else those whose value it quotes."""
    values = {key: value for key, value in vars(trainer).items() if value is not None}
    places = {key: match.start() for key in values if (match := re.search(rf"\b{key}\b", text))}
    named = sorted(places, key=lambda key: places[key])
    quoted = [key for key, value in values.items() if isinstance(value, str) and value.lower() in text.lower()]
    near = {"gpu": "accelerator", "tpu": "accelerator", "xla": "accelerator", "transformer_engine": "precision"}
    guessed = [option for word, option in near.items() if word in text.lower()]
    options = list(dict.fromkeys(named[:1] or quoted[:1] or guessed[:1]))
    return f"--trainer.{options[0]} {values.get(options[0], '')}: " if options else ""
