"""Small towers with experts, and images for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.starts.base import Problem

TASKS = ("red", "green", "blue")
FEATURES = 6


def small_vit(layers: int = 2) -> VisionTransformer:
    """open_clip's tower of width 16 with five tokens: images [B, 3, 8, 8] → features [B, 6]."""
    torch.manual_seed(0)
    tower = VisionTransformer(8, 4, 16, layers, 2, 2.0, output_dim=FEATURES).eval()
    for parameter in tower.parameters():
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return tower


def bank_of(backbone: nn.Module, tasks: tuple[str, ...] = TASKS, scale: float = 0.1) -> TaskVectors:
    """Experts that are the backbone's weights, moved at random; a task is moved the same way in every bank."""
    base = {name: value.detach() for name, value in backbone.named_parameters()}
    experts = {}
    for task in tasks:
        generator = torch.Generator().manual_seed(sum(map(ord, task)))
        experts[task] = {name: v + scale * torch.randn(v.shape, generator=generator) for name, v in base.items()}
    return TaskVectors.from_state_dicts(base, experts)


def images_of(tasks: tuple[str, ...] = TASKS, count: int = 48) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {task: torch.randn(count, 3, 8, 8, generator=generator) + index for index, task in enumerate(tasks)}


def heads_of(tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {task: 8 * nn.functional.normalize(torch.randn(4, FEATURES, generator=generator), dim=-1) for task in tasks}


@pytest.fixture
def vit() -> VisionTransformer:
    return small_vit()


@pytest.fixture
def make_problem(vit) -> Callable[..., Problem]:
    """A problem of the small tower; keyword arguments replace its parts."""

    def make(batch: int = 16, **parts) -> Problem:
        backbone = parts.pop("backbone", vit)
        bank = parts.pop("experts", None) or bank_of(backbone)
        images = parts.pop("images", None) or images_of(bank.tasks)
        anchor = parts.pop("anchor", bank.pretrained + 0.3 * bank.vectors.sum(0))
        batches = {task: pixels.split(batch) for task, pixels in images.items()}
        return Problem(backbone, bank, anchor, batches, parts.pop("heads", heads_of(bank.tasks)), **parts)

    return make
