"""Names of parameter groups that one can read on an axis."""

from __future__ import annotations

import re
from collections.abc import Sequence

from adaptive_merge.merge.blocks import in_depth, numbers, repeated

__all__ = ["depth", "readable"]

# Order of names says little where they are sorted: these parts come after the blocks.
_END = re.compile(r"(^|\.)(ln_post|post_layernorm|final_\w*norm|norm|proj|visual_projection|head|fc)(\.\w+)?$")
_WORDS = (
    (r"^((visual|vision_model|model|module|backbone|encoder|trunk|transformer|embeddings)\.)+", ""),
    (r"\b(self_)?(attn|attention)\.in_proj_", "qkv."),
    (r"\b(self_)?(attn|attention)\.out_proj\b", "attn out"),
    (r"\b(self_)?(attn|attention)\.([qkv])_proj\b", r"attn \3"),
    (r"\b(self_)?(attn|attention)\.", "attn "),
    (r"\bmlp\.(c_fc|fc1)\b", "mlp up"),
    (r"\bmlp\.(c_proj|fc2)\b", "mlp down"),
    (r"\b(ln|layer_norm|norm|layernorm)_?(\d)\b", r"norm \2"),
    (r"\b(ln_pre|pre_layrnorm)\b", "norm pre"),
    (r"\b(ln_post|post_layernorm)\b", "norm post"),
    (r"\bpositional_embedding\b", "position"),
    (r"\bclass_embedding\b", "class token"),
    (r"[. ]?\bweight$", ""),
    (r"[.]bias$", " bias"),
)


def readable(names: Sequence[str]) -> list[str]:
    """`transformer.resblocks.3.attn.in_proj_weight` → `3 · qkv`; unknown patterns stay as they are."""
    blocks = repeated(names)
    labels = _labels(blocks)
    return [_shorten(name, block, labels.get(block)) for name, block in zip(names, blocks)]


def depth(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Group names → labels of the stages of the network from front to back, and the stage of each group.

    The stages are `stem`, the blocks by number, and `end`: what follows the blocks, or is called as such parts are.
    """
    blocks = repeated(names)
    numbered = _labels(blocks)
    last = max((index for index, block in enumerate(blocks) if block), default=len(names))
    stages = [
        numbered[block] if block else "end" if index > last or _END.search(name) else "stem"
        for index, (name, block) in enumerate(zip(names, blocks))
    ]
    labels = [label for label in ("stem", *numbered.values(), "end") if label in stages]
    return labels, [labels.index(stage) for stage in stages]


def _labels(blocks: Sequence[str | None]) -> dict[str | None, str]:
    """Block → its numbers, without those that all blocks have in common; front to back."""
    ordered = in_depth(blocks)
    places = list(zip(*map(numbers, ordered)))
    differing = [place for place, values in enumerate(places) if len(set(values)) > 1] or [len(places) - 1]
    return {block: ".".join(str(numbers(block)[place]) for place in differing) for block in ordered}


def _shorten(name: str, block: str | None, label: str | None) -> str:
    text = name if block is None else name[len(block) + 1 :]
    for pattern, words in _WORDS:
        text = re.sub(pattern, words, text)
    if block is None:
        return text or name
    return f"{label} · {text}" if text else f"block {label}"
