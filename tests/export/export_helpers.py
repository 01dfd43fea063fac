"""A small tower of the true architecture with three experts, as modules that have learned something."""

from __future__ import annotations

import torch
from conftest import perturbed
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn

import adaptive_merge as am

CLASSES = {"red": 3, "green/blue": 5, "grey": 4}


def build_tower(**settings) -> VisionTransformer:
    torch.manual_seed(0)
    options = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
    tower = VisionTransformer(**options | {"output_dim": 24, "act_layer": QuickGELU} | settings).eval()
    tower.image_mean, tower.image_std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    return tower


def build_module(tower=None, seed=0, heads=None, **parts) -> am.AdaptiveMerge:
    tower = tower or build_tower()
    experts = {task: perturbed(tower.state_dict(), seed + row, 0.05) for row, task in enumerate(CLASSES)}
    bank = am.TaskVectors.from_state_dicts(tower.state_dict(), experts)
    generator = torch.Generator().manual_seed(3)
    zero_shot = {
        task: 100 * nn.functional.normalize(torch.randn(classes, 24, generator=generator), dim=-1)
        for task, classes in CLASSES.items()
    }
    settings = {"recipe": "test", "coefficients": am.LayerWise(0.3)} | parts
    module = am.AdaptiveMerge(bank, tower, zero_shot | (heads or {}), **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module.eval()
