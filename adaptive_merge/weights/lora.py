"""LoRA adapters as PEFT saves them, folded into the pre-trained tower that they were trained on."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.factors import Change, Product
from adaptive_merge.weights.files import open_entries
from adaptive_merge.weights.folders import Folder
from adaptive_merge.weights.huggingface_names import from_huggingface
from adaptive_merge.weights.lora_settings import LoraSettings
from adaptive_merge.weights.manifest import Manifest, Weights, sha256_of_files
from adaptive_merge.weights.reader import check_finite

__all__ = ["Lora"]

_TOWER: Final = re.compile(r"((?:.*\.)?(?:vision_model|visual)\.)(.+)")
_FACTOR: Final = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?$")
_SPLIT: Final = re.compile(r"(.+\.attn\.)([qkv])_proj\.(weight|bias)$")
_WRAPPED: Final = "base_model.model."


class Lora(Folder):
    """A PEFT adapter: θ = θ₀ + scale·B·A (Hu et al., "LoRA", eq. 3); the scale is alpha/r, or alpha/√r in rsLoRA.

    DoRA's magnitudes and the biases, layers and modules that PEFT trained whole are folded in as well. Queries, keys
    and values apart (Hugging Face) or fused (open_clip's `nn.MultiheadAttention`) give the same tower.
    """

    expects = "adapter_config.json with adapter_model.safetensors (LoRA, by PEFT)"
    format, config, names = "lora", "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

    def statement(self, folder: Path) -> Manifest:
        return Manifest(str(folder / self.config))

    def read(self, path: Path, base: Weights | None = None) -> Weights:
        if base is None:
            raise InputError(
                f"`{path}`: a LoRA adapter is a difference to a pre-trained tower; give that tower as `base=`, or name "
                "the adapter as an expert of a suite"
            )
        folder = path if path.is_dir() else path.parent
        settings = LoraSettings.read(folder / self.config)
        files = self.inside(path)
        entries: dict[str, Tensor] = {}
        for file in files:
            loaders, _, _ = open_entries(file)
            entries |= {name: load() for name, load in loaders.items()}
        names, dropped = _tower_names(entries, settings.text_too, str(path))
        tower = _Tower(dict(base.tensors), str(path))
        _fold(tower, {names[name]: entries[name] for name in names}, settings)
        check_finite(tower.tensors, str(path))
        manifest = dataclasses.replace(
            base.manifest,
            source=str(path),
            format=self.format,
            sha256=sha256_of_files(files),
            dtype=", ".join(sorted({str(entry.dtype).removeprefix("torch.") for entry in entries.values()})),
            revision=None,
            dropped=tuple(dropped),
            notes=settings.notes
            + _notes(dropped, settings.biases and not any(name.endswith("bias") for name in names)),
        )
        return Weights(tower.tensors, manifest, tower.changes(base.tensors))


@dataclass
class _Module:
    """What an adapter holds for one matrix, embedding or convolution."""

    factors: dict[str, Tensor] = field(default_factory=dict)
    scaled_as: str = ""
    times: float = 1.0


def _tower_names(entries: Mapping[str, Tensor], text_too: bool, path: str) -> tuple[dict[str, str], list[str]]:
    """Name in the file → name inside the image tower, and the names outside it."""
    plain = {name: name.removeprefix(_WRAPPED) for name in entries}
    prefixes = {match[1] for name in plain.values() if (match := _TOWER.match(name))}
    if len(prefixes) > 1:
        raise InputError(f"`{path}`: adapters of {len(prefixes)} image towers, {sorted(prefixes)}; expected one")
    prefix = next(iter(prefixes), "")
    projection = prefix.removesuffix("vision_model.") + "visual_projection."
    inside = {
        name: inner.removeprefix(prefix)
        for name, inner in plain.items()
        if inner.startswith((prefix, projection)) and not inner.startswith("text_")
    }
    if not inside or (text_too and not prefix):
        raise InputError(
            f"`{path}`: no tensor of an image tower among {len(entries)} ({', '.join(list(entries)[:3])} …)"
        )
    return inside, [name for name in entries if name not in inside]


class _Tower:
    """The pre-trained tower while an adapter is folded into it, and what that changes.

    Args:
        tensors: of the tower; those that change are replaced, not written to.
        path: of the adapter, for messages.
    """

    def __init__(self, tensors: dict[str, Tensor], path: str) -> None:
        self.tensors, self.path = tensors, path
        self._products: dict[str, list[Product]] = defaultdict(list)
        self._whole: set[str] = set()  # what is no sum of products

    def changes(self, base: Mapping[str, Tensor]) -> dict[str, Change]:
        """Name → what was added to the tower's tensor: products where it is a sum of them."""
        whole: dict[str, Change] = {name: self.tensors[name] - base[name] for name in self._whole}
        return {name: tuple(products) for name, products in self._products.items()} | whole

    def write(self, name: str, value: Tensor, more: bool = False) -> None:
        """Replace (a part of) a tensor by one that was trained whole, or add to it where it is `more`."""
        ours, rows = _place(self.tensors, name, self.path)
        value = value.t() if ours == "proj" and value.dim() == 2 else value
        self._check(self.tensors[ours][rows], value, name)
        self._put(ours, rows, self.tensors[ours][rows] + value if more else value)
        self._whole.add(ours)

    def add(self, name: str, high: Tensor, low: Tensor, magnitude: Tensor | None) -> None:
        """Add high [outputs, r] · low [r, inputs]; DoRA then gives each output the length `magnitude`."""
        ours, rows = _place(self.tensors, name, self.path)
        if ours == "proj":  # [inputs, outputs] in open_clip
            high, low = low.t(), high.t()
        part = self.tensors[ours][rows]
        if high.shape[1] != low.shape[0]:
            raise self.damaged(name, f"factors of ranks {high.shape[1]} and {low.shape[0]}")
        change = high @ low
        self._check(part.reshape(len(part), -1), change, name)
        total = part + change.reshape(part.shape)
        if magnitude is None:
            self._products[ours].append(Product(rows.start or 0, high.contiguous(), low.contiguous()))
        else:
            matrix = total.t() if ours == "proj" else total.reshape(len(total), -1)
            if magnitude.numel() != len(matrix):
                raise self.damaged(name, f"{magnitude.numel()} lengths for {len(matrix)} outputs")
            lengths = torch.linalg.norm(matrix, dim=1, keepdim=True)
            matrix = matrix * (magnitude.reshape(-1, 1) / lengths)
            total = (matrix.t() if ours == "proj" else matrix).reshape(part.shape)
            self._whole.add(ours)
        self._put(ours, rows, total)

    def _put(self, name: str, rows: slice, value: Tensor) -> None:
        self.tensors[name] = self.tensors[name].clone()
        self.tensors[name][rows] = value

    def damaged(self, name: str, what: str) -> InputError:
        return InputError(f"`{self.path}`: tensor `{name}`: {what}; save the adapter again")

    def _check(self, place: Tensor, value: Tensor, name: str) -> None:
        if place.shape != value.shape:
            raise InputError(
                f"`{self.path}`: tensor `{name}`: its product has shape {tuple(value.shape)}, the pre-trained tower "
                f"{tuple(place.shape)} there; give the base that this adapter was trained on"
            )


def _fold(tower: _Tower, entries: Mapping[str, Tensor], settings: LoraSettings) -> None:
    """Everything of the adapter into the tower; trained-whole tensors first, low-rank products on top."""
    modules: dict[str, _Module] = defaultdict(_Module)
    biases: dict[str, Tensor] = {}
    for name, tensor in entries.items():
        if name.endswith(".lora_B.bias"):
            biases[name.removesuffix(".lora_B.bias")] = tensor.float()
        elif match := _FACTOR.match(name):
            _add_factor(modules, match[1], match[2].removeprefix("lora_"), tensor.float(), tower.path)
        else:
            tower.write(name.replace("base_layer.", ""), tensor.float())
    for module, held in modules.items():
        low, high = (held.factors.get(kind, held.factors.get(f"embedding_{kind}")) for kind in "AB")
        if low is None or high is None:
            raise InputError(
                f"`{tower.path}`: module `{module}`: one factor of its product is missing; the file is incomplete"
            )
        if min(low.dim(), high.dim()) < 2:
            raise tower.damaged(module, f"factors of shapes {tuple(high.shape)} and {tuple(low.shape)}, no matrices")
        scale = settings.of(held.scaled_as, low.shape[0]) * held.times
        factors = high.flatten(1) * scale, low.flatten(1)
        if "embedding_A" in held.factors:
            factors = factors[1].t(), factors[0].t()
        tower.add(f"{module}.weight", *factors, held.factors.get("magnitude_vector"))
        if module in biases:
            tower.write(f"{module}.bias", biases[module] * scale, more=True)


def _add_factor(modules: dict[str, _Module], name: str, kind: str, tensor: Tensor, path: str) -> None:
    # PEFT wraps `nn.MultiheadAttention` with its `out_proj`, at the attention's rank and scale. Its forward, by which
    # the factors were trained, and its `merge_and_unload` add the product of `out_proj` twice (PEFT 0.21.2).
    module, scaled_as = name.replace("base_layer.", ""), name.split(".base_layer")[0]
    held = modules[module]
    held.times = 2.0 if scaled_as != name else 1.0
    if kind in held.factors:
        raise InputError(
            f"`{path}`: module `{module}` is adapted twice (by itself and as a part of its attention); merge the "
            "adapter into its model with PEFT's `merge_and_unload` and save that"
        )
    held.factors[kind], held.scaled_as = tensor, scaled_as


def _place(tower: Mapping[str, Tensor], name: str, path: str) -> tuple[str, slice]:
    """The tower's tensor that a name of the adapter means, and its rows: q, k and v are thirds of one matrix."""
    ours = "proj" if name == "visual_projection.weight" else from_huggingface(name) or name
    stem, _, kind = ours.rpartition(".")
    if stem.endswith(".attn"):  # the attention itself is its fused matrix
        ours = f"{stem}.in_proj_{kind}"
    rows = slice(None)
    if match := _SPLIT.match(ours):
        ours = f"{match[1]}in_proj_{match[3]}"
        width = len(tower[ours]) // 3 if ours in tower else 0
        rows = slice("qkv".index(match[2]) * width, ("qkv".index(match[2]) + 1) * width)
    if ours not in tower and stem in tower and kind == "weight":  # an embedding is a bare tensor in open_clip
        ours = stem
    if ours not in tower:
        raise InputError(f"`{path}`: tensor `{name}` has no place in a CLIP image tower; expected PEFT's names")
    return ours, rows


def _notes(dropped: list[str], lost: bool) -> tuple[str, ...]:
    notes = [f"adapters outside the image tower, dropped: {', '.join(dropped[:4])}"] if dropped else []
    if lost:  # as PEFT before 0.21 does for `bias="lora_only"`
        notes.append("biases were trained, but the PEFT that saved this adapter left them out; they are the base's")
    return tuple(notes)
