"""All that this package touches behind the public names of other libraries, with the versions where it was seen.

Nothing else reaches for a private name of another library (ruff's SLF001 sees to it), and tests/test_upstream.py is
the first to fail where a library changes one of these.
"""

from __future__ import annotations

import argparse
import pickle  # noqa: S403
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from pytorch_lightning.loggers import WandbLogger
    from pytorch_lightning.strategies import DDPStrategy, Strategy

__all__ = [
    "OVERRIDDEN",
    "DispatchMode",
    "PythonUnpickler",
    "add_ddp_options",
    "bound_timeout",
    "is_hollow",
    "is_offline",
    "keep_samplers",
    "labelled_files",
    "leave_signals",
    "options_of",
    "redirect",
    "shapes_alone",
    "timeout_of",
    "version_of",
    "wandb_options",
]

# Hooks with private names that classes of this package override: class → names.
OVERRIDDEN: Final[dict[str, tuple[str, ...]]] = {
    # torch 2.6 to 2.14, MergedBackbone and AdaptedModel: the bank moves with the module.
    "torch.nn.Module": ("_apply",),
    # Lightning 2.6, the command line: a checkpoint does not choose the configuration; a grid builds and runs nothing.
    "pytorch_lightning.cli.LightningCLI": ("_parse_ckpt_path", "_set_seed", "_run_subcommand"),
}


# Hears of every operation while it is entered, and of what it gives (torch 2.6 to 2.14).
DispatchMode = TorchDispatchMode

# The unpickler that is written in Python (3.11 to 3.14): its `dispatch`, opcode → method, lets a subclass look at the
# `stack` before an opcode takes from it.
PythonUnpickler = pickle._Unpickler  # type: ignore[attr-defined]


def version_of(tensor: Tensor) -> int:
    """A count that grows with every change in place (torch 2.6 to 2.14; autograd's own)."""
    return tensor._version


def timeout_of(strategy: Strategy) -> timedelta | None:
    """How long a strategy's processes wait for each other; None where it has none (Lightning 2.6; no getter)."""
    return getattr(strategy, "_timeout", None)


def bound_timeout(strategy: Strategy, patience: timedelta) -> None:
    """Another timeout in place of the default one (Lightning 2.6; the trainer's shortcuts such as `"ddp"` take none).

    A timeout that the user gave is kept, one that equals the default too.
    """
    # The very object, not an equal one: it is the default of the strategies' argument.
    if timeout_of(strategy) is default_pg_timeout:
        strategy._timeout = patience  # type: ignore[attr-defined]


def add_ddp_options(strategy: DDPStrategy, options: Mapping[str, Any]) -> None:
    """Arguments for torch's DDP, under those that the user gave (Lightning 2.6; the same shortcuts)."""
    strategy._ddp_kwargs = {**options, **strategy._ddp_kwargs}


def leave_signals(trainer: Trainer) -> None:
    """Lightning puts no handlers of its own over those that are there (Lightning 2.6; no setting).

    Its handlers save and communicate in the middle of a step, and write checkpoints that it then prefers to ours.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """Every option that a parser knows, such as `--trainer.max_steps` (argparse; no getter)."""
    return list(parser._option_string_actions)


def keep_samplers(trainer: Trainer) -> None:
    """Let the trainer take loaders as they are, whatever `use_distributed_sampler` says (Lightning 2.6; no setter)."""
    trainer._accelerator_connector.use_distributed_sampler = False


def wandb_options(logger: WandbLogger) -> dict[str, Any]:
    """What the logger will hand to `wandb.init` when it is first used; may be changed (Lightning 2.6; no getter)."""
    return logger._wandb_init


def is_offline(logger: WandbLogger) -> bool:
    """Whether `WandbLogger(offline=True)` was said (Lightning 2.6)."""
    return logger._offline


def redirect(logger: WandbLogger) -> None:
    """Let the logger's own folder, id and name follow changed options (Lightning 2.6 copies them when it is made)."""
    options = wandb_options(logger)
    logger._save_dir, logger._id, logger._name = options["dir"], options["id"], options["name"]
    if options.get("mode") == "offline":
        # With this, the logger would set an environment variable that wandb then warns about.
        logger._offline = False


def labelled_files(dataset: Any) -> list[tuple[Path, int]]:
    """File and label of each image of a torchvision data set of files, undecoded (torchvision 0.21 to 0.29).

    It keeps the pairs as `_samples`, or apart as `_labels` and `_images` or `_image_files`.
    """
    if hasattr(dataset, "_samples"):
        pairs = dataset._samples
    else:
        pairs = zip(dataset._image_files if hasattr(dataset, "_image_files") else dataset._images, dataset._labels)
    return [(Path(path), int(label)) for path, label in pairs]


@cache
def shapes_alone() -> AbstractContextManager[Any]:
    """Tensors made in here, or of those, have shape, type and device and no numbers (torch 2.6 to 2.14).

    Unlike those on the meta device they go the way that a CPU's go, such as its own kernel of attention. What depends
    on numbers is a RuntimeError.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # here, because it takes most of a second

    class ShapesAlone(FakeTensorMode):
        # Else torch looks for the driver of a GPU in every operation, which is a quarter of the time.
        avoid_device_init = True

    return ShapesAlone(allow_non_fake_inputs=True)


def is_hollow(tensor: Any) -> bool:
    """Whether a tensor was made in `shapes_alone`."""
    return type(tensor).__name__ == "FakeTensor"
