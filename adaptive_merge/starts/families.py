"""What is known of towers: one small description a family, and hooks for all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_merge.starts.sites import Site, Weights
from adaptive_merge.starts.tower import Activation, Attention, Block, Chain, Hooked, Linear, Norm, Pool, Step, Taken

__all__ = ["describe"]

# Relative; two implementations of attention differ by less in float32 and in bfloat16.
SAME = 2e-2


@dataclass(frozen=True)
class _Names:
    """Names inside a pre-norm transformer block; of fused queries, keys and values there is one name, else three."""

    norms: tuple[str, str]
    qkv: tuple[str, ...]
    out: str
    fc: str
    act: str
    proj: str
    scales: tuple[str, str] = ("", "")
    parameter: str = "."  # between the name of `qkv` and `weight`


@dataclass(frozen=True)
class _Family:
    """Where the parts of a vision transformer are, as attribute paths from its root."""

    blocks: str
    norm: str
    names: _Names
    heads: str
    projection: str | None = None


_OPEN_CLIP = _Family(
    "transformer.resblocks",
    "ln_post",
    _Names(
        ("ln_1", "ln_2"), ("attn.in_proj",), "attn.out_proj", "mlp.c_fc", "mlp.gelu", "mlp.c_proj",
        ("ls_1", "ls_2"), "_",
    ),
    "attn.num_heads",
    "proj",
)  # fmt: skip
_HUGGING_FACE = _Family(
    "encoder.layers",
    "post_layernorm",
    _Names(
        ("layer_norm1", "layer_norm2"), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.out_proj", "mlp.fc1", "mlp.activation_fn", "mlp.fc2",
    ),
    "self_attn.num_heads",
)  # fmt: skip
_TIMM = _Family(
    "blocks",
    "norm",
    _Names(("norm1", "norm2"), ("attn.qkv",), "attn.proj", "mlp.fc1", "mlp.act", "mlp.fc2", ("ls1", "ls2")),
    "attn.num_heads",
)
_FAMILIES = (_OPEN_CLIP, _HUGGING_FACE, _TIMM)


def describe(backbone: nn.Module, images: Tensor, weights: Weights) -> tuple[Block, ...]:
    """The backbone's blocks in forward order.

    A vision transformer of open_clip, Hugging Face CLIP or timm, alone or inside a wrapper, is a stem, its
    transformer blocks and its tail. Any other module is one block for each of its layers.

    Args:
        backbone: its structure; see `without_weights`.
        images: a batch, of which the order of execution is taken where it is not known.
        weights: any weights and buffers of the backbone, to make sure that a tower does what its names promise.
    """
    for family in _FAMILIES:
        for prefix, module in backbone.named_modules():
            if _fits(family, module):
                blocks = _transformer(family, backbone, module, f"{prefix}." if prefix else "")
                if _faithful(family, backbone, module, blocks, images[:2], weights):
                    return blocks
    return _hooked(backbone, images)


def _faithful(
    family: _Family, backbone: nn.Module, tower: nn.Module, blocks: Sequence[Block], images: Tensor, weights: Weights
) -> bool:
    """Whether the walk's stream after the last transformer block is the tower's own.

    Blocks may have the same names in another order, such as timm's that normalise after the attention.
    """
    outputs: list[Tensor] = []
    last = list(_get(tower, family.blocks))[-1]
    handle = last.register_forward_hook(lambda *call: outputs.append(call[-1]))
    try:
        torch.func.functional_call(backbone, dict(weights), (images,))
    finally:
        handle.remove()
    state = images
    for block in blocks[:-1]:
        state = block.advance(weights, state)
    own = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
    return own.shape == state.shape and bool((own - state).norm() <= SAME * own.norm())


def _get(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _fits(family: _Family, tower: nn.Module) -> bool:
    """Whether the tower is of this family and has no part that the description does not know."""
    blocks, norm = _get(tower, family.blocks), _get(tower, family.norm)
    if not isinstance(norm, nn.LayerNorm) or not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
        return False
    names = family.names
    known: set[str] = set()
    for path in (*names.norms, names.out, names.fc, names.proj, *names.qkv, *filter(None, names.scales)):
        known.update((path, f"{path}.weight", f"{path}.bias", f"{path}.gamma", f"{path}_weight", f"{path}_bias"))
    complete = all(_get(block, path) is not None for block in blocks for path in (names.fc, names.proj, names.act))
    plain = all(name in known for block in blocks for name, _ in block.named_parameters())
    return complete and plain and _plain_tail(tower)


def _plain_tail(tower: nn.Module) -> bool:
    """Class token or mean of the patches, then linear; no pooling that learns."""
    pool = getattr(tower, "global_pool", None) or getattr(tower, "pool_type", None) or "tok"
    learned = getattr(tower, "attn_pool", None) is not None
    late = getattr(tower, "final_ln_after_pool", False) or isinstance(getattr(tower, "fc_norm", None), nn.LayerNorm)
    return pool in ("tok", "token", "avg") and not learned and not late


def _transformer(family: _Family, backbone: nn.Module, tower: nn.Module, prefix: str) -> tuple[Block, ...]:
    pool = getattr(tower, "global_pool", None) or getattr(tower, "pool_type", None) or "tok"
    mean, container = pool == "avg", _get(tower, family.blocks)
    blocks = [
        _block(family, block, f"{prefix}{family.blocks}.{index}.", index == len(container) - 1 and not mean)
        for index, block in enumerate(container)
    ]
    tail = _tail(family, backbone, tower, prefix, mean)
    taken = {name for block in (*blocks, tail) for name in block.parameters}
    rest = [name for name, _ in backbone.named_parameters() if name not in taken]
    first = f"{prefix}{family.blocks}.0"
    return (Hooked(backbone, _stem_sites(backbone, rest), rest, until=first), *blocks, tail)


def _block(family: _Family, block: nn.Module, prefix: str, last: bool) -> Chain:
    names = family.names
    scales = [_scale(block, path, prefix) for path in names.scales]
    steps: list[Step] = [
        _norm(block, names.norms[0], prefix),
        _qkv(block, names, prefix, last),
        Attention(_get(block, family.heads)),
        Linear((_linear(block, names.out, prefix, class_only=last, stream=True),), scales[0]),
        _norm(block, names.norms[1], prefix, class_only=last),
        Linear((_linear(block, names.fc, prefix, class_only=last),)),
        Activation(_get(block, names.act)),
        Linear((_linear(block, names.proj, prefix, class_only=last, stream=True),), scales[1]),
    ]
    return Chain(steps)


def _scale(block: nn.Module, path: str, prefix: str) -> str | None:
    gamma = path and getattr(_get(block, path), "gamma", None)
    return f"{prefix}{path}.gamma" if isinstance(gamma, Tensor) else None


def _norm(module: nn.Module, path: str, prefix: str, class_only: bool = False) -> Norm:
    name = prefix + path
    site = Site(name, (f"{name}.weight",), (f"{name}.bias",), "norm", class_only=class_only)
    return Norm(site, _get(module, path).eps)


def _linear(module: nn.Module, path: str, prefix: str, class_only: bool = False, stream: bool = False) -> Site:
    name = prefix + path
    biases = (f"{name}.bias",) if _get(module, path).bias is not None else ()
    return Site(name, (f"{name}.weight",), biases, class_only=class_only, stream=stream)


def _qkv(block: nn.Module, names: _Names, prefix: str, last: bool) -> Linear:
    """One site; in the last block two, since queries are asked by the class token and keys and values by all."""
    weights = tuple(f"{prefix}{path}{names.parameter}weight" for path in names.qkv)
    biases = tuple(f"{prefix}{path}{names.parameter}bias" for path in names.qkv)
    biases = biases if _get(block, f"{names.qkv[0]}{names.parameter}bias") is not None else ()
    name = f"{prefix}qkv"
    if not last:
        return Linear((Site(name, weights, biases),))
    if len(weights) == 3:
        query = Site(f"{prefix}q", weights[:1], biases[:1], class_only=True)
        return Linear((query, Site(f"{prefix}kv", weights[1:], biases[1:])))
    rows = _get(block, f"{names.qkv[0]}{names.parameter}weight").shape[0]
    query = Site(f"{prefix}q", weights, biases, rows=(0, rows // 3), class_only=True)
    return Linear((query, Site(f"{prefix}kv", weights, biases, rows=(rows // 3, rows))))


def _tail(family: _Family, backbone: nn.Module, tower: nn.Module, prefix: str, mean: bool) -> Chain:
    """Norm and pooling (the order of which does not matter to a class token), and the linear map to the features."""
    norm = _norm(tower, family.norm, prefix)
    pool = Pool(getattr(tower, "num_prefix_tokens", 1), mean)
    steps: list[Step] = [norm, Taken(), pool] if mean else [pool, norm]
    projection = family.projection and getattr(tower, family.projection, None)
    if isinstance(projection, Tensor):
        steps.append(
            Linear((Site(f"{prefix}{family.projection}", (f"{prefix}{family.projection}",), transposed=True),))
        )
    else:
        steps += [Linear((site,)) for site in _output_map(backbone, tower, prefix)]
    return Chain(steps)


def _output_map(backbone: nn.Module, tower: nn.Module, prefix: str) -> list[Site]:
    """timm's head, or Hugging Face's projection, which is its tower's sibling."""
    above = prefix[:-1].rpartition(".")[0]
    sibling = f"{above}.visual_projection".lstrip(".")
    for path in (f"{prefix}head", sibling):
        if isinstance(_get(backbone, path), nn.Linear):
            return [_linear(backbone, path, "")]
    return []


