"""From what a user names (file, folder, `local-dir:`, `hf-hub:`, hub id) to the files to read and their facts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adaptive_merge.errors import InputError, MissingFileError, did_you_mean
from adaptive_merge.weights import huggingface
from adaptive_merge.weights.manifest import Facts, triple

__all__ = ["Plan", "plan"]

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_SUFFIXES: Final = (".pt", ".pth", ".bin", ".pkl", ".ckpt", ".safetensors", ".json")
_OPEN_CLIP_FILES: Final = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_HUGGING_FACE_FILES: Final = ("model.safetensors", "pytorch_model.bin")
_VISION_KEYS: Final = frozenset(
    {
        "layers",
        "width",
        "patch_size",
        "image_size",
        "head_width",
        "mlp_ratio",
        "patch_dropout",
        "output_tokens",
    }
)
_VISION_DEFAULTS: Final = (None, False, 0, "", "tok", "learnable", {}, [])


@dataclass(frozen=True)
class Plan:
    """The files that hold the tensors, what their folder says of the tower, and how it is called."""

    files: list[Path]
    format: str | None
    facts: Facts


def plan(source: str, revision: str | None) -> Plan:
    """Find the files behind a name.

    Raises:
        MissingFileError: nothing is there.
        InputError: a folder without a known layout, or with a link that leads out of it.
    """
    kind, _, rest = source.partition(":")
    if kind == "hf-hub":
        return _hub(rest, revision)
    path = Path(rest if kind == "local-dir" else source).expanduser()
    if kind == "local-dir" and not path.is_dir():
        raise MissingFileError(f"`{path}`: no such folder; `local-dir:` takes the path of an open_clip folder")
    if path.is_dir():
        return _folder(path, None)
    if path.is_file():
        return _file(path)
    is_hub_id = _HUB_ID.fullmatch(source) and not source.endswith(_FILE_SUFFIXES)
    if is_hub_id and not path.parent.exists():
        return _hub(source, revision)
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise MissingFileError(f"`{path}`: no such file or folder{did_you_mean(path.name, siblings)}")


def _hub(name: str, revision: str | None) -> Plan:
    repository, _, stated = name.partition("@")
    folder = huggingface.snapshot(repository, revision or stated or None)
    found = _folder(folder, folder.name)
    if not (revision or stated):
        found.facts.notes.append(f"revision not pinned; this was {folder.name}, pass `revision={folder.name!r}`")
    return found


def _file(path: Path) -> Plan:
    for name, names, config, facts in _LAYOUTS:
        if path.name in names and (path.parent / config).is_file():
            return Plan([path], name, facts(path.parent))
    return Plan([path], None, Facts())


def _folder(folder: Path, revision: str | None) -> Plan:
    for name, names, config, facts in _LAYOUTS:
        files = [] if not (folder / config).is_file() else _weight_files(folder, names)
        if files:
            root = _allowed_root(folder)
            for path in [*files, folder / config, folder / "preprocessor_config.json"]:
                _check_inside(path, folder, root)
            found = facts(folder)
            found.revision = revision
            return Plan(files, name, found)
    raise InputError(
        f"`{folder}`: expected open_clip_config.json with {_OPEN_CLIP_FILES[0]} (open_clip), or config.json with "
        f"{_HUGGING_FACE_FILES[0]} (Hugging Face); found {sorted(entry.name for entry in folder.iterdir())[:8]}"
    )


def _weight_files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The first of `names` that is there, whole or in shards."""
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    placed = huggingface.read_json(index).get("weight_map")
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


def _check_inside(path: Path, folder: Path, root: Path) -> None:
    if path.exists() and not path.resolve().is_relative_to(root):
        raise InputError(
            f"`{path}`: refused, a link that leads out of `{folder}` to `{path.resolve()}`; give that file itself, or "
            "copy it into the folder"
        )


def _open_clip_facts(folder: Path) -> Facts:
    path = folder / "open_clip_config.json"
    config = huggingface.read_json(path)
    model = config.get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vision, dict):
        raise InputError(f"`{path}`: expected model_cfg.vision_cfg, found keys {sorted(config)[:8]}")
    unknown = {key: vision[key] for key in vision.keys() - _VISION_KEYS if vision[key] not in _VISION_DEFAULTS}
    if unknown or not isinstance(vision.get("layers"), int):
        raise InputError(
            f"`{path}`: vision_cfg has {unknown or {'layers': vision.get('layers')}}, expected a plain CLIP vision "
            "transformer; towers of timm, ResNets and other poolings are not read"
        )
    facts = Facts(quick_gelu=bool(model.get("quick_gelu", False)))
    facts.heads = int(vision.get("width", 768)) // int(vision.get("head_width", 64))
    size: Any = vision.get("image_size")
    facts.image_size = size if isinstance(size, int) else None
    preprocess = config.get("preprocess_cfg")
    if isinstance(preprocess, dict):
        facts.mean, facts.std = triple(preprocess.get("mean")), triple(preprocess.get("std"))
    return facts


_Layout = tuple[str, tuple[str, ...], str, Callable[[Path], Facts]]
_LAYOUTS: Final[tuple[_Layout, ...]] = (
    ("open_clip", _OPEN_CLIP_FILES, "open_clip_config.json", _open_clip_facts),
    ("huggingface", _HUGGING_FACE_FILES, "config.json", huggingface.facts_of_folder),
)
