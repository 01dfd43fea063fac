"""What every form of a CLIP image tower goes through: a `Reader` finds tensors, `assemble` checks and names them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.weights import huggingface_names as huggingface
from adaptive_merge.weights.manifest import Manifest, Weights, sha256_of_files
from adaptive_merge.weights.open_clip_names import (
    architecture_of,
    expected_shapes,
    fuse_attention,
    is_text_leftover,
    tower_prefix,
    unwrapped,
)

__all__ = ["Loader", "Reader", "assemble", "check_finite", "check_shapes"]

Loader = Callable[[], Tensor]

_FLOATING: Final = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Reader(ABC):
    """One form in which a tower is published. A new form is a subclass in a file of its own; importing it is enough.

    Subclasses that state `expects` are known to `read_weights`, which takes the first that accepts, the newest asked
    first.
    """

    expects: ClassVar[str]
    kinds: ClassVar[list[type[Reader]]] = []

    def __init_subclass__(cls) -> None:
        if "expects" in cls.__dict__:
            Reader.kinds.insert(0, cls)

    @abstractmethod
    def accepts(self, path: Path) -> bool:
        """Whether this file or folder, which is there, has the form."""

    @abstractmethod
    def read(self, path: Path, base: Weights | None = None) -> Weights:
        """The tower; `base` is the pre-trained one, for forms that hold a difference to it.

        Raises:
            InputError, MissingFileError: naming the file, the tensor, what was expected, found, and the remedy.
        """

    def files(self, path: Path) -> list[Path]:
        """The files that hold the tensors."""
        return [path]


def assemble(
    loaders: Mapping[str, Loader], statements: Sequence[Manifest], path: Path, files: list[Path], format: str
) -> Weights:
    """The tower among named tensors, complete, finite and in float32, with a manifest of all that is known of it.

    Args:
        loaders: by whatever names; read one by one.
        statements: what configurations and containers state of the tower; the first is believed on its normalisation.
        path: how messages call it.
        files: where the tensors are from, for the digest.
    """
    tensors, dropped = _select(unwrapped(loaders, str(path)), str(path))
    tensors = fuse_attention(tensors, str(path))
    architecture = architecture_of(tensors, str(path))
    shapes = expected_shapes(**architecture)
    check_shapes(tensors, shapes, str(path))
    stored = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    manifest = Manifest(
        str(path),
        **architecture,
        projection="absent" if architecture["embed_dim"] is None else "present",
        format=format,
        sha256=sha256_of_files(files),
        dtype=", ".join(stored),
        dropped=tuple(dropped),
        notes=_notes(stored, dropped),
    )
    for statement in statements:
        manifest = manifest.filled(statement, "correct the configuration, or give the weights that belong to it")
    ordered = {name: _as_float32(tensors[name], name, str(path)) for name in shapes}
    check_finite(ordered, str(path))
    return Weights(ordered, manifest)


def check_shapes(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], path: str) -> None:
    """Refuse missing, extra and misshapen tensors, naming the first of them."""
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise InputError(f"`{path}`: {len(missing)} tensors missing, first `{missing[0]}`; the file is incomplete")
    extra = [name for name in tensors if name not in expected]
    if extra:
        raise InputError(
            f"`{path}`: {len(extra)} tensors that a CLIP vision transformer does not have, first `{extra[0]}`; "
            "expected the names of open_clip's `visual` tower or of a Hugging Face CLIP; remove what does not belong"
        )
    for name, shape in expected.items():
        stored = tuple(tensors[name].shape)
        if stored != shape:
            turned = stored == shape[::-1] and len(shape) > 1
            remedy = "it is transposed: save it the other way round" if turned else "it is of another architecture"
            raise InputError(f"`{path}`: tensor `{name}`: expected shape {shape}, found {stored}; {remedy}")


def check_finite(tensors: dict[str, Tensor], path: str) -> None:
    """Refuse NaN and infinity, naming the tensor and how many numbers are affected; meta tensors have none."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            continue
        # A sum is finite unless a number is not (or it overflows, which the exact count then clears).
        if not bool(tensor.sum().isfinite()):
            count = int((~tensor.isfinite()).sum())
            if count:
                raise InputError(
                    f"`{path}`: tensor `{name}`: {count} of {tensor.numel()} numbers are NaN or infinite, expected "
                    "none; the fine-tuning diverged or the file is damaged, so use another checkpoint"
                )


def _notes(stored: list[str], dropped: list[str]) -> tuple[str, ...]:
    notes = []
    others = [name for name in dropped if not is_text_leftover(name)]
    if others:
        notes.append(f"not part of the image tower, dropped: {', '.join(others[:6])}")
    if stored != ["float32"]:
        notes.append(f"stored as {', '.join(stored)}, cast to float32")
    return tuple(notes)


def _select(loaders: Mapping[str, Loader], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tower's tensors by open_clip's names (q, k, v maybe still apart), and the names that were left."""
    prefix = tower_prefix(loaders, huggingface.MARKER, source)
    if prefix is not None:
        return _select_huggingface(loaders, prefix, source)
    prefix = tower_prefix(loaders, "class_embedding", source)
    if prefix is None:
        raise InputError(
            f"`{source}`: no tensor `class_embedding` among {len(loaders)} ({', '.join(list(loaders)[:4])} …); "
            "expected a CLIP vision transformer, as `visual.*`, `vision_model.*` or the tower alone"
        )
    inside = [name for name in loaders if name.startswith(prefix)]
    dropped = [name for name in loaders if not name.startswith(prefix)]
    return {name.removeprefix(prefix): loaders[name]() for name in inside}, dropped


def _select_huggingface(loaders: Mapping[str, Loader], prefix: str, source: str) -> tuple[dict[str, Tensor], list[str]]:
    projection = prefix.removesuffix("vision_model.") + huggingface.PROJECTION
    tensors: dict[str, Tensor] = {}
    dropped = []
    for name, load in loaders.items():
        inner = name.removeprefix(prefix)
        ours = huggingface.from_huggingface(inner) if name.startswith(prefix) else None
        if name == projection:
            tensors["proj"] = load().t().contiguous()
        elif ours is not None:
            tensors[ours] = load()
        elif name.startswith(prefix) and not (inner.endswith("position_ids") or is_text_leftover(inner)):
            raise InputError(
                f"`{source}`: tensor `{name}` has no place in open_clip's tower; expected a plain CLIP vision model "
                "(fold LoRA and other adapters into the weights first)"
            )
        else:
            dropped.append(name)
    return tensors, dropped


def _as_float32(tensor: Tensor, name: str, path: str) -> Tensor:
    if tensor.dtype not in _FLOATING:
        raise InputError(
            f"`{path}`: tensor `{name}`: expected floating-point numbers, found {tensor.dtype}; undo the quantisation"
        )
    return tensor.to(torch.float32).contiguous()