def _stem_sites(backbone: nn.Module, names: Sequence[str]) -> list[Site]:
    """Convolutions before the transformer, in order of definition, which in stems is that of execution."""
    return [
        _conv(name, module)
        for name, module in backbone.named_modules()
        if f"{name}.weight" in names and _is_plain_conv(module)
    ]


def _is_plain_conv(module: nn.Module) -> bool:
    plain = isinstance(module, nn.Conv2d) and module.groups == 1
    return plain and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _conv(name: str, module: Any) -> Site:
    biases = (f"{name}.bias",) if module.bias is not None else ()
    patches = nn.Unfold(module.kernel_size, module.dilation, module.padding, module.stride)
    return Site(name, (f"{name}.weight",), biases, "conv", patches=patches)


def _hooked(backbone: nn.Module, images: Tensor) -> tuple[Block, ...]:
    """One block a layer, in order of execution; a layer that runs twice in a forward stays at the anchor."""
    calls: list[str] = []
    names = {name for name, module in backbone.named_modules() if _site(name, module)}
    handles = [
        backbone.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name)) for name in names
    ]
    try:
        backbone(images.to("meta"))
    finally:
        for handle in handles:
            handle.remove()
    parameters = [name for name, _ in backbone.named_parameters()]
    sites = [_site(name, backbone.get_submodule(name)) for name in calls if calls.count(name) == 1]
    return tuple(Hooked(backbone, [site], parameters) for site in sites if site)


def _site(name: str, module: nn.Module) -> Site | None:
    bias = (f"{name}.bias",) if getattr(module, "bias", None) is not None else ()
    if isinstance(module, nn.Linear):
        return Site(name, (f"{name}.weight",), bias)
    if _is_plain_conv(module):
        return _conv(name, module)
    if isinstance(module, nn.LayerNorm) and module.elementwise_affine and bias and len(module.normalized_shape) == 1:
        return Site(name, (f"{name}.weight",), bias, "norm")
    if (
        isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm))
        and module.running_mean is not None
    ):
        return Site(name, (f"{name}.running_mean",), (f"{name}.running_var",), "statistics")
    return None
