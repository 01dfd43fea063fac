"""Do a pre-trained tower and an expert belong together? Asked before any task vector is formed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final, Literal

import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.weights.manifest import Manifest, Weights
from adaptive_merge.weights.reader import check_finite, check_shapes

__all__ = ["check_agreement"]

_REMEDY: Final = (
    "give the pre-trained model that this expert was fine-tuned from, or correct a wrong statement with "
    "`read_weights(..., quick_gelu=...)`: with another activation all tensors would fit and only the accuracy fall"
)


def check_agreement(
    pretrained: Weights,
    expert: Weights,
    *,
    name: str,
    projection: Literal["auto", "pretrained"] = "auto",
) -> Weights:
    """The expert with exactly the pre-trained tower's tensors, or an error that says what keeps them apart.

    Args:
        name: the task, for messages.
        projection: where the expert has no `proj`: `"auto"` takes the pre-trained one (τ = 0) only for Hugging
            Face models, whose fine-tuning leaves it alone; `"pretrained"` says that this holds for any other file.

    Raises:
        InputError: QuickGELU differs or is unknown; another architecture; tensors of the expert missing, extra or
            transposed; NaN or infinity; a projection that was lost.
    """
    base, source = pretrained.manifest, f"{expert.manifest.source} (task {name!r})"
    _check_stated(base)
    _check_stated(expert.manifest)
    dataclasses.replace(expert.manifest, source=source).filled(base, _REMEDY)
    expected = {key: tuple(tensor.shape) for key, tensor in pretrained.tensors.items()}
    tensors, notes = _with_projection(pretrained, expert, source, projection)
    check_shapes(tensors, expected, source)
    check_finite(tensors, source)
    state = _projection_state(pretrained, expert)
    embed_dim = tensors["proj"].shape[1] if "proj" in tensors else None
    notes = (*expert.manifest.notes, *notes, *_normalisation(base, expert.manifest))
    manifest = dataclasses.replace(expert.manifest, projection=state, embed_dim=embed_dim, notes=notes)
    return Weights({key: tensors[key] for key in expected}, manifest, expert.changes)


def _with_projection(
    pretrained: Weights, expert: Weights, source: str, projection: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The expert's tensors, with the pre-trained `proj` where they may go without one, and what was done."""
    base = pretrained.manifest
    if "proj" in expert.tensors and "proj" not in pretrained.tensors:
        raise InputError(
            f"`{base.source}`: tensor `proj`: expected, because `{source}` has one, found none; "
            "give a pre-trained model with its projection (CLIPVisionModelWithProjection, CLIPModel or open_clip)"
        )
    if "proj" in expert.tensors or "proj" not in pretrained.tensors:
        return expert.tensors, []
    if expert.manifest.format != "huggingface" and projection != "pretrained":
        raise InputError(
            f"`{source}`: tensor `proj`: expected shape "
            f"{tuple(pretrained.tensors['proj'].shape)}, found none; its fine-tuned projection is lost unless it was "
            'frozen. If it was, say `projection="pretrained"`; otherwise get the original checkpoint'
        )
    note = "projection taken from the pre-trained model, its task vector is zero"
    return {**expert.tensors, "proj": pretrained.tensors["proj"]}, [note]


def _check_stated(manifest: Manifest) -> None:
    if manifest.quick_gelu is None:
        raise InputError(
            f"`{manifest.source}`: the file does not say whether its activation is QuickGELU; state it, "
            "`read_weights(..., quick_gelu=True)` for OpenAI's CLIP and everything fine-tuned from it, False for "
            "towers trained with plain GELU (most of LAION's)"
        )


def _normalisation(base: Manifest, expert: Manifest) -> list[str]:
    """Images are normalised for the pre-trained tower; an expert that states another mean was not tuned so."""
    stated = [(name, getattr(expert, name), getattr(base, name)) for name in ("mean", "std")]
    defaults = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    return [
        f"it states the {name} {_short(own)} of its images; they are normalised with the pre-trained model's "
        f"{_short(other or defaults[name])}"
        for name, own, other in stated
        if own is not None and not _close(own, other or defaults[name])
    ]


def _short(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def _close(values: Sequence[float], others: Sequence[float]) -> bool:
    return all(abs(one - other) < 1e-3 for one, other in zip(values, others))


def _projection_state(pretrained: Weights, expert: Weights) -> Literal["present", "absent", "trained", "pretrained"]:
    if "proj" not in pretrained.tensors:
        return "absent"
    if "proj" not in expert.tensors:
        return "pretrained"
    base, own = pretrained.tensors["proj"], expert.tensors["proj"]
    same = base.is_meta or own.is_meta or torch.equal(base, own)  # headers alone cannot tell
    return "present" if same else "trained"
