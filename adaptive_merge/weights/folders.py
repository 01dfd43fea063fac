"""Folders of weights with a configuration beside them, whole or in shards."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.limits import read_json
from adaptive_merge.weights.files import read_files
from adaptive_merge.weights.manifest import Manifest, Weights
from adaptive_merge.weights.reader import Reader

__all__ = ["Folder"]


class Folder(Reader):
    """A folder with a configuration and weights of these names, or one of its weight files."""

    format: ClassVar[str]
    config: ClassVar[str]
    names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def statement(self, folder: Path) -> Manifest:
        """What the configuration states of the tower."""

    def accepts(self, path: Path) -> bool:
        if path.is_file():
            return path.name in self.names and (path.parent / self.config).is_file()
        return (path / self.config).is_file() and bool(self.files(path))

    def files(self, path: Path) -> list[Path]:
        if path.is_file():
            return [path]
        for name in self.names:
            if (path / name).is_file():
                return [path / name]
            index = path / f"{name}.index.json"
            if index.is_file():
                return _shards(index)
        return []

    def inside(self, path: Path) -> list[Path]:
        """The files that hold the tensors; of a folder, none may be a link that leads out of it."""
        files = self.files(path)
        if path.is_dir():
            for file in [*files, path / self.config, path / "preprocessor_config.json"]:
                _check_inside(file, path)
        return files

    def read(self, path: Path, base: Weights | None = None) -> Weights:
        folder = path if path.is_dir() else path.parent
        return read_files(self.inside(path), path, [self.statement(folder)], self.format)


def _shards(index: Path) -> list[Path]:
    placed = read_json(index).get("weight_map")
    names = sorted(set(placed.values())) if isinstance(placed, dict) and placed else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise InputError(f"`{index}`: `weight_map` should name files beside it, found {names[:4]}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise MissingFileError(f"`{index.parent / missing[0]}`: named in {index.name} but not there; download it")
    return [index.parent / name for name in names]


def _allowed_root(folder: Path) -> Path:
    """The folder itself; for a snapshot in the hub's cache, whose files are links to blobs, its repository."""
    real = folder.resolve()
    in_cache = real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--")
    return real.parent.parent if in_cache else real


def _check_inside(path: Path, folder: Path) -> None:
    root = _allowed_root(folder)
    if path.exists() and not path.resolve().is_relative_to(root):
        raise InputError(
            f"`{path}`: refused, a link that leads out of `{folder}` to `{path.resolve()}`; give that file itself, or "
            "copy it into the folder"
        )
