"""A grid of settings: what `tune` and `submit` are asked to run, which `fit` each combination is, what is done."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adaptive_merge.cli.fit import AdaptiveMergeCLI
from adaptive_merge.errors import AdaptiveMergeError, InputError
from adaptive_merge.limits import parse_yaml, read_yaml
from adaptive_merge.privacy import scrub
from adaptive_merge.runs.checkpoint_io import check_writable
from adaptive_merge.runs.folder import RUN_FILES

__all__ = ["Grid", "Trial", "arguments_of", "parse_grid", "plan", "settings_of", "without"]

_KEY: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_LONGEST: Final = 80  # characters of a folder's name
# Settings that say where a run lies or what it is scored on: runs that differ in these are not ranked together.
_NOT_RANKED: Final = ("config", "suite", "data.protocol", "data.corruption")
_OF_THE_FOLDER: Final = ("run.root", "run.name", "run.if_exists", "run.report", "slurm", "ckpt_path", "weights_only")
# Settings that do not make a finished run another one; the stream's seed follows seed_everything and is not written.
_NOT_COMPARED: Final = (
    "data.seed",
    *("config", "trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.devices", "trainer.num_nodes"),
    *_OF_THE_FOLDER,
)

Grid = dict[str, list[Any]]
"""Setting → the values to try."""


@dataclass(frozen=True)
class Trial:
    """One combination: its values, the arguments and settings of its `fit`, its folder, and whether it is to run."""

    values: dict[str, Any]
    arguments: list[str]
    settings: dict[str, Any]
    folder: Path
    pending: bool

    @property
    def name(self) -> str:
        """The values for people."""
        return " ".join(f"{key}={_text(value)}" for key, value in self.values.items())


def parse_grid(varied: Sequence[str], ranked: bool = True) -> Grid:
    """Setting → values, of `KEY=A,B,...`; a value is written as in YAML, so that lists, mappings and strings work.

    Args:
        varied: the settings.
        ranked: whether the runs have to be comparable.

    Raises:
        InputError: there is none to rank, one is malformed or named twice, or it is not for a grid.
    """
    if ranked and not varied:
        raise InputError("nothing to tune; add --vary KEY=A,B,... such as --vary model.lr=0.0003,0.001,0.003")
    grid: Grid = {}
    for text in varied:
        key, equals, listed = text.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise InputError(f"--vary {text}: write KEY=A,B,... such as --vary model.lr=0.0003,0.001,0.003")
        if _among(key, _OF_THE_FOLDER):
            raise InputError(f"--vary {key}: it is one for all runs; give it once, without --vary")
        if ranked and _among(key, _NOT_RANKED):
            raise InputError(
                f"--vary {key}: runs that differ in it cannot be ranked together; start a tuning of its own for each "
                "value, with another --run.name"
            )
        if key in grid:
            raise InputError(f"--vary {key} is there twice; give all its values at once: --vary {key}=A,B,...")
        try:
            values = parse_yaml(f"[{listed}]", "--vary")
            json.dumps(values)  # dates and the like are no settings
        except (InputError, TypeError) as error:
            raise InputError(f"--vary {text}: the values are not YAML ({error}); quote strings") from error
        if not values or len({_text(value) for value in values}) < len(values):
            raise InputError(f"--vary {text}: give at least one value, and none twice")
        grid[key] = values
    return grid


def _among(key: str, fixed: Sequence[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in fixed)


class _Settings(AdaptiveMergeCLI):
    """The settings that a `fit` would run with; nothing is built, nothing is run."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def plan(grid: Grid, rest: Sequence[str], kind: str = "tune") -> tuple[Path, list[Trial]]:
    """The grid's folder and its trials; every combination is checked before the first one runs.

    Args:
        grid: of `parse_grid`; an empty one is one run, whose folder is that of `fit`.
        rest: the other arguments of `fit`.
        kind: what the grid's folder is called by default, after the recipe.

    Raises:
        InputError: settings that `fit` does not know; a folder that holds a run of other settings.
    """
    combinations = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    arguments = [_with(values, rest) for values in combinations]
    fits = [_Settings(args=["fit", *own]) for own in arguments]
    parsed, asked, folder = [_plain(one) for one in fits], fits[0].settings.run, fits[0].folder
    if grid and not asked.name:
        folder = folder.with_name(f"{folder.name}-{kind}")
    check_writable(folder)
    if grid and any((folder / name).exists() for name in RUN_FILES):
        raise InputError(f"{folder} holds a run, not a grid of them; choose another --run.name")
    overwrite = asked.if_exists == "overwrite"
    trials = []
    for values, own, settings in zip(combinations, arguments, parsed):
        place = folder / _slug(values) if grid else folder
        own = without(own, ("run.root", "run.name", "run.if_exists"))
        own += [f"--run.root={place.parent}", f"--run.name={place.name}"]
        own.append(f"--run.if_exists={'overwrite' if overwrite else 'resume'}")
        trials.append(Trial(values, own, settings, place, overwrite or not _finished(place, settings)))
    return folder, trials


