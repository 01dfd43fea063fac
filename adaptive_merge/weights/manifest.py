"""What is known about a set of weights besides the numbers: where they come from and which tower they fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from torch import Tensor

from adaptive_merge.errors import InputError, check_normalisation
from adaptive_merge.merge.factors import Change
from adaptive_merge.weights.headers import without_numbers

__all__ = ["METADATA_KEY", "Manifest", "Weights", "sha256_of_files"]

METADATA_KEY = "adaptive_merge.manifest"
_LARGEST: Final = 1 << 24  # of a size that a configuration states
_CHUNK = 1 << 20
_NEUTRAL = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Manifest:
    """One image tower: what a file, a folder, an architecture's name or the caller states of it; None is "not stated".

    `quick_gelu` is part of it: weights trained with x·σ(1.702x) load into a GELU tower without a complaint and
    only the accuracy falls.

    `projection` is `"present"` or `"absent"` as read; after `check_agreement` it is `"trained"` where it differs
    from the pre-trained one and `"pretrained"` where it was taken from there.
    """

    source: str
    width: int | None = None
    layers: int | None = None
    patch: int | None = None
    image_size: int | None = None
    mlp_width: int | None = None
    embed_dim: int | None = None
    heads: int | None = None
    quick_gelu: bool | None = None
    projection: Literal["present", "absent", "trained", "pretrained"] | None = None
    format: str = ""
    sha256: str = ""
    dtype: str = ""
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    revision: str | None = None
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_normalisation(f"`{self.source}`", self.mean or _NEUTRAL, self.std or _NEUTRAL)

    def architecture(self) -> dict[str, int | None]:
        """The sizes that two towers must share to be merged, by name."""
        return {name: getattr(self, name) for name in ("width", "layers", "patch", "image_size", "mlp_width")}

    def filled(self, other: Manifest, remedy: str) -> Manifest:
        """This manifest, with what it leaves open as `other` states it.

        Raises:
            InputError: both state a size, the heads or the activation, and not the same.
        """
        differing = [
            f"{fact.replace('quick_gelu', 'QuickGELU')}: expected {getattr(other, fact)}, found {getattr(self, fact)}"
            for fact in (*self.architecture(), "heads", "quick_gelu")
            if None not in (getattr(self, fact), getattr(other, fact)) and getattr(self, fact) != getattr(other, fact)
        ]
        if differing:
            raise InputError(f"`{self.source}`: does not fit `{other.source}`: {'; '.join(differing)}; {remedy}")
        stated = {field.name: getattr(other, field.name) for field in dataclasses.fields(self)}
        still = {name: value for name, value in stated.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **still, notes=self.notes + other.notes)

    def to_metadata(self) -> dict[str, str]:
        """A safetensors metadata entry that `read_weights` recognises in a file of ours."""
        return {METADATA_KEY: json.dumps(dataclasses.asdict(self), sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> Manifest:
        """What a safetensors file of ours states of its tower beside the tensors; nothing for a third party's."""
        if METADATA_KEY not in metadata:
            return cls(str(path))
        try:
            entry = json.loads(metadata[METADATA_KEY])
            facts = {name: entry[name] for name in ("heads", "quick_gelu", "image_size")}
            return cls(str(path), **facts, mean=triple(entry["mean"]), std=triple(entry["std"]))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"`{path}`: metadata entry {METADATA_KEY!r} cannot be read ({error!r}), although this program writes "
                "it; the file is damaged, so export or copy it again"
            ) from error


@dataclass(frozen=True)
class Weights:
    """Tensors (float32, by open_clip's names inside the visual tower, in `named_parameters()` order) and manifest.

    `changes` is what they differ by from the pre-trained ones, where the file held that, such as low-rank factors.
    """

    tensors: dict[str, Tensor] = field(repr=False)
    manifest: Manifest
    changes: dict[str, Change] | None = field(default=None, repr=False)


def whole(settings: dict[str, Any], name: str, source: str | Path, default: int | None = None) -> int | None:
    """A whole number from 1 that a configuration may state.

    Raises:
        InputError: it states something else.
    """
    value = settings.get(name, default)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST):
        raise InputError(f"`{source}`: {name}: expected a whole number from 1, found {value!r:.60}; correct it")
    return value


def triple(values: Any) -> tuple[float, float, float] | None:
    """Three floats (per-channel mean or std), or None where there is nothing of that form."""
    if not isinstance(values, list | tuple) or len(values) != 3:
        return None
    if not all(isinstance(value, int | float) and abs(value) < _LARGEST for value in values):
        return None
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def sha256_of_files(paths: list[Path]) -> str:
    """SHA-256 of one file (as `sha256sum` prints it), or of the sorted "name digest" lines of several.

    Empty under `headers_only`.
    """
    if without_numbers():
        return ""
    digests = [_sha256(path) for path in paths]
    if len(digests) == 1:
        return digests[0]
    lines = sorted(f"{path.name} {digest}\n" for path, digest in zip(paths, digests))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
