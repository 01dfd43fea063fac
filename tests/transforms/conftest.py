"""A small tower with the names of open_clip's, and experts of it that are random, full-rank and float64."""

from __future__ import annotations

import math

import pytest
import torch

import adaptive_merge as am
from adaptive_merge.merge.layout import Layout

torch.set_num_threads(1)
WIDTH, TASKS = 12, ("a", "b", "c")


def shapes(blocks: int = 2) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "text_projection": (5, 7),
        "positional_embedding": (5, WIDTH),
        "proj": (WIDTH, 9),
        "conv1.weight": (WIDTH, 3, 4, 4),
    }
    for block in range(blocks):
        inside = f"transformer.resblocks.{block}."
        found |= {
            f"{inside}ln_1.weight": (WIDTH,),
            f"{inside}attn.in_proj_weight": (3 * WIDTH, WIDTH),
            f"{inside}attn.out_proj.weight": (WIDTH, WIDTH),
            f"{inside}mlp.c_fc.weight": (4 * WIDTH, WIDTH),
            f"{inside}mlp.c_fc.bias": (4 * WIDTH,),
            f"{inside}mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
        }
    return found | {"ln_post.weight": (WIDTH,)}


def build(seed: int = 0, tasks: tuple[str, ...] = TASKS, blocks: int = 2) -> am.TaskVectors:
    """Experts that have a part in common, as real ones do."""
    layout = Layout(*map(tuple, zip(*shapes(blocks).items())))
    generator = torch.Generator().manual_seed(seed)
    size = sum(math.prod(shape) for shape in layout.shapes)
    base, common = torch.randn(2, size, generator=generator, dtype=torch.float64)
    vectors = torch.randn(len(tasks), size, generator=generator, dtype=torch.float64)
    return am.TaskVectors(tasks, layout, base, 0.1 * (vectors + 0.5 * common), {})


@pytest.fixture
def tower() -> am.TaskVectors:
    return build()
