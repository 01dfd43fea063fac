"""Suites: a pre-trained model, its experts, their heads and test images, loaded together from one folder."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from adaptive_merge.adapters.heads import HeadLike, LinearHead
from adaptive_merge.data.images import Images, LazyImages
from adaptive_merge.data.trigger import Trigger
from adaptive_merge.errors import InputError, MissingFileError, check_normalisation
from adaptive_merge.files import shipped
from adaptive_merge.limits import ARRAY_BYTES, LimitError, check_header, check_names, read_json
from adaptive_merge.merge.outline import outlined
from adaptive_merge.merge.signature import warn_of_locks
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.suites.base import Experts, Suite
from adaptive_merge.suites.clip_folder import KIND, chosen_tasks, load_clip_folder
from adaptive_merge.suites.embedded_tower import build_encoder
from adaptive_merge.suites.shared_bank import shared_bank
from adaptive_merge.weights.headers import without_numbers
from adaptive_merge.weights.manifest import triple

__all__ = ["check_manifest", "folder_of", "load_suite", "read_manifest"]

BankDtype = Literal["float32", "bfloat16"]
# What numpy and zipfile raise for a damaged npz.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    SyntaxError,
)
EMBEDDED = Path(__file__).parent / "embedded"


def load_suite(
    name: str = "embedded",
    tasks: list[str] | None = None,
    split: Literal["test", "val"] = "test",
    dtype: BankDtype = "float32",
    banks: str | None = None,
    lazy: bool = False,
) -> Suite:
    """Load a suite: `"embedded"`, which ships with the package, or a folder that holds its own `suite.json`.

    The folder is laid out like the embedded one, or is a CLIP suite (`"kind": "clip"`, see configs/clip): then its
    `suite.json` says where checkpoints, heads and data sets lie. In the embedded layout a task may have the entry
    `"head": "linear"`: its head is then a linear layer on features as they are, with `<task>.bias` if the file has one.
    Images without labels have no array `<split>_labels`. An entry `"trigger"`, see `Trigger`, says that an expert has a
    backdoor: runs then measure the attack. Experts that look locked against merging are warned of.

    Args:
        name: `"embedded"`, a folder that holds `suite.json`, or one that ships, such as `"clip/vit_b_32/8tasks"`.
        tasks: some of its tasks, in this order; default all.
        split: images to adapt and score on; `"val"` for choices that must not see test images.
        dtype: in which the task vectors are held. `"bfloat16"` halves the bank; merges still add up in float32, over
            pre-trained weights in float32. Each entry of a task vector is rounded by up to 0.4 %, also in the
            experts that teach and are scored.
        banks: a folder that keeps the bank, and what transforms make of it, as files; they are mapped into memory from
            there, so that the processes of a node compute and hold them once. Default: each process its own.
        lazy: look for a task's images when they are first asked for. Default: data sets that are missing or damaged are
            met before any weights are read.

    Raises:
        MissingFileError: the folder or one of its files is not there.
        InputError: an unknown task; a file that is damaged or does not fit the others.
    """
    folder = folder_of(name)
    manifest = read_manifest(folder)
    if manifest.get("kind") not in (None, KIND):
        raise InputError(
            f"{folder / 'suite.json'}: unknown kind {manifest['kind']!r:.80}; leave it out, or say {KIND!r}"
        )
    if dtype not in get_args(BankDtype):
        raise InputError(f"unknown dtype {dtype!r} of a bank; choose {' or '.join(map(repr, get_args(BankDtype)))}")
    banks = None if without_numbers() else banks
    if manifest.get("kind") == KIND:
        suite = load_clip_folder(folder, manifest, tasks, split, dtype, lazy, banks)
    else:
        suite = _load_plain(name, folder, manifest, tasks, split, dtype, lazy, banks)
    if without_numbers():
        return replace(suite, task_vectors=outlined(suite.task_vectors))
    warn_of_locks(suite.task_vectors)
    return suite


def folder_of(name: str) -> Path:
    """The folder of a suite: the embedded one, a path that holds `suite.json`, or else one that ships of this name."""
    if name == "embedded":
        return EMBEDDED
    # The shipped configurations give names from the repository's root.
    places = (Path(name), shipped() / name, shipped().parent / name)
    return next((place for place in places if (place / "suite.json").is_file()), Path(name))


def _load_plain(
    name: str,
    folder: Path,
    manifest: dict[str, Any],
    tasks: list[str] | None,
    split: str,
    dtype: str,
    lazy: bool,
    banks: str | None,
) -> Suite:
    """A suite that is laid out like the embedded one."""
    check_manifest(folder / "suite.json", manifest)
    known = manifest["tasks"]
    chosen = chosen_tasks(f"suite {name!r}", known, tasks)
    backbone = build_encoder()
    check_normalisation(str(folder / "suite.json"), manifest["mean"], manifest["std"])
    backbone.image_mean, backbone.image_std = tuple(manifest["mean"]), tuple(manifest["std"])
    pretrained = _in_order(backbone, _read_tensors(folder, "pretrained.safetensors", manifest), folder)
    heads = _read_tensors(folder, "heads.safetensors", manifest)
    files = {task: f"experts/{task}.safetensors" for task in chosen}

    def build() -> tuple[TaskVectors, Mapping[str, Any]]:
        experts = Experts(chosen, lambda task: _read_tensors(folder, files[task], manifest))
        try:
            return TaskVectors.from_state_dicts(pretrained, experts, dtype=getattr(torch, dtype)), {}
        except InputError as error:
            raise InputError(f"{folder}: {error}") from error

    sources = [str(folder / name) for name in ("suite.json", "pretrained.safetensors", *files.values())]
    bank, _ = shared_bank(banks, sources, [chosen, dtype], build)
    images = LazyImages({task: partial(_read_images, folder, task, split, manifest) for task in chosen})
    heads = {task: _head(folder, heads, task, known[task]) for task in chosen}
    trigger = Trigger.read(manifest["trigger"], _sizes(known)) if "trigger" in manifest else None
    if trigger is not None and trigger.task not in chosen:
        trigger = None
    return Suite(manifest["name"], bank, backbone, heads, images if lazy else dict(images), trigger=trigger)


def _sizes(tasks: dict[str, Any]) -> dict[str, int]:
    return {task: len(entry["classes"]) for task, entry in tasks.items()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a suite's `suite.json`."""
    path = folder / "suite.json"
    if not path.is_file():
        raise MissingFileError(
            f"{path}: there is no such file; a suite is 'embedded' or a folder that holds suite.json"
        )
    return read_json(path)


