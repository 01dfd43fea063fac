"""What a user may have in a file: a router on the MLPs (as in WEMoE, arXiv 2402.00433), and a head of several units."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import adaptive_merge as am


class Router(am.Adapter):
    """Adds Σ rₜ(x) τₜ to each block's MLP; a two-layer router makes r of the image's mean token.

    Args:
        hidden: width of the router.
    """

    needs_task = False

    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.hidden = hidden

    def create(self, backbone, heads) -> None:
        width = backbone.block_width()
        self.down = nn.ModuleList(nn.Linear(width, self.hidden) for _ in backbone.blocks)
        self.up = nn.ModuleList(nn.Linear(self.hidden, len(self.tasks)) for _ in backbone.blocks)
        for layer in self.up:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def sites(self, backbone, weights):
        return {
            f"{block}.mlp": partial(self.mlp, index, f"{block}.mlp", backbone.task_vectors, weights)
            for index, block in enumerate(backbone.blocks)
        }

    def mlp(self, index, name, bank, weights, task, tokens, output):
        assert task is None
        gates = self.up[index](self.down[index](tokens.mean(1)).relu())

        def mixed(parameter):
            vectors = bank.of(f"{name}.{parameter}").to(gates)
            return weights[f"{name}.{parameter}"] + torch.einsum("bt,t...->b...", gates, vectors)

        hidden = F.gelu(tokens @ mixed("c_fc.weight").mT + mixed("c_fc.bias")[:, None])
        return hidden @ mixed("c_proj.weight").mT + mixed("c_proj.bias")[:, None]


class Halves(am.Head):
    """A class for each half of the features: two units an image.

    Args:
        weight: [C, d / 2].
    """

    def __init__(self, weight) -> None:
        super().__init__(len(weight), 2 * weight.shape[1])
        self.weight = nn.Parameter(weight)

    def logits(self, features):
        return features.reshape(-1, self.weight.shape[1]) @ self.weight.T
