"""`load_run`: the module of a run folder or of a configuration, built from weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.cli import LightningArgumentParser

from adaptive_merge.cli.configs import Layer, read_layers
from adaptive_merge.cli.fit import AdaptiveMergeCLI
from adaptive_merge.data.stream import TaskStream
from adaptive_merge.engine.begin import FILE, load_begun
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import InputError, MissingFileError, did_you_mean
from adaptive_merge.runs.checkpoint import read_checkpoint

__all__ = ["SOURCES", "load_checkpoint", "load_run", "load_run_and_data"]

SOURCES = (
    "a run folder (the adapted merge), or configurations as for --config: files or names of recipes, of which later "
    "ones override earlier ones (the merge that they start from)"
)
_PARTS = ("seed_everything", "suite", "model", "data")
_OF_FIT = ("ckpt_path", "weights_only")  # which only `fit` itself takes


def load_run(*sources: str) -> AdaptiveMerge:
    """The module of a run or of configurations, see `load_run_and_data`."""
    return load_run_and_data(*sources)[0]


def load_run_and_data(*sources: str) -> tuple[AdaptiveMerge, TaskStream]:
    """The module of a run folder with its learned values, or of configurations as it starts; and the stream.

    No image is read before the stream is asked for it.

    Args:
        sources: one run folder (its `config.yaml` and `checkpoints/last.ckpt` are read), or YAML files and names of
            recipes that ship with the package.
    """
    folder = Path(sources[0])
    if not folder.is_dir():
        layers = [_settings(layer) for layer in read_layers(sources)]
        return _build(layers, " ".join(sources))
    if len(sources) > 1:
        raise InputError(f"{folder} is a run folder, which stands alone; leave out {' '.join(sources[1:])}")
    if not (folder / "config.yaml").is_file() and (folder / "checkpoints" / "last.ckpt").is_file():
        raise MissingFileError(
            f"{folder} has no config.yaml, as runs of am.fit(module, ...): only the code that made its module knows "
            f"its parts. Make the module in the same way, then am.load_checkpoint(module, {str(folder)!r})"
        )
    if not (folder / "config.yaml").is_file():
        raise MissingFileError(f"{folder / 'config.yaml'}: there is no such file; give a run folder or a configuration")
    (layer,) = read_layers([str(folder / "config.yaml")])
    # Of a run only what its module is made of: its loggers and callbacks need not be installed here.
    settings = {key: value for key, value in _settings(layer).items() if key in _PARTS}
    module, stream = _build([settings], layer.name)
    return load_checkpoint(module, folder), stream


def load_checkpoint(module: AdaptiveMerge, folder: str | Path) -> AdaptiveMerge:
    """Bring what a run learned into a module of the same parts, in place, and return it; it predicts at once.

    Args:
        module: made as that of the run was, and not fitted yet.
        folder: of the run: its `checkpoints/last.ckpt` is read, and the solution of its start, where it has one.

    Raises:
        MissingFileError: no checkpoint is there.
        InputError: damaged, or of a module of other parts; the first that differs is named.
    """
    folder = Path(folder)
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    if module.start is not None and module.begun is None:
        module.go_on_from(load_begun(folder / FILE, module.experts))
    module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise InputError(
            f"{path}: does not fit the module, or the run's config.yaml that it was made of ({error}); restore both "
            "files, or make the module as the run's was"
        ) from error
    return module


def _build(layers: Sequence[dict[str, Any]], name: str) -> tuple[AdaptiveMerge, TaskStream]:
    arguments: list[str] = []
    for settings in layers:
        of_ours = {key: value for key, value in settings.items() if key not in _OF_FIT}
        arguments += ["--config", yaml.safe_dump(of_ours)]
    try:
        cli = _ModuleAlone(args=[*arguments, "--suite.lazy=true"], run=False)
    except TypeError as error:
        raise InputError(f"{name}: not a configuration of this program ({error})") from error
    return cli.model, cli.datamodule


class _ModuleAlone(AdaptiveMergeCLI):
    """Parses all that `fit` parses, and makes the module of it; trainer, callbacks and loggers stay the defaults."""

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        super().parse_arguments(parser, args)
        self.config.trainer = parser.get_defaults().trainer


def _settings(layer: Layer) -> dict[str, Any]:
    if not isinstance(layer.settings, dict) or not layer.settings:
        raise InputError(f"{layer.name}: not a configuration of this program; it holds no settings")
    known = (*_PARTS, *_OF_FIT, "trainer", "run")
    for key in (str(key) for key in layer.settings if key not in known):  # an empty group the parser would let pass
        raise InputError(f"{layer.name}: Option {key!r} is not accepted{did_you_mean(key, known)}")
    return layer.settings