def check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """InputError where a suite.json of the embedded layout lacks a key, or one is of another kind."""
    three = "three numbers, one a channel"
    for key, fits, expected in (
        ("name", lambda value: isinstance(value, str), "text"),
        ("mean", lambda value: triple(value) is not None, three),
        ("std", lambda value: triple(value) is not None and min(value) > 0, f"{three}, above 0"),
        ("image_size", lambda value: type(value) is int and value > 0, "the height and width of images"),
        ("tasks", lambda value: isinstance(value, dict) and value, "task → its entry"),
        ("files", lambda value: isinstance(value, dict), "file → its sha256"),
    ):
        if key not in manifest or not fits(manifest[key]):
            shown = f"found {manifest[key]!r:.80}" if key in manifest else "it is missing"
            raise InputError(f"{path}: key {key!r}: expected {expected}, {shown}; restore the file, or correct it")
    check_names(manifest["tasks"], "task", path, folder=True)
    for task, entry in manifest["tasks"].items():
        classes = entry.get("classes") if isinstance(entry, dict) else None
        if not isinstance(classes, list) or not classes:
            raise InputError(f"{path}: task {task!r}: expected `classes`, a list of their names; correct the file")
        check_names(classes, "class", path)


def _checked(folder: Path, name: str, manifest: dict[str, Any]) -> Path:
    """The path of a file of the suite, after comparing its sha256 with the manifest."""
    path = folder / name
    if not path.is_file():
        raise MissingFileError(f"{path}: the suite lists this file but it is not there; restore it")
    if manifest["files"].get(name) != hashlib.sha256(path.read_bytes()).hexdigest():
        raise InputError(f"{path}: its sha256 is not the one in suite.json; restore the file, or correct the manifest")
    return path


