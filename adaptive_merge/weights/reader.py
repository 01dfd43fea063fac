"""`read_weights`: one entry for every published form of a CLIP image tower."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.weights import huggingface
from adaptive_merge.weights.folders import plan
from adaptive_merge.weights.manifest import Facts, Weights, sha256_of_files
from adaptive_merge.weights.modules import facts_of_module, named_records
from adaptive_merge.weights.open_clip_names import (
    architecture_of,
    expected_shapes,
    fuse_attention,
    is_text_leftover,
    tower_prefix,
)
from adaptive_merge.weights.torch_files import open_torch_file

__all__ = ["check_finite", "check_shapes", "open_entries", "read_weights"]

Loader = Callable[[], Tensor]

_FLOATING: Final = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_weights(path_or_id: str | Path, *, quick_gelu: bool | None = None, revision: str | None = None) -> Weights:
    """The image tower in a file, folder or hub repository, as float32 tensors under open_clip's names.

    Args:
        path_or_id: a `.safetensors`, `.pt`, `.pth`, `.bin` or `.pkl` file (state dict, whole CLIP, or a whole
            pickled model, of which nothing is run), an open_clip or Hugging Face folder, `local-dir:<folder>`,
            `hf-hub:<org>/<name>[@revision]` or a hub id.
        quick_gelu: the activation of the tower where the file cannot say it; True for OpenAI's weights and
            everything fine-tuned from them.
        revision: commit, tag or branch of a hub repository.

    Raises:
        MissingFileError, InputError: naming the file, the tensor, what was expected, found, and the remedy.
    """
    source = str(path_or_id)
    found = plan(source, revision)
    loaders: dict[str, Loader] = {}
    for path in found.files:
        entries, form, facts = open_entries(path)
        loaders.update(entries)
    _merge_facts(facts, found.facts, quick_gelu, source)
    tensors, dropped = _select(loaders, source)
    tensors = fuse_attention(tensors, source)
    architecture = architecture_of(tensors, source)
    shapes = expected_shapes(**architecture)
    check_shapes(tensors, shapes, source)
    _check_image_size(facts, architecture["image_size"], source)
    stored = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    ordered = {name: _as_float32(tensors[name], name, source) for name in shapes}
    check_finite(ordered, source)
    facts.notes.extend(_notes(stored, dropped))
    manifest = facts.manifest(
        architecture,
        source=source,
        format=found.format or form,
        sha256=sha256_of_files(found.files),
        dtype=", ".join(stored),
        dropped=tuple(dropped),
    )
    return Weights(ordered, manifest)


def open_entries(path: Path) -> tuple[dict[str, Loader], str, Facts]:
    """Every named tensor of a file as a loader, the file's format, and what the file itself says of the tower."""
    if _is_safetensors(path):
        return _open_safetensors(path)
    file = open_torch_file(path)
    records = named_records(file)
    loaders = {name: _torch_loader(file.tensor, record, name) for name, record in records.items()}
    whole = not isinstance(file.root, dict)
    return loaders, f"{file.kind} {'module' if whole else 'state dict'}", facts_of_module(file)


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
        found = tuple(tensors[name].shape)
        if found != shape:
            turned = found == shape[::-1] and len(shape) > 1
            remedy = "it is transposed: save it the other way round" if turned else "it is of another architecture"
            raise InputError(f"`{path}`: tensor `{name}`: expected shape {shape}, found {found}; {remedy}")


def check_finite(tensors: dict[str, Tensor], path: str) -> None:
    """Refuse NaN and infinity, naming the tensor and how many numbers are affected."""
    for name, tensor in tensors.items():
        # A sum is finite unless a number is not (or it overflows, which the exact count then clears).
        if not bool(tensor.sum().isfinite()):
            count = int((~tensor.isfinite()).sum())
            if count:
                raise InputError(
                    f"`{path}`: tensor `{name}`: {count} of {tensor.numel()} numbers are NaN or infinite, expected "
                    "none; the fine-tuning diverged or the file is damaged, so use another checkpoint"
                )


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors":
        return True
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] <= path.stat().st_size


def _open_safetensors(path: Path) -> tuple[dict[str, Loader], str, Facts]:
    try:
        file = safe_open(path, framework="pt")
        names, metadata = list(file.keys()), dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"`{path}`: not a readable safetensors file ({error}); it is damaged, so copy or download it again"
        ) from error
    loaders = {name: _safetensors_loader(file, name) for name in names}
    return loaders, "safetensors", Facts.from_metadata(metadata, path)


def _torch_loader(load: Callable[[Any, str], Tensor], record: Any, name: str) -> Loader:
    return lambda: load(record, name)


def _safetensors_loader(file: Any, name: str) -> Loader:
    return lambda: file.get_tensor(name)


def _merge_facts(facts: Facts, folder: Facts, quick_gelu: bool | None, source: str) -> None:
    """Fold what the folder and the caller say into what the file says; a contradiction is an error."""
    said = {"the file": facts.quick_gelu, "the configuration": folder.quick_gelu, "`quick_gelu=`": quick_gelu}
    known = {who: value for who, value in said.items() if value is not None}
    if len(set(known.values())) > 1:
        raise InputError(
            f"`{source}`: QuickGELU: {', '.join(f'{who} says {value}' for who, value in known.items())}; leave out "
            "`quick_gelu=` or mend the configuration, since the wrong one only shows as low accuracy"
        )
    facts.quick_gelu = next(iter(known.values()), None)
    for name in ("heads", "image_size", "mean", "std", "revision"):
        if getattr(folder, name) is not None:
            setattr(facts, name, getattr(folder, name))
    facts.notes.extend(folder.notes)


def _check_image_size(facts: Facts, found: int, source: str) -> None:
    if facts.image_size not in (None, found):
        raise InputError(
            f"`{source}`: the configuration says image_size {facts.image_size}, the tensor `positional_embedding` "
            f"fits {found}; mend the configuration"
        )


def _notes(stored: list[str], dropped: list[str]) -> list[str]:
    notes = []
    strangers = [name for name in dropped if not is_text_leftover(name)]
    if strangers:
        notes.append(f"not part of the image tower, dropped: {', '.join(strangers[:6])}")
    if stored != ["float32"]:
        notes.append(f"stored as {', '.join(stored)}, cast to float32")
    return notes


def _select(loaders: dict[str, Loader], source: str) -> tuple[dict[str, Tensor], list[str]]:
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


def _select_huggingface(loaders: dict[str, Loader], prefix: str, source: str) -> tuple[dict[str, Tensor], list[str]]:
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
        elif name.startswith(prefix) and prefix and not inner.endswith("position_ids"):
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
