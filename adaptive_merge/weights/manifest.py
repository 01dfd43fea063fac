"""What is known about a set of weights besides the numbers: where they come from and which tower they fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from adaptive_merge.errors import InputError

__all__ = ["METADATA_KEY", "Manifest", "Weights", "sha256_of_files"]

METADATA_KEY = "adaptive_merge.manifest"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """The identity of one image tower.

    `quick_gelu` is part of it: weights trained with x·σ(1.702x) load into a GELU tower without a complaint and
    only the accuracy falls. `None` means that the file does not say.

    `projection` is `"present"` or `"absent"` as read; after `check_agreement` it is `"trained"` where it differs
    from the pre-trained one and `"pretrained"` where it was taken from there.
    """

    width: int
    layers: int
    patch: int
    image_size: int
    mlp_width: int
    embed_dim: int | None
    heads: int | None
    quick_gelu: bool | None
    projection: Literal["present", "absent", "trained", "pretrained"]
    source: str
    format: str
    sha256: str
    dtype: str
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    revision: str | None = None
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def architecture(self) -> dict[str, int | None]:
        """The facts that two towers must share to be merged, by name."""
        return {name: getattr(self, name) for name in ("width", "layers", "patch", "image_size", "mlp_width")}

    def to_metadata(self) -> dict[str, str]:
        """A safetensors metadata entry that `read_weights` recognises in a file of ours."""
        return {METADATA_KEY: json.dumps(dataclasses.asdict(self), sort_keys=True)}


@dataclass(frozen=True)
class Weights:
    """Tensors (float32, by open_clip's names inside the visual tower, in `named_parameters()` order) and manifest."""

    tensors: dict[str, Tensor] = field(repr=False)
    manifest: Manifest


@dataclass
class Facts:
    """What a container says about the tower it holds; `None` is "does not say"."""

    heads: int | None = None
    quick_gelu: bool | None = None
    image_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    revision: str | None = None
    notes: list[str] = field(default_factory=list)

    def manifest(
        self,
        architecture: dict[str, Any],
        *,
        source: str,
        format: str,
        sha256: str,
        dtype: str,
        dropped: tuple[str, ...],
    ) -> Manifest:
        """These facts and those of the tensors as a manifest."""
        return Manifest(
            **architecture,
            heads=self.heads,
            quick_gelu=self.quick_gelu,
            projection="absent" if architecture["embed_dim"] is None else "present",
            source=source,
            format=format,
            sha256=sha256,
            dtype=dtype,
            mean=self.mean,
            std=self.std,
            revision=self.revision,
            dropped=dropped,
            notes=tuple(self.notes),
        )

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> Facts:
        """The facts that a safetensors file of ours carries; empty for a stranger's."""
        if METADATA_KEY not in metadata:
            return cls()
        try:
            found = json.loads(metadata[METADATA_KEY])
            heads, quick_gelu, size = found["heads"], found["quick_gelu"], found["image_size"]
            mean, std = triple(found["mean"]), triple(found["std"])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"`{path}`: metadata entry {METADATA_KEY!r} cannot be read ({error!r}), although this program writes "
                "it; the file is damaged, so export or copy it again"
            ) from error
        return cls(heads=heads, quick_gelu=quick_gelu, image_size=size, mean=mean, std=std)


def triple(values: Any) -> tuple[float, float, float] | None:
    """Three floats (per-channel mean or std), or None where there is nothing of that form."""
    if not isinstance(values, list | tuple) or len(values) != 3:
        return None
    if not all(isinstance(value, int | float) for value in values):
        return None
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def sha256_of_files(paths: list[Path]) -> str:
    """SHA-256 of one file (as `sha256sum` prints it), or of the sorted "name digest" lines of several."""
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