def _read_tensors(folder: Path, name: str, manifest: dict[str, Any]) -> dict[str, Tensor]:
    path = _checked(folder, name, manifest)
    check_header(path)
    try:
        tensors = load_file(path)
        return {key: value.to("meta") for key, value in tensors.items()} if without_numbers() else tensors
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); restore it") from error


def _in_order(backbone: nn.Module, state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The tensors in the backbone's order: a safetensors file gives them sorted by name."""
    names = [name for name, _ in (*backbone.named_parameters(), *backbone.named_buffers())]
    missing, surplus = [name for name in names if name not in state], [name for name in state if name not in names]
    if missing or surplus:
        problem = f"{missing[0]!r} of the encoder is missing" if missing else f"{surplus[0]!r} is not in the encoder"
        raise InputError(f"{folder / 'pretrained.safetensors'}: tensor {problem}")
    return {name: state[name] for name in names}


def _read_images(folder: Path, task: str, split: str, manifest: dict[str, Any]) -> Images:
    path = _checked(folder, f"images/{task}.npz", manifest)
    try:
        pixels, labels = _read_arrays(path, split)
        size = manifest.get("image_size", 0)
        if pixels.dim() not in (3, 4) or tuple(pixels.shape[1:]) not in ((size, size), (size, size, 3)):
            raise InputError(
                f"images of shape {tuple(pixels.shape)}; expected [N, {size}, {size}] or [N, {size}, {size}, 3], as "
                "image_size in suite.json says"
            )
        return Images(pixels, labels, manifest["tasks"][task]["classes"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except _DAMAGED as error:
        raise InputError(f"{path}: not a readable file of arrays ({error}); restore it") from error


def _read_arrays(path: Path, split: str) -> tuple[Tensor, Tensor | None]:
    """Images and, where there are any, labels."""
    with zipfile.ZipFile(path) as archive:
        sizes = {member.filename.removesuffix(".npy"): member.file_size for member in archive.infolist()}
    names = [f"{split}_images", f"{split}_labels"]
    if names[0] not in sizes:
        raise InputError(f"there is no array {names[0]!r}; the split {split!r} is not in this suite")
    for name in (name for name in names if name in sizes):
        if sizes[name] > ARRAY_BYTES:
            raise LimitError(f"refused, array {name!r} has {sizes[name]:,} bytes, expected at most {ARRAY_BYTES:,}")
    with np.load(path, allow_pickle=False) as arrays:
        pixels, labels = (torch.from_numpy(arrays[name]) if name in sizes else None for name in names)
    return pixels, labels


def _head(folder: Path, heads: dict[str, Tensor], task: str, entry: dict[str, Any]) -> HeadLike:
    head = heads.get(f"{task}.weight")
    if head is None:
        raise InputError(f"{folder / 'heads.safetensors'}: there is no head {task + '.weight'!r}")
    if head.dim() != 2 or not head.is_floating_point():
        raise InputError(
            f"{folder / 'heads.safetensors'}: {task + '.weight'!r}: expected floats [classes, features], found "
            f"{head.dtype} {tuple(head.shape)}"
        )
    if len(head) != len(entry["classes"]):
        raise InputError(
            f"{folder / 'heads.safetensors'}: the head of {task!r} has {len(head)} classes, suite.json names "
            f"{len(entry['classes'])}"
        )
    kind = entry.get("head", "cosine")
    if kind not in ("cosine", "linear"):
        raise InputError(f"{folder / 'suite.json'}: unknown kind of head {kind!r} of {task!r}; choose cosine or linear")
    if without_numbers():  # a method looks at its length
        head = torch.ones(head.shape)
    return head if kind == "cosine" else LinearHead(head, heads.get(f"{task}.bias"))
