"""`load_run`: the module of a run folder or of a configuration, built from weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from adaptive_merge.cli.configs import read_layers
from adaptive_merge.cli.fit import AdaptiveMergeCLI
from adaptive_merge.engine.begin import FILE, load_begun
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.runs.checkpoint import read_checkpoint

__all__ = ["SOURCES", "load_run"]

SOURCES = (
    "a run folder (the adapted merge), or configurations as for --config: files or names of recipes, of which later "
    "ones override earlier ones (the merge that they start from)"
)
_PARTS = ("seed_everything", "suite", "model", "data")


def load_run(*sources: str) -> AdaptiveMerge:
    """The module of a run folder with its learned values, or of configurations as it starts; no image is read.

    Args:
        sources: one run folder (its `config.yaml` and `checkpoints/last.ckpt` are read), or YAML files and names of
            recipes that ship with the package.
    """
    folder = Path(sources[0])
    if not folder.is_dir():
        return _build(*sources)
    if len(sources) > 1:
        raise InputError(f"{folder} is a run folder, which stands alone; leave out {' '.join(sources[1:])}")
    if not (folder / "config.yaml").is_file():
        raise MissingFileError(f"{folder / 'config.yaml'}: there is no such file; give a run folder or a configuration")
    module = _build(str(folder / "config.yaml"))
    if module.start is not None:
        module.go_on_from(load_begun(folder / FILE, module.experts))
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise InputError(f"{path}: does not fit the run's config.yaml ({error}); restore both files") from error
    return module


def _build(*configs: str) -> AdaptiveMerge:
    arguments: list[str] = []
    for layer in read_layers(configs):
        arguments += ["--config", yaml.safe_dump(_parts(layer.name, layer.settings))]
    try:
        return AdaptiveMergeCLI(args=[*arguments, "--suite.lazy=true"], run=False).model
    except TypeError as error:
        raise InputError(f"{' '.join(configs)}: not a configuration of this program ({error})") from error


def _parts(name: str, settings: Any) -> dict[str, Any]:
    """What the module is made of; trainer, callbacks and loggers are not asked for."""
    if not isinstance(settings, dict):
        raise InputError(f"{name}: not a configuration of this program; it holds no settings")
    return {key: settings[key] for key in _PARTS if key in settings}
