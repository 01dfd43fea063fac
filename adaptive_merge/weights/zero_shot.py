"""Zero-shot heads: the text tower's embedding of every class name, averaged over prompt templates."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from adaptive_merge.errors import InputError
from adaptive_merge.sealed import load_sealed, save_sealed
from adaptive_merge.weights.heads import read_head

__all__ = ["head_fingerprint", "read_head", "zero_shot_head"]

Tokenizer = Callable[[list[str]], Tensor]

_LOG = logging.getLogger(__name__)
_SUFFIX: Final = "head.safetensors"
_PLACE: Final = "{}"
_VISUAL: Final = "visual."


def zero_shot_head(
    model: nn.Module,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    backbone: str = "",
    cache: str | Path | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Weight [C, d] of the head whose logits are s · cos(feature, class), with s = exp(logit_scale).

    w_c = s · m_c / ‖m_c‖,  m_c = mean over templates of e(template(c)) / ‖e(template(c))‖

    Args:
        model: an open_clip model (`encode_text`, `logit_scale`), on the device that is to compute.
        tokenizer: texts → token ids [texts, context].
        templates: with one `{}` each, the place of the class name.
        backbone: the model's name, a part of the cache's key.
        cache: folder that keeps heads by fingerprint; None computes it anew.
        batch_size: texts per forward pass.

    Returns:
        float32 on the CPU, without a gradient.
    """
    _check_texts(class_names, templates)
    place = None
    if cache is not None:
        place = Path(cache) / f"{head_fingerprint(model, class_names, templates, backbone)}.{_SUFFIX}"
        if place.is_file() and (cached := _cached(place)) is not None:
            return cached
    weight = _embed(model, tokenizer, class_names, templates, batch_size)
    if place is not None:
        texts = {"classes": json.dumps(list(class_names)), "templates": json.dumps(list(templates))}
        save_sealed(place, {"weight": weight}, {"backbone": backbone, **texts})
    return weight


def head_fingerprint(model: nn.Module, class_names: Sequence[str], templates: Sequence[str], backbone: str = "") -> str:
    """SHA-256 of all that a zero-shot head depends on: names, templates, backbone and the text tower's weights."""
    digest = hashlib.sha256(json.dumps([list(class_names), list(templates), backbone]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(_VISUAL):
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()


def _cached(place: Path) -> Tensor | None:
    """The head in the cache; None, with a warning, where the file is damaged, which a new one then replaces."""
    try:
        return load_sealed(place)[0]["weight"]
    except (InputError, KeyError) as error:
        _LOG.warning("a cached head is computed anew: %s", error)
        return None


@torch.no_grad()
def _embed(
    model: nn.Module, tokenizer: Tokenizer, class_names: Sequence[str], templates: Sequence[str], batch_size: int
) -> Tensor:
    device = next(model.parameters()).device
    texts = [template.replace(_PLACE, name) for name in class_names for template in templates]
    was_training = model.training
    model.eval()
    try:
        chunks = [
            nn.functional.normalize(model.encode_text(tokenizer(texts[i : i + batch_size]).to(device)).float(), dim=-1)
            for i in range(0, len(texts), batch_size)
        ]
    finally:
        model.train(was_training)
    per_class = torch.cat(chunks).view(len(class_names), len(templates), -1).mean(dim=1)
    weight = model.logit_scale.detach().float().exp() * nn.functional.normalize(per_class, dim=-1)
    if not bool(weight.isfinite().all()):
        raise InputError("the text tower gives NaN or infinite embeddings; its weights are damaged or diverged")
    return weight.cpu().contiguous()


def _check_texts(class_names: Sequence[str], templates: Sequence[str]) -> None:
    if isinstance(class_names, str) or not class_names:
        raise InputError("class_names: expected a list with at least one name, found none (or one bare string)")
    if isinstance(templates, str) or not templates:
        raise InputError("templates: expected a list with at least one template such as 'a photo of a {}.', found none")
    wrong = [template for template in templates if template.count(_PLACE) != 1]
    if wrong:
        raise InputError(f"template {wrong[0]!r}: expected one {{}} (the place of the class name) in it")
    if len(set(class_names)) != len(class_names):
        twice = next(name for name in class_names if list(class_names).count(name) > 1)
        raise InputError(f"class_names: {twice!r} is given twice; every class needs a name of its own")
