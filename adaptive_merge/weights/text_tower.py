"""The text side of a CLIP checkpoint: what zero-shot heads and complete open_clip folders need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from open_clip import SimpleTokenizer
from open_clip.model import CLIP
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.limits import LAYERS, LimitError, read_json
from adaptive_merge.weights.files import open_entries
from adaptive_merge.weights.manifest import whole
from adaptive_merge.weights.open_clip import OpenClip
from adaptive_merge.weights.open_clip_names import BLOCK, tower_prefix, unwrapped
from adaptive_merge.weights.reader import Loader
from adaptive_merge.weights.sources import locate, reader_of

__all__ = ["TextTower", "read_text_tower"]

# Only the text side of the model below is used; open_clip's class wants an image tower all the same.
_NO_IMAGES: Final = {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32, "head_width": 64}
_HEAD_WIDTH: Final = 64


@dataclass(frozen=True)
class TextTower:
    """open_clip's `text_cfg`, and the tensors by the names that they have in an open_clip `CLIP`."""

    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)
    embed_dim: int

    def build(self, quick_gelu: bool) -> tuple[CLIP, Callable[[list[str]], Tensor]]:
        """A model with this tower's `encode_text` and `logit_scale` (its image tower is a dummy), and a tokenizer."""
        model = CLIP(self.embed_dim, dict(_NO_IMAGES), dict(self.config), quick_gelu=quick_gelu)
        unexpected = model.load_state_dict(self.tensors, strict=False).unexpected_keys
        if unexpected:
            raise InputError(f"tensor `{unexpected[0]}` has no place in open_clip's text tower; give a plain CLIP")
        return model.eval(), SimpleTokenizer(context_length=self.config["context_length"])


def read_text_tower(source: str) -> TextTower:
    """The text tower in a full CLIP checkpoint: an open_clip folder or file, or OpenAI's state dict.

    Raises:
        MissingFileError, InputError: nothing there, or no complete text tower under open_clip's names.
    """
    path, _ = locate(source)
    reader = reader_of(path)
    loaders: dict[str, Loader] = {}
    for file in reader.files(path):
        loaders |= open_entries(file)[0]
    tensors = _select(unwrapped(loaders, source), source)
    config = _config(tensors, source)
    if isinstance(reader, OpenClip):
        folder = path if path.is_dir() else path.parent
        stated = _stated(folder / reader.config)
        # The tensors tell all sizes but the number of heads.
        config["heads"] = whole(stated, "heads", folder / reader.config) or config["heads"]
        if config["width"] % config["heads"]:
            raise InputError(f"`{folder / reader.config}`: text_cfg: heads {config['heads']} do not divide the width")
    tensors = {name: value for name, value in tensors.items() if name in _names(config["layers"])}
    missing = [name for name in _names(config["layers"]) if name not in tensors]
    if missing:
        raise InputError(f"`{source}`: tensor `{missing[0]}` of the text tower: expected, found none; {_REMEDY}")
    return TextTower(config, tensors, int(tensors["text_projection"].shape[1]))


def _stated(path: Path) -> dict[str, Any]:
    model = read_json(path).get("model_cfg")
    stated = model.get("text_cfg") if isinstance(model, dict) else None
    return stated if isinstance(stated, dict) else {}


def _select(loaders: Mapping[str, Loader], source: str) -> dict[str, Tensor]:
    """What lies beside the embedding of the tokens, wherever the tower is, and the scale, which may be further out."""
    prefix = tower_prefix(loaders, "token_embedding.weight", source, "text") or ""
    names = {name: name.removeprefix(prefix) for name in loaders if name.startswith(prefix)}
    scale = f"{prefix.removesuffix('text.')}logit_scale"
    names |= {scale: "logit_scale"} if scale in loaders else {}
    return {inner: loaders[name]().float() for name, inner in names.items() if not inner.startswith("visual.")}


_REMEDY: Final = (
    "zero-shot heads and complete open_clip folders need the text tower, so give a full open_clip CLIP (not only its "
    "image tower; Hugging Face's text names are not read)"
)
_SINGLE: Final = (
    *("positional_embedding", "text_projection", "logit_scale", "token_embedding.weight"),
    *("ln_final.weight", "ln_final.bias"),
)


def _names(layers: int) -> list[str]:
    return [*_SINGLE, *(f"transformer.resblocks.{index}.{name}" for index in range(layers) for name in BLOCK)]


def _config(tensors: dict[str, Tensor], source: str) -> dict[str, Any]:
    for name, rank in (("token_embedding.weight", 2), ("positional_embedding", 2), ("text_projection", 2)):
        if name not in tensors or tensors[name].dim() != rank:
            raise InputError(f"`{source}`: tensor `{name}` of the text tower: expected a matrix, found none; {_REMEDY}")
    vocabulary, width = tensors["token_embedding.weight"].shape
    blocks = {name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")}
    if len(blocks) > LAYERS:
        raise LimitError(f"`{source}`: refused, a text tower of {len(blocks)} blocks, expected at most {LAYERS}")
    return {
        "context_length": int(tensors["positional_embedding"].shape[0]),
        "vocab_size": int(vocabulary),
        "width": int(width),
        "heads": max(int(width) // _HEAD_WIDTH, 1),
        "layers": len(blocks),
    }
