"""Names of parameter groups that one can read on an axis."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["depth", "readable"]

# The first numbered part of a name: container, number and the rest.
_NUMBERED = re.compile(r"^(.*?)\.(\d+)(?:\.(.*))?$")
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
    return [_shorten(name, found) for name, found in zip(names, _blocks(names))]


def depth(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Group names → labels of the stages of the network from front to back, and the stage of each group.

    The stages are `stem`, the blocks by number, and `end`: what follows the blocks, or is called as such parts are.
    """
    blocks = _blocks(names)
    last = max((index for index, found in enumerate(blocks) if found), default=len(names))
    stages = [
        str(int(found[2])) if found else "end" if index > last or _END.search(name) else "stem"
        for index, (name, found) in enumerate(zip(names, blocks))
    ]
    numbers = sorted({int(found[2]) for found in blocks if found})
    labels = [label for label in ("stem", *map(str, numbers), "end") if label in stages]
    return labels, [labels.index(stage) for stage in stages]


def _blocks(names: Sequence[str]) -> list[re.Match[str] | None]:
    """The match of each name that lies in the container with the most names: the repeated blocks."""
    found = [_NUMBERED.match(name) for name in names]
    containers = Counter(match[1] for match in found if match)
    if not containers:
        return [None] * len(names)
    home = containers.most_common(1)[0][0]
    return [match if match and match[1] == home else None for match in found]


def _shorten(name: str, block: re.Match[str] | None) -> str:
    text = name if block is None else block[3] or ""
    for pattern, words in _WORDS:
        text = re.sub(pattern, words, text)
    if block is None:
        return text or name
    return f"{block[2]} · {text}" if text else f"block {block[2]}"