def _with(values: Mapping[str, Any], rest: Sequence[str]) -> list[str]:
    """The arguments of one combination: a recipe comes before the configurations that are laid over it."""
    recipe = {key: value for key, value in values.items() if key == "config"}
    return [*arguments_of(recipe), *rest, *arguments_of({key: values[key] for key in values if key not in recipe})]


def without(arguments: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Arguments of `fit`, which it has taken, but for those of some settings."""
    kept: list[str] = []
    values = iter(arguments)
    for argument in values:
        option, equals, _ = argument.partition("=")
        if not _among(option.removeprefix("--"), settings):
            kept.append(argument)
        elif not equals:
            next(values, None)
    return kept


def settings_of(arguments: Sequence[str]) -> dict[str, Any]:
    """What `fit` would run with, as plain values without secrets."""
    return _plain(_Settings(args=["fit", *arguments]))


def _plain(fit: AdaptiveMergeCLI) -> dict[str, Any]:
    return json.loads(json.dumps(scrub(fit.settings.as_dict()), default=str))


def _finished(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether the folder holds the finished run of these settings; InputError where it holds another run."""
    if not any((folder / name).exists() for name in RUN_FILES):
        return False
    try:
        found = read_yaml(folder / "config.yaml")
        found = _flat(found if isinstance(found, dict) else {})
    except AdaptiveMergeError:
        found = {}
    asked = _flat(wanted)
    for key in dict.fromkeys((*asked, *found)):
        if found.get(key) != asked.get(key):
            raise InputError(
                f"{folder} holds a run of other settings: its {key} is {found.get(key)}, this grid asks for "
                f"{asked.get(key)}; choose another --run.name, or run all anew with --run.if_exists overwrite"
            )
    return (folder / "results.json").is_file()


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted key → value, without what does not make another run."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{above}{name}"
        if key not in _NOT_COMPARED:
            found |= _flat(value, f"{key}.") if isinstance(value, Mapping) and value else {key: value}
    return found


def _slug(values: Mapping[str, Any]) -> str:
    """A readable folder name that no other combination of the same grid has."""
    last = [key.rpartition(".")[2] for key in values]
    names = last if len(set(last)) == len(last) else list(values)
    plain = ",".join(f"{name}={_text(value)}" for name, value in zip(names, values.values()))
    kept = re.sub(r"[^\w.,=+-]+", "_", plain)
    if kept == plain and len(plain) <= _LONGEST:
        return plain
    return f"{kept[:_LONGEST]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def arguments_of(values: Mapping[str, Any]) -> list[str]:
    """Setting → value, as `fit` takes them."""
    return [f"--{key}={_text(value)}" for key, value in values.items()]


def _text(value: Any) -> str:
    """A value as the command line takes it: strings as they are, all else as JSON, which is YAML."""
    return value if isinstance(value, str) else json.dumps(value)
